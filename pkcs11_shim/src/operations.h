/* Operations of a session: Init, the one-shot call, and the calls in parts, with as few round trips as the standard allows. */
#ifndef OPERATIONS_H
#define OPERATIONS_H

#include "call.h"
#include "greeting.h"
#include "session.h"

struct kind {
    enum operation operation;
    uint32_t init, once, shot; /* call ids; once 0 = no deferral */
    uint32_t update, final; /* 0 = it works in one part */
    bool has_key;
    bool messages; /* the mechanism's parameter, if any, is that of a message */
};

/* Data of one message; the rest of a request is smaller than what remains. */
#define MOST_AT_ONCE (largest_request() - 16384u)

/* What an Init carries beside mechanism and key. */
struct piece {
    const CK_BYTE *data;
    CK_ULONG length;
};

extern const struct kind SIGN, VERIFY, DECRYPT, DIGEST, ENCRYPT, SIGN_RECOVER, VERIFY_RECOVER, VERIFY_SIGNATURE;
extern const struct kind MESSAGE_ENCRYPT, MESSAGE_DECRYPT, MESSAGE_SIGN, MESSAGE_VERIFY;
extern const CK_FLAGS operation_flags[OPERATIONS]; /* CKF_SIGN ... of C_SessionCancel */

/* Whether the module may have this operation open in `s`.  One that a lost connection ended says CKR_DEVICE_ERROR, once. */
CK_RV operation_check(struct session *s, enum operation operation);

/* `more` NULL = nothing. */
CK_RV operation_init(const struct kind *kind, CK_SESSION_HANDLE session, const CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key,
                     const struct piece *more);

/* The whole operation on `in`.  With `signature` (verify) there is no output, else no signature. */
CK_RV operation_shot(const struct kind *kind, CK_SESSION_HANDLE session, const CK_BYTE *in, CK_ULONG in_len, const CK_BYTE *signature,
                     CK_ULONG signature_len, CK_BYTE *out, CK_ULONG *out_len);

/* Before a call that goes on with an operation: CKR_OK when the module may have it open, and knows of it. */
CK_RV operation_begin_part(const struct kind *kind, struct session *s);

/* After such a call: what is known of the operation now. */
void operation_after(struct session *s, enum operation operation, const struct call *call, bool open);

/* A call that goes on with an operation, or ends it, and has no output; `in` NULL = no input either. */
CK_RV operation_call(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, const struct piece *in, bool goes_on);

/* Sends an Init that was put off: what follows, a login for this use, is for an operation that the module knows. */
CK_RV operation_settle(const struct kind *kind, CK_SESSION_HANDLE session);

/* Wrong arguments end an operation, as any other error does: CKR_ARGUMENTS_BAD. */
CK_RV operation_abandon(const struct kind *kind, CK_SESSION_HANDLE session);

/* One part; `out_len` NULL = this call has no output. */
CK_RV operation_update(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, const CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out,
                       CK_ULONG *out_len);

/* One part that is a key's value. */
CK_RV operation_key(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, CK_OBJECT_HANDLE key);

/* The end of an operation in parts: an output, or a signature to verify. */
CK_RV operation_final(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, const CK_BYTE *signature, CK_ULONG signature_len,
                      CK_BYTE *out, CK_ULONG *out_len);

#endif
