"""A worker hands its guest's connections to its successor: records and sockets on a socket between the two.

The leader of the reactor does it between two requests, so no operation is under way; what is open in a session goes along as
the requests that made it.  An application with more of them than a journal keeps is served on until they are done, or for
as long as the host says.
"""

from __future__ import annotations

import array
import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from hsmvisor_rpc.internal import handover as h
from hsmvisor_rpc.internal.descriptors import receive
from hsmvisor_rpc.sealed.canonical import MAX_RECORD, MalformedRecord, Record, record_type

from hsmvisord.ck import CkError
from hsmvisord.face import journal
from hsmvisord.keystore import persistence
from hsmvisord.keystore.pages import GuestObject
from hsmvisord.keystore.records import ObjectRecord
from hsmvisord.token import rules
from hsmvisord.token.application import Application
from hsmvisord.token.application import Saved as SavedApplication
from hsmvisord.token.guest import GuestItem
from hsmvisord.token.secrets import SecretObject
from hsmvisord.token.token import Token
from hsmvisord.transport.connection import Connection, Ended
from hsmvisord.transport.connection import Saved as SavedConnection
from hsmvisord.transport.listener import Listener
from hsmvisord.worker.plug import NoDevice, Plug

PATIENCE = 60.0  #: seconds that one of the two waits for the other; longer than the host lets applications linger
_AT_ONCE = 128  #: descriptors in one message (unix(7), SCM_RIGHTS: 253)
_PART = 1 << 20  #: bytes of a device's state in one record
MAX_DEVICE = 64 * 1024 * 1024  #: bytes of it; base64 of what all streams' buffers hold (limits.py) is 43 MB
LOOK = 0.02  #: seconds between looks at those that linger

_LENGTH = struct.Struct(">I")
_RECORDS: dict[str, type[Record]] = {
    record.TYPE: record
    for record in (h.SavedModule, h.SavedDevice, h.Descriptors, h.DevicePart, h.SavedApplication, h.SavedConnection, h.Pause)
}


class SuccessionFailed(Exception):
    """The other worker is gone, or what it says cannot be."""


