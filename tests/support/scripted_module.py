"""A module that follows a script: the native dialect (NATIVE.md) on a unix socket, with a codec of its own.

It keeps applications and sessions as a real one does, signs with a hash, writes down every request, and lets a test replace any
answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsmvisord import ck, limits
from hsmvisord.wire.calls import MORE_FOLLOWS, Call
from hsmvisord.wire.table import CALLS

HEADER = struct.Struct(">III")
SIGNATURE = 64  #: bytes of every signature
KEY, FOREIGN_KEY = 5, 6  #: object handles: the one that signs, and one that SignInit refuses

SECOND = 1000  #: milliseconds


class Refuse(Exception):
    """The answer is this CK_RV."""

    def __init__(self, rv: int) -> None:
        super().__init__(ck.rv_name(rv))
        self.rv = rv


@dataclass(frozen=True)
class Raw:
    """The answer is these bytes, whatever they are."""

    message: bytes = b""  #: behind a header with the request's id and this length
    frame: bytes | None = None  #: instead of header and message


class Close(Exception):
    """The connection ends without an answer."""


@dataclass
class Room:
    """A reply's value for a buffer that is too small: the length or count that is needed."""

    needed: int


@dataclass
class Session:
    slot: int
    flags: int
    operation: tuple[Any, ...] | None = None


@dataclass
class Application:
    ticket: bytes
    sessions: dict[int, Session] = field(default_factory=dict)
    connections: int = 0


@dataclass(frozen=True)
class Request:
    connection: int
    call: Call
    args: tuple[Any, ...]
    deadline: int  #: milliseconds, 0 = none

    @property
    def name(self) -> str:
        return self.call.name


