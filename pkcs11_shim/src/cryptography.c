/* Cryptographic functions (PKCS#11 3.0, 5.8-5.20). */
#include <string.h>

#include "call.h"
#include "operations.h"

#define RANDOM_AT_ONCE 65536u

CK_RV C_SignInit(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    return operation_init(&SIGN, session, mechanism, key, NULL);
}

CK_RV C_Sign(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    return operation_shot(&SIGN, session, in, in_len, NULL, 0, out, out_len);
}

CK_RV C_SignUpdate(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len)
{
    return operation_update(&SIGN, CALL_SIGN_UPDATE, session, in, in_len, NULL, NULL);
}

CK_RV C_SignFinal(CK_SESSION_HANDLE session, CK_BYTE *out, CK_ULONG *out_len)
{
    return operation_final(&SIGN, CALL_SIGN_FINAL, session, NULL, 0, out, out_len);
}

CK_RV C_VerifyInit(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    return operation_init(&VERIFY, session, mechanism, key, NULL);
}

CK_RV C_Verify(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *signature, CK_ULONG signature_len)
{
    return operation_shot(&VERIFY, session, in, in_len, signature, signature_len, NULL, NULL);
}

CK_RV C_VerifyUpdate(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len)
{
    return operation_update(&VERIFY, CALL_VERIFY_UPDATE, session, in, in_len, NULL, NULL);
}

CK_RV C_VerifyFinal(CK_SESSION_HANDLE session, CK_BYTE *signature, CK_ULONG signature_len)
{
    return operation_final(&VERIFY, CALL_VERIFY_FINAL, session, signature, signature_len, NULL, NULL);
}

CK_RV C_DecryptInit(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    return operation_init(&DECRYPT, session, mechanism, key, NULL);
}

CK_RV C_Decrypt(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    return operation_shot(&DECRYPT, session, in, in_len, NULL, 0, out, out_len);
}

CK_RV C_DecryptUpdate(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    return out_len ? operation_update(&DECRYPT, CALL_DECRYPT_UPDATE, session, in, in_len, out, out_len) : operation_abandon(&DECRYPT, session);
}

CK_RV C_DecryptFinal(CK_SESSION_HANDLE session, CK_BYTE *out, CK_ULONG *out_len)
{
    return operation_final(&DECRYPT, CALL_DECRYPT_FINAL, session, NULL, 0, out, out_len);
}

CK_RV C_EncryptInit(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    return operation_init(&ENCRYPT, session, mechanism, key, NULL);
}

CK_RV C_Encrypt(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    return operation_shot(&ENCRYPT, session, in, in_len, NULL, 0, out, out_len);
}

CK_RV C_EncryptUpdate(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    return out_len ? operation_update(&ENCRYPT, CALL_ENCRYPT_UPDATE, session, in, in_len, out, out_len) : operation_abandon(&ENCRYPT, session);
}

CK_RV C_EncryptFinal(CK_SESSION_HANDLE session, CK_BYTE *out, CK_ULONG *out_len)
{
    return operation_final(&ENCRYPT, CALL_ENCRYPT_FINAL, session, NULL, 0, out, out_len);
}

CK_RV C_DigestInit(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism)
{
    return operation_init(&DIGEST, session, mechanism, 0, NULL);
}

CK_RV C_Digest(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    return operation_shot(&DIGEST, session, in, in_len, NULL, 0, out, out_len);
}

CK_RV C_DigestUpdate(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len)
{
    return operation_update(&DIGEST, CALL_DIGEST_UPDATE, session, in, in_len, NULL, NULL);
}

CK_RV C_DigestFinal(CK_SESSION_HANDLE session, CK_BYTE *out, CK_ULONG *out_len)
{
    return operation_final(&DIGEST, CALL_DIGEST_FINAL, session, NULL, 0, out, out_len);
}

CK_RV C_DigestKey(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE key)
{
    return operation_key(&DIGEST, CALL_DIGEST_KEY, session, key);
}

CK_RV C_SignRecoverInit(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    return operation_init(&SIGN_RECOVER, session, mechanism, key, NULL);
}

CK_RV C_SignRecover(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    return operation_shot(&SIGN_RECOVER, session, in, in_len, NULL, 0, out, out_len);
}

CK_RV C_VerifyRecoverInit(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    return operation_init(&VERIFY_RECOVER, session, mechanism, key, NULL);
}

CK_RV C_VerifyRecover(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    return operation_shot(&VERIFY_RECOVER, session, in, in_len, NULL, 0, out, out_len);
}

/* ---- dual functions: one call, for the module alone can do both or neither ---- */

