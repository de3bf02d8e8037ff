#include "operations.h"

#include <string.h>

#include "application.h"
#include "calls.h"

const struct kind SIGN = {OPERATION_SIGN, CALL_SIGN_INIT, CALL_SIGN_ONCE, CALL_SIGN, true};
const struct kind VERIFY = {OPERATION_VERIFY, CALL_VERIFY_INIT, CALL_VERIFY_ONCE, CALL_VERIFY, true};
const struct kind DECRYPT = {OPERATION_DECRYPT, CALL_DECRYPT_INIT, CALL_DECRYPT_ONCE, CALL_DECRYPT, true};
const struct kind DIGEST = {OPERATION_DIGEST, CALL_DIGEST_INIT, CALL_DIGEST_ONCE, CALL_DIGEST, false};
const struct kind ENCRYPT = {OPERATION_ENCRYPT, CALL_ENCRYPT_INIT, 0, CALL_ENCRYPT, true};

static unsigned bit(const struct kind *kind)
{
    return 1u << kind->operation;
}

/* An operation that a lost connection ended says so once. */
static CK_RV check_lost(struct session *s, const struct kind *kind)
{
    if (!s)
        return CKR_SESSION_HANDLE_INVALID;
    if (!(s->lost & bit(kind)))
        return CKR_OK;
    s->lost &= ~bit(kind);
    return CKR_DEVICE_ERROR;
}

/* ---- Init ---- */

static CK_RV send_init(const struct kind *kind, struct session *s, const uint8_t *mechanism, size_t length, CK_OBJECT_HANDLE key)
{
    struct call call;
    CK_RV rv = call_begin(&call, kind->init);
    if (rv == CKR_OK) {
        put_ulong(call.out, s->handle);
        put_raw(call.out, mechanism, length);
        if (kind->has_key)
            put_ulong(call.out, key);
        rv = call_run(&call, REPLAY);
    }
    return call_end(&call, rv);
}

CK_RV operation_init(const struct kind *kind, CK_SESSION_HANDLE session, const CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    CK_RV rv = application_check();
    if (rv != CKR_OK)
        return rv;
    struct session *s = session_find(session);
    if (!s)
        return CKR_SESSION_HANDLE_INVALID;
    struct deferred *d = &s->deferred[kind->operation];
    s->lost &= ~bit(kind);
    if (mechanism && (d->pending || s->active & bit(kind)))
        return CKR_OPERATION_ACTIVE;
    struct call call; /* the encoded mechanism is built where the message will be */
    rv = call_begin(&call, kind->init);
    if (rv != CKR_OK)
        return call_end(&call, rv);
    put_ulong(call.out, session);
    size_t start = call.out->length;
    put_mechanism(call.out, mechanism);
    if (call.out->failed)
        return call_end(&call, CKR_ARGUMENTS_BAD);
    uint8_t encoded[MAX_PROVEN_MECHANISM];
    size_t length = call.out->length - start;
    bool fits = mechanism && kind->once && length <= sizeof encoded;
    if (fits)
        memcpy(encoded, call.out->data + start, length);
    if (fits && proof_find(kind->operation, key, encoded, (uint32_t)length, &d->output_size)) {
        d->pending = true;
        d->key = key;
        d->length = (uint32_t)length;
        memcpy(d->mechanism, encoded, length);
        return call_end(&call, CKR_OK);
    }
    if (kind->has_key)
        put_ulong(call.out, key);
    rv = call_run(&call, REPLAY);
    rv = call_end(&call, rv);
    if (!mechanism) {
        d->pending = false;
        s->active &= ~bit(kind);
    } else if (rv == CKR_OK) {
        s->active |= bit(kind);
        if (fits) {
            proof_add(kind->operation, key, encoded, (uint32_t)length, 0);
            /* remembered for the size of the output that this operation will tell */
            d->key = key;
            d->length = (uint32_t)length;
            memcpy(d->mechanism, encoded, length);
            d->output_size = 0;
        } else {
            d->length = 0;
        }
    }
    return rv;
}

/* Sends an Init that was put off, because what follows is not the one-shot call. */
static CK_RV settle(const struct kind *kind, struct session *s)
{
    struct deferred *d = &s->deferred[kind->operation];
    if (!d->pending)
        return CKR_OK;
    d->pending = false;
    CK_RV rv = send_init(kind, s, d->mechanism, d->length, d->key);
    if (rv == CKR_OK)
        s->active |= bit(kind);
    return rv;
}

/* ---- one shot ---- */

/* A signature's size is fixed by key and mechanism: asked for once, then known. */
static bool answer_size(const struct kind *kind, const struct deferred *d, CK_BYTE *out, CK_ULONG *out_len, CK_RV *rv)
{
    if (kind->operation != OPERATION_SIGN || !d->pending || !d->output_size || (out && *out_len >= d->output_size))
        return false;
    *out_len = d->output_size;
    *rv = out ? CKR_BUFFER_TOO_SMALL : CKR_OK;
    return true;
}

