/* Descriptors are made, closed and shut down under one lock, never read or written: so no thread shuts down a number that is another
 * file's by now, and a child finds none half made. */
#ifndef DESCRIPTORS_H
#define DESCRIPTORS_H

#include <stdbool.h>

void descriptors_lock(void);
void descriptors_unlock(void);

/* In a child; the lock was held over the fork. */
void descriptors_child(void);

/* Between the two nobody makes one: connection_open is refused with ECANCELED. */
void descriptors_stop(void);
void descriptors_start(void);

/* With the lock held. */
bool descriptors_stopped(void);

/* A descriptor of 0-2 in a daemon that closed its standard streams would receive what it prints: returns the same file elsewhere. */
int above_standard(int fd);

#endif
