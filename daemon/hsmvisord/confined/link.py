"""A worker's or a TPM's end of the internal protocol: one control connection at a time, from the supervisor alone.

The main thread accepts and reads; requests go to the module's command thread; `ask` waits for the supervisor's reply, over a
reconnect if need be: a new supervisor attaches to the same listening socket.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import json
import queue
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.descriptors import close_descriptors, receive
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.internal.phases import MAX_DESCRIPTORS, SUPERVISOR_MAY, Phase, by_type, descriptors_of
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record, record_type

from hsmvisord import limits

Rows = Mapping[Phase, frozenset[type[Record]]]


class Versioned(Protocol):
    """A change that the supervisor stores."""

    @property
    def version(self) -> int: ...

    def encode(self) -> bytes: ...


@dataclass(frozen=True)
class Incoming:
    """One request of the supervisor, to be answered with `reply`."""

    message: Record
    descriptors: list[int]  #: that came with it; the receiver's to close
    reply: Callable[[Record, list[int]], None]


class Refused(Exception):
    """The supervisor answered a request with an Error."""

    def __init__(self, error: m.Error) -> None:
        super().__init__(f"{error.reason}: {error.detail}")
        self.reason = error.reason


class Link:
    def __init__(self, listener: socket.socket, supervisor_uid: int, may: Rows = SUPERVISOR_MAY) -> None:
        """`may`: what the supervisor may ask in which phase."""
        self._listener, self._supervisor_uid, self._may = listener, supervisor_uid, may
        self._known = by_type(frozenset().union(*may.values()))  #: of all phases
        self.phase = Phase.EMPTY
        self.requests: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
        #: Takes UseHsm of a module that serves: not in the row of requests, where one may wait for what it brings.
        self.on_hardware: Callable[[Incoming], None] = self.requests.put
        self._ids = itertools.count(1)
        self._send_lock = threading.Lock()
        self._changed = threading.Condition()
        self._sock: socket.socket | None = None
        self._attached = 0  #: how often a supervisor has attached
        self._stored_version = 0
        self._replies: dict[int, Record] = {}
        self._descriptors: list[int] = []  #: that came and belong to a request that is not whole yet
        self._events: list[m.Event] = []
        self._dropped = 0

    # ---- main thread --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves one supervisor after the other, for ever."""
        while True:
            sock, _ = self._listener.accept()
            _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid == self._supervisor_uid:
                with contextlib.suppress(OSError, MalformedRecord):
                    self._read(sock)
            with self._changed:
                self._sock = None
                self._changed.notify_all()
            sock.close()
            close_descriptors(self._descriptors)  # of a request that did not come whole
            self._descriptors = []

    def _read(self, sock: socket.socket) -> None:
        reader = FrameReader()
        with self._changed:
            self._sock = sock
        while True:
            data, descriptors = receive(sock, MAX_DESCRIPTORS)
            self._descriptors += descriptors
            if not data:
                return
            for frame in reader.feed(data):
                self._take(sock, frame)

    def _take(self, sock: socket.socket, frame: Frame) -> None:
        if frame.kind is Kind.REQUEST:
            self._request(sock, frame)
            return
        reply: Record = m.Error.decode(frame.payload) if frame.kind is Kind.ERROR else m.Done.decode(frame.payload)
        with self._changed:
            self._replies[frame.id] = reply
            self._changed.notify_all()

    def _request(self, sock: socket.socket, frame: Frame) -> None:
        kind = by_type(self._may[self.phase]).get(record_type(frame.payload))

        def reply(record: Record, descriptors: list[int]) -> None:
            form = Kind.ERROR if isinstance(record, m.Error) else Kind.REPLY
            with contextlib.suppress(OSError):  # the supervisor is gone; what was stored, it will find
                self._send(sock, Frame(frame.id, form, record.encode()), descriptors)

        if kind is None:
            self._refuse_descriptors(frame.payload)
            reply(m.Error(m.REASON_PHASE, f"not in phase {self.phase}"), [])
            return
        message = kind.decode(frame.payload)
        if isinstance(message, m.Attach):
            with self._changed:
                self._attached += 1
                self._stored_version = message.stored_version
                self._changed.notify_all()
        incoming = Incoming(message, self._claim(descriptors_of(message)), reply)
        if isinstance(message, m.UseHsm) and self.phase is Phase.SERVING:
            self.on_hardware(incoming)
        else:
            self.requests.put(incoming)

    def _claim(self, count: int) -> list[int]:
        descriptors, self._descriptors = self._descriptors[:count], self._descriptors[count:]
        return descriptors

    def _refuse_descriptors(self, payload: bytes) -> None:
        """Closes those of a request that is not carried out, so that the next one does not take them for its own."""
        kind = self._known.get(record_type(payload))
        if kind is not None:
            close_descriptors(self._claim(descriptors_of(kind.decode(payload))))

    # ---- any thread ---------------------------------------------------------------------------------------------

    def _send(self, sock: socket.socket, frame: Frame, descriptors: list[int]) -> None:
        data = encode_frame(frame)
        with self._send_lock:
            if descriptors:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
                sent = sock.sendmsg([data], rights)
                data = data[sent:]
            sock.sendall(data)

    def store(self, request: Versioned) -> None:
        """Returns once the supervisor has stored it; raises Refused.  Outlives the supervisor: the next one says whether
        it is stored."""
        while True:
            with self._changed:
                while self._sock is None or not self._attached:
                    self._changed.wait()
                sock, attached, ident = self._sock, self._attached, next(self._ids)
                if self._stored_version == request.version:
                    return
            with contextlib.suppress(OSError):
                self._send(sock, Frame(ident, Kind.REQUEST, request.encode()), [])
            with self._changed:
                self._changed.wait_for(lambda i=ident, a=attached: i in self._replies or self._attached != a)  # type: ignore[misc]
                reply = self._replies.pop(ident, None)
                if isinstance(reply, m.Error):
                    raise Refused(reply)
                if reply is not None:
                    self._stored_version = request.version
                    return

    def tell(self, event: m.Event) -> None:
        """Queues a notification; `flush` sends it."""
        with self._changed:
            if len(self._events) >= limits.EVENT_BACKLOG:
                del self._events[0]
                self._dropped += 1
            self._events.append(event)

    def announce(self, record: Record, descriptors: list[int]) -> None:
        """Sends a notification at once; without a supervisor nobody hears it, and the next one asks."""
        with self._changed:
            sock = self._sock if self._attached else None
        if sock is not None:
            with contextlib.suppress(OSError):
                self._send(sock, Frame(0, Kind.NOTIFICATION, record.encode()), descriptors)

    def flush(self) -> None:
        """Sends the queued events if a supervisor is attached."""
        with self._changed:
            sock, events = self._sock, self._events
            if sock is None or not events or not self._attached:
                return
            self._events = []
            if self._dropped:
                events.insert(0, m.Event("events-suppressed", events[0].at_ms, json.dumps({"count": self._dropped})))
                self._dropped = 0
        with contextlib.suppress(OSError):
            for event in events:
                self._send(sock, Frame(0, Kind.NOTIFICATION, event.encode()), [])
