#include "operations.h"

#include <string.h>

#include "call.h"
#include "greeting.h"

const struct kind SIGN = {OPERATION_SIGN, CALL_SIGN_INIT, CALL_SIGN_ONCE, CALL_SIGN, CALL_SIGN_UPDATE, CALL_SIGN_FINAL, true, false};
const struct kind VERIFY = {
    OPERATION_VERIFY, CALL_VERIFY_INIT, CALL_VERIFY_ONCE, CALL_VERIFY, CALL_VERIFY_UPDATE, CALL_VERIFY_FINAL, true, false};
const struct kind DECRYPT = {
    OPERATION_DECRYPT, CALL_DECRYPT_INIT, CALL_DECRYPT_ONCE, CALL_DECRYPT, CALL_DECRYPT_UPDATE, CALL_DECRYPT_FINAL, true, false};
const struct kind DIGEST = {
    OPERATION_DIGEST, CALL_DIGEST_INIT, CALL_DIGEST_ONCE, CALL_DIGEST, CALL_DIGEST_UPDATE, CALL_DIGEST_FINAL, false, false};
const struct kind ENCRYPT = {
    OPERATION_ENCRYPT, CALL_ENCRYPT_INIT, CALL_ENCRYPT_ONCE, CALL_ENCRYPT, CALL_ENCRYPT_UPDATE, CALL_ENCRYPT_FINAL, true, false};
const struct kind SIGN_RECOVER = {OPERATION_SIGN_RECOVER, CALL_SIGN_RECOVER_INIT, 0, CALL_SIGN_RECOVER, 0, 0, true, false};
const struct kind VERIFY_RECOVER = {OPERATION_VERIFY_RECOVER, CALL_VERIFY_RECOVER_INIT, 0, CALL_VERIFY_RECOVER, 0, 0, true, false};
/* The same operation as that of C_VerifyInit: a session has one of both. */
const struct kind VERIFY_SIGNATURE = {OPERATION_VERIFY, CALL_VERIFY_SIGNATURE_INIT, 0, 0, 0, 0, true, false};
const struct kind MESSAGE_ENCRYPT = {OPERATION_MESSAGE_ENCRYPT, CALL_MESSAGE_ENCRYPT_INIT, 0, 0, 0, 0, true, true};
const struct kind MESSAGE_DECRYPT = {OPERATION_MESSAGE_DECRYPT, CALL_MESSAGE_DECRYPT_INIT, 0, 0, 0, 0, true, true};
const struct kind MESSAGE_SIGN = {OPERATION_MESSAGE_SIGN, CALL_MESSAGE_SIGN_INIT, 0, 0, 0, 0, true, false};
const struct kind MESSAGE_VERIFY = {OPERATION_MESSAGE_VERIFY, CALL_MESSAGE_VERIFY_INIT, 0, 0, 0, 0, true, false};
const CK_FLAGS operation_flags[OPERATIONS] = {
    CKF_FIND_OBJECTS, CKF_SIGN,         CKF_VERIFY,          CKF_DECRYPT,         CKF_DIGEST,       CKF_ENCRYPT,
    CKF_SIGN_RECOVER, CKF_VERIFY_RECOVER, CKF_MESSAGE_ENCRYPT, CKF_MESSAGE_DECRYPT, CKF_MESSAGE_SIGN, CKF_MESSAGE_VERIFY,
};

static const CK_BYTE nothing[1];

CK_RV operation_check(struct session *s, enum operation operation)
{
    if (!s)
        return CKR_SESSION_HANDLE_INVALID;
    if (!s->begun[operation] || s->begun[operation] == incarnation())
        return CKR_OK;
    s->begun[operation] = 0;
    return CKR_DEVICE_ERROR;
}

void operation_after(struct session *s, enum operation operation, const struct call *call, bool open)
{
    s->begun[operation] = open ? call->incarnation : 0;
    s->uncertain[operation] = call->unknown;
}

/* ---- Init ---- */