class Stream:
    """Records and descriptors on a unix stream socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(PATIENCE)
        self._buffer = bytearray()
        self._descriptors: list[int] = []

    def send(self, record: Record, descriptors: list[int] | None = None) -> None:
        try:
            payload = record.encode()
        except MalformedRecord as error:
            raise SuccessionFailed(f"what cannot be handed over: {error}") from None
        data = _LENGTH.pack(len(payload)) + payload
        try:
            if descriptors:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
                data = data[self._sock.sendmsg([data], rights) :]
            self._sock.sendall(data)
        except OSError as error:
            raise SuccessionFailed(f"the successor does not take it: {error}") from None

    def receive(self) -> Record | None:
        """Returns None at the end of the stream."""
        while True:
            if len(self._buffer) >= 4:
                size = _LENGTH.unpack_from(self._buffer)[0]
                if size > MAX_RECORD:
                    raise SuccessionFailed(f"a record of {size} bytes")
                if len(self._buffer) >= 4 + size:
                    payload = bytes(self._buffer[4 : 4 + size])
                    del self._buffer[: 4 + size]
                    return self._decoded(payload)
            try:
                data, descriptors = receive(self._sock, _AT_ONCE)
            except OSError as error:
                raise SuccessionFailed(f"nothing comes: {error}") from None
            self._descriptors += descriptors
            if not data:
                if self._buffer:
                    raise SuccessionFailed("it ended within a record")
                return None
            self._buffer += data

    def _decoded(self, payload: bytes) -> Record:
        try:
            kind = _RECORDS.get(record_type(payload))
            if kind is None:
                raise SuccessionFailed(f"a record of type {record_type(payload)}")
            return kind.decode(payload)
        except MalformedRecord as error:
            raise SuccessionFailed(str(error)) from None

    def descriptor(self) -> int:
        """Returns the next one that came."""
        if not self._descriptors:
            raise SuccessionFailed("a connection without its socket")
        return self._descriptors.pop(0)

    def say_ready(self) -> None:
        with contextlib.suppress(OSError):  # heard when the first record does not come
            self._sock.sendall(h.READY)

    def await_ready(self) -> None:
        try:
            ready = self._sock.recv(1) == h.READY
        except OSError:
            ready = False
        if not ready:
            raise SuccessionFailed("the successor did not come up")

    def close(self) -> None:
        self._sock.close()


# ---- the old worker ---------------------------------------------------------------------------------------------------


@dataclass
class Departure:
    """`give` is called by the reactor's leader; `given` are counted."""

    token: Token
    listener: Listener
    stream: Stream
    plug: Plug
    linger: float  #: seconds that an application with a long operation is served on
    applications: int = 0
    connections: int = 0

    def give_device(self) -> None:
        """First of all; by a thread that may wait.  The device stands still from now on.  Raises SuccessionFailed."""
        self.stream.send(h.SavedModule(self.token.epoch, self.token.slot_events))
        try:
            suspended = self.plug.suspend()
        except TimeoutError as error:
            raise SuccessionFailed(str(error)) from None
        if suspended is not None:
            plug, cid, state, descriptors = suspended
            self.stream.send(h.SavedDevice(plug, cid, len(state), len(descriptors)), descriptors[:_AT_ONCE])
            for start in range(_AT_ONCE, len(descriptors), _AT_ONCE):
                more = descriptors[start : start + _AT_ONCE]
                self.stream.send(h.Descriptors(len(more)), more)
            for start in range(0, len(state), _PART):
                self.stream.send(h.DevicePart(state[start : start + _PART]))

    def begin(self) -> int:
        """Gives what can be given at once; returns how many applications linger.  Raises SuccessionFailed."""
        self.listener.end_accepting()
        lingering = self.give(False)
        self.stream.send(h.Pause(lingering))
        return lingering

    def give(self, last: bool) -> int:
        """As `begin`, for those that lingered; `last`: they are given without the operations that cannot be saved."""
        groups: dict[Application | None, list[Connection]] = {}
        for connection in self.listener.all():
            application = connection.caller.application_or_none if connection.caller else None
            groups.setdefault(application, []).append(connection)
        lingering = 0
        for application, connections in groups.items():
            at_rest = [c for c in connections if self.listener.reactor.at_rest(c)]
            if application is None:
                self._give(None, at_rest)
                lingering += len(connections) - len(at_rest)
            elif at_rest == connections and (last or _whole(application)):
                self._give(application, connections)
            else:
                lingering += 1
        return lingering

    def _give(self, application: Application | None, connections: list[Connection]) -> None:
        if application is not None:
            self.stream.send(_application_record(application, connections))
            self.applications += 1
        for connection in connections:
            record = _connection_record(application.ticket if application else b"", connection.saved())
            self.stream.send(record, [connection.sock.fileno()])
            self.listener.forget(connection)
            connection.sock.close()
            self.connections += 1


def _whole(application: Application) -> bool:
    return all(o.journal is not None and o.journal.whole for o in application.operations())


def _application_record(application: Application, connections: list[Connection]) -> h.SavedApplication:
    saved = application.saved()
    operations = [
        h.SavedOperation(journal.saved(o)).encode() for o in application.operations() if o.journal is not None and o.journal.whole
    ]
    return h.SavedApplication(
        ticket=saved.ticket,
        program=saved.program,
        watermark=saved.watermark,
        logged_in=saved.logged_in,
        seen_slot_events=saved.seen_slot_events,
        next_session=saved.next_session,
        next_object=saved.next_object,
        connections=len(connections),
        sessions=tuple(number for triple in saved.sessions for number in triple),
        objects=tuple(_object_record(session, item).encode() for session, item in saved.objects),
        operations=tuple(operations),
        guest_role=0 if saved.guest_role is None else saved.guest_role + 1,
        guest_objects=tuple(_guest_object_record(session, item).encode() for session, item in saved.guest_objects),
    )


