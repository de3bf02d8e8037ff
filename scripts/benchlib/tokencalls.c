/* The calls that tokenbench measures, each on objects of its own. */
#include "tokenbench.h"

#include <stdint.h>
#include <string.h>

#ifndef CKM_EC_EDWARDS_KEY_PAIR_GEN
#define CKM_EC_EDWARDS_KEY_PAIR_GEN 0x1055UL
#endif

#define BATCH 1000u /* handles of one C_FindObjects */
#define POOL 8u     /* messages that are decrypted in turn */
#define TAG 16u
#define SLACK 128u /* room beyond what comes out */
#define MIB (1u << 20)
#define LABEL "object-%06lu"
#define ANOTHER 999999u /* the number of an object that is made beside them */

static CK_BBOOL yes = CK_TRUE, no = CK_FALSE;
static unsigned char *data, *sealed[POOL], *out;
static CK_ULONG sealed_len[POOL];
static unsigned char ivs[POOL][12];
static unsigned turn;
static CK_OBJECT_HANDLE key, made[2];
static CK_SESSION_HANDLE opened;

static CK_RV generate(CK_MECHANISM_TYPE type, CK_OBJECT_CLASS class, CK_KEY_TYPE kind, CK_ATTRIBUTE_TYPE may, CK_ATTRIBUTE_TYPE also)
{
    CK_MECHANISM m = {type, NULL, 0};
    CK_ULONG length = 32;
    CK_ATTRIBUTE t[] = {{CKA_CLASS, &class, sizeof class}, {CKA_KEY_TYPE, &kind, sizeof kind}, {CKA_VALUE_LEN, &length, sizeof length},
                        {CKA_TOKEN, &no, 1}, {may, &yes, 1}, {also, &yes, 1}};
    return p11->C_GenerateKey(session, &m, t, 6, &key);
}

static void destroy_key(const struct measure *m)
{
    (void)m;
    check(p11->C_DestroyObject(session, key), "C_DestroyObject");
}

static CK_RV null_once(const struct measure *m)
{
    CK_SESSION_INFO info;
    (void)m;
    return p11->C_GetSessionInfo(session, &info);
}

static CK_RV session_once(const struct measure *m)
{
    (void)m;
    CK_RV rv = p11->C_OpenSession(slot, CKF_SERIAL_SESSION, NULL, NULL, &opened);
    return rv == CKR_OK ? p11->C_CloseSession(opened) : rv;
}

/* ---- searches */

static CK_RV find(CK_ATTRIBUTE *t, CK_ULONG n, CK_ULONG wanted)
{
    static CK_OBJECT_HANDLE found[BATCH];
    CK_ULONG count, all = 0;
    CK_RV rv = p11->C_FindObjectsInit(session, t, n);
    if (rv != CKR_OK)
        return rv;
    do {
        rv = p11->C_FindObjects(session, found, BATCH, &count);
        all += count;
    } while (rv == CKR_OK && count);
    if (rv == CKR_OK)
        rv = p11->C_FindObjectsFinal(session);
    if (rv == CKR_OK && all != wanted)
        DIE("a search found %lu objects instead of %lu", all, wanted);
    key = found[0];
    return rv;
}

static CK_RV find_one(const struct measure *m)
{
    char label[32];
    (void)m;
    /* another one each time: far apart, and all of them in the end */
    int n = snprintf(label, sizeof label, LABEL, (unsigned long)(turn++ * 7919ul % objects));
    CK_OBJECT_CLASS class = CKO_DATA;
    CK_ATTRIBUTE t[] = {{CKA_CLASS, &class, sizeof class}, {CKA_LABEL, label, (CK_ULONG)n}};
    return find(t, 2, 1);
}

static CK_RV find_none(const struct measure *m)
{
    char label[32];
    (void)m;
    int n = snprintf(label, sizeof label, "nothing-%06u", turn++);
    CK_ATTRIBUTE t[] = {{CKA_LABEL, label, (CK_ULONG)n}};
    return find(t, 1, 0);
}

