/* Object functions and searches (PKCS#11 3.0, 5.7), and those that make keys (5.18). */
#include <stdlib.h>
#include <string.h>

#include "call.h"
#include "greeting.h"
#include "operations.h"

CK_RV C_GetAttributeValue(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object, CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    if (!attributes && count)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = call_begin(&call, CALL_GET_ATTRIBUTE_VALUE);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_ulong(call.out, object);
        put_rooms(call.out, attributes, count);
        rv = call_run(&call, REPLAY);
        if (rv == CKR_OK)
            rv = get_attributes(&call.reply, attributes, count);
    }
    return call_end(&call, rv);
}

CK_RV C_GetObjectSize(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object, CK_ULONG *size)
{
    if (!size)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = call_begin(&call, CALL_GET_OBJECT_SIZE);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_ulong(call.out, object);
        rv = call_run(&call, REPLAY);
        if (rv == CKR_OK)
            *size = get_ulong(&call.reply);
    }
    return call_end(&call, rv);
}

/* A call with up to two handles, an optional mechanism and input, and a template, that may answer a new handle. */
struct making {
    uint32_t id;
    CK_SESSION_HANDLE session;
    const CK_OBJECT_HANDLE *object;
    const CK_MECHANISM *mechanism;
    const CK_BYTE *in;
    CK_ULONG in_len;
    const CK_ATTRIBUTE *attributes;
    CK_ULONG count;
    CK_OBJECT_HANDLE *made;
};

static CK_RV make(const struct making *m)
{
    if ((!m->attributes && m->count) || (m->id != CALL_SET_ATTRIBUTE_VALUE && !m->made))
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = call_begin(&call, m->id);
    if (rv == CKR_OK) {
        put_ulong(call.out, m->session);
        if (m->mechanism)
            put_mechanism(call.out, m->mechanism);
        if (m->object)
            put_ulong(call.out, *m->object);
        if (m->id == CALL_UNWRAP_KEY)
            put_bytes(call.out, m->in, m->in_len);
        put_attributes(call.out, m->attributes, m->count, 0);
        if (m->id == CALL_SET_ATTRIBUTE_VALUE)
            proofs_clear(); /* what a key may do may be another thing now */
        rv = call_run(&call, ONCE_ONLY);
        if (rv == CKR_OK && m->made)
            *m->made = get_ulong(&call.reply);
    }
    return call_end(&call, rv);
}

CK_RV C_CreateObject(CK_SESSION_HANDLE session, CK_ATTRIBUTE *attributes, CK_ULONG count, CK_OBJECT_HANDLE *object)
{
    return make(&(struct making){
        .id = CALL_CREATE_OBJECT, .session = session, .attributes = attributes, .count = count, .made = object});
}

CK_RV C_CopyObject(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object, CK_ATTRIBUTE *attributes, CK_ULONG count, CK_OBJECT_HANDLE *copy)
{
    return make(&(struct making){
        .id = CALL_COPY_OBJECT, .session = session, .object = &object, .attributes = attributes, .count = count, .made = copy});
}

CK_RV C_SetAttributeValue(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object, CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    return make(&(struct making){
        .id = CALL_SET_ATTRIBUTE_VALUE, .session = session, .object = &object, .attributes = attributes, .count = count});
}

CK_RV C_GenerateKey(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_ATTRIBUTE *attributes, CK_ULONG count, CK_OBJECT_HANDLE *key)
{
    if (!mechanism)
        return CKR_ARGUMENTS_BAD;
    return make(&(struct making){
        .id = CALL_GENERATE_KEY, .session = session, .mechanism = mechanism, .attributes = attributes, .count = count, .made = key});
}

CK_RV C_DeriveKey(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE base_key, CK_ATTRIBUTE *attributes,
                  CK_ULONG count, CK_OBJECT_HANDLE *key)
{
    if (!mechanism)
        return CKR_ARGUMENTS_BAD;
    return make(&(struct making){.id = CALL_DERIVE_KEY, .session = session, .mechanism = mechanism, .object = &base_key,
                                 .attributes = attributes, .count = count, .made = key});
}

CK_RV C_UnwrapKey(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE unwrapping_key, CK_BYTE *in, CK_ULONG in_len,
                  CK_ATTRIBUTE *attributes, CK_ULONG count, CK_OBJECT_HANDLE *key)
{
    if (!mechanism || !in)
        return CKR_ARGUMENTS_BAD;
    return make(&(struct making){.id = CALL_UNWRAP_KEY, .session = session, .mechanism = mechanism, .object = &unwrapping_key, .in = in,
                                 .in_len = in_len, .attributes = attributes, .count = count, .made = key});
}

CK_RV C_DestroyObject(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object)
{
    struct call call;
    CK_RV rv = call_begin(&call, CALL_DESTROY_OBJECT);
    if (rv == CKR_OK) {
        proofs_clear();
        put_ulong(call.out, session);
        put_ulong(call.out, object);
        rv = call_run(&call, ONCE_ONLY);
    }
    return call_end(&call, rv);
}