def _guest_object_record(session: int, item: GuestItem) -> h.SavedGuestObject:
    stored = GuestObject(item.handle, item.attributes, item.key, 0)
    return h.SavedGuestObject(session, persistence.object_record(stored).encode())


def _object_record(session: int, item: SecretObject) -> h.SavedObject:
    return h.SavedObject(session, item.handle, tuple(item.attributes), tuple(map(_value, item.attributes.values())))


def _value(value: bool | int | bytes) -> bytes:
    if isinstance(value, bool):
        return b"b" + bytes((value,))
    return b"u" + value.to_bytes(8, "big") if isinstance(value, int) else b"y" + value


def _connection_record(ticket: bytes, saved: SavedConnection) -> h.SavedConnection:
    return h.SavedConnection(
        application=ticket,
        number=saved.number,
        greeting=saved.greeting,
        ulong_size=saved.ulong_size,
        peer=saved.peer,
        program=saved.program,
        pid=saved.pid,
        refused=saved.refused,
        used=json.dumps(saved.used),
        received=saved.received,
        unsent=saved.unsent,
        parked=tuple(frame for frame, _ in saved.parked),
        parked_ms=tuple(left for _, left in saved.parked),
    )


# ---- the successor ----------------------------------------------------------------------------------------------------


class Arrival:
    """Takes what the old worker gives.  `make` makes a connection of a socket; `count` sees each one."""

    def __init__(
        self, token: Token, listener: Listener, stream: Stream, make: Callable[[socket.socket, str, bool], Connection], plug: Plug
    ) -> None:
        self._token, self._listener, self._stream, self._make, self._plug = token, listener, stream, make, plug
        self._applications: dict[bytes, Application] = {}
        self._operations: dict[bytes, tuple[bytes, ...]] = {}
        self.operations_lost = 0

    def take(self) -> bool:
        """Takes records until the pause, and then until the end; says whether there may be more.  Raises SuccessionFailed."""
        while (record := self._stream.receive()) is not None:
            match record:
                case h.Pause():
                    self._plug.resume()  # not before: the old worker goes on if it cannot give all
                    return record.lingering > 0
                case h.SavedModule():
                    self._token.epoch, self._token.slot_events = record.epoch, record.slot_events
                case h.SavedDevice():
                    self._take_device(record)
                case h.SavedApplication():
                    self._take_application(record)
                case h.SavedConnection():
                    connection, saved = self._taken(record)
                    self._listener.reactor.tell(partial(self._add, connection, saved))
        return False

    def _add(self, connection: Connection, saved: SavedConnection) -> None:
        self._listener.add(connection)
        connection.revive(saved)

    def _take_device(self, record: h.SavedDevice) -> None:
        for _ in range(-(-record.descriptors // _AT_ONCE) - 1):
            if not isinstance(self._stream.receive(), h.Descriptors):
                raise SuccessionFailed("a device without all of its descriptors")
        descriptors = [self._stream.descriptor() for _ in range(record.descriptors)]
        if not 0 < record.size <= MAX_DEVICE:
            raise SuccessionFailed(f"a device's state of {record.size} bytes")
        state = bytearray()
        while len(state) < record.size:
            part = self._stream.receive()
            if not isinstance(part, h.DevicePart) or not 0 < len(part.data) <= record.size - len(state):
                raise SuccessionFailed("a device without all of its state")
            state += part.data
        try:
            self._plug.plug(record.plug, record.cid, bytes(state), descriptors, start=False)
        except NoDevice as error:
            raise SuccessionFailed(str(error)) from None

    def _take_application(self, record: h.SavedApplication) -> None:
        numbers = record.sessions
        saved = SavedApplication(
            record.ticket,
            record.program,
            record.watermark,
            record.logged_in,
            record.seen_slot_events,
            record.next_session,
            record.next_object,
            list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=False)),
            [_object(data) for data in record.objects],
            record.guest_role - 1 if record.guest_role else None,
            [_guest_object(data, self._token) for data in record.guest_objects],
        )
        try:
            application = self._token.restore_application(saved)
        except (CkError, KeyError) as error:
            raise SuccessionFailed(f"an application that cannot be: {error}") from None
        self._applications[record.ticket] = application
        self._operations[record.ticket] = record.operations

    def _taken(self, record: h.SavedConnection) -> tuple[Connection, SavedConnection]:
        try:
            sock = socket.socket(fileno=self._stream.descriptor())
        except OSError as error:
            raise SuccessionFailed(f"a connection that is no socket: {error.strerror}") from None
        connection = self._make(sock, record.peer, record.refused)
        application = self._applications.get(record.application)
        if application is None and record.application:
            raise SuccessionFailed("a connection of an application that did not come")
        saved = _connection(record)
        try:
            connection.restore(saved, application)
        except Ended as end:
            raise SuccessionFailed(str(end)) from None
        if application is not None:
            application.connections += 1
            self._replay(connection, self._operations.pop(record.application, ()))
        return connection, saved

    def _replay(self, connection: Connection, operations: tuple[bytes, ...]) -> None:
        """The first connection of an application carries out again what its operations are made of."""
        caller = connection.caller
        assert caller is not None
        for data in operations:
            try:
                frames = h.SavedOperation.decode(data).frames
            except MalformedRecord as error:
                raise SuccessionFailed(str(error)) from None
            self.operations_lost += not journal.replay(caller, frames)


