/* General, slot, session and login functions (PKCS#11 3.0, 5.4-5.6). */
#include <stdlib.h>
#include <string.h>

#include "call.h"
#include "operations.h"

#define VENDOR "hsmvisor"
#define DESCRIPTION "hsmvisor virtual HSM"

CK_RV C_Initialize(void *args)
{
    const CK_C_INITIALIZE_ARGS *a = args;
    bool threads = true;
    if (a) {
        int given = !!a->CreateMutex + !!a->DestroyMutex + !!a->LockMutex + !!a->UnlockMutex;
        if (a->pReserved || (given != 0 && given != 4))
            return CKR_ARGUMENTS_BAD;
        if (given == 4 && !(a->flags & CKF_OS_LOCKING_OK))
            return CKR_CANT_LOCK; /* the library uses the system's locks */
        threads = !(a->flags & CKF_LIBRARY_CANT_CREATE_OS_THREADS);
    }
    return application_initialize(threads);
}

CK_RV C_Finalize(void *reserved)
{
    return reserved ? CKR_ARGUMENTS_BAD : application_finalize();
}

static void pad(CK_UTF8CHAR *field, size_t width, const char *text)
{
    memset(field, ' ', width);
    memcpy(field, text, strlen(text));
}

CK_RV C_GetInfo(CK_INFO *info)
{
    CK_RV rv = application_check();
    if (rv != CKR_OK)
        return rv;
    if (!info)
        return CKR_ARGUMENTS_BAD;
    memset(info, 0, sizeof *info);
    info->cryptokiVersion = (CK_VERSION){3, 0};
    info->libraryVersion = (CK_VERSION){0, 1};
    pad(info->manufacturerID, sizeof info->manufacturerID, VENDOR);
    pad(info->libraryDescription, sizeof info->libraryDescription, DESCRIPTION);
    return CKR_OK;
}

/* As call_begin; a slot that is not shown is not there. */
static CK_RV slot_begin(struct call *call, uint32_t id, CK_SLOT_ID slot)
{
    CK_RV rv = call_begin(call, id);
    return rv == CKR_OK && !slots_show(application_slots(), slot) ? CKR_SLOT_ID_INVALID : rv;
}

CK_RV C_GetSlotInfo(CK_SLOT_ID slot, CK_SLOT_INFO *info)
{
    if (!info)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = slot_begin(&call, CALL_GET_SLOT_INFO, slot);
    if (rv == CKR_OK) {
        put_ulong(call.out, slot);
        rv = call_run(&call, REPLAY);
        if (rv == CKR_OK) {
            get_fixed(&call.reply, info->slotDescription, sizeof info->slotDescription);
            get_fixed(&call.reply, info->manufacturerID, sizeof info->manufacturerID);
            info->flags = get_ulong(&call.reply);
            info->hardwareVersion = get_version(&call.reply);
            info->firmwareVersion = get_version(&call.reply);
        }
    }
    return call_end(&call, rv);
}

CK_RV C_GetTokenInfo(CK_SLOT_ID slot, CK_TOKEN_INFO *info)
{
    if (!info)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = slot_begin(&call, CALL_GET_TOKEN_INFO, slot);
    if (rv == CKR_OK) {
        put_ulong(call.out, slot);
        rv = call_run(&call, REPLAY);
        struct reader *r = &call.reply;
        if (rv == CKR_OK) {
            get_fixed(r, info->label, sizeof info->label);
            get_fixed(r, info->manufacturerID, sizeof info->manufacturerID);
            get_fixed(r, info->model, sizeof info->model);
            get_fixed(r, info->serialNumber, sizeof info->serialNumber);
            CK_ULONG *numbers[] = {
                &info->flags, &info->ulMaxSessionCount, &info->ulSessionCount, &info->ulMaxRwSessionCount, &info->ulRwSessionCount,
                &info->ulMaxPinLen, &info->ulMinPinLen, &info->ulTotalPublicMemory, &info->ulFreePublicMemory,
                &info->ulTotalPrivateMemory, &info->ulFreePrivateMemory,
            };
            for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
                *numbers[i] = get_ulong(r);
            info->hardwareVersion = get_version(r);
            info->firmwareVersion = get_version(r);
            get_fixed(r, info->utcTime, sizeof info->utcTime);
        }
    }
    return call_end(&call, rv);
}

CK_RV C_GetMechanismList(CK_SLOT_ID slot, CK_MECHANISM_TYPE *list, CK_ULONG *count)
{
    if (!count)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = slot_begin(&call, CALL_GET_MECHANISM_LIST, slot);
    if (rv == CKR_OK) {
        put_ulong(call.out, slot);
        put_room(call.out, list, *count);
        rv = call_run(&call, REPLAY);
        if (rv == CKR_OK)
            rv = get_ulongs(&call.reply, list, count);
    }
    return call_end(&call, rv);
}

