/* Mechanisms as fields: a parameter that holds pointers cannot travel as memory (NATIVE.md, "Mechanism"). */
#include "message.h"

enum { PARAMETER_ABSENT, PARAMETER_RAW, PARAMETER_FIELDS, MECHANISM_NULL = 255 };

static void field_u(struct writer *w, CK_ULONG value)
{
    put_u8(w, 'u');
    put_ulong(w, value);
}

static void field_b(struct writer *w, const void *data, CK_ULONG length)
{
    put_u8(w, 'b');
    put_text(w, data, data ? length : 0);
}

static bool is_pss(CK_MECHANISM_TYPE type)
{
    switch (type) {
    case CKM_RSA_PKCS_PSS:
    case 0x0E: /* CKM_SHA1_RSA_PKCS_PSS */
    case 0x43: /* SHA256, SHA384, SHA512, SHA224 */
    case 0x44:
    case 0x45:
    case 0x47:
    case 0x63: /* SHA3-256, SHA3-384, SHA3-512, SHA3-224 */
    case 0x64:
    case 0x65:
    case 0x67:
        return true;
    default:
        return false;
    }
}

/* Writes the fields of a parameter that it knows by type and size; false for any other. */
static bool put_fields(struct writer *w, const CK_MECHANISM *m)
{
    const void *p = m->pParameter;
    CK_ULONG size = m->ulParameterLen;
    if (is_pss(m->mechanism) && size == sizeof(CK_RSA_PKCS_PSS_PARAMS)) {
        const CK_RSA_PKCS_PSS_PARAMS *pss = p;
        put_u8(w, PARAMETER_FIELDS);
        put_u8(w, 3);
        field_u(w, pss->hashAlg);
        field_u(w, pss->mgf);
        field_u(w, pss->sLen);
    } else if (m->mechanism == CKM_RSA_PKCS_OAEP && size == sizeof(CK_RSA_PKCS_OAEP_PARAMS)) {
        const CK_RSA_PKCS_OAEP_PARAMS *oaep = p;
        put_u8(w, PARAMETER_FIELDS);
        put_u8(w, 4);
        field_u(w, oaep->hashAlg);
        field_u(w, oaep->mgf);
        field_u(w, oaep->source);
        field_b(w, oaep->pSourceData, oaep->ulSourceDataLen);
    } else if ((m->mechanism == CKM_ECDH1_DERIVE || m->mechanism == CKM_ECDH1_COFACTOR_DERIVE) &&
               size == sizeof(CK_ECDH1_DERIVE_PARAMS)) {
        const CK_ECDH1_DERIVE_PARAMS *ecdh = p;
        put_u8(w, PARAMETER_FIELDS);
        put_u8(w, 3);
        field_u(w, ecdh->kdf);
        field_b(w, ecdh->pSharedData, ecdh->ulSharedDataLen);
        field_b(w, ecdh->pPublicData, ecdh->ulPublicDataLen);
    } else if (m->mechanism == CKM_EDDSA && size == sizeof(CK_EDDSA_PARAMS)) {
        const CK_EDDSA_PARAMS *eddsa = p;
        put_u8(w, PARAMETER_FIELDS);
        put_u8(w, 2);
        field_u(w, eddsa->phFlag);
        field_b(w, eddsa->pContextData, eddsa->ulContextDataLen);
    } else if (m->mechanism == CKM_ML_DSA && size == sizeof(CK_SIGN_ADDITIONAL_CONTEXT)) {
        const CK_SIGN_ADDITIONAL_CONTEXT *context = p;
        put_u8(w, PARAMETER_FIELDS);
        put_u8(w, 2);
        field_u(w, context->hedgeVariant);
        field_b(w, context->pContext, context->ulContextLen);
    } else {
        return false;
    }
    return true;
}

void put_mechanism(struct writer *w, const CK_MECHANISM *m)
{
    if (!m) {
        put_u64(w, 0);
        put_u8(w, MECHANISM_NULL);
        return;
    }
    put_ulong(w, m->mechanism);
    if (!m->pParameter || !m->ulParameterLen) {
        put_u8(w, PARAMETER_ABSENT);
    } else if (!put_fields(w, m)) {
        put_u8(w, PARAMETER_RAW);
        put_text(w, m->pParameter, m->ulParameterLen);
    }
}