static void cancel(struct session *s, enum operation operation)
{
    struct call call;
    CK_RV rv = call_begin(&call, CALL_SESSION_CANCEL);
    if (rv == CKR_OK) {
        put_ulong(call.out, s->handle);
        put_ulong(call.out, operation_flags[operation]);
        rv = call_run(&call, REPLAY);
        s->uncertain[operation] = rv != CKR_OK;
    }
    call_end(&call, rv);
}

static void put_any_mechanism(struct writer *w, const struct kind *kind, const CK_MECHANISM *mechanism)
{
    if (kind->messages)
        put_message_mechanism(w, mechanism);
    else
        put_mechanism(w, mechanism);
}

static CK_RV send_init(const struct kind *kind, struct session *s, const uint8_t *encoded, size_t length, const CK_MECHANISM *mechanism,
                       CK_OBJECT_HANDLE key, const struct piece *more)
{
    enum operation operation = kind->operation;
    if (s->uncertain[operation])
        cancel(s, operation);
    struct call call;
    CK_RV rv = call_begin(&call, kind->init);
    if (rv == CKR_OK) {
        put_ulong(call.out, s->handle);
        if (encoded)
            put_raw(call.out, encoded, length);
        else
            put_any_mechanism(call.out, kind, mechanism);
        if (kind->has_key)
            put_ulong(call.out, key);
        if (more)
            put_bytes(call.out, more->data, more->length);
        call.session = s->handle;
        call.cancel = s->begun[operation] ? 0 : operation_flags[operation];
        rv = call_run(&call, REPLAY);
    }
    bool cancels = !encoded && !mechanism;
    if (rv == CKR_OK)
        operation_after(s, operation, &call, !cancels);
    return call_end(&call, rv);
}

/* A module that takes larger messages than the first ones did knows EncryptOnce too. */
static bool has_once(const struct kind *kind)
{
    return kind->once && (kind->once != CALL_ENCRYPT_ONCE || largest_request() > LEAST_REQUEST);
}

CK_RV operation_init(const struct kind *kind, CK_SESSION_HANDLE session, const CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key,
                     const struct piece *more)
{
    CK_RV rv = application_check();
    if (rv != CKR_OK)
        return rv;
    struct session *s = session_find(session);
    if (!s)
        return CKR_SESSION_HANDLE_INVALID;
    struct deferred *d = &s->deferred[kind->operation];
    if (!mechanism) { /* NULL ends the operation (PKCS#11 3.0, 5.8.1) */
        d->pending = false;
        return send_init(kind, s, NULL, 0, NULL, key, more);
    }
    if (d->pending)
        return CKR_OPERATION_ACTIVE;
    operation_check(s, kind->operation); /* what a lost connection ended is over */
    uint8_t encoded[MAX_PROVEN_MECHANISM];
    struct writer w = {.data = encoded, .room = sizeof encoded, .fixed = true};
    if (has_once(kind))
        put_mechanism(&w, mechanism);
    if (w.failed || !has_once(kind)) {
        d->length = 0;
        return send_init(kind, s, NULL, 0, mechanism, key, more);
    }
    if (!s->begun[kind->operation] && !s->uncertain[kind->operation] &&
        proof_find(kind->operation, key, encoded, (uint32_t)w.length, &d->output_size)) {
        d->pending = true;
    } else {
        rv = send_init(kind, s, encoded, w.length, mechanism, key, NULL);
        if (rv != CKR_OK)
            return rv;
        proof_add(kind->operation, key, encoded, (uint32_t)w.length, 0);
    }
    d->key = key; /* also for the size of the output that this operation will tell */
    d->length = (uint32_t)w.length;
    memcpy(d->mechanism, encoded, w.length);
    return CKR_OK;
}

/* Sends an Init that was put off, because what follows is not the one-shot call. */
static CK_RV settle(const struct kind *kind, struct session *s)
{
    struct deferred *d = &s->deferred[kind->operation];
    if (!d->pending)
        return CKR_OK;
    d->pending = false;
    CK_RV rv = send_init(kind, s, d->mechanism, d->length, NULL, d->key, NULL);
    if (rv != CKR_OK)
        proof_drop(kind->operation, d->key, d->mechanism, d->length);
    return rv;
}

