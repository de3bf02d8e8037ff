/* One call on the module.  Use:
 *     struct call call;
 *     CK_RV rv = call_begin(&call, CALL_...);
 *     if (rv == CKR_OK) { put_...(call.out, ...); rv = call_run(&call, REPLAY); if (rv == CKR_OK) get_...(&call.reply); }
 *     return call_end(&call, rv);
 */
#ifndef CALL_H
#define CALL_H

#include "application.h"
#include "calls.h"

struct call {
    struct connection *connection;
    struct writer *out;
    struct reader reply;
    uint32_t id;
    /* What the caller may set between call_begin and call_run: */
    unsigned bound;            /* the incarnation in which the session's operation was begun; in another the call fails.  0 = any */
    CK_SESSION_HANDLE session; /* with `cancel`, CKF_...: an operation that the call begins, and that a replay must find not begun */
    CK_FLAGS cancel;
    /* What call_run says: */
    unsigned incarnation; /* of the application that answered */
    bool unknown;         /* no answer came: the module may have done it or not */
};

enum replay {
    ONCE_ONLY, /* after a lost connection it is not known whether it was done: CKR_DEVICE_ERROR */
    REPLAY,    /* idempotent: sent again on the next connection */
};

CK_RV call_begin(struct call *call, uint32_t id);
CK_RV call_run(struct call *call, enum replay replay);

/* Gives the connection back; a reply that did not parse is CKR_DEVICE_ERROR. */
CK_RV call_end(struct call *call, CK_RV rv);

/* The same after secrets: what was sent and received is overwritten. */
CK_RV call_end_wiped(struct call *call, CK_RV rv);

/* Whether this process has ever reached the module; a library that has not shows no slots. */
bool module_seen(void);

/* A call with one number, answered by one number, that may wait for ever (timeout_ms 0) on a connection of its own; C_Finalize ends it.
 * With `patient` it also waits for a module that is gone. */
CK_RV call_parked(uint32_t id, CK_ULONG field, CK_ULONG timeout_ms, bool patient, CK_ULONG *result);

#endif
