/* Message-based functions (PKCS#11 3.0, 5.9, 5.11, 5.14, 5.16): an Init, then message after message.
 *
 * Wrong arguments change nothing here; what a lost connection leaves in doubt ends the whole process. */
#include "call.h"
#include "operations.h"
#include "parameters.h"

static const CK_BYTE nothing[1];

/* A call that goes on with a process. */
struct step {
    const struct kind *kind;
    struct session *session;
    struct call call;
};

static CK_RV find(struct step *step, const struct kind *kind, CK_SESSION_HANDLE session)
{
    *step = (struct step){.kind = kind};
    CK_RV rv = application_check();
    if (rv != CKR_OK)
        return rv;
    step->session = session_find(session);
    rv = operation_check(step->session, kind->operation);
    if (rv == CKR_OK && !step->session->begun[kind->operation])
        rv = CKR_OPERATION_NOT_INITIALIZED;
    return rv;
}

static CK_RV begin(struct step *step, uint32_t id)
{
    CK_RV rv = call_begin(&step->call, id);
    if (rv == CKR_OK) {
        put_ulong(step->call.out, step->session->handle);
        step->call.bound = step->session->begun[step->kind->operation];
    }
    return rv;
}

static CK_RV run(struct step *step)
{
    if (step->call.out->failed)
        return CKR_ARGUMENTS_BAD; /* nothing was sent */
    CK_RV rv = call_run(&step->call, ONCE_ONLY);
    if (step->call.incarnation || step->call.unknown || rv == CKR_DEVICE_ERROR) /* else nobody has heard it */
        operation_after(step->session, step->kind->operation, &step->call, !step->call.unknown);
    return rv;
}

static CK_RV end(struct step *step, CK_RV rv)
{
    return step->kind == &MESSAGE_DECRYPT ? call_end_wiped(&step->call, rv) : call_end(&step->call, rv);
}

/* ---- signing and verification ---- */

CK_RV C_MessageSignInit(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    return operation_init(&MESSAGE_SIGN, session, mechanism, key, NULL);
}

CK_RV C_MessageVerifyInit(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    return operation_init(&MESSAGE_VERIFY, session, mechanism, key, NULL);
}

static CK_RV finish(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session)
{
    struct step step;
    CK_RV rv = find(&step, kind, session);
    if (rv != CKR_OK)
        return rv;
    rv = begin(&step, id);
    if (rv == CKR_OK)
        rv = run(&step);
    if (rv == CKR_OK)
        step.session->begun[kind->operation] = 0;
    return end(&step, rv);
}

CK_RV C_MessageSignFinal(CK_SESSION_HANDLE session)
{
    return finish(&MESSAGE_SIGN, CALL_MESSAGE_SIGN_FINAL, session);
}

CK_RV C_MessageVerifyFinal(CK_SESSION_HANDLE session)
{
    return finish(&MESSAGE_VERIFY, CALL_MESSAGE_VERIFY_FINAL, session);
}

/* SignMessage and SignMessageNext; `out_len` NULL = more follows. */
static CK_RV sign(uint32_t id, CK_SESSION_HANDLE session, const void *parameter, CK_ULONG parameter_len, const CK_BYTE *in,
                  CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    struct step step;
    CK_RV rv = find(&step, &MESSAGE_SIGN, session);
    if (rv != CKR_OK)
        return rv;
    rv = begin(&step, id);
    if (rv == CKR_OK) {
        CK_ULONG none = 0;
        put_bytes(step.call.out, parameter, parameter_len);
        put_bytes(step.call.out, in ? in : nothing, in_len);
        if (id == CALL_SIGN_MESSAGE_NEXT)
            put_room_or_none(step.call.out, out, out_len);
        else
            put_room(step.call.out, out, *out_len);
        rv = run(&step);
        if (rv == CKR_OK)
            rv = out_len ? get_output(&step.call.reply, out, out_len) : get_output(&step.call.reply, NULL, &none);
    }
    return end(&step, rv);
}

CK_RV C_SignMessageBegin(CK_SESSION_HANDLE session, void *parameter, CK_ULONG parameter_len)
{
    struct step step;
    CK_RV rv = find(&step, &MESSAGE_SIGN, session);
    if (rv != CKR_OK)
        return rv;
    rv = begin(&step, CALL_SIGN_MESSAGE_BEGIN);
    if (rv == CKR_OK) {
        put_bytes(step.call.out, parameter, parameter_len);
        rv = run(&step);
    }
    return end(&step, rv);
}

