/* The exported lists and interfaces, and the functions of 3.0 that no module has. */
#include <string.h>

#include "call.h"
#include "hsmvisor-pkcs11.h"

#define NOT_SUPPORTED(name, parameters) \
    CK_RV name parameters { return CKR_FUNCTION_NOT_SUPPORTED; }

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
/* Message-based functions: their parameters hold pointers that only a library in the same memory could follow. */
NOT_SUPPORTED(C_MessageEncryptInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key))
NOT_SUPPORTED(C_EncryptMessage, (S_, PARAMETER_, CK_BYTE *data, CK_ULONG data_len, IN_, OUT_))
NOT_SUPPORTED(C_EncryptMessageBegin, (S_, PARAMETER_, CK_BYTE *data, CK_ULONG data_len))
NOT_SUPPORTED(C_EncryptMessageNext, (S_, PARAMETER_, IN_, OUT_, CK_FLAGS flags))
NOT_SUPPORTED(C_MessageEncryptFinal, (S_))
NOT_SUPPORTED(C_MessageDecryptInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key))
NOT_SUPPORTED(C_DecryptMessage, (S_, PARAMETER_, CK_BYTE *data, CK_ULONG data_len, IN_, OUT_))
NOT_SUPPORTED(C_DecryptMessageBegin, (S_, PARAMETER_, CK_BYTE *data, CK_ULONG data_len))
NOT_SUPPORTED(C_DecryptMessageNext, (S_, PARAMETER_, IN_, OUT_, CK_FLAGS flags))
NOT_SUPPORTED(C_MessageDecryptFinal, (S_))
NOT_SUPPORTED(C_MessageSignInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key))
NOT_SUPPORTED(C_SignMessage, (S_, PARAMETER_, IN_, OUT_))
NOT_SUPPORTED(C_SignMessageBegin, (S_, PARAMETER_))
NOT_SUPPORTED(C_SignMessageNext, (S_, PARAMETER_, IN_, OUT_))
NOT_SUPPORTED(C_MessageSignFinal, (S_))
NOT_SUPPORTED(C_MessageVerifyInit, (S_, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key))
NOT_SUPPORTED(C_VerifyMessage, (S_, PARAMETER_, IN_, CK_BYTE *signature, CK_ULONG signature_len))
NOT_SUPPORTED(C_VerifyMessageBegin, (S_, PARAMETER_))
NOT_SUPPORTED(C_VerifyMessageNext, (S_, PARAMETER_, IN_, CK_BYTE *signature, CK_ULONG signature_len))
NOT_SUPPORTED(C_MessageVerifyFinal, (S_))
#pragma GCC diagnostic pop

static CK_RV rotation_wait(CK_ULONG last, CK_ULONG timeout_ms, CK_ULONG *now)
{
    return now ? call_parked(CALL_ROTATION_WAIT, last, timeout_ms, false, now) : CKR_ARGUMENTS_BAD;
}

#define ENTRY(name, parameters) name,
static CK_FUNCTION_LIST list_2_40 = {{2, 40}, PKCS11_2_40(ENTRY)};
static CK_FUNCTION_LIST_3_0 list_3_0 = {{3, 0}, PKCS11_2_40(ENTRY) PKCS11_3_0(ENTRY)};
static HSMVISOR_INTERFACE vendor = {{1, 0}, rotation_wait};

/* Fork safe in the sense of PKCS#11 3.0, 5.4.4? No: a child has to call C_Initialize.  So the flag is not set. */
static CK_INTERFACE interfaces[] = {
    {(CK_UTF8CHAR *)"PKCS 11", &list_3_0, 0},
    {(CK_UTF8CHAR *)"PKCS 11", &list_2_40, 0},
    {(CK_UTF8CHAR *)HSMVISOR_INTERFACE_NAME, &vendor, 0},
};
#define INTERFACES (sizeof interfaces / sizeof *interfaces)

CK_RV C_GetFunctionList(CK_FUNCTION_LIST **list)
{
    if (!list)
        return CKR_ARGUMENTS_BAD;
    *list = &list_2_40;
    return CKR_OK;
}

CK_RV C_GetInterfaceList(CK_INTERFACE *list, CK_ULONG *count)
{
    if (!count)
        return CKR_ARGUMENTS_BAD;
    CK_ULONG room = *count;
    *count = INTERFACES;
    if (!list)
        return CKR_OK;
    if (room < INTERFACES)
        return CKR_BUFFER_TOO_SMALL;
    memcpy(list, interfaces, sizeof interfaces);
    return CKR_OK;
}

CK_RV C_GetInterface(CK_UTF8CHAR *name, CK_VERSION *version, CK_INTERFACE **interface, CK_FLAGS flags)
{
    if (!interface)
        return CKR_ARGUMENTS_BAD;
    for (size_t i = 0; i < INTERFACES; i++) {
        const CK_VERSION *has = interfaces[i].pFunctionList;
        if (name && strcmp((const char *)name, (const char *)interfaces[i].pInterfaceName))
            continue;
        if (version && (version->major != has->major || version->minor != has->minor))
            continue;
        if ((interfaces[i].flags & flags) != flags)
            continue;
        *interface = &interfaces[i];
        return CKR_OK;
    }
    return CKR_FUNCTION_FAILED;
}
