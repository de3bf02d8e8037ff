/* This process as one PKCS#11 application: its state, its connections, and what survives a lost one. */
#ifndef APPLICATION_H
#define APPLICATION_H

#include "connection.h"

CK_RV application_initialize(void);
CK_RV application_finalize(void);

/* One call on the module.  Use:
 *     struct call call;
 *     CK_RV rv = call_begin(&call, CALL_...);
 *     if (rv == CKR_OK) { put_...(call.out, ...); rv = call_run(&call, REPLAY); if (rv == CKR_OK) get_...(&call.reply); }
 *     return call_end(&call, rv);
 */
struct call {
    struct connection *connection;
    struct writer *out;
    struct reader reply;
    uint32_t id;
};

enum replay {
    ONCE_ONLY,   /* after a lost connection it is not known whether it was done: CKR_DEVICE_ERROR */
    REPLAY,      /* idempotent: sent again on the next connection */
};

CK_RV call_begin(struct call *call, uint32_t id);
CK_RV call_run(struct call *call, enum replay replay);
/* Gives the connection back; a reply that did not parse is CKR_DEVICE_ERROR. */
CK_RV call_end(struct call *call, CK_RV rv);

/* A call that may wait for ever, on a connection of its own that C_Finalize ends.
 * timeout_ms 0 = no limit.  `fields` puts the request's fields, `take` reads the reply's. */
CK_RV call_parked(uint32_t id, CK_ULONG field, CK_ULONG timeout_ms, CK_ULONG *result);

/* CKR_OK when the library is initialised in this process. */
CK_RV application_check(void);
bool application_connected(void);

#endif
