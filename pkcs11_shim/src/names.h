/* Names of calls and CK_RV for diagnostics. */
#ifndef NAMES_H
#define NAMES_H

#include <stdint.h>

#include "pkcs11.h"

const char *call_name(uint32_t id);
const char *rv_name(CK_RV rv); /* "another CK_RV" for those that no module here answers */

#endif
