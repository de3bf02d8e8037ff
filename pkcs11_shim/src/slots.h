/* Which of the module's slots applications see, and in which order: for software that takes the first one. */
#ifndef SLOTS_H
#define SLOTS_H

#include <stdbool.h>

#include "pkcs11.h"

#define MOST_SLOTS 8u

struct slots {
    unsigned count; /* 0: all of the module's, in its order */
    unsigned char ids[MOST_SLOTS];
};

/* Reads "all", or ids with commas between them, each once: "1", "1,0".  False for anything else. */
bool slots_parse(struct slots *slots, const char *text);

bool slots_show(const struct slots *slots, CK_SLOT_ID slot);

#endif
