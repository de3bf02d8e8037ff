#include "parameters.h"

#include <string.h>

#include "fields.h"

#define MOST_TAG 16u
#define TAG_OF_CHACHA 16u

CK_RV parameter_find(CK_MECHANISM_TYPE type, const void *parameter, CK_ULONG length, struct parameter *found)
{
    if (!parameter)
        return CKR_MECHANISM_PARAM_INVALID;
    if (type == CKM_AES_GCM && length == sizeof(CK_GCM_MESSAGE_PARAMS)) {
        const CK_GCM_MESSAGE_PARAMS *gcm = parameter;
        *found = (struct parameter){gcm->pIv, gcm->ulIvLen, gcm->pTag, gcm->ulTagBits / 8};
    } else if (type == CKM_AES_CCM && length == sizeof(CK_CCM_MESSAGE_PARAMS)) {
        const CK_CCM_MESSAGE_PARAMS *ccm = parameter;
        *found = (struct parameter){ccm->pNonce, ccm->ulNonceLen, ccm->pMAC, ccm->ulMACLen};
    } else if (type == CKM_CHACHA20_POLY1305 && length == sizeof(CK_SALSA20_CHACHA20_POLY1305_MSG_PARAMS)) {
        const CK_SALSA20_CHACHA20_POLY1305_MSG_PARAMS *chacha = parameter;
        *found = (struct parameter){chacha->pNonce, chacha->ulNonceLen, chacha->pTag, TAG_OF_CHACHA};
    } else {
        return CKR_MECHANISM_PARAM_INVALID;
    }
    bool promised = found->nonce_len && !found->nonce; /* and not there */
    return !promised && found->tag_len <= MOST_TAG ? CKR_OK : CKR_MECHANISM_PARAM_INVALID;
}

void put_parameter(struct writer *w, CK_MECHANISM_TYPE type, const void *parameter, bool checked)
{
    const CK_GCM_MESSAGE_PARAMS *gcm = parameter;
    const CK_CCM_MESSAGE_PARAMS *ccm = parameter;
    const CK_SALSA20_CHACHA20_POLY1305_MSG_PARAMS *chacha = parameter;
    put_ulong(w, type);
    switch (type) {
    case CKM_AES_GCM:
        fields_begin(w, 5);
        field_b(w, gcm->pIv, gcm->ulIvLen);
        field_u(w, gcm->ulIvFixedBits);
        field_u(w, gcm->ivGenerator);
        field_b(w, checked ? gcm->pTag : NULL, gcm->ulTagBits / 8);
        field_u(w, gcm->ulTagBits);
        break;
    case CKM_AES_CCM:
        fields_begin(w, 6);
        field_u(w, ccm->ulDataLen);
        field_b(w, ccm->pNonce, ccm->ulNonceLen);
        field_u(w, ccm->ulNonceFixedBits);
        field_u(w, ccm->nonceGenerator);
        field_b(w, checked ? ccm->pMAC : NULL, ccm->ulMACLen);
        field_u(w, ccm->ulMACLen);
        break;
    default:
        fields_begin(w, 2);
        field_b(w, chacha->pNonce, chacha->ulNonceLen);
        field_b(w, checked ? chacha->pTag : NULL, TAG_OF_CHACHA);
    }
}

void put_message_mechanism(struct writer *w, const CK_MECHANISM *m)
{
    struct parameter found;
    if (m && m->pParameter && parameter_find(m->mechanism, m->pParameter, m->ulParameterLen, &found) == CKR_OK)
        put_parameter(w, m->mechanism, m->pParameter, false);
    else
        put_mechanism(w, m);
}

/* NULL with `failed` unless there are `room` bytes, or none. */
static const uint8_t *get_place(struct reader *r, const void *place, CK_ULONG room, CK_ULONG *length)
{
    bool valid = get_u8(r);
    *length = get_u32(r);
    const uint8_t *at = get_raw(r, *length);
    if (!valid || (*length && (!place || *length != room)))
        r->failed = true;
    return r->failed ? NULL : at;
}

void get_nonce(struct reader *r, const struct parameter *p)
{
    CK_ULONG length;
    const uint8_t *at = get_place(r, p->nonce, p->nonce_len, &length);
    if (at && length)
        memcpy(p->nonce, at, length);
}

CK_RV get_tag_and_output(struct reader *r, const struct parameter *p, CK_BYTE *out, CK_ULONG *out_len, bool tagged)
{
    CK_ULONG length;
    const uint8_t *at = get_place(r, p->tag, p->tag_len, &length);
    CK_RV rv = get_output(r, out, out_len);
    bool whole = rv == CKR_OK && out && tagged; /* else it is a question, or there is more to come */
    if (r->failed || whole != (length != 0)) {
        r->failed = true;
        return CKR_DEVICE_ERROR;
    }
    if (whole)
        memcpy(p->tag, at, length);
    return rv;
}
