#include "message.h"

#include <endian.h>
#include <stdlib.h>
#include <string.h>

#define EMPTY_ROOM 0xffffffffu
#define MAX_DEPTH 4
#define MAX_ATTRIBUTES 256

enum { ATTRIBUTE_UNAVAILABLE, ATTRIBUTE_MEMORY, ATTRIBUTE_TEMPLATE, ATTRIBUTE_TOO_SMALL };

static uint8_t *grow(struct writer *w, size_t more)
{
    if (w->failed || more > MAX_REQUEST + HEADER_SIZE || w->length + more > MAX_REQUEST + HEADER_SIZE) {
        w->failed = true;
        return NULL;
    }
    if (w->length + more > w->room) {
        if (w->fixed) {
            w->failed = true;
            return NULL;
        }
        size_t room = w->room ? w->room : 512;
        while (room < w->length + more)
            room *= 2;
        uint8_t *data = realloc(w->data, room);
        if (!data) {
            w->failed = true;
            return NULL;
        }
        w->data = data;
        w->room = room;
    }
    uint8_t *at = w->data + w->length;
    w->length += more;
    return at;
}

void put_raw(struct writer *w, const void *data, size_t length)
{
    uint8_t *at = grow(w, length);
    if (at && length)
        memcpy(at, data, length);
}

void put_u8(struct writer *w, uint8_t value)
{
    put_raw(w, &value, 1);
}

void put_u32(struct writer *w, uint32_t value)
{
    value = htobe32(value);
    put_raw(w, &value, 4);
}

void put_u64(struct writer *w, uint64_t value)
{
    value = htobe64(value);
    put_raw(w, &value, 8);
}

void put_ulong(struct writer *w, CK_ULONG value)
{
    put_u64(w, value == CK_UNAVAILABLE_INFORMATION ? UINT64_MAX : (uint64_t)value);
}

void put_text(struct writer *w, const void *data, size_t length)
{
    if (length > MAX_REQUEST) {
        w->failed = true;
        return;
    }
    put_u32(w, (uint32_t)length);
    put_raw(w, data, length);
}

void put_bytes(struct writer *w, const void *data, size_t length)
{
    put_u8(w, data != NULL);
    if (data)
        put_text(w, data, length);
    else
        put_u32(w, length > UINT32_MAX ? UINT32_MAX : (uint32_t)length);
}

void put_room(struct writer *w, const void *out, CK_ULONG length)
{
    if (!out)
        put_u32(w, 0);
    else if (!length)
        put_u32(w, EMPTY_ROOM);
    else
        put_u32(w, length >= EMPTY_ROOM ? EMPTY_ROOM - 1 : (uint32_t)length);
}

void put_room_or_none(struct writer *w, const void *out, const CK_ULONG *length)
{
    put_u8(w, length != NULL);
    if (length)
        put_room(w, out, *length);
}

static bool is_template(CK_ATTRIBUTE_TYPE type)
{
    return type == CKA_WRAP_TEMPLATE || type == CKA_UNWRAP_TEMPLATE || type == CKA_DERIVE_TEMPLATE;
}

void put_attributes(struct writer *w, const CK_ATTRIBUTE *attributes, CK_ULONG count, int depth)
{
    if (depth > MAX_DEPTH || count > MAX_ATTRIBUTES || (count && !attributes)) {
        w->failed = true;
        return;
    }
    put_u32(w, (uint32_t)count);
    for (CK_ULONG i = 0; i < count; i++) {
        const CK_ATTRIBUTE *a = &attributes[i];
        put_ulong(w, a->type);
        if (is_template(a->type) && a->ulValueLen % sizeof(CK_ATTRIBUTE) == 0) {
            put_u8(w, ATTRIBUTE_TEMPLATE);
            put_attributes(w, a->pValue, a->ulValueLen / sizeof(CK_ATTRIBUTE), depth + 1);
        } else {
            put_u8(w, ATTRIBUTE_MEMORY);
            put_text(w, a->pValue, a->pValue ? a->ulValueLen : 0);
        }
    }
}

void put_rooms(struct writer *w, const CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    if (count > MAX_ATTRIBUTES) {
        w->failed = true;
        return;
    }
    put_u32(w, (uint32_t)count);
    for (CK_ULONG i = 0; i < count; i++) {
        put_ulong(w, attributes[i].type);
        put_room(w, attributes[i].pValue, attributes[i].ulValueLen);
    }
}

/* ---- reading ---- */

const uint8_t *get_raw(struct reader *r, size_t length)
{
    if (r->failed || length > r->length) {
        r->failed = true;
        return NULL;
    }
    const uint8_t *at = r->data;
    r->data += length;
    r->length -= length;
    return at;
}

