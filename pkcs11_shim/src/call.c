#include "call.h"

#include <stdlib.h>

#include "diagnostics.h"
#include "greeting.h"
#include "names.h"

#define MOST_TRIES 4u         /* a request that ends the module each time must not do so for ever */
#define PATIENT_PAUSE_MS 1000u

CK_RV call_begin(struct call *call, uint32_t id)
{
    *call = (struct call){.id = id};
    CK_RV rv = application_take(&call->connection);
    if (rv == CKR_OK) {
        call->out = &call->connection->out;
        connection_begin(call->connection, id);
    }
    return rv;
}

/* After the first try of a call that begins an operation: if the application still exists, the operation may. */
static bool cancel_begun(struct connection *c, const struct call *call)
{
    connection_begin(c, CALL_SESSION_CANCEL);
    put_ulong(&c->out, call->session);
    put_ulong(&c->out, call->cancel);
    struct reader reply;
    return connection_exchange(c, 0, &reply) == EXCHANGE_DONE;
}

/* Connects; the call's message is kept while its connection greets. */
static CK_RV attach_keeping(struct call *call, bool again)
{
    struct connection *c = call->connection;
    struct writer message = c->out;
    unsigned before = c->incarnation;
    c->out = (struct writer){0};
    CK_RV rv = application_attach(c);
    if (rv == CKR_OK && again && call->cancel && c->incarnation == before && !cancel_begun(c, call))
        rv = CKR_DEVICE_ERROR;
    free(c->out.data);
    c->out = message;
    if (rv == CKR_HOST_MEMORY && application_exchange(&call->connection)) {
        call->out = &call->connection->out;
        rv = CKR_OK;
    }
    return rv;
}

CK_RV call_run(struct call *call, enum replay replay)
{
    if (call->out->failed || call->out->length > largest_request() + HEADER_SIZE)
        return CKR_ARGUMENTS_BAD; /* a count or length past what a message may hold */
    bool again = false;
    for (unsigned try = 0; try < MOST_TRIES; try++) {
        if (call->connection->fd < 0) {
            CK_RV rv = attach_keeping(call, again);
            if (rv != CKR_OK)
                return application_check() == CKR_OK ? rv : CKR_CRYPTOKI_NOT_INITIALIZED;
            if (call->connection->fd < 0)
                continue; /* another one, that has lost its module too */
        }
        struct connection *c = call->connection;
        if (call->bound && c->incarnation != call->bound)
            return CKR_DEVICE_ERROR; /* the operation ended with the application that it was begun in */
        switch (connection_exchange(c, 0, &call->reply)) {
        case EXCHANGE_DONE:
            call->incarnation = c->incarnation;
            call->unknown = false;
            return reply_head(&call->reply, call->id);
        case EXCHANGE_UNSENT:
            break;
        case EXCHANGE_LOST:
            call->unknown = again = true;
            break;
        case EXCHANGE_OVERDUE:
            diagnose("%s: no answer in time", call_name(call->id));
            call->unknown = true;
            connection_close(c);
            return CKR_DEVICE_ERROR;
        case EXCHANGE_BROKEN:
            diagnose("%s: the answer is malformed", call_name(call->id));
            call->unknown = true;
            connection_close(c);
            return CKR_DEVICE_ERROR;
        }
        connection_close(c);
        if (application_check() != CKR_OK)
            return CKR_CRYPTOKI_NOT_INITIALIZED;
        if (again && replay == ONCE_ONLY)
            return CKR_DEVICE_ERROR;
    }
    diagnose("%s: the connection was lost each time", call_name(call->id));
    return CKR_DEVICE_ERROR;
}

static CK_RV judge(struct call *call, CK_RV rv)
{
    if (call->reply.failed || (rv == CKR_OK && call->reply.length)) {
        diagnose("%s: the answer does not have the form that it should", call_name(call->id));
        connection_close(call->connection);
        rv = CKR_DEVICE_ERROR;
    }
    if (rv != CKR_OK && rv != CKR_BUFFER_TOO_SMALL && diagnostics_on())
        diagnose("%s: %s (0x%lx)", call_name(call->id), rv_name(rv), (unsigned long)rv);
    return rv;
}

CK_RV call_end(struct call *call, CK_RV rv)
{
    if (!call->connection)
        return rv;
    rv = judge(call, rv);
    application_give(call->connection);
    call->connection = NULL;
    return rv;
}

CK_RV call_end_wiped(struct call *call, CK_RV rv)
{
    if (call->connection)
        connection_wipe(call->connection);
    return call_end(call, rv);
}

bool module_seen(void)
{
    return incarnation() != 0;
}

static CK_RV park(struct connection *c, uint32_t id, CK_ULONG field, CK_ULONG timeout_ms, CK_ULONG *result)
{
    connection_deadline(c, 0);
    connection_begin(c, id);
    put_ulong(&c->out, field);
    struct reader reply;
    uint32_t told = timeout_ms > UINT32_MAX ? UINT32_MAX : (uint32_t)timeout_ms;
    if (connection_exchange(c, told, &reply) != EXCHANGE_DONE) {
        connection_close(c);
        return CKR_DEVICE_ERROR;
    }
    CK_RV rv = reply_head(&reply, id);
    if (rv != CKR_OK)
        return rv;
    CK_ULONG number = get_ulong(&reply);
    if (reply.failed || reply.length)
        return CKR_DEVICE_ERROR;
    *result = number;
    return CKR_OK;
}

CK_RV call_parked(uint32_t id, CK_ULONG field, CK_ULONG timeout_ms, bool patient, CK_ULONG *result)
{
    struct connection *c;
    CK_RV rv = application_take_apart(&c, &timeout_ms);
    if (rv != CKR_OK)
        return rv;
    do {
        rv = application_attach(c);
        if (rv == CKR_OK)
            rv = park(c, id, field, timeout_ms, result);
    } while (patient && (rv == CKR_DEVICE_ERROR || rv == CKR_HOST_MEMORY) && application_pause(PATIENT_PAUSE_MS));
    if (application_check() != CKR_OK)
        rv = CKR_CRYPTOKI_NOT_INITIALIZED;
    application_drop(c);
    return rv;
}
