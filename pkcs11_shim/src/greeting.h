/* What this process is to the module: the ticket of its application there, and how a connection becomes a part of it. */
#ifndef GREETING_H
#define GREETING_H

#include "connection.h"

/* Greets on a connection that is open: joins this process's application on the module, or begins one, in a child with its parent's view,
 * after a lost one with its sessions.  c->incarnation then says to what it belongs.  Returns what the module answered, CKR_DEVICE_ERROR
 * when it did not. */
CK_RV greet(struct connection *c);

/* How many applications on the module this process has been, one after the other; 0 = none yet. */
unsigned incarnation(void);

/* The view that a search was answered from: a new application begins with it. */
void saw_watermark(uint64_t watermark);

/* How many connections the module lets an application have. */
unsigned most_connections(void);

/* The largest message of a request that the module takes; what every one takes before it was asked. */
#define LEAST_REQUEST (1u << 20)
uint32_t largest_request(void);

void forget_ticket(void);

void greeting_lock(void);
void greeting_unlock(void);
void greeting_child(void);

#endif
