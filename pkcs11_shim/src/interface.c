/* The exported lists and interfaces. */
#include <string.h>

#include "call.h"
#include "hsmvisor-pkcs11.h"

static CK_RV rotation_wait(CK_ULONG last, CK_ULONG timeout_ms, CK_ULONG *now)
{
    return now ? call_parked(CALL_ROTATION_WAIT, last, timeout_ms, false, now) : CKR_ARGUMENTS_BAD;
}

#define ENTRY(name, parameters) name,
static CK_FUNCTION_LIST list_2_40 = {{2, 40}, PKCS11_2_40(ENTRY)};
static CK_FUNCTION_LIST_3_0 list_3_0 = {{3, 0}, PKCS11_2_40(ENTRY) PKCS11_3_0(ENTRY)};
static CK_FUNCTION_LIST_3_2 list_3_2 = {{3, 2}, PKCS11_2_40(ENTRY) PKCS11_3_0(ENTRY) PKCS11_3_2(ENTRY)};
static HSMVISOR_INTERFACE vendor = {{1, 0}, rotation_wait};

/* Fork safe in the sense of PKCS#11 3.0, 5.4.4? No: a child has to call C_Initialize.  So the flag is not set.
 *
 * The first of a name is the default.  Who names no version takes what comes for the newest list that it was built with, and that is 3.0's
 * (OpenSC's pkcs11-tool); who knows 3.2 asks for it (python-pkcs11). */
static CK_INTERFACE interfaces[] = {
    {(CK_UTF8CHAR *)"PKCS 11", &list_3_0, 0},
    {(CK_UTF8CHAR *)"PKCS 11", &list_3_2, 0},
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
