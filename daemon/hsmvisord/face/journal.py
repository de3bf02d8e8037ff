"""Notes the requests that make an operation, and carries them out again in a successor."""

from __future__ import annotations

import struct

from hsmvisord import limits
from hsmvisord.face import face
from hsmvisord.face.caller import Caller
from hsmvisord.token.journal import Journal
from hsmvisord.token.operations import Operation
from hsmvisord.wire.calls import BadMessage, Call, Request, WireError
from hsmvisord.wire.frames import HEADER, FrameBuffer

#: An option of a kept frame, not of the wire (NATIVE.md): what an operation's requests do not tell (Operation.carried).
CARRIED = 0xFFFF
MAX_CARRIED = limits.MAX_NATIVE_OPTIONS - 4  #: bytes of it

_OPTION = struct.Struct(">HH")

#: The operation that a request begins or goes on with.
NOTED: dict[Call, str] = {
    Call.SIGN_INIT: "sign",
    Call.SIGN_UPDATE: "sign",
    Call.VERIFY_INIT: "verify",
    Call.VERIFY_UPDATE: "verify",
    Call.ENCRYPT_INIT: "encrypt",
    Call.ENCRYPT_UPDATE: "encrypt",
    Call.DECRYPT_INIT: "decrypt",
    Call.DECRYPT_UPDATE: "decrypt",
    Call.DIGEST_INIT: "digest",
    Call.DIGEST_UPDATE: "digest",
    Call.FIND_OBJECTS_INIT: "find",
    Call.FIND_OBJECTS: "find",
    Call.SIGN_RECOVER_INIT: "sign recover",
    Call.VERIFY_RECOVER_INIT: "verify recover",
    Call.VERIFY_SIGNATURE_INIT: "verify",
    Call.VERIFY_SIGNATURE_UPDATE: "verify",
    Call.MESSAGE_SIGN_INIT: "message sign",
    Call.SIGN_MESSAGE: "message sign",
    Call.SIGN_MESSAGE_BEGIN: "message sign",
    Call.SIGN_MESSAGE_NEXT: "message sign",
    Call.MESSAGE_VERIFY_INIT: "message verify",
    Call.VERIFY_MESSAGE: "message verify",
    Call.VERIFY_MESSAGE_BEGIN: "message verify",
    Call.VERIFY_MESSAGE_NEXT: "message verify",
    Call.MESSAGE_ENCRYPT_INIT: "message encrypt",
    Call.ENCRYPT_MESSAGE: "message encrypt",
    Call.ENCRYPT_MESSAGE_BEGIN: "message encrypt",
    Call.ENCRYPT_MESSAGE_NEXT: "message encrypt",
    Call.MESSAGE_DECRYPT_INIT: "message decrypt",
    Call.DECRYPT_MESSAGE: "message decrypt",
    Call.DECRYPT_MESSAGE_BEGIN: "message decrypt",
    Call.DECRYPT_MESSAGE_NEXT: "message decrypt",
}


def raw(ident: int, options: bytes, message: bytes | memoryview) -> bytes:
    """Returns the frame as it came."""
    return b"".join((HEADER.pack(ident, len(options), len(message)), options, message))


def note(caller: Caller, request: Request, frame: tuple[int, bytes, bytes | memoryview]) -> None:
    """After a request of `NOTED` was answered: keeps it with the operation that it made, if that is open."""
    application = caller.application_or_none
    if application is None:
        return
    session = application.sessions.get(request.args[0])
    operation = session.operations.get(NOTED[request.call]) if session else None
    if operation is None:
        return
    journals = application.token.journals
    if operation.journal is None:
        operation.journal = Journal()
    elif operation.resting:
        journals.rewind(operation.journal)
        return
    ident, _, message = frame
    journals.add(operation.journal, raw(ident, b"", message))


def saved(operation: Operation) -> tuple[bytes, ...]:
    """Returns the frames that make an operation, for `replay`."""
    assert operation.journal is not None
    first, *others = operation.journal.frames
    state = operation.carried()
    if state:
        ident, _, size = HEADER.unpack_from(first)
        first = raw(ident, _OPTION.pack(CARRIED, len(state)) + state, first[HEADER.size : HEADER.size + size])
    return first, *others


def replay(caller: Caller, frames: tuple[bytes, ...]) -> bool:
    """Carries them out again; says whether the operation that they make is open.  One that cannot be made whole is ended."""
    request = None
    for frame in frames:
        buffer = FrameBuffer()
        buffer.feed(frame)
        try:
            parts = buffer.next_frame()
            again = caller.codec.decode(*parts) if parts is not None else None
        except (BadMessage, WireError):
            again = None
        if again is None or parts is None or again.call not in NOTED:
            break
        request = again
        face.handle(caller, request, lambda request, ready: None)
        note(caller, request, parts)
        if not _carried(caller, request, parts[1]):
            break
    else:
        return _operation(caller, request) is not None
    if request is not None and _operation(caller, request) is not None:
        caller.application.sessions[request.args[0]].cancel(NOTED[request.call])
    return False


def _operation(caller: Caller, request: Request | None) -> Operation | None:
    session = caller.application.sessions.get(request.args[0]) if request is not None else None
    return session.operations.get(NOTED[request.call]) if session is not None and request is not None else None


def _carried(caller: Caller, request: Request, options: bytes) -> bool:
    """After a request was carried out again: hands over what came with it; says whether that can be.  Other options, which earlier
    releases kept as the client sent them, say nothing."""
    operation = _operation(caller, request)
    if operation is None or len(options) < _OPTION.size or _OPTION.unpack_from(options) != (CARRIED, len(options) - _OPTION.size):
        return True
    try:
        operation.carry(options[_OPTION.size :])
    except ValueError:
        return False
    return True
