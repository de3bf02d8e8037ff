"""Notes the requests that make an operation, and carries them out again in a successor."""

from __future__ import annotations

from hsmvisord.face import face
from hsmvisord.face.caller import Caller
from hsmvisord.token.journal import Journal
from hsmvisord.wire.calls import BadMessage, Call, Request, WireError
from hsmvisord.wire.frames import HEADER, FrameBuffer

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
    if operation is not None:
        if operation.journal is None:
            operation.journal = Journal()
        application.token.journals.add(operation.journal, raw(*frame))


def replay(caller: Caller, frames: tuple[bytes, ...]) -> bool:
    """Carries them out again; says whether the operation that they make is open."""
    request = None
    for frame in frames:
        buffer = FrameBuffer()
        buffer.feed(frame)
        try:
            parts = buffer.next_frame()
            if parts is None:
                return False
            request = caller.codec.decode(*parts)
        except (BadMessage, WireError):
            return False
        if request.call not in NOTED:
            return False
        face.handle(caller, request, lambda request, ready: None)
        note(caller, request, parts)
    if request is None:
        return False
    session = caller.application.sessions.get(request.args[0])
    return session is not None and NOTED[request.call] in session.operations
