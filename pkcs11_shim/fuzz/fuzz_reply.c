/* libFuzzer target: an application that calls the library while its module answers whatever the input says.
 *
 * Invariant: no input makes the library read or write past a buffer (AddressSanitizer), overflow (UndefinedBehaviorSanitizer), leak or
 * hang.  The library's own sources are linked; the socket alone is played here (ld --wrap).
 *
 * Input: a row of steps.  A step is a call of the application (one byte), or what the module answers to it: taken in turn whenever the
 * library receives.  An answer is one byte of flags, u16 length (little-endian), that many bytes. */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "pkcs11.h"

enum {
    LOSE = 1,       /* the connection ends instead */
    RAW = 2,        /* the bytes are the frame; else they follow a good header and the call's number */
    PIECES = 4,     /* one byte at a time */
    ERROR = 8,      /* an error reply with the first byte as CK_RV */
    OWN_HELLO = 16, /* Hello, too, is answered from the input */
};

static const uint8_t *input;
static size_t left;
static uint8_t reply[1 << 17], request[16];
static size_t reply_size, reply_sent;
static int pieces, greeting;

static uint8_t next(void)
{
    if (!left)
        return 0;
    left--;
    return *input++;
}

static void store(uint8_t *at, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        at[i] = (uint8_t)(value >> (24 - 8 * i));
}

static void good_hello(void)
{
    static const uint8_t body[] = {0, 0, 1, 0, 1, 0, 0, 0, 16, 'f', 'u', 'z', 'z', 'f', 'u', 'z', 'z', 'f', 'u', 'z', 'z', 'f', 'u', 'z', 'z',
                                   0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4};
    memcpy(reply, request, 4);
    store(reply + 4, 0);
    store(reply + 8, sizeof body);
    memcpy(reply + 12, body, sizeof body);
    reply_size = 12 + sizeof body;
}

static void next_reply(void)
{
    reply_sent = 0;
    pieces = 0;
    int hello = request[14] == 1 && request[15] == 0;
    if (hello && !(left && *input & OWN_HELLO)) {
        good_hello();
        return;
    }
    uint8_t flags = next();
    size_t length = next();
    length |= (size_t)next() << 8;
    if (length > left)
        length = left;
    pieces = flags & PIECES;
    reply_size = 0;
    if (flags & LOSE)
        return;
    if (!(flags & RAW)) {
        memcpy(reply, request, 4);
        store(reply + 4, 0);
        memcpy(reply + 12, request + 12, 4);
        reply_size = 16;
        if (flags & ERROR) {
            memset(reply + 12, 0, 12);
            reply[23] = next();
            reply_size = 24;
            length = 0;
        }
        store(reply + 8, (uint32_t)(reply_size - 12 + length));
    }
    memcpy(reply + reply_size, input, length);
    reply_size += length;
    input += length;
    left -= length;
}

int __wrap_socket(int family, int type, int protocol);
int __wrap_socket(int family, int type, int protocol)
{
    (void)family, (void)type, (void)protocol;
    return open("/dev/null", O_RDWR | O_CLOEXEC);
}

int __wrap_connect(int fd, const struct sockaddr *address, socklen_t size);
int __wrap_connect(int fd, const struct sockaddr *address, socklen_t size)
{
    (void)fd, (void)address, (void)size;
    greeting = 1;
    return 0;
}

ssize_t __wrap_send(int fd, const void *data, size_t length, int flags);
ssize_t __wrap_send(int fd, const void *data, size_t length, int flags)
{
    (void)fd, (void)data, (void)flags;
    return (ssize_t)length;
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags)
{
    (void)fd, (void)flags;
    if (message->msg_iov[0].iov_len >= sizeof request)
        memcpy(request, message->msg_iov[0].iov_base, sizeof request);
    next_reply();
    ssize_t sent = 0;
    for (size_t i = 0; i < message->msg_iovlen; i++)
        sent += (ssize_t)message->msg_iov[i].iov_len;
    return sent;
}

ssize_t __wrap_recv(int fd, void *data, size_t room, int flags);
ssize_t __wrap_recv(int fd, void *data, size_t room, int flags)
{
    (void)fd, (void)flags;
    if (greeting) {
        greeting = 0;
        *(uint8_t *)data = 0x81;
        return 1;
    }
    size_t length = reply_size - reply_sent;
    length = length > room ? room : length;
    length = pieces && length ? 1 : length;
    memcpy(data, reply + reply_sent, length);
    reply_sent += length;
    return (ssize_t)length;
}

/* ---- the application ---- */

