/* Keys that travel with what authenticates or makes them (PKCS#11 3.2, 5.18.8-5.18.11). */
#include "call.h"
#include "parameters.h"

static const CK_BYTE nothing[1];

CK_RV C_EncapsulateKey(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE public_key, CK_ATTRIBUTE *attributes,
                       CK_ULONG count, CK_BYTE *out, CK_ULONG *out_len, CK_OBJECT_HANDLE *key)
{
    if (!mechanism || (!attributes && count) || !out_len || !key)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = call_begin(&call, CALL_ENCAPSULATE_KEY);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_mechanism(call.out, mechanism);
        put_ulong(call.out, public_key);
        put_attributes(call.out, attributes, count, 0);
        put_room(call.out, out, *out_len);
        rv = call_run(&call, ONCE_ONLY);
        if (rv == CKR_OK) {
            rv = get_output(&call.reply, out, out_len);
            CK_OBJECT_HANDLE made = get_ulong(&call.reply);
            if (rv == CKR_OK && out && !call.reply.failed)
                *key = made;
        }
    }
    return call_end(&call, rv);
}

CK_RV C_DecapsulateKey(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE private_key, CK_ATTRIBUTE *attributes,
                       CK_ULONG count, CK_BYTE *in, CK_ULONG in_len, CK_OBJECT_HANDLE *key)
{
    if (!mechanism || (!attributes && count) || !in || !key)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = call_begin(&call, CALL_DECAPSULATE_KEY);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_mechanism(call.out, mechanism);
        put_ulong(call.out, private_key);
        put_bytes(call.out, in, in_len);
        put_attributes(call.out, attributes, count, 0);
        rv = call_run(&call, ONCE_ONLY);
        if (rv == CKR_OK)
            *key = get_ulong(&call.reply);
    }
    return call_end(&call, rv);
}

/* The parameter of a mechanism that wraps with associated data: that of a message. */
static CK_RV find(const CK_MECHANISM *mechanism, struct parameter *found)
{
    if (mechanism->mechanism != CKM_AES_GCM && mechanism->mechanism != CKM_AES_CCM) {
        *found = (struct parameter){0}; /* the module says what it thinks of it */
        return CKR_OK;
    }
    return parameter_find(mechanism->mechanism, mechanism->pParameter, mechanism->ulParameterLen, found);
}

static void put_wrapping(struct writer *w, const CK_MECHANISM *mechanism, bool checked)
{
    if (mechanism->mechanism == CKM_AES_GCM || mechanism->mechanism == CKM_AES_CCM)
        put_parameter(w, mechanism->mechanism, mechanism->pParameter, checked);
    else
        put_mechanism(w, mechanism);
}

CK_RV C_WrapKeyAuthenticated(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE wrapping_key, CK_OBJECT_HANDLE key,
                             CK_BYTE *data, CK_ULONG data_len, CK_BYTE *out, CK_ULONG *out_len)
{
    if (!mechanism || (!data && data_len) || !out_len)
        return CKR_ARGUMENTS_BAD;
    struct parameter found;
    CK_RV rv = find(mechanism, &found);
    if (rv != CKR_OK)
        return rv;
    struct call call;
    rv = call_begin(&call, CALL_WRAP_KEY_AUTHENTICATED);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_wrapping(call.out, mechanism, false);
        put_ulong(call.out, wrapping_key);
        put_ulong(call.out, key);
        put_bytes(call.out, data ? data : nothing, data_len);
        put_room(call.out, out, *out_len);
        rv = call_run(&call, REPLAY);
        if (rv == CKR_OK) {
            get_nonce(&call.reply, &found);
            rv = get_tag_and_output(&call.reply, &found, out, out_len, true);
        }
    }
    return call_end(&call, rv);
}

CK_RV C_UnwrapKeyAuthenticated(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE unwrapping_key, CK_BYTE *in,
                               CK_ULONG in_len, CK_ATTRIBUTE *attributes, CK_ULONG count, CK_BYTE *data, CK_ULONG data_len,
                               CK_OBJECT_HANDLE *key)
{
    if (!mechanism || !in || (!attributes && count) || (!data && data_len) || !key)
        return CKR_ARGUMENTS_BAD;
    struct parameter found;
    CK_RV rv = find(mechanism, &found);
    if (rv != CKR_OK)
        return rv;
    struct call call;
    rv = call_begin(&call, CALL_UNWRAP_KEY_AUTHENTICATED);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_wrapping(call.out, mechanism, true);
        put_ulong(call.out, unwrapping_key);
        put_bytes(call.out, in, in_len);
        put_attributes(call.out, attributes, count, 0);
        put_bytes(call.out, data ? data : nothing, data_len);
        rv = call_run(&call, ONCE_ONLY);
        if (rv == CKR_OK)
            *key = get_ulong(&call.reply);
    }
    return call_end(&call, rv);
}