CK_RV C_GetMechanismInfo(CK_SLOT_ID slot, CK_MECHANISM_TYPE type, CK_MECHANISM_INFO *info)
{
    if (!info)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = slot_begin(&call, CALL_GET_MECHANISM_INFO, slot);
    if (rv == CKR_OK) {
        put_ulong(call.out, slot);
        put_ulong(call.out, type);
        rv = call_run(&call, REPLAY);
        if (rv == CKR_OK) {
            info->ulMinKeySize = get_ulong(&call.reply);
            info->ulMaxKeySize = get_ulong(&call.reply);
            info->flags = get_ulong(&call.reply);
        }
    }
    return call_end(&call, rv);
}

CK_RV C_InitToken(CK_SLOT_ID slot, CK_UTF8CHAR *pin, CK_ULONG pin_len, CK_UTF8CHAR *label)
{
    if (!label)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = slot_begin(&call, CALL_INIT_TOKEN, slot);
    if (rv == CKR_OK) {
        put_ulong(call.out, slot);
        put_bytes(call.out, pin, pin_len);
        put_text(call.out, label, 32); /* the width of CK_TOKEN_INFO.label */
        rv = call_run(&call, ONCE_ONLY);
    }
    return call_end(&call, rv);
}

/* ---- sessions ---- */

CK_RV C_OpenSession(CK_SLOT_ID slot, CK_FLAGS flags, void *application, CK_NOTIFY notify, CK_SESSION_HANDLE *session)
{
    (void)application;
    (void)notify; /* the module makes no callbacks */
    if (!session)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = slot_begin(&call, CALL_OPEN_SESSION, slot);
    if (rv == CKR_OK) {
        put_ulong(call.out, slot);
        put_ulong(call.out, flags);
        rv = call_run(&call, REPLAY);
        CK_SESSION_HANDLE handle = rv == CKR_OK ? get_ulong(&call.reply) : 0;
        if (rv == CKR_OK && !call.reply.failed && !call.reply.length) {
            enum added added = session_add(handle, slot, flags, call.incarnation);
            if (added == ADD_STALE) { /* another thread lost and found the module meanwhile */
                call_end(&call, CKR_OK);
                return C_OpenSession(slot, flags, application, notify, session);
            }
            rv = added == ADDED ? CKR_OK : CKR_HOST_MEMORY;
            *session = handle;
        }
    }
    return call_end(&call, rv);
}

CK_RV C_CloseSession(CK_SESSION_HANDLE handle)
{
    struct call call;
    CK_RV rv = call_begin(&call, CALL_CLOSE_SESSION);
    if (rv == CKR_OK) {
        struct session *s = session_find(handle);
        if (s)
            session_remove(s); /* before the call: a reconnect must not restore it */
        put_ulong(call.out, handle);
        rv = call_run(&call, REPLAY);
        if (s && rv == CKR_SESSION_HANDLE_INVALID)
            rv = CKR_OK; /* closed by the first try, or lost with a connection */
    }
    if (!sessions_any())
        proofs_clear(); /* the last session logs out (PKCS#11 3.0, 5.6.2) */
    return call_end(&call, rv);
}

CK_RV C_CloseAllSessions(CK_SLOT_ID slot)
{
    struct call call;
    CK_RV rv = slot_begin(&call, CALL_CLOSE_ALL_SESSIONS, slot);
    if (rv == CKR_OK) {
        put_ulong(call.out, slot);
        sessions_clear(slot, false);
        proofs_clear();
        rv = call_run(&call, REPLAY);
    }
    return call_end(&call, rv);
}

CK_RV C_GetSessionInfo(CK_SESSION_HANDLE handle, CK_SESSION_INFO *info)
{
    if (!info)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = call_begin(&call, CALL_GET_SESSION_INFO);
    if (rv == CKR_OK) {
        put_ulong(call.out, handle);
        rv = call_run(&call, REPLAY);
        if (rv == CKR_OK) {
            info->slotID = get_ulong(&call.reply);
            info->state = get_ulong(&call.reply);
            info->flags = get_ulong(&call.reply);
            info->ulDeviceError = get_ulong(&call.reply);
        }
    }
    return call_end(&call, rv);
}

CK_RV C_SessionCancel(CK_SESSION_HANDLE handle, CK_FLAGS flags)
{
    struct call call;
    CK_RV rv = call_begin(&call, CALL_SESSION_CANCEL);
    if (rv == CKR_OK) {
        struct session *s = session_find(handle);
        for (int kind = 0; s && kind < OPERATIONS; kind++) {
            if (flags & operation_flags[kind]) {
                s->deferred[kind].pending = false;
                s->begun[kind] = 0;
                s->uncertain[kind] = false;
            }
        }
        put_ulong(call.out, handle);
        put_ulong(call.out, flags);
        rv = call_run(&call, REPLAY);
    }
    return call_end(&call, rv);
}