static CK_SESSION_HANDLE session;
static CK_MECHANISM ecdsa = {0x1041, NULL, 0};

/* Buffers are made for each call and exactly as large as they are said to be. */
static void output(CK_RV (*call)(CK_SESSION_HANDLE, CK_BYTE *, CK_ULONG, CK_BYTE *, CK_ULONG *))
{
    CK_ULONG length = next() % 80;
    CK_BYTE *out = length % 5 ? malloc(length) : NULL;
    call(session, (CK_BYTE *)"data", 4, out, &length);
    free(out);
}

static void numbers(CK_RV (*call)(CK_SLOT_ID, CK_MECHANISM_TYPE *, CK_ULONG *))
{
    CK_ULONG count = next() % 12;
    CK_ULONG *list = count ? malloc(count * sizeof *list) : NULL;
    call(0, list, &count);
    free(list);
}

static CK_RV slots(CK_SLOT_ID present, CK_SLOT_ID *list, CK_ULONG *count)
{
    return C_GetSlotList(present != 0, list, count);
}

static void search(void)
{
    CK_OBJECT_HANDLE *found = malloc(7 * sizeof *found);
    CK_ULONG count;
    C_FindObjectsInit(session, NULL, 0);
    while (C_FindObjects(session, found, 7, &count) == CKR_OK && count && left)
        ;
    C_FindObjectsFinal(session);
    free(found);
}

static void values(void)
{
    CK_ATTRIBUTE wanted[3] = {{CKA_CLASS, NULL, 0}, {CKA_VALUE, NULL, 0}, {CKA_WRAP_TEMPLATE, NULL, 0}};
    for (int i = 0; i < 3; i++) {
        wanted[i].ulValueLen = next() % 40;
        wanted[i].pValue = wanted[i].ulValueLen ? malloc(wanted[i].ulValueLen) : NULL;
    }
    void *buffers[3] = {wanted[0].pValue, wanted[1].pValue, wanted[2].pValue};
    CK_RV rv = C_GetAttributeValue(session, 5, wanted, 3);
    for (int i = 0; i < 3; i++) {
        /* what a caller that was told CKR_OK does with the length */
        volatile uint8_t sum = 0;
        for (CK_ULONG at = 0; rv == CKR_OK && buffers[i] && at < wanted[i].ulValueLen; at++)
            sum = (uint8_t)(sum + ((uint8_t *)buffers[i])[at]);
        free(buffers[i]);
    }
}

static void infos(void)
{
    CK_SLOT_INFO *slot = malloc(sizeof *slot);
    CK_TOKEN_INFO *token = malloc(sizeof *token);
    CK_SESSION_INFO *info = malloc(sizeof *info);
    CK_MECHANISM_INFO *mechanism = malloc(sizeof *mechanism);
    C_GetSlotInfo(0, slot);
    C_GetTokenInfo(0, token);
    C_GetSessionInfo(session, info);
    C_GetMechanismInfo(0, 1, mechanism);
    free(slot);
    free(token);
    free(info);
    free(mechanism);
}

static void random_bytes(void)
{
    CK_ULONG length = next();
    CK_BYTE *out = malloc(length + 1);
    C_GenerateRandom(session, out, length);
    free(out);
}

static void verify(void)
{
    CK_BYTE signature[64] = {1};
    C_VerifyInit(session, &ecdsa, 6);
    if (next() & 1) {
        C_VerifyUpdate(session, (CK_BYTE *)"part", 4);
        C_VerifyFinal(session, signature, sizeof signature);
    } else {
        C_Verify(session, (CK_BYTE *)"data", 4, signature, sizeof signature);
    }
}

/* C_SignFinal and the like. */
static void final(CK_RV (*call)(CK_SESSION_HANDLE, CK_BYTE *, CK_ULONG *))
{
    CK_ULONG length = next() % 80;
    CK_BYTE *out = length % 5 ? malloc(length) : NULL;
    call(session, out, &length);
    free(out);
}

static void wrap(void)
{
    CK_ULONG length = next() % 80;
    CK_BYTE *out = length % 5 ? malloc(length) : NULL;
    C_WrapKey(session, &ecdsa, 5, 6, out, &length);
    free(out);
}

static void make_keys(void)
{
    CK_BBOOL yes = 1;
    CK_ATTRIBUTE template = {1 /* CKA_TOKEN */, &yes, sizeof yes};
    CK_OBJECT_HANDLE *made = malloc(2 * sizeof *made);
    C_GenerateKeyPair(session, &ecdsa, &template, 1, &template, 1, &made[0], &made[1]);
    C_CopyObject(session, 5, &template, 1, &made[0]);
    C_CreateObject(session, &template, 1, &made[0]);
    C_DestroyObject(session, 5);
    free(made);
}