CK_RV operation_shot(const struct kind *kind, CK_SESSION_HANDLE session, const CK_BYTE *in, CK_ULONG in_len, const CK_BYTE *signature,
                     CK_ULONG signature_len, CK_BYTE *out, CK_ULONG *out_len)
{
    CK_RV rv = application_check();
    if (rv != CKR_OK)
        return rv;
    struct session *s = session_find(session);
    rv = check_lost(s, kind);
    if (rv != CKR_OK)
        return rv;
    bool output = kind->operation != OPERATION_VERIFY;
    if ((!in && in_len) || (output ? !out_len : !signature && signature_len)) {
        s->deferred[kind->operation].pending = false; /* an error ends the operation */
        return CKR_ARGUMENTS_BAD;
    }
    struct deferred *d = &s->deferred[kind->operation];
    if (output && answer_size(kind, d, out, out_len, &rv))
        return rv;
    bool once = d->pending;
    if (!once && !(s->active & bit(kind)))
        return CKR_OPERATION_NOT_INITIALIZED;
    struct call call;
    rv = call_begin(&call, once ? kind->once : kind->shot);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        if (once) {
            put_raw(call.out, d->mechanism, d->length);
            if (kind->has_key)
                put_ulong(call.out, d->key);
        }
        put_bytes(call.out, in ? in : (const CK_BYTE *)"", in_len);
        if (output)
            put_room(call.out, out, *out_len);
        else
            put_bytes(call.out, signature ? signature : (const CK_BYTE *)"", signature_len);
        rv = call_run(&call, once ? REPLAY : ONCE_ONLY);
        if (rv == CKR_OK && output)
            rv = get_output(&call.reply, out, out_len);
    }
    rv = call_end(&call, rv);
    d->pending = false;
    bool kept = output && (rv == CKR_BUFFER_TOO_SMALL || (rv == CKR_OK && !out));
    s->active = kept ? s->active | bit(kind) : s->active & ~bit(kind);
    s->lost &= ~bit(kind);
    if (output && (rv == CKR_OK || rv == CKR_BUFFER_TOO_SMALL) && kind->operation == OPERATION_SIGN && d->length)
        proof_add(kind->operation, d->key, d->mechanism, d->length, *out_len);
    return rv;
}

/* ---- in parts ---- */

static CK_RV begin_part(const struct kind *kind, struct session *s)
{
    CK_RV rv = application_check();
    if (rv == CKR_OK)
        rv = check_lost(s, kind);
    if (rv == CKR_OK)
        rv = settle(kind, s);
    if (rv == CKR_OK && !(s->active & bit(kind)))
        rv = CKR_OPERATION_NOT_INITIALIZED;
    return rv;
}

CK_RV operation_update(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, const CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out,
                       CK_ULONG *out_len)
{
    struct session *s = session_find(session);
    CK_RV rv = begin_part(kind, s);
    if (rv != CKR_OK)
        return rv;
    struct call call;
    rv = call_begin(&call, id);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_bytes(call.out, in || in_len ? in : (const CK_BYTE *)"", in_len);
        if (out_len)
            put_room(call.out, out, *out_len);
        rv = !in && in_len ? CKR_ARGUMENTS_BAD : call_run(&call, ONCE_ONLY);
        if (rv == CKR_OK && out_len)
            rv = get_output(&call.reply, out, out_len);
    }
    rv = call_end(&call, rv);
    if (rv != CKR_OK && rv != CKR_BUFFER_TOO_SMALL && rv != CKR_ARGUMENTS_BAD) {
        s->active &= ~bit(kind);
        s->lost &= ~bit(kind);
    }
    return rv;
}

CK_RV operation_final(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, const CK_BYTE *signature, CK_ULONG signature_len,
                      CK_BYTE *out, CK_ULONG *out_len)
{
    struct session *s = session_find(session);
    CK_RV rv = begin_part(kind, s);
    if (rv != CKR_OK)
        return rv;
    struct call call;
    rv = call_begin(&call, id);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        if (out_len)
            put_room(call.out, out, *out_len);
        else
            put_bytes(call.out, signature ? signature : (const CK_BYTE *)"", signature_len);
        rv = call_run(&call, ONCE_ONLY);
        if (rv == CKR_OK && out_len)
            rv = get_output(&call.reply, out, out_len);
    }
    rv = call_end(&call, rv);
    bool kept = out_len && (rv == CKR_BUFFER_TOO_SMALL || (rv == CKR_OK && !out));
    if (!kept)
        s->active &= ~bit(kind);
    s->lost &= ~bit(kind);
    return rv;
}
