/* This process as one PKCS#11 application: its state and its pool of connections, one for each call that is in flight. */
#ifndef APPLICATION_H
#define APPLICATION_H

#include "connection.h"

/* threads: whether this library may make some (CKF_LIBRARY_CANT_CREATE_OS_THREADS). */
CK_RV application_initialize(bool threads);
CK_RV application_finalize(void);

/* CKR_OK when the library is initialised in this process. */
CK_RV application_check(void);

/* Which slots the configuration shows. */
const struct slots *application_slots(void);

/* A connection for one call; waits while as many calls are in flight as the module takes.  It may have to be attached yet. */
CK_RV application_take(struct connection **c);
void application_give(struct connection *c);

/* A connection of its own for a call that may wait: `*timeout_ms`, 0 = for ever.  Where there are few, the call waits for one meanwhile,
 * and the time is less then; CKR_FUNCTION_CANCELED when it was over before. */
CK_RV application_take_apart(struct connection **c, CK_ULONG *timeout_ms);
void application_drop(struct connection *c);

/* Makes `c` a part of this application.  Tries for as long as the configuration says, once when the module has never been there. */
CK_RV application_attach(struct connection *c);

/* The module takes no more connections: drops `c` and waits for another, which then holds its message.  False when there is no other. */
bool application_exchange(struct connection **c);

/* Waits, for less when C_Finalize is called; false then. */
bool application_pause(unsigned ms);

#endif