static void sizes(void)
{
    CK_ULONG *size = malloc(sizeof *size);
    C_GetObjectSize(session, 5, size);
    free(size);
}

static void log_in(void)
{
    C_Login(session, 1, (CK_BYTE *)"1234", 4);
    C_Logout(session);
}

/* ---- what 3.0 and 3.2 add; the parameter's IV and tag, too, are exactly as large as they are said to be ---- */

static CK_GCM_MESSAGE_PARAMS gcm;
static CK_MECHANISM messages = {CKM_AES_GCM, &gcm, sizeof gcm};

static void gcm_begin(void)
{
    CK_ULONG tag = next() % 17;
    gcm = (CK_GCM_MESSAGE_PARAMS){malloc(12), 12, 0, next() % 5, tag ? malloc(tag) : NULL, 8 * tag};
    memset(gcm.pIv, 7, 12);
    if (tag)
        memset(gcm.pTag, 7, tag);
}

static void gcm_end(void)
{
    free(gcm.pIv);
    free(gcm.pTag);
}

static void encrypt_messages(void)
{
    CK_ULONG length = next() % 80;
    CK_BYTE *out = length % 5 ? malloc(length) : NULL;
    gcm_begin();
    C_MessageEncryptInit(session, &messages, 5);
    C_EncryptMessage(session, &gcm, sizeof gcm, (CK_BYTE *)"more", 4, (CK_BYTE *)"data", 4, out, &length);
    C_EncryptMessageBegin(session, &gcm, sizeof gcm, NULL, 0);
    length = out ? length : 0;
    C_EncryptMessageNext(session, &gcm, sizeof gcm, (CK_BYTE *)"data", 4, out, &length, next() & 1);
    C_MessageEncryptFinal(session);
    gcm_end();
    free(out);
}

static void decrypt_messages(void)
{
    CK_ULONG length = next() % 80;
    CK_BYTE *out = length % 5 ? malloc(length) : NULL;
    gcm_begin();
    C_MessageDecryptInit(session, &messages, 5);
    C_DecryptMessage(session, &gcm, sizeof gcm, (CK_BYTE *)"more", 4, (CK_BYTE *)"data", 4, out, &length);
    C_DecryptMessageBegin(session, &gcm, sizeof gcm, NULL, 0);
    length = out ? length : 0;
    C_DecryptMessageNext(session, &gcm, sizeof gcm, (CK_BYTE *)"data", 4, out, &length, next() & 1);
    C_MessageDecryptFinal(session);
    gcm_end();
    free(out);
}

static void sign_messages(void)
{
    CK_ULONG length = next() % 80;
    CK_BYTE *out = length % 5 ? malloc(length) : NULL, signature[64] = {1};
    C_MessageSignInit(session, &ecdsa, 5);
    C_SignMessage(session, NULL, 0, (CK_BYTE *)"data", 4, out, &length);
    C_SignMessageBegin(session, NULL, 0);
    C_SignMessageNext(session, NULL, 0, (CK_BYTE *)"part", 4, NULL, NULL);
    length = out ? length : 0;
    C_SignMessageNext(session, NULL, 0, (CK_BYTE *)"part", 4, out, &length);
    C_MessageSignFinal(session);
    C_MessageVerifyInit(session, &ecdsa, 6);
    C_VerifyMessage(session, NULL, 0, (CK_BYTE *)"data", 4, signature, sizeof signature);
    C_VerifyMessageBegin(session, NULL, 0);
    C_VerifyMessageNext(session, NULL, 0, (CK_BYTE *)"data", 4, next() & 1 ? signature : NULL, sizeof signature);
    C_MessageVerifyFinal(session);
    free(out);
}

static void signature_first(void)
{
    CK_BYTE signature[64] = {1};
    C_VerifySignatureInit(session, &ecdsa, 6, signature, sizeof signature);
    if (next() & 1) {
        C_VerifySignatureUpdate(session, (CK_BYTE *)"part", 4);
        C_VerifySignatureFinal(session);
    } else {
        C_VerifySignature(session, (CK_BYTE *)"data", 4);
    }
}

static void encapsulate(void)
{
    CK_ULONG length = next() % 80;
    CK_BYTE *out = length % 5 ? malloc(length) : NULL;
    CK_OBJECT_HANDLE *made = malloc(sizeof *made);
    C_EncapsulateKey(session, &ecdsa, 6, NULL, 0, out, &length, made);
    C_DecapsulateKey(session, &ecdsa, 5, NULL, 0, (CK_BYTE *)"ciphertext", 10, made);
    free(made);
    free(out);
}