CK_RV operation_abandon(const struct kind *kind, CK_SESSION_HANDLE session)
{
    CK_RV rv = application_check();
    struct session *s = rv == CKR_OK ? session_find(session) : NULL;
    if (rv != CKR_OK || !s)
        return rv != CKR_OK ? rv : CKR_SESSION_HANDLE_INVALID;
    s->deferred[kind->operation].pending = false;
    if (s->begun[kind->operation])
        cancel(s, kind->operation);
    s->begun[kind->operation] = 0;
    return CKR_ARGUMENTS_BAD;
}

/* ---- one shot ---- */

/* A signature's size is fixed by key and mechanism: asked for once, then known. */
static bool answer_size(const struct kind *kind, const struct deferred *d, const CK_BYTE *out, CK_ULONG *out_len, CK_RV *rv)
{
    if (kind->operation != OPERATION_SIGN || !d->pending || !d->output_size || (out && *out_len >= d->output_size))
        return false;
    *out_len = d->output_size;
    *rv = out ? CKR_BUFFER_TOO_SMALL : CKR_OK;
    return true;
}

/* CKR_OK with NULL and CKR_BUFFER_TOO_SMALL keep an operation; anything else ends it (PKCS#11 3.0, 5.2). */
CK_RV operation_begin_part(const struct kind *kind, struct session *s)
{
    CK_RV rv = application_check();
    if (rv == CKR_OK)
        rv = operation_check(s, kind->operation);
    return rv == CKR_OK ? settle(kind, s) : rv;
}

static bool keeps(CK_RV rv, bool output, const CK_BYTE *out)
{
    return output && (rv == CKR_BUFFER_TOO_SMALL || (rv == CKR_OK && !out));
}

/* Data that no mechanism in one part takes: an error, and like any other it ends the operation. */
static CK_RV too_long(const struct kind *kind, CK_SESSION_HANDLE session)
{
    struct session *s = session_find(session);
    bool open = s && (s->begun[kind->operation] || s->deferred[kind->operation].pending);
    CK_RV rv = operation_abandon(kind, session);
    if (rv != CKR_ARGUMENTS_BAD)
        return rv;
    if (!open)
        return CKR_OPERATION_NOT_INITIALIZED;
    if (kind->operation == OPERATION_VERIFY_RECOVER)
        return CKR_SIGNATURE_LEN_RANGE;
    return kind->operation == OPERATION_DECRYPT ? CKR_ENCRYPTED_DATA_LEN_RANGE : CKR_DATA_LEN_RANGE;
}

static bool is_cipher(const struct kind *kind)
{
    return kind->operation == OPERATION_ENCRYPT || kind->operation == OPERATION_DECRYPT;
}

#define PADDING_AND_TAG 64u /* a ciphertext's bytes beyond those of its data, at most */

/* More data than a message holds through a cipher, as many parts.  What comes out is not known before, so there must be room for
 * the most that it can be: a call that has begun cannot be taken back. */
static CK_RV cipher_in_parts(const struct kind *kind, CK_SESSION_HANDLE session, const CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out,
                             CK_ULONG *out_len)
{
    struct session *s = session_find(session);
    CK_RV rv = operation_begin_part(kind, s);
    if (rv != CKR_OK)
        return rv;
    if (!s->begun[kind->operation])
        return CKR_OPERATION_NOT_INITIALIZED;
    CK_ULONG most = in_len + PADDING_AND_TAG, written = 0, none = 0;
    rv = operation_update(kind, kind->update, session, nothing, 0, NULL, &none); /* asks for a size, so nothing happens */
    if (rv == CKR_FUNCTION_NOT_SUPPORTED) /* the mechanism works in one part: on less than a modulus */
        return kind->operation == OPERATION_DECRYPT ? CKR_ENCRYPTED_DATA_LEN_RANGE : CKR_DATA_LEN_RANGE;
    if (rv != CKR_OK)
        return rv;
    if (!out || *out_len < most) {
        *out_len = most;
        return out ? CKR_BUFFER_TOO_SMALL : CKR_OK;
    }
    while (in_len) {
        CK_ULONG at_once = MOST_AT_ONCE, part = in_len < at_once ? in_len : at_once, room = *out_len - written;
        rv = operation_update(kind, kind->update, session, in, part, out + written, &room);
        if (rv != CKR_OK)
            return rv;
        in += part;
        in_len -= part;
        written += room;
    }
    CK_ULONG room = *out_len - written;
    rv = operation_final(kind, kind->final, session, NULL, 0, out + written, &room);
    if (rv == CKR_OK)
        *out_len = written + room;
    return rv;
}