CK_RV C_SignMessageNext(CK_SESSION_HANDLE session, void *parameter, CK_ULONG parameter_len, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out,
                        CK_ULONG *out_len)
{
    if (!in && in_len)
        return CKR_ARGUMENTS_BAD;
    if (in_len > MOST_AT_ONCE && out_len) { /* a part that was sent cannot be taken back: is there room for what comes at the end? */
        CK_ULONG size = 0;
        CK_RV rv = sign(CALL_SIGN_MESSAGE_NEXT, session, parameter, parameter_len, NULL, 0, NULL, &size);
        if (rv != CKR_OK || !out || *out_len < size) {
            *out_len = rv == CKR_OK ? size : *out_len;
            return rv == CKR_OK && out ? CKR_BUFFER_TOO_SMALL : rv;
        }
    }
    for (; in_len > MOST_AT_ONCE; in += MOST_AT_ONCE, in_len -= MOST_AT_ONCE) {
        CK_RV rv = sign(CALL_SIGN_MESSAGE_NEXT, session, parameter, parameter_len, in, MOST_AT_ONCE, NULL, NULL);
        if (rv != CKR_OK)
            return rv;
    }
    return sign(CALL_SIGN_MESSAGE_NEXT, session, parameter, parameter_len, in, in_len, out, out_len);
}

/* A message in one part that no request holds: as many parts, where the mechanism has them. */
static CK_RV begun_in_parts(CK_RV rv)
{
    return rv == CKR_FUNCTION_NOT_SUPPORTED ? CKR_DATA_LEN_RANGE : rv;
}

CK_RV C_SignMessage(CK_SESSION_HANDLE session, void *parameter, CK_ULONG parameter_len, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out,
                    CK_ULONG *out_len)
{
    if ((!in && in_len) || !out_len)
        return CKR_ARGUMENTS_BAD;
    if (in_len <= MOST_AT_ONCE)
        return sign(CALL_SIGN_MESSAGE, session, parameter, parameter_len, in, in_len, out, out_len);
    CK_ULONG size = 0;
    CK_RV rv = sign(CALL_SIGN_MESSAGE, session, parameter, parameter_len, NULL, 0, NULL, &size);
    if (rv != CKR_OK)
        return rv;
    if (!out || *out_len < size) {
        *out_len = size;
        return out ? CKR_BUFFER_TOO_SMALL : CKR_OK;
    }
    rv = begun_in_parts(C_SignMessageBegin(session, parameter, parameter_len));
    return rv == CKR_OK ? C_SignMessageNext(session, parameter, parameter_len, in, in_len, out, out_len) : rv;
}

/* VerifyMessage and VerifyMessageNext; `signature` NULL = more follows. */
static CK_RV verify(uint32_t id, CK_SESSION_HANDLE session, const void *parameter, CK_ULONG parameter_len, const CK_BYTE *in,
                    CK_ULONG in_len, const CK_BYTE *signature, CK_ULONG signature_len)
{
    struct step step;
    CK_RV rv = find(&step, &MESSAGE_VERIFY, session);
    if (rv != CKR_OK)
        return rv;
    rv = begin(&step, id);
    if (rv == CKR_OK) {
        put_bytes(step.call.out, parameter, parameter_len);
        put_bytes(step.call.out, in ? in : nothing, in_len);
        put_bytes(step.call.out, signature, signature ? signature_len : 0);
        rv = run(&step);
    }
    return end(&step, rv);
}

CK_RV C_VerifyMessageBegin(CK_SESSION_HANDLE session, void *parameter, CK_ULONG parameter_len)
{
    struct step step;
    CK_RV rv = find(&step, &MESSAGE_VERIFY, session);
    if (rv != CKR_OK)
        return rv;
    rv = begin(&step, CALL_VERIFY_MESSAGE_BEGIN);
    if (rv == CKR_OK) {
        put_bytes(step.call.out, parameter, parameter_len);
        rv = run(&step);
    }
    return end(&step, rv);
}

CK_RV C_VerifyMessageNext(CK_SESSION_HANDLE session, void *parameter, CK_ULONG parameter_len, CK_BYTE *in, CK_ULONG in_len,
                          CK_BYTE *signature, CK_ULONG signature_len)
{
    if (!in && in_len)
        return CKR_ARGUMENTS_BAD;
    for (; in_len > MOST_AT_ONCE; in += MOST_AT_ONCE, in_len -= MOST_AT_ONCE) {
        CK_RV rv = verify(CALL_VERIFY_MESSAGE_NEXT, session, parameter, parameter_len, in, MOST_AT_ONCE, NULL, 0);
        if (rv != CKR_OK)
            return rv;
    }
    return verify(CALL_VERIFY_MESSAGE_NEXT, session, parameter, parameter_len, in, in_len, signature, signature_len);
}