static CK_RV dual(const struct kind *cipher, const struct kind *other, uint32_t id, CK_SESSION_HANDLE session, const CK_BYTE *in,
                  CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    if (!out_len || (!in && in_len) || in_len > MOST_AT_ONCE) { /* as any error, it ends both */
        operation_abandon(cipher, session);
        CK_RV rv = operation_abandon(other, session);
        return rv != CKR_ARGUMENTS_BAD || in_len <= MOST_AT_ONCE ? rv : CKR_DATA_LEN_RANGE;
    }
    struct session *s = session_find(session);
    CK_RV rv = operation_begin_part(cipher, s);
    if (rv == CKR_OK)
        rv = operation_begin_part(other, s);
    if (rv != CKR_OK)
        return rv;
    struct call call;
    rv = call_begin(&call, id);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_bytes(call.out, in ? in : (const CK_BYTE *)"", in_len);
        put_room(call.out, out, *out_len);
        call.bound = s->begun[cipher->operation];
        rv = call_run(&call, ONCE_ONLY);
        if (rv == CKR_OK)
            rv = get_output(&call.reply, out, out_len);
        bool open = rv == CKR_OK || rv == CKR_BUFFER_TOO_SMALL;
        if (rv != CKR_OPERATION_NOT_INITIALIZED) { /* which leaves the other one as it is */
            operation_after(s, cipher->operation, &call, open);
            operation_after(s, other->operation, &call, open);
        }
    }
    return call_end_wiped(&call, rv);
}

CK_RV C_DigestEncryptUpdate(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    return dual(&ENCRYPT, &DIGEST, CALL_DIGEST_ENCRYPT_UPDATE, session, in, in_len, out, out_len);
}

CK_RV C_DecryptDigestUpdate(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    return dual(&DECRYPT, &DIGEST, CALL_DECRYPT_DIGEST_UPDATE, session, in, in_len, out, out_len);
}

CK_RV C_SignEncryptUpdate(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    return dual(&ENCRYPT, &SIGN, CALL_SIGN_ENCRYPT_UPDATE, session, in, in_len, out, out_len);
}

CK_RV C_DecryptVerifyUpdate(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    return dual(&DECRYPT, &VERIFY, CALL_DECRYPT_VERIFY_UPDATE, session, in, in_len, out, out_len);
}

/* ---- the signature first (PKCS#11 3.2, 5.15.7) ---- */

CK_RV C_VerifySignatureInit(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key, CK_BYTE *signature,
                            CK_ULONG signature_len)
{
    if (!signature && signature_len)
        return CKR_ARGUMENTS_BAD;
    return operation_init(&VERIFY_SIGNATURE, session, mechanism, key, &(struct piece){signature, signature_len});
}

CK_RV C_VerifySignature(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len)
{
    if (!in && in_len)
        return operation_abandon(&VERIFY, session);
    if (in_len <= MOST_AT_ONCE)
        return operation_call(&VERIFY, CALL_VERIFY_SIGNATURE, session, &(struct piece){in, in_len}, false);
    CK_RV rv = C_VerifySignatureUpdate(session, in, in_len);
    if (rv == CKR_FUNCTION_NOT_SUPPORTED)
        return CKR_DATA_LEN_RANGE;
    return rv == CKR_OK ? C_VerifySignatureFinal(session) : rv;
}

CK_RV C_VerifySignatureUpdate(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len)
{
    return operation_update(&VERIFY, CALL_VERIFY_SIGNATURE_UPDATE, session, in, in_len, NULL, NULL);
}

CK_RV C_VerifySignatureFinal(CK_SESSION_HANDLE session)
{
    return operation_call(&VERIFY, CALL_VERIFY_SIGNATURE_FINAL, session, NULL, false);
}

/* ---- random numbers ---- */

CK_RV C_SeedRandom(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len)
{
    if (!in && in_len)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = call_begin(&call, CALL_SEED_RANDOM);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_bytes(call.out, in, in_len);
        rv = call_run(&call, REPLAY);
    }
    return call_end(&call, rv);
}

CK_RV C_GenerateRandom(CK_SESSION_HANDLE session, CK_BYTE *out, CK_ULONG length)
{
    if (!out && length)
        return CKR_ARGUMENTS_BAD;
    CK_RV rv = application_check();
    if (rv == CKR_OK && !session_find(session))
        rv = CKR_SESSION_HANDLE_INVALID;
    while (length && rv == CKR_OK) {
        CK_ULONG part = length < RANDOM_AT_ONCE ? length : RANDOM_AT_ONCE, got = part;
        struct call call;
        rv = call_begin(&call, CALL_GENERATE_RANDOM);
        if (rv == CKR_OK) {
            put_ulong(call.out, session);
            put_room(call.out, out, part);
            rv = call_run(&call, REPLAY);
            if (rv == CKR_OK)
                rv = get_output(&call.reply, out, &got);
            if (rv == CKR_OK && got != part)
                rv = CKR_DEVICE_ERROR;
        }
        rv = call_end_wiped(&call, rv);
        out += part;
        length -= part;
    }
    return rv;
}
