/* What the two halves of tokenbench share: one session of a module, and the calls that are measured in it. */
#ifndef TOKENBENCH_H
#define TOKENBENCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include <p11-kit/pkcs11.h>

#define DIE(...) (fprintf(stderr, "tokenbench: " __VA_ARGS__), fputc('\n', stderr), exit(2))

extern CK_FUNCTION_LIST *p11;
extern CK_SLOT_ID slot;
extern CK_SESSION_HANDLE session;
extern CK_ULONG objects; /* data objects in the token that is searched */

struct measure {
    const char *name;
    CK_RV (*prepare)(const struct measure *m);
    CK_RV (*once)(const struct measure *m);   /* is timed */
    void (*after)(const struct measure *m);   /* each one, untimed */
    void (*end)(const struct measure *m);
    size_t size;
    CK_MECHANISM_TYPE mechanism;
    bool token; /* token objects */
};

void check(CK_RV rv, const char *what);

void calls_begin(void);
const struct measure *measure_named(const char *name); /* or ends the program */
CK_RV create(CK_ULONG number);                         /* one of the objects that are searched */

#endif