static CK_RV find_all(const struct measure *m)
{
    CK_OBJECT_CLASS class = CKO_DATA;
    (void)m;
    CK_ATTRIBUTE t[] = {{CKA_CLASS, &class, sizeof class}};
    return find(t, 1, objects);
}

CK_RV create(CK_ULONG number)
{
    char label[32];
    unsigned char value[32];
    int n = snprintf(label, sizeof label, LABEL, number);
    memset(value, (int)number, sizeof value);
    CK_OBJECT_CLASS class = CKO_DATA;
    CK_ATTRIBUTE t[] = {{CKA_CLASS, &class, sizeof class}, {CKA_TOKEN, &yes, 1}, {CKA_PRIVATE, &no, 1},
                        {CKA_LABEL, label, (CK_ULONG)n}, {CKA_APPLICATION, "tokenbench", 10}, {CKA_VALUE, value, sizeof value}};
    return p11->C_CreateObject(session, t, 6, &made[0]);
}

static CK_RV create_once(const struct measure *m)
{
    (void)m;
    return create(ANOTHER);
}

static void destroy_made(const struct measure *m)
{
    (void)m;
    check(p11->C_DestroyObject(session, made[0]), "C_DestroyObject");
    if (made[1])
        check(p11->C_DestroyObject(session, made[1]), "C_DestroyObject");
    made[0] = made[1] = 0;
}

static CK_RV destroy_prepare(const struct measure *m)
{
    (void)m;
    return create(ANOTHER);
}

static CK_RV destroy_once(const struct measure *m)
{
    (void)m;
    return p11->C_DestroyObject(session, made[0]);
}

static void create_again(const struct measure *m)
{
    (void)m;
    check(create(ANOTHER), "C_CreateObject");
}

/* ---- AES-GCM: another IV each time */

static CK_RV seal(const struct measure *m, unsigned char *iv, unsigned char *to, CK_ULONG *length)
{
    CK_GCM_PARAMS gcm = {.pIv = iv, .ulIvLen = 12, .ulIvBits = 96, .ulTagBits = 8 * TAG};
    CK_MECHANISM mechanism = {CKM_AES_GCM, &gcm, sizeof gcm};
    CK_RV rv = p11->C_EncryptInit(session, &mechanism, key);
    *length = m->size + SLACK;
    return rv == CKR_OK ? p11->C_Encrypt(session, data, m->size, to, length) : rv;
}

static void next_iv(unsigned char *iv)
{
    static uint64_t number;
    number++;
    memset(iv, 0, 12);
    memcpy(iv, &number, sizeof number);
}

static CK_RV encrypt_prepare(const struct measure *m)
{
    (void)m;
    return generate(CKM_AES_KEY_GEN, CKO_SECRET_KEY, CKK_AES, CKA_ENCRYPT, CKA_DECRYPT);
}

static CK_RV encrypt_once(const struct measure *m)
{
    CK_ULONG length;
    next_iv(ivs[0]);
    return seal(m, ivs[0], out, &length);
}

static CK_RV decrypt_prepare(const struct measure *m)
{
    CK_RV rv = encrypt_prepare(m);
    for (unsigned i = 0; i < POOL && rv == CKR_OK; i++) {
        next_iv(ivs[i]);
        rv = seal(m, ivs[i], sealed[i], &sealed_len[i]);
    }
    return rv;
}

static CK_RV decrypt_once(const struct measure *m)
{
    unsigned i = turn++ % POOL;
    CK_GCM_PARAMS gcm = {.pIv = ivs[i], .ulIvLen = 12, .ulIvBits = 96, .ulTagBits = 8 * TAG};
    CK_MECHANISM mechanism = {CKM_AES_GCM, &gcm, sizeof gcm};
    CK_ULONG length = m->size + TAG;
    CK_RV rv = p11->C_DecryptInit(session, &mechanism, key);
    if (rv == CKR_OK)
        rv = p11->C_Decrypt(session, sealed[i], sealed_len[i], out, &length);
    if (rv == CKR_OK && length != m->size)
        DIE("decrypted %lu bytes", length);
    return rv;
}