CK_RV C_VerifyMessage(CK_SESSION_HANDLE session, void *parameter, CK_ULONG parameter_len, CK_BYTE *in, CK_ULONG in_len,
                      CK_BYTE *signature, CK_ULONG signature_len)
{
    if ((!in && in_len) || !signature)
        return CKR_ARGUMENTS_BAD;
    if (in_len <= MOST_AT_ONCE)
        return verify(CALL_VERIFY_MESSAGE, session, parameter, parameter_len, in, in_len, signature, signature_len);
    CK_RV rv = begun_in_parts(C_VerifyMessageBegin(session, parameter, parameter_len));
    return rv == CKR_OK ? C_VerifyMessageNext(session, parameter, parameter_len, in, in_len, signature, signature_len) : rv;
}

/* ---- encryption and decryption ---- */

static CK_RV cipher_init(const struct kind *kind, CK_SESSION_HANDLE session, const CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    struct parameter found;
    if (mechanism && mechanism->pParameter && mechanism->ulParameterLen) {
        CK_RV rv = parameter_find(mechanism->mechanism, mechanism->pParameter, mechanism->ulParameterLen, &found);
        if (rv != CKR_OK)
            return rv;
    }
    CK_RV rv = operation_init(kind, session, mechanism, key, NULL);
    struct session *s = rv == CKR_OK && mechanism ? session_find(session) : NULL;
    if (s)
        s->messages[kind->operation] = mechanism->mechanism;
    return rv;
}

CK_RV C_MessageEncryptInit(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    return cipher_init(&MESSAGE_ENCRYPT, session, mechanism, key);
}

CK_RV C_MessageDecryptInit(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    return cipher_init(&MESSAGE_DECRYPT, session, mechanism, key);
}

CK_RV C_MessageEncryptFinal(CK_SESSION_HANDLE session)
{
    return finish(&MESSAGE_ENCRYPT, CALL_MESSAGE_ENCRYPT_FINAL, session);
}

CK_RV C_MessageDecryptFinal(CK_SESSION_HANDLE session)
{
    return finish(&MESSAGE_DECRYPT, CALL_MESSAGE_DECRYPT_FINAL, session);
}

/* Begins a call with the parameter of a message. */
static CK_RV begin_with(struct step *step, const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, const void *parameter,
                        CK_ULONG parameter_len, struct parameter *found)
{
    CK_RV rv = find(step, kind, session);
    if (rv != CKR_OK)
        return rv;
    CK_MECHANISM_TYPE type = step->session->messages[kind->operation];
    rv = parameter_find(type, parameter, parameter_len, found);
    if (rv != CKR_OK)
        return rv;
    rv = begin(step, id);
    if (rv == CKR_OK)
        put_parameter(step->call.out, type, parameter, kind == &MESSAGE_DECRYPT);
    return rv;
}

static CK_RV cipher_begin(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, const void *parameter, CK_ULONG parameter_len,
                          const CK_BYTE *data, CK_ULONG data_len)
{
    if (!data && data_len)
        return CKR_ARGUMENTS_BAD;
    struct step step;
    struct parameter found;
    CK_RV rv = begin_with(&step, kind, id, session, parameter, parameter_len, &found);
    if (rv == CKR_OK) {
        put_bytes(step.call.out, data ? data : nothing, data_len);
        rv = run(&step);
        if (rv == CKR_OK && kind == &MESSAGE_ENCRYPT)
            get_nonce(&step.call.reply, &found);
    }
    return end(&step, rv);
}

CK_RV C_EncryptMessageBegin(CK_SESSION_HANDLE session, void *parameter, CK_ULONG parameter_len, CK_BYTE *data, CK_ULONG data_len)
{
    return cipher_begin(&MESSAGE_ENCRYPT, CALL_ENCRYPT_MESSAGE_BEGIN, session, parameter, parameter_len, data, data_len);
}

CK_RV C_DecryptMessageBegin(CK_SESSION_HANDLE session, void *parameter, CK_ULONG parameter_len, CK_BYTE *data, CK_ULONG data_len)
{
    return cipher_begin(&MESSAGE_DECRYPT, CALL_DECRYPT_MESSAGE_BEGIN, session, parameter, parameter_len, data, data_len);
}

static CK_RV cipher_next(const struct kind *kind, uint32_t id, CK_SESSION_HANDLE session, const void *parameter, CK_ULONG parameter_len,
                         const CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len, CK_FLAGS flags)
{
    if ((!in && in_len) || !out_len)
        return CKR_ARGUMENTS_BAD;
    if (in_len > MOST_AT_ONCE)
        return CKR_DATA_LEN_RANGE; /* parts are the caller's to make */
    struct step step;
    struct parameter found;
    CK_RV rv = begin_with(&step, kind, id, session, parameter, parameter_len, &found);
    if (rv == CKR_OK) {
        put_bytes(step.call.out, in ? in : nothing, in_len);
        put_room(step.call.out, out, *out_len);
        put_ulong(step.call.out, flags);
        rv = run(&step);
        if (rv == CKR_OK && kind == &MESSAGE_ENCRYPT)
            rv = get_tag_and_output(&step.call.reply, &found, out, out_len, flags & CKF_END_OF_MESSAGE);
        else if (rv == CKR_OK)
            rv = get_output(&step.call.reply, out, out_len);
    }
    return end(&step, rv);
}