CK_RV C_GenerateKeyPair(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_ATTRIBUTE *public_attributes, CK_ULONG public_count,
                        CK_ATTRIBUTE *private_attributes, CK_ULONG private_count, CK_OBJECT_HANDLE *public_key,
                        CK_OBJECT_HANDLE *private_key)
{
    if (!mechanism || !public_key || !private_key || (!public_attributes && public_count) || (!private_attributes && private_count))
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = call_begin(&call, CALL_GENERATE_KEY_PAIR);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_mechanism(call.out, mechanism);
        put_attributes(call.out, public_attributes, public_count, 0);
        put_attributes(call.out, private_attributes, private_count, 0);
        rv = call_run(&call, ONCE_ONLY);
        if (rv == CKR_OK) {
            *public_key = get_ulong(&call.reply);
            *private_key = get_ulong(&call.reply);
        }
    }
    return call_end(&call, rv);
}

CK_RV C_WrapKey(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE wrapping_key, CK_OBJECT_HANDLE key, CK_BYTE *out,
                CK_ULONG *out_len)
{
    if (!mechanism || !out_len)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = call_begin(&call, CALL_WRAP_KEY);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_mechanism(call.out, mechanism);
        put_ulong(call.out, wrapping_key);
        put_ulong(call.out, key);
        put_room(call.out, out, *out_len);
        rv = call_run(&call, REPLAY);
        if (rv == CKR_OK)
            rv = get_output(&call.reply, out, out_len);
    }
    return call_end(&call, rv);
}

/* ---- searches: C_FindObjectsInit fetches the first handles at once ---- */

static bool keep_found(struct session *s, struct reader *r)
{
    bool valid = get_u8(r);
    uint32_t count = get_u32(r);
    if (!s->found)
        s->found = malloc(FIND_AT_ONCE * sizeof *s->found);
    if (!valid || count > FIND_AT_ONCE || !s->found)
        return false;
    for (uint32_t i = 0; i < count; i++)
        s->found[i] = get_ulong(r);
    s->found_more = get_u8(r);
    s->found_count = count;
    s->found_next = 0;
    uint64_t watermark = get_u64(r);
    if (r->failed || r->length)
        return false;
    saw_watermark(watermark);
    return true;
}

CK_RV C_FindObjectsInit(CK_SESSION_HANDLE session, CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    if (!attributes && count)
        return CKR_ARGUMENTS_BAD;
    CK_RV rv = application_check();
    struct session *s = rv == CKR_OK ? session_find(session) : NULL;
    if (rv != CKR_OK || !s)
        return rv != CKR_OK ? rv : CKR_SESSION_HANDLE_INVALID;
    if (operation_check(s, OPERATION_FIND) == CKR_OK && s->begun[OPERATION_FIND])
        return CKR_OPERATION_ACTIVE;
    struct call call;
    rv = call_begin(&call, CALL_FIND_ONCE);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_attributes(call.out, attributes, count, 0);
        put_u64(call.out, FIND_AT_ONCE);
        call.session = session;
        call.cancel = CKF_FIND_OBJECTS;
        rv = call_run(&call, REPLAY);
        if (rv == CKR_OK && !keep_found(s, &call.reply))
            call.reply.failed = true;
        else if (rv == CKR_OK)
            s->begun[OPERATION_FIND] = call.incarnation;
    }
    return call_end(&call, rv);
}

/* CKR_OK when a search is open.  One whose handles are all here outlives a lost connection; another says so, once. */
static CK_RV search(struct session *s)
{
    if (!s)
        return CKR_SESSION_HANDLE_INVALID;
    if (!s->begun[OPERATION_FIND])
        return CKR_OPERATION_NOT_INITIALIZED;
    return s->found_more ? operation_check(s, OPERATION_FIND) : CKR_OK;
}

CK_RV C_FindObjects(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE *objects, CK_ULONG room, CK_ULONG *count)
{
    if (!objects || !count || !room)
        return CKR_ARGUMENTS_BAD;
    CK_RV rv = application_check();
    struct session *s = rv == CKR_OK ? session_find(session) : NULL;
    if (rv == CKR_OK)
        rv = search(s);
    if (rv != CKR_OK)
        return rv;
    CK_ULONG next = s->found_next, all = s->found_count;
    if (next < all || !s->found_more) {
        *count = next < all && all <= FIND_AT_ONCE ? (all - next < room ? all - next : room) : 0;
        if (*count)
            memcpy(objects, s->found + next, *count * sizeof *objects);
        s->found_next = next + *count;
        return CKR_OK;
    }
    struct call call;
    rv = call_begin(&call, CALL_FIND_OBJECTS);
    if (rv == CKR_OK) {
        *count = room;
        put_ulong(call.out, session);
        put_room(call.out, objects, room);
        call.bound = s->begun[OPERATION_FIND];
        rv = call_run(&call, ONCE_ONLY);
        if (rv == CKR_OK && get_ulongs(&call.reply, objects, count) != CKR_OK)
            call.reply.failed = true; /* there is always room for some */
        if (rv != CKR_OK)
            s->begun[OPERATION_FIND] = 0;
    }
    return call_end(&call, rv);
}

CK_RV C_FindObjectsFinal(CK_SESSION_HANDLE session)
{
    CK_RV rv = application_check();
    struct session *s = rv == CKR_OK ? session_find(session) : NULL;
    if (rv == CKR_OK)
        rv = search(s);
    if (rv != CKR_OK)
        return rv;
    unsigned bound = s->begun[OPERATION_FIND];
    s->begun[OPERATION_FIND] = 0;
    if (!s->found_more)
        return CKR_OK; /* the module has ended it with the last handle */
    struct call call;
    rv = call_begin(&call, CALL_FIND_OBJECTS_FINAL);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        call.bound = bound;
        rv = call_run(&call, ONCE_ONLY);
    }
    return call_end(&call, rv);
}