/* ---- attributes, MAC, digest, random numbers */

static CK_RV attribute_once(const struct measure *m)
{
    CK_KEY_TYPE kind;
    CK_BBOOL sensitive;
    (void)m;
    CK_ATTRIBUTE t[] = {{CKA_KEY_TYPE, &kind, sizeof kind}, {CKA_SENSITIVE, &sensitive, 1}};
    return p11->C_GetAttributeValue(session, key, t, 2);
}

static CK_RV hmac_prepare(const struct measure *m)
{
    (void)m;
    return generate(CKM_GENERIC_SECRET_KEY_GEN, CKO_SECRET_KEY, CKK_GENERIC_SECRET, CKA_SIGN, CKA_VERIFY);
}

static CK_RV hmac_once(const struct measure *m)
{
    CK_MECHANISM mechanism = {CKM_SHA256_HMAC, NULL, 0};
    CK_ULONG length = 32;
    data[0]++;
    CK_RV rv = p11->C_SignInit(session, &mechanism, key);
    return rv == CKR_OK ? p11->C_Sign(session, data, m->size, out, &length) : rv;
}

static CK_RV digest_once(const struct measure *m)
{
    CK_MECHANISM mechanism = {CKM_SHA256, NULL, 0};
    CK_ULONG length = 32;
    data[0]++;
    CK_RV rv = p11->C_DigestInit(session, &mechanism);
    return rv == CKR_OK ? p11->C_Digest(session, data, m->size, out, &length) : rv;
}

static CK_RV random_once(const struct measure *m)
{
    return p11->C_GenerateRandom(session, out, m->size);
}

/* ---- new keys */

static CK_RV secret_once(const struct measure *m)
{
    CK_MECHANISM mechanism = {m->mechanism, NULL, 0};
    CK_ULONG length = m->size;
    CK_BBOOL token = m->token;
    CK_ATTRIBUTE t[] = {{CKA_VALUE_LEN, &length, sizeof length}, {CKA_TOKEN, &token, 1}, {CKA_ENCRYPT, &yes, 1}};
    return p11->C_GenerateKey(session, &mechanism, t, 3, &made[0]);
}

static bool by_name; /* how the module wants curves of Edwards to be told: by OID, or by the names of PKCS#11 2.40's draft */

static CK_RV pair_once(const struct measure *m)
{
    static unsigned char p256[] = {0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07};
    static unsigned char ed25519[] = {0x06, 0x03, 0x2b, 0x65, 0x70};
    static unsigned char edwards25519[] = {0x13, 0x0c, 'e', 'd', 'w', 'a', 'r', 'd', 's', '2', '5', '5', '1', '9'};
    static unsigned char exponent[] = {1, 0, 1};
    CK_MECHANISM mechanism = {m->mechanism, NULL, 0};
    CK_ULONG bits = m->size;
    CK_BBOOL token = m->token;
    CK_ATTRIBUTE public[4] = {{CKA_TOKEN, &token, 1}, {CKA_VERIFY, &yes, 1}};
    CK_ATTRIBUTE private[] = {{CKA_TOKEN, &token, 1}, {CKA_SIGN, &yes, 1}, {CKA_PRIVATE, &yes, 1}, {CKA_SENSITIVE, &yes, 1}};
    CK_ULONG n = 3;
    if (m->mechanism == CKM_RSA_PKCS_KEY_PAIR_GEN) {
        public[2] = (CK_ATTRIBUTE){CKA_MODULUS_BITS, &bits, sizeof bits};
        public[3] = (CK_ATTRIBUTE){CKA_PUBLIC_EXPONENT, exponent, sizeof exponent};
        n = 4;
    } else if (m->mechanism == CKM_EC_KEY_PAIR_GEN) {
        public[2] = (CK_ATTRIBUTE){CKA_EC_PARAMS, p256, sizeof p256};
    } else if (by_name) {
        public[2] = (CK_ATTRIBUTE){CKA_EC_PARAMS, edwards25519, sizeof edwards25519};
    } else {
        public[2] = (CK_ATTRIBUTE){CKA_EC_PARAMS, ed25519, sizeof ed25519};
    }
    return p11->C_GenerateKeyPair(session, &mechanism, public, n, private, 4, &made[0], &made[1]);
}

