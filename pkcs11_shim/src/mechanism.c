/* Mechanisms as fields: a parameter that holds pointers cannot travel as memory (NATIVE.md, "Mechanism"). */
#include <string.h>

#include "fields.h"

enum { PARAMETER_ABSENT, PARAMETER_RAW, PARAMETER_FIELDS, MECHANISM_NULL = 255 };

void field_u(struct writer *w, CK_ULONG value)
{
    put_u8(w, 'u');
    put_ulong(w, value);
}

void field_b(struct writer *w, const void *data, CK_ULONG length)
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

/* Mechanisms whose parameter is the length of the MAC. */
static bool is_general_mac(CK_MECHANISM_TYPE type)
{
    switch (type) {
    case CKM_AES_MAC_GENERAL:
    case CKM_AES_CMAC_GENERAL:
    case 0x222: /* CKM_SHA_1_HMAC_GENERAL */
    case 0x257: /* SHA224, SHA256, SHA384, SHA512, SHA512/224, SHA512/256 */
    case 0x252:
    case 0x262:
    case 0x272:
    case 0x4A:
    case 0x4E:
    case 0x2B7: /* SHA3-224, SHA3-256, SHA3-384, SHA3-512 */
    case 0x2B2:
    case 0x2C2:
    case 0x2D2:
        return true;
    default:
        return false;
    }
}

void fields_begin(struct writer *w, uint8_t items)
{
    put_u8(w, PARAMETER_FIELDS);
    put_u8(w, items);
}

static void oaep_fields(struct writer *w, const CK_RSA_PKCS_OAEP_PARAMS *oaep)
{
    field_u(w, oaep->hashAlg);
    field_u(w, oaep->mgf);
    field_u(w, oaep->source);
    field_b(w, oaep->pSourceData, oaep->ulSourceDataLen);
}

#define MOST_DATA_PARAMETERS 8u

/* How many items a data parameter has; 0 for one that cannot be written. */
static uint8_t prf_items(const CK_PRF_DATA_PARAM *part)
{
    switch (part->type) {
    case CK_SP800_108_ITERATION_VARIABLE:
    case CK_SP800_108_COUNTER:
        return part->pValue && part->ulValueLen == sizeof(CK_SP800_108_COUNTER_FORMAT) ? 3 : 0;
    case CK_SP800_108_DKM_LENGTH:
        return part->pValue && part->ulValueLen == sizeof(CK_SP800_108_DKM_LENGTH_FORMAT) ? 4 : 0;
    default:
        return 2;
    }
}

static bool put_sp800_108(struct writer *w, const CK_SP800_108_KDF_PARAMS *kdf)
{
    uint8_t items = 1;
    if (kdf->ulNumberOfDataParams > MOST_DATA_PARAMETERS || (kdf->ulNumberOfDataParams && !kdf->pDataParams) ||
        kdf->ulAdditionalDerivedKeys)
        return false;
    for (CK_ULONG n = 0; n < kdf->ulNumberOfDataParams; n++) {
        uint8_t more = prf_items(&kdf->pDataParams[n]);
        if (!more)
            return false;
        items = (uint8_t)(items + more);
    }
    fields_begin(w, items);
    field_u(w, kdf->prfType);
    for (CK_ULONG n = 0; n < kdf->ulNumberOfDataParams; n++) {
        const CK_PRF_DATA_PARAM *part = &kdf->pDataParams[n];
        const CK_SP800_108_COUNTER_FORMAT *counter = part->pValue;
        const CK_SP800_108_DKM_LENGTH_FORMAT *length = part->pValue;
        field_u(w, part->type);
        switch (prf_items(part)) {
        case 3:
            field_u(w, counter->bLittleEndian);
            field_u(w, counter->ulWidthInBits);
            break;
        case 4:
            field_u(w, length->dkmLengthMethod);
            field_u(w, length->bLittleEndian);
            field_u(w, length->ulWidthInBits);
            break;
        default:
            field_b(w, part->pValue, part->ulValueLen);
        }
    }
    return true;
}

