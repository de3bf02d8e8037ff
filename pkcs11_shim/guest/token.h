/* The token as hsmvisor-guest uses it: certificates by label, and a wait for the next rotation. */
#ifndef TOKEN_H
#define TOKEN_H

#include <stdbool.h>
#include <stddef.h>

#include "pkcs11.h"

struct token {
    void *library;
    CK_FUNCTION_LIST *functions;
    CK_RV (*wait)(CK_ULONG last, CK_ULONG timeout_ms, CK_ULONG *now); /* NULL with a library that has no vendor interface */
};

/* Loads a PKCS#11 library and initialises it; false with a message on stderr. */
bool token_open(struct token *token, const char *library);
void token_close(struct token *token);

enum found { FOUND, NOT_THERE, NO_TOKEN, FAILED };

/* Writes the certificate with this label as PEM, and with `chain` its intermediates, leaf first, into a buffer that the caller frees. */
enum found token_certificates(const struct token *token, const char *label, bool chain, char **pem, size_t *length);

#endif