uint8_t get_u8(struct reader *r)
{
    const uint8_t *at = get_raw(r, 1);
    return at ? *at : 0;
}

uint32_t get_u32(struct reader *r)
{
    uint32_t value = 0;
    const uint8_t *at = get_raw(r, 4);
    if (at)
        memcpy(&value, at, 4);
    return be32toh(value);
}

uint64_t get_u64(struct reader *r)
{
    uint64_t value = 0;
    const uint8_t *at = get_raw(r, 8);
    if (at)
        memcpy(&value, at, 8);
    return be64toh(value);
}

CK_ULONG get_ulong(struct reader *r)
{
    uint64_t value = get_u64(r);
    return value == UINT64_MAX ? CK_UNAVAILABLE_INFORMATION : (CK_ULONG)value;
}

void get_fixed(struct reader *r, CK_UTF8CHAR *text, size_t width)
{
    const uint8_t *at = get_raw(r, get_u32(r) == width ? width : SIZE_MAX);
    if (at)
        memcpy(text, at, width);
}

CK_VERSION get_version(struct reader *r)
{
    CK_VERSION version = {0, 0};
    const uint8_t *at = get_raw(r, 2);
    if (at)
        version = (CK_VERSION){at[0], at[1]};
    return version;
}

CK_RV get_output(struct reader *r, CK_BYTE *out, CK_ULONG *out_len)
{
    bool valid = get_u8(r);
    CK_ULONG length = get_u32(r);
    if (!valid && !r->failed && length <= MAX_REPLY && (!out || length > *out_len)) {
        *out_len = length;
        return out ? CKR_BUFFER_TOO_SMALL : CKR_OK;
    }
    const uint8_t *at = valid && out && length <= *out_len ? get_raw(r, length) : NULL;
    if (!at) {
        r->failed = true;
        return CKR_DEVICE_ERROR;
    }
    memcpy(out, at, length);
    *out_len = length;
    return CKR_OK;
}

CK_RV get_ulongs(struct reader *r, CK_ULONG *out, CK_ULONG *count)
{
    bool valid = get_u8(r);
    CK_ULONG length = get_u32(r);
    if (!valid && !r->failed && length <= MAX_REPLY && (!out || length > *count)) {
        *count = length;
        return out ? CKR_BUFFER_TOO_SMALL : CKR_OK;
    }
    if (!valid || !out || length > *count || length > r->length / 8) {
        r->failed = true;
        return CKR_DEVICE_ERROR;
    }
    for (CK_ULONG i = 0; i < length; i++)
        out[i] = get_ulong(r);
    *count = length;
    return CKR_OK;
}

/* One attribute of C_GetAttributeValue's reply; false when it has no value.  A value longer than the room that was sent is a lie: nothing
 * is written. */
static bool get_attribute(struct reader *r, CK_ATTRIBUTE *a)
{
    CK_ULONG room = a->pValue ? a->ulValueLen : 0, length;
    const uint8_t *at;
    a->ulValueLen = CK_UNAVAILABLE_INFORMATION;
    if (get_ulong(r) != a->type)
        r->failed = true;
    switch (get_u8(r)) {
    case ATTRIBUTE_UNAVAILABLE:
        return false;
    case ATTRIBUTE_MEMORY:
        length = get_u32(r);
        at = get_raw(r, length);
        if (!at || (a->pValue && length > room)) {
            r->failed = true;
            return false;
        }
        if (a->pValue && length)
            memcpy(a->pValue, at, length);
        a->ulValueLen = length;
        return true;
    case ATTRIBUTE_TEMPLATE:
        if (get_u32(r)) /* no module has another than the empty one so far */
            r->failed = true;
        a->ulValueLen = 0;
        return true;
    case ATTRIBUTE_TOO_SMALL:
        length = get_u32(r);
        if (a->pValue || length > MAX_REPLY)
            return false;
        a->ulValueLen = length;
        return true;
    default:
        r->failed = true;
        return false;
    }
}

/* CKR_OK is the module's word that every value is there: callers then use their buffers unseen. */
CK_RV get_attributes(struct reader *r, CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    bool all = true;
    if (get_u32(r) != count)
        r->failed = true;
    for (CK_ULONG i = 0; i < count && !r->failed; i++)
        all &= get_attribute(r, &attributes[i]);
    CK_RV rv = get_ulong(r);
    if (rv == CKR_OK ? !all : rv != CKR_ATTRIBUTE_SENSITIVE && rv != CKR_ATTRIBUTE_TYPE_INVALID && rv != CKR_BUFFER_TOO_SMALL)
        r->failed = true;
    if (r->failed)
        for (CK_ULONG i = 0; i < count; i++)
            attributes[i].ulValueLen = CK_UNAVAILABLE_INFORMATION;
    return rv;
}
