"""The PKCS#11 face: one decoded request in, one encoded reply out.  No socket, no thread, no protocol knowledge but the calls."""

from __future__ import annotations

from collections.abc import Callable

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.face import combined, cryptography, encapsulation, general, messages, native, objects
from hsmvisord.face.caller import Args, Caller, Handler, Parked
from hsmvisord.wire.calls import BadMessage, Call, Request

HANDLERS: dict[Call, Handler] = (
    general.TABLE | objects.TABLE | cryptography.TABLE | combined.TABLE | messages.TABLE | encapsulation.TABLE | native.TABLE
)

#: What a client may ask before C_Initialize (p11-kit) or Hello (native).
BEFORE_INITIALIZE = frozenset({Call.INITIALIZE, Call.HELLO, Call.GET_INFO})

#: (request, ready): the answer comes later; `finish` makes it.  Raises CkError.
Park = Callable[[Request, Callable[[], Args | None]], None]


def handle(caller: Caller, request: Request, park: Park) -> bytes | None:
    """Returns the reply's frame, or None when the request was parked."""
    codec = caller.codec
    try:
        if caller.refused:
            raise CkError(ck.CKR_HOST_MEMORY, "the module has too many connections")
        handler = HANDLERS.get(request.call)
        if handler is None:
            raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED)
        if caller.application_or_none is None and request.call not in BEFORE_INITIALIZE:
            raise CkError(ck.CKR_CRYPTOKI_NOT_INITIALIZED)
        return codec.reply(request, *handler(caller, request.args))
    except CkError as error:
        return codec.error(request.id, error.rv)
    except Parked as parked:
        return _park(caller, request, parked, park)
    except BadMessage as error:
        return codec.error(request.id, error.rv)
    except Exception as error:
        # A fault of ours is the call's error, not the connection's end; its text may hold a guest's data, so only its
        # place is told.
        caller.token.on_fault(request.call.name, error)
        return codec.error(request.id, ck.CKR_GENERAL_ERROR)


def _park(caller: Caller, request: Request, parked: Parked, park: Park) -> bytes | None:
    try:
        park(request, parked.ready)
    except CkError as error:
        return caller.codec.error(request.id, error.rv)
    return None


def finish(caller: Caller, request: Request, ready: Callable[[], Args | None]) -> bytes | None:
    """Asks a parked request again; returns its reply's frame when it has one."""
    try:
        values = ready()
        return None if values is None else caller.codec.reply(request, *values)
    except CkError as error:
        return caller.codec.error(request.id, error.rv)


def expire(caller: Caller, request: Request) -> bytes:
    """The reply to a parked request whose deadline is over."""
    return caller.codec.error(request.id, ck.CKR_FUNCTION_CANCELED)