/* Parameters of signatures, of RSA and of agreement. */
static bool put_asymmetric(struct writer *w, const CK_MECHANISM *m)
{
    const void *p = m->pParameter;
    CK_ULONG size = m->ulParameterLen;
    if (is_pss(m->mechanism) && size == sizeof(CK_RSA_PKCS_PSS_PARAMS)) {
        const CK_RSA_PKCS_PSS_PARAMS *pss = p;
        fields_begin(w, 3);
        field_u(w, pss->hashAlg);
        field_u(w, pss->mgf);
        field_u(w, pss->sLen);
    } else if (m->mechanism == CKM_RSA_PKCS_OAEP && size == sizeof(CK_RSA_PKCS_OAEP_PARAMS)) {
        fields_begin(w, 4);
        oaep_fields(w, p);
    } else if (m->mechanism == CKM_RSA_AES_KEY_WRAP && size == sizeof(CK_RSA_AES_KEY_WRAP_PARAMS)) {
        const CK_RSA_AES_KEY_WRAP_PARAMS *wrap = p;
        if (!wrap->pOAEPParams)
            return false;
        fields_begin(w, 5);
        field_u(w, wrap->ulAESKeyBits);
        oaep_fields(w, wrap->pOAEPParams);
    } else if ((m->mechanism == CKM_ECDH1_DERIVE || m->mechanism == CKM_ECDH1_COFACTOR_DERIVE) &&
               size == sizeof(CK_ECDH1_DERIVE_PARAMS)) {
        const CK_ECDH1_DERIVE_PARAMS *ecdh = p;
        fields_begin(w, 3);
        field_u(w, ecdh->kdf);
        field_b(w, ecdh->pSharedData, ecdh->ulSharedDataLen);
        field_b(w, ecdh->pPublicData, ecdh->ulPublicDataLen);
    } else if (m->mechanism == CKM_EDDSA && size == sizeof(CK_EDDSA_PARAMS)) {
        const CK_EDDSA_PARAMS *eddsa = p;
        if (eddsa->ulContextDataLen && !eddsa->pContextData)
            return false; /* not a signature without the context */
        fields_begin(w, 2);
        field_u(w, eddsa->phFlag);
        field_b(w, eddsa->pContextData, eddsa->ulContextDataLen);
    } else if (m->mechanism == CKM_ML_DSA && size == sizeof(CK_SIGN_ADDITIONAL_CONTEXT)) {
        const CK_SIGN_ADDITIONAL_CONTEXT *context = p;
        if (context->ulContextLen && !context->pContext)
            return false;
        fields_begin(w, 2);
        field_u(w, context->hedgeVariant);
        field_b(w, context->pContext, context->ulContextLen);
    } else {
        return false;
    }
    return true;
}

/* Parameters of secret keys. */
static bool put_symmetric(struct writer *w, const CK_MECHANISM *m)
{
    const void *p = m->pParameter;
    CK_ULONG size = m->ulParameterLen, type = m->mechanism;
    if (type == CKM_AES_CTR && size == sizeof(CK_AES_CTR_PARAMS)) {
        const CK_AES_CTR_PARAMS *ctr = p;
        fields_begin(w, 2);
        field_u(w, ctr->ulCounterBits);
        field_b(w, ctr->cb, sizeof ctr->cb);
    } else if ((type == CKM_AES_GCM || type == CKM_AES_GMAC) && size == sizeof(CK_GCM_PARAMS)) {
        const CK_GCM_PARAMS *gcm = p;
        fields_begin(w, 4);
        field_b(w, gcm->pIv, gcm->ulIvLen);
        field_u(w, gcm->ulIvBits);
        field_b(w, gcm->pAAD, gcm->ulAADLen);
        field_u(w, gcm->ulTagBits);
    } else if (type == CKM_AES_CCM && size == sizeof(CK_CCM_PARAMS)) {
        const CK_CCM_PARAMS *ccm = p;
        fields_begin(w, 4);
        field_u(w, ccm->ulDataLen);
        field_b(w, ccm->pNonce, ccm->ulNonceLen);
        field_b(w, ccm->pAAD, ccm->ulAADLen);
        field_u(w, ccm->ulMACLen);
    } else if (type == CKM_CHACHA20_POLY1305 && size == sizeof(CK_SALSA20_CHACHA20_POLY1305_PARAMS)) {
        const CK_SALSA20_CHACHA20_POLY1305_PARAMS *chacha = p;
        fields_begin(w, 2);
        field_b(w, chacha->pNonce, chacha->ulNonceLen);
        field_b(w, chacha->pAAD, chacha->ulAADLen);
    } else if (is_general_mac(type) && size == sizeof(CK_ULONG)) {
        CK_ULONG length;
        memcpy(&length, p, sizeof length);
        fields_begin(w, 1);
        field_u(w, length);
    } else if ((type == CKM_HKDF_DERIVE || type == CKM_HKDF_DATA) && size == sizeof(CK_HKDF_PARAMS)) {
        const CK_HKDF_PARAMS *hkdf = p;
        fields_begin(w, 7);
        field_u(w, hkdf->bExtract);
        field_u(w, hkdf->bExpand);
        field_u(w, hkdf->prfHashMechanism);
        field_u(w, hkdf->ulSaltType);
        field_b(w, hkdf->pSalt, hkdf->ulSaltLen);
        field_u(w, hkdf->hSaltKey);
        field_b(w, hkdf->pInfo, hkdf->ulInfoLen);
    } else if (type == CKM_AES_ECB_ENCRYPT_DATA && size == sizeof(CK_KEY_DERIVATION_STRING_DATA)) {
        const CK_KEY_DERIVATION_STRING_DATA *string = p;
        fields_begin(w, 1);
        field_b(w, string->pData, string->ulLen);
    } else if (type == CKM_AES_CBC_ENCRYPT_DATA && size == sizeof(CK_AES_CBC_ENCRYPT_DATA_PARAMS)) {
        const CK_AES_CBC_ENCRYPT_DATA_PARAMS *cbc = p;
        fields_begin(w, 2);
        field_b(w, cbc->iv, sizeof cbc->iv);
        field_b(w, cbc->pData, cbc->length);
    } else if (type == CKM_SP800_108_COUNTER_KDF && size == sizeof(CK_SP800_108_KDF_PARAMS)) {
        return put_sp800_108(w, p);
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
    } else if (!put_asymmetric(w, m) && !put_symmetric(w, m)) {
        put_u8(w, PARAMETER_RAW);
        put_text(w, m->pParameter, m->ulParameterLen);
    }
}