/* ---- login ---- */

static CK_RV pin_call(uint32_t id, CK_SESSION_HANDLE session, const CK_USER_TYPE *user, CK_UTF8CHAR *pin, CK_ULONG pin_len,
                      CK_UTF8CHAR *more, CK_ULONG more_len, bool have_more)
{
    struct call call;
    CK_RV rv = call_begin(&call, id);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        if (user)
            put_ulong(call.out, *user);
        put_bytes(call.out, pin, pin_len);
        if (have_more)
            put_bytes(call.out, more, more_len);
        rv = call_run(&call, ONCE_ONLY); /* a wrong PIN must not be counted twice */
    }
    return call_end_wiped(&call, rv);
}

CK_RV C_InitPIN(CK_SESSION_HANDLE session, CK_UTF8CHAR *pin, CK_ULONG pin_len)
{
    return pin_call(CALL_INIT_PIN, session, NULL, pin, pin_len, NULL, 0, false);
}

CK_RV C_SetPIN(CK_SESSION_HANDLE session, CK_UTF8CHAR *old_pin, CK_ULONG old_len, CK_UTF8CHAR *new_pin, CK_ULONG new_len)
{
    return pin_call(CALL_SET_PIN, session, NULL, old_pin, old_len, new_pin, new_len, true);
}

CK_RV C_Login(CK_SESSION_HANDLE session, CK_USER_TYPE user, CK_UTF8CHAR *pin, CK_ULONG pin_len)
{
    if (user == CKU_CONTEXT_SPECIFIC) {
        CK_RV rv = application_check();
        if (rv == CKR_OK)
            rv = operation_settle(&SIGN, session);
        if (rv == CKR_OK)
            rv = operation_settle(&DECRYPT, session);
        if (rv != CKR_OK)
            return rv;
    }
    return pin_call(CALL_LOGIN, session, &user, pin, pin_len, NULL, 0, false);
}

CK_RV C_LoginUser(CK_SESSION_HANDLE session, CK_USER_TYPE user, CK_UTF8CHAR *pin, CK_ULONG pin_len, CK_UTF8CHAR *name, CK_ULONG name_len)
{
    return pin_call(CALL_LOGIN_USER, session, &user, pin, pin_len, name, name_len, true);
}

CK_RV C_Logout(CK_SESSION_HANDLE session)
{
    struct call call;
    CK_RV rv = call_begin(&call, CALL_LOGOUT);
    proofs_clear();
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        rv = call_run(&call, ONCE_ONLY);
    }
    return call_end(&call, rv);
}

/* ---- the rest ---- */

CK_RV C_GetOperationState(CK_SESSION_HANDLE session, CK_BYTE *out, CK_ULONG *out_len)
{
    if (!out_len)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = call_begin(&call, CALL_GET_OPERATION_STATE);
    struct session *s = rv == CKR_OK ? session_find(session) : NULL;
    for (int kind = 0; s && kind < OPERATIONS; kind++)
        if (s->deferred[kind].pending)
            rv = CKR_STATE_UNSAVEABLE; /* the module does not know of it yet, and would say there is none */
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_room(call.out, out, *out_len);
        rv = call_run(&call, REPLAY);
        if (rv == CKR_OK)
            rv = get_output(&call.reply, out, out_len);
    }
    return call_end(&call, rv);
}

CK_RV C_SetOperationState(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_OBJECT_HANDLE encryption_key,
                          CK_OBJECT_HANDLE authentication_key)
{
    struct call call;
    CK_RV rv = call_begin(&call, CALL_SET_OPERATION_STATE);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_bytes(call.out, in, in_len);
        put_ulong(call.out, encryption_key);
        put_ulong(call.out, authentication_key);
        rv = call_run(&call, ONCE_ONLY);
    }
    return call_end(&call, rv);
}

CK_RV C_GetFunctionStatus(CK_SESSION_HANDLE session)
{
    (void)session;
    CK_RV rv = application_check();
    return rv == CKR_OK ? CKR_FUNCTION_NOT_PARALLEL : rv;
}

CK_RV C_CancelFunction(CK_SESSION_HANDLE session)
{
    return C_GetFunctionStatus(session);
}

CK_RV C_GetSessionValidationFlags(CK_SESSION_HANDLE session, CK_ULONG type, CK_FLAGS *flags)
{
    if (!flags)
        return CKR_ARGUMENTS_BAD;
    struct call call;
    CK_RV rv = call_begin(&call, CALL_GET_SESSION_VALIDATION_FLAGS);
    if (rv == CKR_OK) {
        put_ulong(call.out, session);
        put_ulong(call.out, type);
        rv = call_run(&call, REPLAY);
        if (rv == CKR_OK)
            *flags = get_ulong(&call.reply);
    }
    return call_end(&call, rv);
}