static CK_RV edwards_prepare(const struct measure *m)
{
    by_name = false;
    by_name = pair_once(m) != CKR_OK;
    if (!by_name)
        destroy_made(m);
    return CKR_OK;
}

static const struct measure measures[] = {
    {"null", NULL, null_once, NULL, NULL, 0, 0, false},
    {"session", NULL, session_once, NULL, NULL, 0, 0, false},
    {"find-one", NULL, find_one, NULL, NULL, 0, 0, false},
    {"find-none", NULL, find_none, NULL, NULL, 0, 0, false},
    {"find-all", NULL, find_all, NULL, NULL, 0, 0, false},
    {"create", NULL, create_once, destroy_made, NULL, 0, 0, true},
    {"destroy", destroy_prepare, destroy_once, create_again, destroy_made, 0, 0, true},
    {"attribute", encrypt_prepare, attribute_once, NULL, destroy_key, 0, 0, false},
    {"encrypt-1k", encrypt_prepare, encrypt_once, NULL, destroy_key, 1024, 0, false},
    {"decrypt-1k", decrypt_prepare, decrypt_once, NULL, destroy_key, 1024, 0, false},
    {"encrypt-1m", encrypt_prepare, encrypt_once, NULL, destroy_key, MIB, 0, false},
    {"decrypt-1m", decrypt_prepare, decrypt_once, NULL, destroy_key, MIB, 0, false},
    {"hmac-1k", hmac_prepare, hmac_once, NULL, destroy_key, 1024, 0, false},
    {"digest-1m", NULL, digest_once, NULL, NULL, MIB, 0, false},
    {"random-32", NULL, random_once, NULL, NULL, 32, 0, false},
    {"aes", NULL, secret_once, destroy_made, NULL, 32, CKM_AES_KEY_GEN, false},
    {"p256", NULL, pair_once, destroy_made, NULL, 0, CKM_EC_KEY_PAIR_GEN, false},
    {"ed25519", edwards_prepare, pair_once, destroy_made, NULL, 0, CKM_EC_EDWARDS_KEY_PAIR_GEN, false},
    {"rsa2048", NULL, pair_once, destroy_made, NULL, 2048, CKM_RSA_PKCS_KEY_PAIR_GEN, false},
    {"token-aes", NULL, secret_once, destroy_made, NULL, 32, CKM_AES_KEY_GEN, true},
    {"token-p256", NULL, pair_once, destroy_made, NULL, 0, CKM_EC_KEY_PAIR_GEN, true},
    {"token-ed25519", edwards_prepare, pair_once, destroy_made, NULL, 0, CKM_EC_EDWARDS_KEY_PAIR_GEN, true},
    {"token-rsa2048", NULL, pair_once, destroy_made, NULL, 2048, CKM_RSA_PKCS_KEY_PAIR_GEN, true},
};

static unsigned char *room(size_t size)
{
    unsigned char *at = malloc(size);
    if (!at)
        DIE("out of memory");
    memset(at, 0x5a, size);
    return at;
}

void calls_begin(void)
{
    data = room(MIB);
    out = room(MIB + SLACK);
    for (unsigned i = 0; i < POOL; i++)
        sealed[i] = room(MIB + SLACK);
}

const struct measure *measure_named(const char *name)
{
    for (size_t i = 0; i < sizeof measures / sizeof *measures; i++)
        if (!strcmp(measures[i].name, name))
            return &measures[i];
    DIE("no measure is called %s", name);
}
