#include "token.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hsmvisor-pkcs11.h"

#define MAX_SLOTS 16u
#define MAX_FOUND 64u
#define MAX_CHAIN 10u
#define MAX_VALUE 65536u
#define LINE 64u

typedef CK_RV (*get_list)(CK_FUNCTION_LIST **);
typedef CK_RV (*get_interface)(CK_UTF8CHAR *, CK_VERSION *, CK_INTERFACE **, CK_FLAGS);

/* What the configuration hides from applications is not hidden from this one; programs that it starts have the variable as it was. */
static CK_RV initialize_with_all_slots(CK_FUNCTION_LIST *functions)
{
    const char *name = "HSMVISOR_PKCS11_SLOTS", *before = getenv(name);
    char *kept = before ? strdup(before) : NULL;
    if ((before && !kept) || setenv(name, "all", 1))
        return CKR_HOST_MEMORY;
    CK_C_INITIALIZE_ARGS arguments = {.flags = CKF_OS_LOCKING_OK};
    CK_RV rv = functions->C_Initialize(&arguments);
    if (kept)
        setenv(name, kept, 1);
    else
        unsetenv(name);
    free(kept);
    return rv;
}

bool token_open(struct token *token, const char *library)
{
    memset(token, 0, sizeof *token);
    token->library = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!token->library) {
        fprintf(stderr, "hsmvisor-guest: %s; --module names the PKCS#11 library\n", dlerror());
        return false;
    }
    get_list list;
    get_interface interface;
    *(void **)&list = dlsym(token->library, "C_GetFunctionList");
    *(void **)&interface = dlsym(token->library, "C_GetInterface");
    if (!list || list(&token->functions) != CKR_OK) {
        fprintf(stderr, "hsmvisor-guest: %s is no PKCS#11 library\n", library);
        return false;
    }
    CK_INTERFACE *vendor;
    if (interface && interface((CK_UTF8CHAR *)HSMVISOR_INTERFACE_NAME, NULL, &vendor, 0) == CKR_OK)
        token->wait = ((HSMVISOR_INTERFACE *)vendor->pFunctionList)->C_Rotation_Wait;
    CK_RV rv = initialize_with_all_slots(token->functions);
    if (rv != CKR_OK) {
        fprintf(stderr, "hsmvisor-guest: C_Initialize: 0x%lx; HSMVISOR_PKCS11_DEBUG=1 tells more\n", rv);
        return false;
    }
    return true;
}

void token_close(struct token *token)
{
    if (token->functions)
        token->functions->C_Finalize(NULL);
    if (token->library)
        dlclose(token->library);
    memset(token, 0, sizeof *token);
}

/* ---- one certificate ---- */

struct certificate {
    CK_OBJECT_HANDLE handle;
    CK_BYTE *value, *subject, *issuer;
    CK_ULONG value_len, subject_len, issuer_len;
};

static void certificate_free(struct certificate *c)
{
    free(c->value);
    free(c->subject);
    free(c->issuer);
    memset(c, 0, sizeof *c);
}

static bool read_certificate(CK_FUNCTION_LIST *f, CK_SESSION_HANDLE session, CK_OBJECT_HANDLE handle, struct certificate *c)
{
    CK_ATTRIBUTE wanted[] = {{CKA_VALUE, NULL, 0}, {CKA_SUBJECT, NULL, 0}, {CKA_ISSUER, NULL, 0}};
    if (f->C_GetAttributeValue(session, handle, wanted, 3) != CKR_OK)
        return false;
    for (int i = 0; i < 3; i++) {
        if (wanted[i].ulValueLen == 0 || wanted[i].ulValueLen > MAX_VALUE || !(wanted[i].pValue = malloc(wanted[i].ulValueLen))) {
            for (int j = 0; j < i; j++)
                free(wanted[j].pValue);
            return false;
        }
    }
    bool good = f->C_GetAttributeValue(session, handle, wanted, 3) == CKR_OK;
    *c = (struct certificate){handle, wanted[0].pValue, wanted[1].pValue, wanted[2].pValue,
                              wanted[0].ulValueLen, wanted[1].ulValueLen, wanted[2].ulValueLen};
    if (!good)
        certificate_free(c);
    return good;
}

/* ---- which of several authorities with one name: authorityKeyIdentifier and subjectKeyIdentifier (RFC 5280, 4.2.1.1-2) ---- */

static const CK_BYTE AUTHORITY_KEY_ID[] = {0x06, 0x03, 0x55, 0x1d, 0x23}, SUBJECT_KEY_ID[] = {0x06, 0x03, 0x55, 0x1d, 0x0e};

/* Finds the key identifier behind an extension's OID: within OCTET STRING, [0] of SEQUENCE or OCTET STRING; NULL when there is none. */
static const CK_BYTE *key_identifier(const struct certificate *c, const CK_BYTE *oid, size_t *length)
{
    const CK_BYTE *at = memmem(c->value, c->value_len, oid, sizeof AUTHORITY_KEY_ID);
    if (!at)
        return NULL;
    at += sizeof AUTHORITY_KEY_ID;
    size_t left = (size_t)(c->value + c->value_len - at);
    for (int depth = 0; depth < 3 && left >= 2; depth++) {
        bool wrapper = (depth == 0 && at[0] == 0x04) || (depth == 1 && at[0] == 0x30);
        if (at[1] >= 0x80 || at[1] > left - 2)
            return NULL;
        if (!wrapper) {
            *length = at[1];
            return at[0] == 0x80 || at[0] == 0x04 ? at + 2 : NULL;
        }
        at += 2;
        left -= 2;
    }
    return NULL;
}

