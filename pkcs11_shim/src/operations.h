/* Operations of a session: Init, the one-shot call, and the calls in parts, with as few round trips as the standard allows. */
#ifndef OPERATIONS_H
#define OPERATIONS_H

#include "session.h"

struct kind {
    enum operation operation;
    uint32_t init, once, shot; /* call ids; once 0 = no deferral */
    bool has_key;
};

extern const struct kind SIGN, VERIFY, DECRYPT, DIGEST, ENCRYPT;

CK_RV operation_init(const struct kind *kind, CK_SESSION_HANDLE session, const CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key);

/* The whole operation on `in`.  With `signature` (verify) there is no output, else no signature. */
CK_RV operation_shot(const struct kind *kind, CK_SESSION_HANDLE session, const CK_BYTE *in, CK_ULONG in_len, const CK_BYTE *signature,
                     CK_ULONG signature_len, CK_BYTE *out, CK_ULONG *out_len);

/* One part; `out_len` NULL = this call has no output. */
CK_RV operation_update(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, const CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out,
                       CK_ULONG *out_len);

/* The end of an operation in parts: an output, or a signature to verify. */
CK_RV operation_final(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, const CK_BYTE *signature, CK_ULONG signature_len,
                      CK_BYTE *out, CK_ULONG *out_len);

#endif
