/* Operations of a session: Init, the one-shot call, and the calls in parts, with as few round trips as the standard allows. */
#ifndef OPERATIONS_H
#define OPERATIONS_H

#include "session.h"

struct kind {
    enum operation operation;
    uint32_t init, once, shot; /* call ids */
    uint32_t update, final;
    bool has_key;
};

extern const struct kind SIGN, VERIFY, DECRYPT, DIGEST, ENCRYPT;
extern const CK_FLAGS operation_flags[OPERATIONS]; /* CKF_SIGN ... of C_SessionCancel */

/* Whether the module may have this operation open in `s`.  One that a lost connection ended says CKR_DEVICE_ERROR, once. */
CK_RV operation_check(struct session *s, enum operation operation);

CK_RV operation_init(const struct kind *kind, CK_SESSION_HANDLE session, const CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key);

/* The whole operation on `in`.  With `signature` (verify) there is no output, else no signature. */
CK_RV operation_shot(const struct kind *kind, CK_SESSION_HANDLE session, const CK_BYTE *in, CK_ULONG in_len, const CK_BYTE *signature,
                     CK_ULONG signature_len, CK_BYTE *out, CK_ULONG *out_len);

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