CK_RV C_EncryptMessageNext(CK_SESSION_HANDLE session, void *parameter, CK_ULONG parameter_len, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out,
                           CK_ULONG *out_len, CK_FLAGS flags)
{
    return cipher_next(&MESSAGE_ENCRYPT, CALL_ENCRYPT_MESSAGE_NEXT, session, parameter, parameter_len, in, in_len, out, out_len, flags);
}

CK_RV C_DecryptMessageNext(CK_SESSION_HANDLE session, void *parameter, CK_ULONG parameter_len, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out,
                           CK_ULONG *out_len, CK_FLAGS flags)
{
    return cipher_next(&MESSAGE_DECRYPT, CALL_DECRYPT_MESSAGE_NEXT, session, parameter, parameter_len, in, in_len, out, out_len, flags);
}

typedef CK_RV (*begin_function)(CK_SESSION_HANDLE, void *, CK_ULONG, CK_BYTE *, CK_ULONG);
typedef CK_RV (*next_function)(CK_SESSION_HANDLE, void *, CK_ULONG, CK_BYTE *, CK_ULONG, CK_BYTE *, CK_ULONG *, CK_FLAGS);

/* What comes out of a message is as long as what goes in. */
static CK_RV whole_in_parts(begin_function begin_message, next_function next, CK_SESSION_HANDLE session, void *parameter,
                            CK_ULONG parameter_len, CK_BYTE *data, CK_ULONG data_len, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out,
                            CK_ULONG *out_len)
{
    if (!out || *out_len < in_len) {
        *out_len = in_len;
        return out ? CKR_BUFFER_TOO_SMALL : CKR_OK;
    }
    CK_RV rv = begin_message(session, parameter, parameter_len, data, data_len);
    CK_ULONG written = 0;
    while (rv == CKR_OK && in_len) {
        CK_ULONG part = in_len < MOST_AT_ONCE ? in_len : MOST_AT_ONCE, room = *out_len - written;
        rv = next(session, parameter, parameter_len, in, part, out + written, &room, part == in_len ? CKF_END_OF_MESSAGE : 0);
        in += part;
        in_len -= part;
        written += rv == CKR_OK ? room : 0;
    }
    if (rv == CKR_OK)
        *out_len = written;
    return rv;
}

CK_RV C_EncryptMessage(CK_SESSION_HANDLE session, void *parameter, CK_ULONG parameter_len, CK_BYTE *data, CK_ULONG data_len, CK_BYTE *in,
                       CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    if ((!in && in_len) || (!data && data_len) || !out_len)
        return CKR_ARGUMENTS_BAD;
    if (in_len > MOST_AT_ONCE)
        return whole_in_parts(C_EncryptMessageBegin, C_EncryptMessageNext, session, parameter, parameter_len, data, data_len, in, in_len,
                              out, out_len);
    struct step step;
    struct parameter found;
    CK_RV rv = begin_with(&step, &MESSAGE_ENCRYPT, CALL_ENCRYPT_MESSAGE, session, parameter, parameter_len, &found);
    if (rv == CKR_OK) {
        put_bytes(step.call.out, data ? data : nothing, data_len);
        put_bytes(step.call.out, in ? in : nothing, in_len);
        put_room(step.call.out, out, *out_len);
        rv = run(&step);
        if (rv == CKR_OK) {
            get_nonce(&step.call.reply, &found);
            rv = get_tag_and_output(&step.call.reply, &found, out, out_len, true);
        }
    }
    return end(&step, rv);
}

CK_RV C_DecryptMessage(CK_SESSION_HANDLE session, void *parameter, CK_ULONG parameter_len, CK_BYTE *data, CK_ULONG data_len, CK_BYTE *in,
                       CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)
{
    if ((!in && in_len) || (!data && data_len) || !out_len)
        return CKR_ARGUMENTS_BAD;
    if (in_len > MOST_AT_ONCE)
        return whole_in_parts(C_DecryptMessageBegin, C_DecryptMessageNext, session, parameter, parameter_len, data, data_len, in, in_len,
                              out, out_len);
    struct step step;
    struct parameter found;
    CK_RV rv = begin_with(&step, &MESSAGE_DECRYPT, CALL_DECRYPT_MESSAGE, session, parameter, parameter_len, &found);
    if (rv == CKR_OK) {
        put_bytes(step.call.out, data ? data : nothing, data_len);
        put_bytes(step.call.out, in ? in : nothing, in_len);
        put_room(step.call.out, out, *out_len);
        rv = run(&step);
        if (rv == CKR_OK)
            rv = get_output(&step.call.reply, out, out_len);
    }
    return end(&step, rv);
}