/* The one-shot call on more data than a message holds. */
static CK_RV shot_in_parts(const struct kind *kind, CK_SESSION_HANDLE session, const CK_BYTE *in, CK_ULONG in_len,
                           const CK_BYTE *signature, CK_ULONG signature_len, CK_BYTE *out, CK_ULONG *out_len)
{
    if (!kind->update)
        return too_long(kind, session);
    if (is_cipher(kind))
        return cipher_in_parts(kind, session, in, in_len, out, out_len);
    CK_RV rv;
    if (out_len) {
        CK_ULONG size = 0;
        rv = operation_shot(kind, session, NULL, 0, NULL, 0, NULL, &size); /* asks for the size, so it keeps the operation */
        if (rv != CKR_OK)
            return rv;
        if (!out || *out_len < size) {
            *out_len = size;
            return out ? CKR_BUFFER_TOO_SMALL : CKR_OK;
        }
    }
    rv = operation_update(kind, kind->update, session, in, in_len, NULL, NULL);
    if (rv == CKR_FUNCTION_NOT_SUPPORTED)
        return CKR_DATA_LEN_RANGE; /* the mechanism works in one part: on a digest, or a number below a modulus */
    return rv == CKR_OK ? operation_final(kind, kind->final, session, signature, signature_len, out, out_len) : rv;
}

CK_RV operation_shot(const struct kind *kind, CK_SESSION_HANDLE session, const CK_BYTE *in, CK_ULONG in_len, const CK_BYTE *signature,
                     CK_ULONG signature_len, CK_BYTE *out, CK_ULONG *out_len)
{
    bool output = kind->operation != OPERATION_VERIFY;
    if ((!in && in_len) || (output ? !out_len : !signature && signature_len))
        return operation_abandon(kind, session);
    if (in_len > MOST_AT_ONCE)
        return shot_in_parts(kind, session, in, in_len, signature, signature_len, out, out_len);
    CK_RV rv = application_check();
    if (rv != CKR_OK)
        return rv;
    struct session *s = session_find(session);
    rv = operation_check(s, kind->operation);
    if (rv != CKR_OK)
        return rv;
    struct deferred *d = &s->deferred[kind->operation];
    if (output && answer_size(kind, d, out, out_len, &rv))
        return rv;
    bool once = d->pending;
    d->pending = false;
    struct call call;
    rv = call_begin(&call, once ? kind->once : kind->shot);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        if (once) {
            put_raw(call.out, d->mechanism, d->length);
            if (kind->has_key)
                put_ulong(call.out, d->key);
            call.session = session;
            call.cancel = operation_flags[kind->operation];
        } else {
            call.bound = s->begun[kind->operation];
        }
        put_bytes(call.out, in ? in : nothing, in_len);
        if (output)
            put_room(call.out, out, *out_len);
        else
            put_bytes(call.out, signature ? signature : nothing, signature_len);
        rv = call_run(&call, once ? REPLAY : ONCE_ONLY);
        if (rv == CKR_OK && output)
            rv = get_output(&call.reply, out, out_len);
        operation_after(s, kind->operation, &call, keeps(rv, output, out));
    }
    rv = kind->operation == OPERATION_DECRYPT ? call_end_wiped(&call, rv) : call_end(&call, rv);
    bool good = rv == CKR_OK || rv == CKR_BUFFER_TOO_SMALL;
    if (good && kind->operation == OPERATION_SIGN && d->length && d->output_size != *out_len)
        proof_add(kind->operation, d->key, d->mechanism, d->length, d->output_size = *out_len);
    if (!good && once)
        proof_drop(kind->operation, d->key, d->mechanism, d->length); /* the next Init asks again and says its error itself */
    return rv;
}

