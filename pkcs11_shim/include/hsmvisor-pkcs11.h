/* The vendor interface of libhsmvisor-pkcs11.so: C_GetInterface("Vendor hsmvisor", NULL, &interface, 0). */
#ifndef HSMVISOR_PKCS11_VENDOR_H
#define HSMVISOR_PKCS11_VENDOR_H

#include "pkcs11.h"

#define HSMVISOR_INTERFACE_NAME "Vendor hsmvisor"

typedef struct {
    CK_VERSION version; /* 1.0 */

    /* Waits until the module's keys or certificates change.
     * last: the number that the last call gave, 0 at first (answers at once).
     * timeout_ms: CKR_FUNCTION_CANCELED after that long; 0 = wait for ever.
     * now: the number of the newest rotation. */
    CK_RV (*C_Rotation_Wait)(CK_ULONG last, CK_ULONG timeout_ms, CK_ULONG *now);
} HSMVISOR_INTERFACE;

#endif
