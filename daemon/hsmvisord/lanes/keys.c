/* Signatures by Debian's libcrypto. */
#define OPENSSL_SUPPRESS_DEPRECATED /* ECDSA_do_sign: see sign_ecdsa */
#include "lanes.h"

#include <openssl/crypto.h>
#include <openssl/ecdsa.h>
#include <openssl/err.h>
#include <openssl/rsa.h>
#include <openssl/x509.h>
#include <stdlib.h>

struct key *key_new(const uint8_t *der, size_t length, int kind, size_t size)
{
    struct key *key = calloc(1, sizeof *key);
    if (!key)
        return NULL;
    key->pkey = d2i_AutoPrivateKey(NULL, &der, (long)length);
    key->kind = (enum kind)kind;
    key->size = size;
    if (key->pkey && size <= MAX_SIGNATURE)
        return key;
    ERR_clear_error();
    key_free(key);
    return NULL;
}

void key_free(struct key *key)
{
    EVP_PKEY_free(key->pkey); /* overwrites the private numbers with the last reference */
    free(key);
}

bool key_sign(struct key *key, const uint8_t *data, size_t length, uint8_t *signature)
{
    struct signer signer;
    bool good = signer_begin(&signer, key) && signer_sign(&signer, data, length, signature);
    signer_end(&signer);
    return good;
}

bool signer_begin(struct signer *signer, const struct key *key)
{
    *signer = (struct signer){.pkey = key->pkey, .kind = key->kind, .size = key->size};
    EVP_PKEY_up_ref(key->pkey);
    if (key->kind == KIND_ED25519)
        return (signer->message = EVP_MD_CTX_new()) != NULL;
    if (key->kind == KIND_ECDSA)
        return (signer->ec = EVP_PKEY_get1_EC_KEY(key->pkey)) != NULL;
    signer->context = EVP_PKEY_CTX_new(key->pkey, NULL);
    bool good = signer->context && EVP_PKEY_sign_init(signer->context) > 0 &&
                EVP_PKEY_CTX_set_rsa_padding(signer->context, RSA_PKCS1_PADDING) > 0;
    if (!good)
        ERR_clear_error();
    return good;
}

void signer_end(struct signer *signer)
{
    EVP_PKEY_CTX_free(signer->context);
    EVP_MD_CTX_free(signer->message);
    EC_KEY_free(signer->ec);
    EVP_PKEY_free(signer->pkey);
    *signer = (struct signer){0};
}

/* r || s of fixed size (PKCS#11 3.1, 6.3.1).  By the older interface, which gives the two numbers: by way of EVP_PKEY_sign they are
 * packed in DER and unpacked again, and eight threads make a twentieth fewer signatures. */
static bool sign_ecdsa(struct signer *signer, const uint8_t *data, size_t length, uint8_t *signature)
{
    ECDSA_SIG *parts = ECDSA_do_sign(data, (int)length, signer->ec);
    if (!parts)
        return false;
    int half = (int)(signer->size / 2);
    bool good = BN_bn2binpad(ECDSA_SIG_get0_r(parts), signature, half) == half &&
                BN_bn2binpad(ECDSA_SIG_get0_s(parts), signature + half, half) == half;
    ECDSA_SIG_free(parts);
    return good;
}

bool signer_sign(struct signer *signer, const uint8_t *data, size_t length, uint8_t *signature)
{
    size_t size = signer->size;
    bool good = false;
    switch (signer->kind) {
    case KIND_ECDSA:
        good = sign_ecdsa(signer, data, length, signature);
        break;
    case KIND_RSA:
        good = EVP_PKEY_sign(signer->context, signature, &size, data, length) > 0 && size == signer->size;
        break;
    case KIND_ED25519:
        good = EVP_DigestSignInit(signer->message, NULL, NULL, NULL, signer->pkey) > 0 &&
               EVP_DigestSign(signer->message, signature, &size, data, length) > 0 && size == signer->size;
        EVP_MD_CTX_reset(signer->message);
        break;
    }
    if (!good)
        ERR_clear_error();
    return good;
}