/* ---- in parts ---- */

CK_RV operation_settle(const struct kind *kind, CK_SESSION_HANDLE session)
{
    struct session *s = session_find(session);
    return s ? settle(kind, s) : CKR_SESSION_HANDLE_INVALID;
}

CK_RV operation_update(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, const CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out,
                       CK_ULONG *out_len)
{
    if (!in && in_len)
        return operation_abandon(kind, session);
    const CK_ULONG most = MOST_AT_ONCE;
    if (in_len > most && out_len)
        return too_long(kind, session);
    for (; in_len > most; in += most, in_len -= most) {
        CK_RV early = operation_update(kind, id, session, in, most, NULL, NULL);
        if (early != CKR_OK)
            return early;
    }
    struct session *s = session_find(session);
    CK_RV rv = operation_begin_part(kind, s);
    if (rv != CKR_OK)
        return rv;
    struct call call;
    rv = call_begin(&call, id);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_bytes(call.out, in ? in : nothing, in_len);
        if (out_len)
            put_room(call.out, out, *out_len);
        call.bound = s->begun[kind->operation];
        rv = call_run(&call, ONCE_ONLY);
        if (rv == CKR_OK && out_len)
            rv = get_output(&call.reply, out, out_len);
        operation_after(s, kind->operation, &call, rv == CKR_OK || rv == CKR_BUFFER_TOO_SMALL);
    }
    return kind->operation == OPERATION_DECRYPT ? call_end_wiped(&call, rv) : call_end(&call, rv);
}

CK_RV operation_call(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, const struct piece *in, bool goes_on)
{
    struct session *s = session_find(session);
    CK_RV rv = operation_begin_part(kind, s);
    if (rv != CKR_OK)
        return rv;
    struct call call;
    rv = call_begin(&call, id);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        if (in)
            put_bytes(call.out, in->data ? in->data : nothing, in->length);
        call.bound = s->begun[kind->operation];
        rv = call_run(&call, ONCE_ONLY);
        operation_after(s, kind->operation, &call, goes_on && rv == CKR_OK);
    }
    return call_end(&call, rv);
}

CK_RV operation_key(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, CK_OBJECT_HANDLE key)
{
    struct session *s = session_find(session);
    CK_RV rv = operation_begin_part(kind, s);
    if (rv != CKR_OK)
        return rv;
    struct call call;
    rv = call_begin(&call, id);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_ulong(call.out, key);
        call.bound = s->begun[kind->operation];
        rv = call_run(&call, ONCE_ONLY);
        operation_after(s, kind->operation, &call, rv == CKR_OK);
    }
    return call_end(&call, rv);
}

CK_RV operation_final(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, const CK_BYTE *signature, CK_ULONG signature_len,
                      CK_BYTE *out, CK_ULONG *out_len)
{
    bool output = kind->operation != OPERATION_VERIFY;
    if (output ? !out_len : !signature && signature_len)
        return operation_abandon(kind, session);
    struct session *s = session_find(session);
    CK_RV rv = operation_begin_part(kind, s);
    if (rv != CKR_OK)
        return rv;
    struct call call;
    rv = call_begin(&call, id);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        if (output)
            put_room(call.out, out, *out_len);
        else
            put_bytes(call.out, signature ? signature : nothing, signature_len);
        call.bound = s->begun[kind->operation];
        rv = call_run(&call, ONCE_ONLY);
        if (rv == CKR_OK && output)
            rv = get_output(&call.reply, out, out_len);
        operation_after(s, kind->operation, &call, keeps(rv, output, out));
    }
    return kind->operation == OPERATION_DECRYPT ? call_end_wiped(&call, rv) : call_end(&call, rv);
}