static void wrap_authenticated(void)
{
    CK_ULONG length = next() % 80;
    CK_BYTE *out = length % 5 ? malloc(length) : NULL;
    CK_OBJECT_HANDLE *made = malloc(sizeof *made);
    gcm_begin();
    C_WrapKeyAuthenticated(session, &messages, 5, 6, (CK_BYTE *)"more", 4, out, &length);
    C_UnwrapKeyAuthenticated(session, &messages, 5, (CK_BYTE *)"wrapped", 7, NULL, 0, NULL, 0, made);
    gcm_end();
    free(made);
    free(out);
}

static void dual(void)
{
    C_DigestInit(session, &ecdsa);
    C_EncryptInit(session, &ecdsa, 5);
    output(next() & 1 ? C_DigestEncryptUpdate : C_DecryptDigestUpdate);
    C_SignInit(session, &ecdsa, 5);
    C_DecryptInit(session, &ecdsa, 5);
    output(next() & 1 ? C_SignEncryptUpdate : C_DecryptVerifyUpdate);
}

static void recover(void)
{
    C_SignRecoverInit(session, &ecdsa, 5);
    output(C_SignRecover);
    C_VerifyRecoverInit(session, &ecdsa, 6);
    output(C_VerifyRecover);
}

static void validation(void)
{
    CK_FLAGS *flags = malloc(sizeof *flags);
    C_GetSessionValidationFlags(session, 1, flags);
    free(flags);
}

#define NEWER 208 /* from here on; below, what the kept corpus was found with */

static void act_newer(uint8_t what)
{
    switch ((what - NEWER) % 9) {
    case 0: encrypt_messages(); break;
    case 1: decrypt_messages(); break;
    case 2: sign_messages(); break;
    case 3: signature_first(); break;
    case 4: encapsulate(); break;
    case 5: wrap_authenticated(); break;
    case 6: dual(); break;
    case 7: recover(); break;
    case 8: validation(); break;
    }
}

static void act(uint8_t what)
{
    CK_OBJECT_HANDLE object;
    CK_SLOT_ID slot;
    if (what >= NEWER) {
        act_newer(what);
        return;
    }
    switch (what % 26) {
    case 0: C_OpenSession(0, CKF_SERIAL_SESSION, NULL, NULL, &session); break;
    case 1: numbers(slots); break;
    case 2: numbers(C_GetMechanismList); break;
    case 3: search(); break;
    case 4: values(); break;
    case 5: infos(); break;
    case 6: C_SignInit(session, &ecdsa, 5); break;
    case 7: output(C_Sign); break;
    case 8: C_SignUpdate(session, (CK_BYTE *)"part", 4); break;
    case 9: C_DecryptInit(session, &ecdsa, 5); break;
    case 10: output(C_Decrypt); break;
    case 11: random_bytes(); break;
    case 12: C_WaitForSlotEvent(CKF_DONT_BLOCK, &slot, NULL); break;
    case 13: C_DeriveKey(session, &ecdsa, 5, NULL, 0, &object); break;
    case 14: C_CloseSession(session); break;
    case 15: verify(); break;
    case 16: final(C_SignFinal); break;
    case 17: C_EncryptInit(session, &ecdsa, 6); break;
    case 18: output(C_Encrypt); break;
    case 19: C_DigestInit(session, &ecdsa); break;
    case 20: output(next() & 1 ? C_Digest : C_SignRecover); break;
    case 21: final(next() & 1 ? C_DigestFinal : C_GetOperationState); break;
    case 22: wrap(); break;
    case 23: make_keys(); break;
    case 24: sizes(); break;
    case 25: log_in(); break;
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    char path[32];
    int fd = memfd_create("pkcs11.conf", 0);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (fd < 0 || dprintf(fd, "address = unix:path=/fuzz\nreconnect_ms = 0\n") < 0)
        abort();
    setenv("HSMVISOR_PKCS11_CONFIG", path, 1);
    unsetenv("HSMVISOR_PKCS11_ADDRESS");
    if (C_Initialize(NULL) != CKR_OK || C_Finalize(NULL) != CKR_OK)
        abort();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input = data;
    left = size;
    session = 1;
    if (C_Initialize(NULL) != CKR_OK)
        abort();
    for (int steps = 0; left && steps < 64; steps++)
        act(next());
    left = 0;
    if (C_Finalize(NULL) != CKR_OK)
        abort();
    return 0;
}
