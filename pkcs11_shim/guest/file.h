/* A file that is replaced whole or not at all. */
#ifndef FILE_H
#define FILE_H

#include <stdbool.h>
#include <stddef.h>

bool file_exists(const char *path);
bool file_holds(const char *path, const char *text, size_t length);

/* Writes beside `path`, syncs, renames; a link's target is replaced, not the link.  The file keeps its mode, and its owner where this
 * process may give it; a new one has mode 0644.  False with errno: the old file is untouched. */
bool file_replace(const char *path, const char *text, size_t length);

#endif
