/* Inits that have succeeded: the same words again need no round trip of their own. */
#ifndef PROOF_H
#define PROOF_H

#include <stdbool.h>
#include <stdint.h>

#include "pkcs11.h"

enum operation {
    OPERATION_FIND,
    OPERATION_SIGN,
    OPERATION_VERIFY,
    OPERATION_DECRYPT,
    OPERATION_DIGEST,
    OPERATION_ENCRYPT,
    OPERATION_SIGN_RECOVER,
    OPERATION_VERIFY_RECOVER,
    OPERATION_MESSAGE_ENCRYPT,
    OPERATION_MESSAGE_DECRYPT,
    OPERATION_MESSAGE_SIGN,
    OPERATION_MESSAGE_VERIFY,
    OPERATIONS
};

#define MAX_PROVEN_MECHANISM 128u /* bytes of an encoded mechanism that is remembered */

/* Whether an Init with this encoded mechanism and key (of a cipher: with an IV and the like of the same lengths) has succeeded; `output_size` is what the operation gave then, 0 = not known. */
bool proof_find(enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *mechanism, uint32_t length, CK_ULONG *output_size);
void proof_add(enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *mechanism, uint32_t length, CK_ULONG output_size);

/* After an error: the next Init asks the module again, and says its error itself. */
void proof_drop(enum operation kind, CK_OBJECT_HANDLE key, const uint8_t *mechanism, uint32_t length);

/* Whenever what was allowed may not be any longer: after a logout, or an object's end. */
void proofs_clear(void);

void proofs_child(void);

#endif
