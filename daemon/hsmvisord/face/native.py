"""Calls of the native dialect alone (wire/NATIVE.md): hello, restored sessions, waiting for a rotation."""

from __future__ import annotations

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.face.caller import Args, Caller, Handler, Parked
from hsmvisord.token.application import Application
from hsmvisord.wire.calls import Call

NEW, JOIN, FORK, RESUME = range(4)


def hello(caller: Caller, args: Args) -> Args:
    ulong_size, mode, ticket, watermark, program, pid = args
    if caller.application_or_none is not None:
        raise CkError(ck.CKR_CRYPTOKI_ALREADY_INITIALIZED)
    if ulong_size not in (4, 8) or mode not in (NEW, JOIN, FORK, RESUME):
        raise CkError(ck.CKR_ARGUMENTS_BAD, "Hello: size of CK_ULONG or mode")
    caller.program = printable(program)
    caller.pid = pid
    caller.codec.ulong_size = ulong_size
    application, joined = _application(caller, mode, ticket or b"", watermark)
    caller.application_or_none = application
    most = min(limits.MAX_JOINED, caller.token.settings.max_connections)
    return application.ticket, int(joined), caller.token.epoch, application.watermark, limits.MAX_MESSAGE, most


def _application(caller: Caller, mode: int, ticket: bytes, watermark: int) -> tuple[Application, bool]:
    token = caller.token
    if mode in (JOIN, RESUME):
        application = token.join(ticket)
        if application is not None:
            return application, True
        if mode == JOIN:
            raise CkError(ck.CKR_SESSION_CLOSED, "the application that this connection would join has ended")
    parent = token.application(ticket) if mode == FORK else None
    if parent is not None:
        watermark = parent.watermark
    return token.new_application(caller.program, 0 if mode == NEW else watermark, mode == FORK), False


def printable(text: bytes) -> str:
    """A guest's word for itself, fit for a log line."""
    shown = text[: limits.MAX_PROGRAM].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in shown)


def restore_sessions(caller: Caller, args: Args) -> Args:
    numbers = args[0] or ()
    if len(numbers) % 3 or len(numbers) > 3 * limits.MAX_SESSIONS:
        raise CkError(ck.CKR_ARGUMENTS_BAD, "RestoreSessions: triples of handle, slot, flags")
    triples = list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
    return (tuple(caller.application.restore_sessions(triples)),)


def rotation_wait(caller: Caller, args: Args) -> Args:
    (last,) = args
    _ = caller.application
    token = caller.token

    def ready() -> Args | None:
        return (token.watermark,) if token.watermark > last else None

    answer = ready()
    if answer is None:
        raise Parked(ready)
    return answer


TABLE: dict[Call, Handler] = {
    Call.HELLO: hello,
    Call.RESTORE_SESSIONS: restore_sessions,
    Call.ROTATION_WAIT: rotation_wait,
}
