/* Asynchronous functions (PKCS#11 3.2, 5.22), of a library that has none. */
#include "application.h"
#include "session.h"

/* No session is asynchronous (CKR_SESSION_ASYNC_NOT_SUPPORTED), so no function ever answers CKR_PENDING: there is nothing to complete, to
 * keep or to join (PKCS#11 3.2, 5.22). */
static CK_RV not_pending(CK_SESSION_HANDLE session, const void *function, bool complete, CK_RV answer)
{
    CK_RV rv = application_check();
    if (rv != CKR_OK)
        return rv;
    if (!session_find(session))
        return CKR_SESSION_HANDLE_INVALID;
    return function && complete ? answer : CKR_ARGUMENTS_BAD;
}

CK_RV C_AsyncComplete(CK_SESSION_HANDLE session, CK_UTF8CHAR *function, CK_ASYNC_DATA *result)
{
    (void)result; /* may be NULL for a function without output */
    return not_pending(session, function, true, CKR_OPERATION_NOT_INITIALIZED);
}

CK_RV C_AsyncGetID(CK_SESSION_HANDLE session, CK_UTF8CHAR *function, CK_ULONG *id)
{
    return not_pending(session, function, id != NULL, CKR_OPERATION_NOT_INITIALIZED);
}

CK_RV C_AsyncJoin(CK_SESSION_HANDLE session, CK_UTF8CHAR *function, CK_ULONG id, CK_BYTE *out, CK_ULONG out_len)
{
    (void)id;
    return not_pending(session, function, out || !out_len, CKR_SAVED_STATE_INVALID);
}