class Fields:
    """Reads a request."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        taken = self.data[self.at : self.at + count]
        assert len(taken) == count, "a request ends too early"
        self.at += count
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def room(self) -> int | None:
        room = self.number(4)
        return None if room == 0 else 0 if room == 0xFFFFFFFF else room

    def attributes(self) -> list[tuple[int, Any]]:
        return [(self.number(8), self.attribute()) for _ in range(self.number(4))]

    def attribute(self) -> Any:
        form = self.number(1)
        assert form in (1, 2), f"an attribute of form {form}"
        return self.take(self.number(4)) if form == 1 else self.attributes()

    def mechanism(self) -> tuple[int, Any] | None:
        kind, form = self.number(8), self.number(1)
        match form:
            case 0:
                return kind, None
            case 1:
                return kind, self.take(self.number(4))
            case 2:
                return kind, tuple(self.item() for _ in range(self.number(1)))
            case 255:
                return None
        raise AssertionError(f"a mechanism of form {form}")

    def item(self) -> int | bytes:
        return self.number(8) if self.take(1) == b"u" else self.take(self.number(4))

    def field(self, code: str) -> Any:
        match code:
            case "u":
                return self.number(8)
            case "y":
                return self.number(1)
            case "z" | "s":
                return self.take(self.number(4))
            case "ay":
                valid, length = self.number(1), self.number(4)
                return self.take(length) if valid else None
            case "au":
                valid, count = self.number(1), self.number(4)
                return [self.number(8) for _ in range(count)] if valid else None
            case "fy" | "fu":
                return self.room()
            case "Ny":
                return self.room() if self.number(1) else MORE_FOLLOWS
            case "aA":
                return self.attributes()
            case "fA":
                return [(self.number(8), self.room()) for _ in range(self.number(4))]
            case "M":
                return self.mechanism()
        raise AssertionError(code)


def reply_field(code: str, value: Any) -> bytes:
    match code, value:
        case "u", int():
            return struct.pack(">Q", value)
        case "y", int():
            return bytes((value,))
        case "v", _:
            return bytes(value)
        case "s", bytes():
            return struct.pack(">I", len(value)) + value
        case "ay" | "au", Room():
            return b"\0" + struct.pack(">I", value.needed)
        case "ay", bytes():
            return b"\1" + struct.pack(">I", len(value)) + value
        case "au", _:
            return b"\1" + struct.pack(f">I{len(value)}Q", len(value), *value)
        case "aA", _:
            return struct.pack(">I", len(value)) + b"".join([struct.pack(">Q", kind) + form for kind, form in value])
    raise AssertionError((code, value))


def fit(data: bytes, room: int | None) -> bytes | Room:
    return data if room is not None and len(data) <= room else Room(len(data))


class ScriptedModule:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[Request] = []
        self.answers: dict[Call, Callable[..., Any]] = {}  #: call -> answer(module, application, request), instead of the usual one
        self.applications: dict[bytes, Application] = {}
        self.max_connections = 64  #: that an application is told
        self.max_message = limits.MAX_MESSAGE  #: bytes, likewise
        self.refuse_after: int | None = None  #: connections at a time; the next are answered CKR_HOST_MEMORY
        self.watermark = 7
        self.changed = threading.Condition()
        self.stopping = False
        self._sockets: list[socket.socket] = []
        self._numbers = itertools.count(1)
        self._handles = itertools.count(1)
        self.start()

    # ---- life ----------------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return f"unix:path={self.path}"

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Closes every connection; new ones are welcome."""
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def restart(self) -> None:
        """The worker dies and another takes its place: nothing of its applications is left."""
        self.applications.clear()
        self.cut()

    def names(self) -> list[str]:
        return [request.name for request in self.requests]

    def connections(self) -> int:
        return len(self._sockets)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                self._sockets.append(sock)
                threading.Thread(target=self._serve, args=(sock, next(self._numbers)), daemon=True).start()

    # ---- one connection ------------------------------------------------------------------------------------------------

    def _serve(self, sock: socket.socket, number: int) -> None:
        application: Application | None = None

        def take(count: int) -> bytes:
            data = b""
            while len(data) < count:
                piece = sock.recv(count - len(data))
                if not piece:
                    raise Close
                data += piece
            return data

        try:
            assert take(1) == b"\x81"
            sock.sendall(b"\x81")
            while True:
                ident, option_size, size = HEADER.unpack(take(HEADER.size))
                deadline = int.from_bytes(take(option_size)[4:8], "big")
                request = self._request(number, take(size), deadline)
                self.requests.append(request)
                answer, application = self._answer(request, application)
                if isinstance(answer, Raw) and answer.frame is not None:
                    sock.sendall(answer.frame)
                    continue
                message = answer.message if isinstance(answer, Raw) else answer
                sock.sendall(HEADER.pack(ident, 0, len(message)) + message)
        except (Close, OSError):
            pass
        finally:
            if sock in self._sockets:
                self._sockets.remove(sock)
            if application is not None:
                application.connections -= 1
                if not application.connections:
                    self.applications.pop(application.ticket, None)
            sock.close()

    def _request(self, number: int, message: bytes, deadline: int) -> Request:
        fields = Fields(message)
        call = Call(fields.number(4))
        request = Request(number, call, tuple(fields.field(code) for code in CALLS[call][0]), deadline)
        assert fields.at == len(message), f"{call.name} has {len(message) - fields.at} bytes too many"
        return request

    def _answer(self, request: Request, application: Application | None) -> tuple[bytes | Raw, Application | None]:
        try:
            if request.call is Call.HELLO and request.call not in self.answers:
                application, values = self._hello(*request.args)
            else:
                assert application is not None or request.call is Call.HELLO, f"{request.name} before Hello"
                answer = self.answers.get(request.call) or getattr(ScriptedModule, request.name.lower())
                values = answer(self, application, request)
        except Refuse as refused:
            return struct.pack(">IQ", 0, refused.rv), application
        if isinstance(values, Raw):
            return values, application
        codes = CALLS[request.call][1]
        body = b"".join([reply_field(code, value) for code, value in zip(codes, values, strict=True)])
        return struct.pack(">I", request.call) + body, application

    def _hello(
        self, size: int, mode: int, ticket: bytes | None, watermark: int, program: bytes, pid: int
    ) -> tuple[Application, tuple[Any, ...]]:
        if self.refuse_after is not None and sum(a.connections for a in self.applications.values()) >= self.refuse_after:
            raise Refuse(ck.CKR_HOST_MEMORY)
        application = self.applications.get(ticket or b"") if mode in (1, 3) else None
        if mode == 1 and application is None:
            raise Refuse(ck.CKR_SESSION_CLOSED)
        joined = application is not None
        if application is None:
            application = Application(os.urandom(16))
            self.applications[application.ticket] = application
        application.connections += 1
        return application, (
            application.ticket,
            int(joined),
            1,
            watermark or self.watermark,
            self.max_message,
            self.max_connections,
        )

    # ---- the usual answers ---------------------------------------------------------------------------------------------

    @staticmethod
    def _session(application: Application, request: Request) -> Session:
        try:
            return application.sessions[request.args[0]]
        except KeyError:
            raise Refuse(ck.CKR_SESSION_HANDLE_INVALID) from None

    def get_slot_list(self, application: Application, request: Request) -> Any:
        room = request.args[1]
        return ((0,) if room else Room(1),)

    def open_session(self, application: Application, request: Request) -> Any:
        handle = next(self._handles)
        application.sessions[handle] = Session(*request.args)
        return (handle,)

    def close_session(self, application: Application, request: Request) -> Any:
        self._session(application, request)
        del application.sessions[request.args[0]]
        return ()

    def get_session_info(self, application: Application, request: Request) -> Any:
        session = self._session(application, request)
        return session.slot, 0, session.flags, 0

    def restore_sessions(self, application: Application, request: Request) -> Any:
        numbers = request.args[0]
        for handle, slot, flags in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
            application.sessions[handle] = Session(slot, flags)
        return ((0,) * (len(numbers) // 3),)

    def session_cancel(self, application: Application, request: Request) -> Any:
        self._session(application, request).operation = None
        return ()

    def login(self, application: Application, request: Request) -> Any:
        return ()

    def logout(self, application: Application, request: Request) -> Any:
        return ()

    def _begin(self, session: Session, mechanism: Any, key: int) -> None:
        if mechanism is None:
            session.operation = None
            return
        if session.operation is not None:
            raise Refuse(ck.CKR_OPERATION_ACTIVE)
        if key != KEY:
            raise Refuse(ck.CKR_KEY_HANDLE_INVALID)
        session.operation = (mechanism, key)

    def sign_init(self, application: Application, request: Request) -> Any:
        self._begin(self._session(application, request), *request.args[1:3])
        return ()

    def _sign(self, session: Session, data: bytes, room: int | None) -> Any:
        if session.operation is None:
            raise Refuse(ck.CKR_OPERATION_NOT_INITIALIZED)
        value = fit(signature(data), room)
        if isinstance(value, bytes):
            session.operation = None
        return (value,)

    def sign(self, application: Application, request: Request) -> Any:
        return self._sign(self._session(application, request), request.args[1], request.args[2])

    def sign_once(self, application: Application, request: Request) -> Any:
        _, mechanism, key, data, room = request.args
        session = self._session(application, request)
        self._begin(session, mechanism, key)
        return self._sign(session, data, room)

    def sign_update(self, application: Application, request: Request) -> Any:
        session = self._session(application, request)
        if session.operation is None:
            raise Refuse(ck.CKR_OPERATION_NOT_INITIALIZED)
        session.operation = (*session.operation, request.args[1])
        return ()

    def sign_final(self, application: Application, request: Request) -> Any:
        session = self._session(application, request)
        if session.operation is None:
            raise Refuse(ck.CKR_OPERATION_NOT_INITIALIZED)
        return self._sign(session, b"".join(session.operation[2:]), request.args[1])

    def find_once(self, application: Application, request: Request) -> Any:
        self._session(application, request)
        return (KEY, FOREIGN_KEY), 0, self.watermark

    def generate_random(self, application: Application, request: Request) -> Any:
        return (b"r" * (request.args[1] or 0),)

    def wait_for_slot_event(self, application: Application, request: Request) -> Any:
        if request.args[0] & ck.CKF_DONT_BLOCK:
            raise Refuse(ck.CKR_NO_EVENT)
        with self.changed:
            self.changed.wait_for(lambda: self.stopping)
        raise Close

    def rotation_wait(self, application: Application, request: Request) -> Any:
        with self.changed:
            timeout = request.deadline / SECOND if request.deadline else None
            if not self.changed.wait_for(lambda: self.watermark > request.args[0] or self.stopping, timeout):
                raise Refuse(ck.CKR_FUNCTION_CANCELED)
        return (self.watermark,)

    def rotate(self) -> None:
        with self.changed:
            self.watermark += 1
            self.changed.notify_all()

    def end(self) -> None:
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        self.stop()


def signature(data: bytes) -> bytes:
    return hashlib.sha512(data).digest()
