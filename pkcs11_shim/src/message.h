/* One message of the native dialect (daemon/hsmvisord/wire/NATIVE.md): written into a buffer that grows, read with every length
 * checked.  Both keep a flag instead of failing at each step: `failed` is looked at once, at the end. */
#ifndef MESSAGE_H
#define MESSAGE_H

#include <stdbool.h>
#include <stdint.h>

#include "pkcs11.h"

#define MAX_REQUEST (17u << 16) /* 1 MiB of data, and what stands beside it */
#define MAX_REPLY (16u << 20)
#define HEADER_SIZE 12u

struct writer {
    uint8_t *data;
    size_t length, room;
    bool fixed; /* the room does not grow */
    bool failed;
};

void put_u8(struct writer *w, uint8_t value);
void put_u32(struct writer *w, uint32_t value);
void put_u64(struct writer *w, uint64_t value);
void put_raw(struct writer *w, const void *data, size_t length);
void put_ulong(struct writer *w, CK_ULONG value); /* CK_UNAVAILABLE_INFORMATION becomes 2^64-1 */
void put_bytes(struct writer *w, const void *data, size_t length); /* `ay`; NULL with its length */
void put_text(struct writer *w, const void *data, size_t length);  /* `z`, and the `bytes` of other fields */
void put_room(struct writer *w, const void *out, CK_ULONG length);  /* `fy`, `fu` */
void put_attributes(struct writer *w, const CK_ATTRIBUTE *attributes, CK_ULONG count, int depth);
void put_rooms(struct writer *w, const CK_ATTRIBUTE *attributes, CK_ULONG count);
void put_room_or_none(struct writer *w, const void *out, const CK_ULONG *length); /* `Ny`; NULL length = there is more to come */
void put_mechanism(struct writer *w, const CK_MECHANISM *mechanism); /* NULL cancels */
void put_message_mechanism(struct writer *w, const CK_MECHANISM *mechanism); /* the same; its parameter is that of a message */

struct reader {
    const uint8_t *data;
    size_t length;
    bool failed;
};

uint8_t get_u8(struct reader *r);
uint32_t get_u32(struct reader *r);
uint64_t get_u64(struct reader *r);
CK_ULONG get_ulong(struct reader *r);
const uint8_t *get_raw(struct reader *r, size_t length); /* NULL when it is not there */
void get_fixed(struct reader *r, CK_UTF8CHAR *text, size_t width); /* `s` */
CK_VERSION get_version(struct reader *r);
CK_RV get_output(struct reader *r, CK_BYTE *out, CK_ULONG *out_len); /* `ay` for an `fy`; CKR_BUFFER_TOO_SMALL */
CK_RV get_ulongs(struct reader *r, CK_ULONG *out, CK_ULONG *count);  /* `au` for an `fu` */
CK_RV get_attributes(struct reader *r, CK_ATTRIBUTE *attributes, CK_ULONG count);

#endif
