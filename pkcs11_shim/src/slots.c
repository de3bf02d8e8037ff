#include "slots.h"

#include <stdlib.h>
#include <string.h>

#include "call.h"

#define MOST_OF_A_MODULE 16u

/* ---- what the configuration says ---- */

bool slots_parse(struct slots *slots, const char *text)
{
    memset(slots, 0, sizeof *slots);
    if (!strcmp(text, "all"))
        return true;
    for (const char *at = text;; at++) {
        char *end;
        if (*at < '0' || *at > '9')
            return false;
        unsigned long id = strtoul(at, &end, 10);
        if (id > 255 || slots->count == MOST_SLOTS || (slots->count && slots_show(slots, id)))
            return false;
        slots->ids[slots->count++] = (unsigned char)id;
        at = end;
        if (!*at)
            return true;
        if (*at != ',')
            return false;
    }
}

bool slots_show(const struct slots *slots, CK_SLOT_ID slot)
{
    for (unsigned i = 0; i < slots->count; i++)
        if (slots->ids[i] == slot)
            return true;
    return !slots->count;
}

/* ---- functions ---- */

/* Those of the module's slots that are shown, in the order of the configuration. */
static CK_RV shown(const struct slots *slots, const CK_SLOT_ID *all, CK_ULONG of_all, CK_SLOT_ID *out, CK_ULONG *count)
{
    CK_SLOT_ID found[MOST_SLOTS];
    CK_ULONG n = 0;
    for (unsigned i = 0; i < slots->count; i++)
        for (CK_ULONG j = 0; j < of_all; j++)
            if (all[j] == slots->ids[i])
                found[n++] = all[j];
    CK_ULONG room = *count;
    *count = n;
    if (!out)
        return CKR_OK;
    if (n > room)
        return CKR_BUFFER_TOO_SMALL;
    memcpy(out, found, n * sizeof *found);
    return CKR_OK;
}

static CK_RV list(CK_BBOOL present, CK_SLOT_ID *slots, CK_ULONG *count)
{
    struct call call;
    CK_RV rv = call_begin(&call, CALL_GET_SLOT_LIST);
    if (rv == CKR_OK) {
        put_u8(call.out, present ? 1 : 0);
        put_room(call.out, slots, *count);
        rv = call_run(&call, REPLAY);
        if (rv == CKR_OK)
            rv = get_ulongs(&call.reply, slots, count);
    }
    rv = call_end(&call, rv);
    if (rv == CKR_DEVICE_ERROR && !module_seen()) {
        *count = 0; /* the module was never there: a library without slots, so that other tokens stay usable */
        rv = CKR_OK;
    }
    return rv;
}

CK_RV C_GetSlotList(CK_BBOOL present, CK_SLOT_ID *out, CK_ULONG *count)
{
    if (!count)
        return CKR_ARGUMENTS_BAD;
    const struct slots *slots = application_slots();
    if (!slots->count)
        return list(present, out, count);
    CK_SLOT_ID all[MOST_OF_A_MODULE];
    CK_ULONG of_all = MOST_OF_A_MODULE;
    CK_RV rv = list(present, all, &of_all);
    return rv == CKR_OK ? shown(slots, all, of_all, out, count) : rv;
}

CK_RV C_WaitForSlotEvent(CK_FLAGS flags, CK_SLOT_ID *slot, void *reserved)
{
    if (!slot || reserved)
        return CKR_ARGUMENTS_BAD;
    CK_SLOT_ID of = 0;
    CK_RV rv;
    if (!(flags & CKF_DONT_BLOCK)) {
        do
            rv = call_parked(CALL_WAIT_FOR_SLOT_EVENT, flags, 0, true, &of);
        while (rv == CKR_OK && !slots_show(application_slots(), of));
        if (rv == CKR_OK)
            *slot = of;
        return rv;
    }
    struct call call;
    rv = call_begin(&call, CALL_WAIT_FOR_SLOT_EVENT);
    if (rv == CKR_OK) {
        put_ulong(call.out, flags);
        rv = call_run(&call, REPLAY);
        if (rv == CKR_OK)
            of = get_ulong(&call.reply);
    }
    rv = call_end(&call, rv);
    if (rv == CKR_OK && slots_show(application_slots(), of))
        *slot = of;
    else if (rv == CKR_OK || rv == CKR_DEVICE_ERROR)
        rv = CKR_NO_EVENT; /* a module that is away has none; callers spin on other errors */
    return rv;
}