def _object(data: bytes) -> tuple[int, SecretObject]:
    try:
        record = h.SavedObject.decode(data)
        attributes = dict(zip(record.attributes, map(_read_value, record.values), strict=True))
    except (MalformedRecord, ValueError) as error:
        raise SuccessionFailed(f"a session object that cannot be: {error}") from None
    return record.session, SecretObject(record.handle, attributes)


def _guest_object(data: bytes, token: Token) -> tuple[int, GuestItem]:
    try:
        record = h.SavedGuestObject.decode(data)
        stored = persistence.object_of(ObjectRecord.decode(record.object), token.provider)
        if not rules.sound(stored.attributes):
            raise ValueError("attributes that this release would not have made")
    except (MalformedRecord, ValueError, CkError) as error:
        raise SuccessionFailed(f"a session object that cannot be: {error}") from None
    return record.session, GuestItem(stored.handle, stored.attributes, stored.key)


def _read_value(data: bytes) -> bool | int | bytes:
    kind, value = data[:1], data[1:]
    if kind == b"b" and len(value) == 1:
        return value == b"\1"
    if kind == b"u" and len(value) == 8:
        return int.from_bytes(value, "big")
    if kind == b"y":
        return value
    raise ValueError(f"a value of kind {kind!r}")


def _connection(record: h.SavedConnection) -> SavedConnection:
    try:
        used = [(str(o), int(m), (str(g[0]), int(g[1])) if g else None) for o, m, g in json.loads(record.used)]
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        raise SuccessionFailed("a connection that was used for what cannot be") from None
    greeted = record.greeting != h.NOT_GREETED
    if record.greeting > h.NOT_GREETED or (greeted and record.ulong_size not in (4, 8)) or (record.application and not greeted):
        raise SuccessionFailed("a connection that began as none can")
    return SavedConnection(
        record.number,
        record.greeting,
        record.ulong_size,
        record.peer,
        record.program,
        record.pid,
        record.refused,
        used,
        record.received,
        record.unsent,
        list(zip(record.parked, record.parked_ms, strict=False)),
    )


def looks(seconds: float) -> Iterator[bool]:
    """Gives a turn every LOOK seconds; True for the last one."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(InterruptedError):
            time.sleep(LOOK)
        yield False
    yield True
