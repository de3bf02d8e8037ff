/* The fields of a mechanism's parameter (NATIVE.md, "Mechanism"). */
#ifndef FIELDS_H
#define FIELDS_H

#include "message.h"

void fields_begin(struct writer *w, uint8_t items);
void field_u(struct writer *w, CK_ULONG value);
void field_b(struct writer *w, const void *data, CK_ULONG length); /* NULL is empty */

#endif