static bool issued(const struct certificate *subject, const struct certificate *issuer)
{
    size_t wanted_len, has_len;
    const CK_BYTE *wanted = key_identifier(subject, AUTHORITY_KEY_ID, &wanted_len);
    const CK_BYTE *has = key_identifier(issuer, SUBJECT_KEY_ID, &has_len);
    return !wanted || !has || (wanted_len == has_len && !memcmp(wanted, has, wanted_len));
}

/* The first object that matches; with `subject`, the first that may have issued it. */
static bool find(CK_FUNCTION_LIST *f, CK_SESSION_HANDLE session, CK_ATTRIBUTE *wanted, CK_ULONG count, const struct certificate *subject,
                 struct certificate *c, bool *failed)
{
    CK_OBJECT_HANDLE found[MAX_FOUND];
    CK_ULONG number = 0;
    *failed = f->C_FindObjectsInit(session, wanted, count) != CKR_OK;
    if (*failed)
        return false;
    *failed = f->C_FindObjects(session, found, MAX_FOUND, &number) != CKR_OK;
    f->C_FindObjectsFinal(session);
    for (CK_ULONG i = 0; !*failed && i < number; i++) {
        if (!read_certificate(f, session, found[i], c))
            continue;
        if (!subject || issued(subject, c))
            return true;
        certificate_free(c);
    }
    return false;
}

/* ---- PEM ---- */

static bool append_pem(char **text, size_t *length, const CK_BYTE *der, size_t size)
{
    static const char begin[] = "-----BEGIN CERTIFICATE-----\n", end[] = "-----END CERTIFICATE-----\n";
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t encoded = (size + 2) / 3 * 4, lines = (encoded + LINE - 1) / LINE;
    char *larger = realloc(*text, *length + sizeof begin + encoded + lines + sizeof end);
    if (!larger)
        return false;
    *text = larger;
    char *at = larger + *length;
    memcpy(at, begin, sizeof begin - 1);
    at += sizeof begin - 1;
    size_t column = 0;
    for (size_t i = 0; i < size; i += 3) {
        uint32_t three = (uint32_t)der[i] << 16 | (i + 1 < size ? der[i + 1] << 8 : 0) | (i + 2 < size ? der[i + 2] : 0);
        *at++ = digits[three >> 18];
        *at++ = digits[three >> 12 & 63];
        *at++ = i + 1 < size ? digits[three >> 6 & 63] : '=';
        *at++ = i + 2 < size ? digits[three & 63] : '=';
        if ((column += 4) == LINE) {
            *at++ = '\n';
            column = 0;
        }
    }
    if (column)
        *at++ = '\n';
    memcpy(at, end, sizeof end - 1);
    at += sizeof end - 1;
    *length = (size_t)(at - larger);
    return true;
}

static enum found collect(CK_FUNCTION_LIST *f, CK_SESSION_HANDLE session, const char *label, bool chain, char **pem, size_t *length)
{
    CK_OBJECT_CLASS class = CKO_CERTIFICATE;
    CK_ULONG authority = CK_CERTIFICATE_CATEGORY_AUTHORITY;
    CK_ATTRIBUTE by_label[] = {{CKA_CLASS, &class, sizeof class}, {CKA_LABEL, (void *)label, strlen(label)}};
    struct certificate c;
    bool failed;
    if (!find(f, session, by_label, 2, NULL, &c, &failed))
        return failed ? FAILED : NOT_THERE;
    bool good = append_pem(pem, length, c.value, c.value_len);
    for (unsigned depth = 1; good && chain && depth < MAX_CHAIN; depth++) {
        if (c.issuer_len == c.subject_len && !memcmp(c.issuer, c.subject, c.issuer_len))
            break; /* self-issued: the chain ends */
        CK_ATTRIBUTE by_subject[] = {{CKA_CLASS, &class, sizeof class},
                                     {CKA_CERTIFICATE_CATEGORY, &authority, sizeof authority},
                                     {CKA_SUBJECT, c.issuer, c.issuer_len}};
        struct certificate issuer;
        if (!find(f, session, by_subject, 3, &c, &issuer, &failed)) {
            good = !failed;
            break;
        }
        bool root = issuer.issuer_len == issuer.subject_len && !memcmp(issuer.issuer, issuer.subject, issuer.issuer_len);
        good = root || append_pem(pem, length, issuer.value, issuer.value_len); /* who verifies has the root, or does not trust it */
        certificate_free(&c);
        c = issuer;
    }
    certificate_free(&c);
    return good ? FOUND : FAILED;
}

enum found token_certificates(const struct token *token, const char *label, bool chain, char **pem, size_t *length)
{
    CK_FUNCTION_LIST *f = token->functions;
    CK_SLOT_ID slots[MAX_SLOTS];
    CK_ULONG count = MAX_SLOTS;
    *pem = NULL;
    *length = 0;
    if (f->C_GetSlotList(1, slots, &count) != CKR_OK)
        return NO_TOKEN;
    enum found result = count ? NOT_THERE : NO_TOKEN;
    for (CK_ULONG i = 0; i < count && result != FOUND; i++) {
        /* A session of its own for each reading: a view moves at the first session after none was open. */
        CK_SESSION_HANDLE session;
        if (f->C_OpenSession(slots[i], CKF_SERIAL_SESSION, NULL, NULL, &session) != CKR_OK) {
            result = FAILED;
            continue;
        }
        *length = 0;
        enum found here = collect(f, session, label, chain, pem, length);
        if (here != NOT_THERE)
            result = here;
        f->C_CloseSession(session);
    }
    if (result != FOUND) {
        free(*pem);
        *pem = NULL;
    }
    return result;
}
