"""One guest connection, without a thread: a reactor reads it, replies are written where they are made.

Its requests are answered in order.  While one is answered that takes long, the connection is not read.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic, perf_counter

from hsmvisord import ck, limits
from hsmvisord.budget import Budget
from hsmvisord.face import face, journal, prepared
from hsmvisord.face.caller import Caller, take_number
from hsmvisord.face.prepared import Prepared
from hsmvisord.face.waits import MAY_WAIT, waits
from hsmvisord.token.application import Application
from hsmvisord.token.token import Token
from hsmvisord.transport.parking import Parking
from hsmvisord.wire.calls import BadMessage, Call, Request, WireError
from hsmvisord.wire.frames import FrameBuffer
from hsmvisord.wire.handshake import negotiate

_NEVER = float("inf")
NOT_GREETED = 256  #: in the place of a client's first byte
_NOTHING: tuple[int, bytes, bytes | memoryview] = (0, b"", b"")

#: A process has one module: all its connections share these.
LARGE_REQUESTS = Budget(limits.MAX_LARGE_REQUESTS)
LARGE_REPLIES = Budget(limits.MAX_LARGE_REPLIES)


@dataclass(frozen=True)
class Saved:
    """A connection without its socket and application."""

    number: int
    greeting: int
    ulong_size: int
    peer: str
    program: str
    pid: int
    refused: bool
    used: list[tuple[str, int, tuple[str, int] | None]]  #: operation, mechanism, generation
    received: bytes
    unsent: bytes
    parked: list[tuple[bytes, int]]  #: frame, milliseconds that it still waits (0 = for ever)


class Ended(Exception):
    """The connection is over; the text says how."""


class Connection:
    """`begun` is called once, when its application has begun.  `why` says how it ended."""

    def __init__(
        self, sock: socket.socket, peer: str, token: Token, parking: Parking, refused: bool, begun: Callable[[Connection], None]
    ) -> None:
        self.sock = sock
        self.peer, self._token, self._parking, self._begun = peer, token, parking, begun
        self.refused = refused  #: over the limit
        self.caller: Caller | None = None
        most = token.settings.max_connections
        self.why = f"over the limit of {most} connections" if refused else "closed by the client"
        #: `overdue_at` while nothing is: one over the limit does not stay
        self._at_rest = monotonic() + limits.REFUSED_SECONDS if refused else _NEVER
        self.overdue_at = monotonic() + limits.GREETING_SECONDS  #: when it is closed unless its frame is whole by then
        self.queued = False  #: has whole requests in its buffer, and waits for its turn; the reactor's
        self.starved = False  #: is not read: the module's large requests have used up their room
        self._request_room = self._reply_room = 0  #: bytes taken of LARGE_REQUESTS and LARGE_REPLIES
        self.slow = False  #: the last two requests took long
        self._long = False  #: the last request did
        self.alone = False  #: nobody else has asked for a while: what takes long keeps nobody waiting
        self.write_wanted: Callable[[Connection], None] = lambda connection: None  #: the reactor's: bytes wait for the socket
        self.greeting = NOT_GREETED  #: the client's first byte, also one that nobody understands
        self._buffer = FrameBuffer()
        self._frame: tuple[int, bytes, bytes | memoryview] = _NOTHING  #: of the request that is being answered
        self._pending: Request | None = None
        self.told = False  #: `begun` was called
        self.prepared: Prepared | None = None  #: its next requests are a lane's, when the reactor gives it one
        self._head = b""  #: of the last signature's request, and how many in a row were equal to it
        self._equal = 0
        self._lane_after = limits.LANE_AFTER
        self._lock = threading.Lock()
        self._unsent: bytes | memoryview = b""  #: of a reply that is large a view: it is copied for no piece that is sent
        sock.setblocking(False)

    # ---- the leader ---------------------------------------------------------------------------------------------

    def receive(self) -> None:
        """Takes what the socket has; raises Ended."""
        space = self._buffer.space
        try:
            if space is not None:  # of a large request that has begun: as much of it as there is
                got = self.sock.recv_into(space)
            else:
                data = self.sock.recv(limits.RECEIVE)
                got = len(data)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            raise Ended(f"connection lost: {error.strerror}") from None
        if not got:
            raise Ended("closed by the client")
        if space is not None:
            self._buffer.filled(got)
            return
        if self.caller is None:
            data = self._greet(data)
        self._buffer.feed(data)

    def _greet(self, data: bytes) -> bytes:
        self.send(self._negotiated(data[0]))
        return data[1:]

    def _negotiated(self, greeting: int) -> bytes:
        self.greeting = greeting
        try:
            codec, answer = negotiate(greeting)
        except WireError as error:
            raise Ended(f"broken greeting: {error}") from None
        self._buffer.patient = codec.dialect == "p11-kit"
        self.caller = Caller(self._token, codec, self.peer, refused=self.refused)
        self._token.add_counters(self.caller.counters)
        return answer

    def work(self) -> bool:
        """Answers requests that have come; returns whether there may be more.  Raises Ended."""
        caller = self.caller
        if caller is None:
            return False
        for _ in range(limits.FRAMES_AT_ONCE):
            if self._unsent or self.prepared is not None:
                return False
            request = self._next(caller)
            if request is None:
                return False
            if (self.slow and not self.alone) or self._waits(request):
                self._pending = request
                return True
            began = perf_counter()
            self._answer(caller, request)
            self._took_long(perf_counter() - began)
        return True

    @property
    def waits(self) -> bool:
        """Whether its pending request waits for the host."""
        return self._pending is not None and self._waits(self._pending)

    def _waits(self, request: Request) -> bool:
        return request.call in MAY_WAIT and waits(self.caller.application_or_none if self.caller is not None else None, request)

    def _next(self, caller: Caller) -> Request | None:
        while True:
            try:
                frame = self._buffer.next_frame()
                if frame is None:
                    self._wait_for_frame()
                    return None
                if not self._unsent:
                    self.overdue_at = self._at_rest
                self._frame = frame
                return caller.codec.decode(*frame)
            except BadMessage as error:
                self._let_go()
                self.send(caller.codec.error(error.request_id, error.rv))
                if self._unsent:
                    return None
            except WireError as error:
                raise Ended(f"broken frame: {error}") from None

    def _wait_for_frame(self) -> None:
        wanted = self._buffer.wanted
        if wanted > limits.SMALL_FRAME and not self._request_room:
            self.starved = not LARGE_REQUESTS.take(wanted)
            if not self.starved:
                self._request_room = wanted
                self._buffer.gather()
        if not wanted or self.starved:
            self.overdue_at = self._at_rest
        elif self.overdue_at == self._at_rest:
            self.overdue_at = min(self._at_rest, monotonic() + limits.FRAME_SECONDS)

    def feed(self) -> bool:
        """Returns whether a starved one may be read again."""
        self._wait_for_frame()
        return not self.starved

    def _let_go(self) -> None:
        """Of the request that is answered."""
        self._frame = _NOTHING
        room, self._request_room = self._request_room, 0
        if room:
            LARGE_REQUESTS.give(room)

    def _answer(self, caller: Caller, request: Request) -> None:
        reply = face.handle(caller, request, self._park)
        if request.call in journal.NOTED:
            journal.note(caller, request, self._frame)
        if request.call is Call.SIGN_ONCE:
            self._count_equal(caller, request)
        self._let_go()
        if reply is not None:
            if len(reply) > limits.SMALL_FRAME and not self._room_for(len(reply)):
                reply = caller.codec.error(request.id, ck.CKR_HOST_MEMORY)
            self.send(reply)
        if not self.told and caller.application_or_none is not None:
            self.told = True
            self._begun(self)

    def _count_equal(self, caller: Caller, request: Request) -> None:
        _, options, message = self._frame
        head = bytes(message[: prepared.HEAD])
        if head != self._head or options:
            self._head, self._equal = head, 0
            return
        self._equal += 1
        if self._equal >= self._lane_after and not self._buffer.mid_frame:
            self._equal = 0
            self.prepared = prepared.prepare(caller, request, bytes(message))

    def back(self, served: int, received: bytes, unsent: bytes) -> None:
        """From a lane.  One that was not worth its while comes later the next time."""
        self._lane_after = limits.LANE_AFTER if served > self._lane_after else min(2 * self._lane_after, limits.LANE_MOST)
        self._equal = 0
        if received:
            self._buffer.feed(received)
        if unsent:
            with self._lock:
                self._unsent = b"".join((unsent, self._unsent))
                self.overdue_at = monotonic() + limits.FRAME_SECONDS

    # ---- the thread that has given up the lead ------------------------------------------------------------------

    @property
    def pending(self) -> Request | None:
        """A request that is to be answered without the lead."""
        return self._pending

    def work_pending(self) -> None:
        request, self._pending = self._pending, None
        if request is None or self.caller is None:
            return
        began = perf_counter()
        self._answer(self.caller, request)
        if not self._waits(request):
            self._took_long(perf_counter() - began)

    def _took_long(self, seconds: float) -> None:
        """One that the scheduler held up says nothing about the next: two in a row do."""
        long = seconds > limits.SLOW
        self.slow = long and self._long
        self._long = long

    # ---- any thread ---------------------------------------------------------------------------------------------

    def _park(self, request: Request, ready: Callable[[], tuple[object, ...] | None]) -> None:
        assert self.caller is not None
        self._parking.park(self.caller, request, ready, self.send, journal.raw(*self._frame))
        if self.sock.fileno() < 0:  # ended meanwhile
            self._parking.remove(self.caller)

    @property
    def unsent(self) -> bool:
        return bool(self._unsent)

    def _room_for(self, size: int) -> bool:
        if not LARGE_REPLIES.take(size):
            return False
        self._reply_room += size
        return True

    def _all_sent(self) -> None:
        if self._reply_room:
            LARGE_REPLIES.give(self._reply_room)
            self._reply_room = 0

    def send(self, frame: bytes) -> None:
        """Writes at once what the socket takes; the rest waits for the reader.  Never blocks."""
        with self._lock:
            if self._unsent:
                self._unsent = b"".join((self._unsent, frame))
                if len(self._unsent) > limits.MAX_UNSENT:
                    self._drop()
                return
            try:
                sent = self.sock.send(frame)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                return  # the reactor sees the end
            if sent == len(frame):
                self._all_sent()
                return
            self._unsent = memoryview(frame)[sent:]
            self.overdue_at = monotonic() + limits.FRAME_SECONDS
        self.write_wanted(self)

    def flush(self) -> bool:
        """Writes what waits; returns whether all is written.  Raises Ended."""
        with self._lock:
            try:
                sent = self.sock.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                raise Ended(f"connection lost: {error.strerror}") from None
            self._unsent = self._unsent[sent:]
            if self._unsent:
                return False
            self.overdue_at = self._at_rest
            self._all_sent()
            return True

    @property
    def late(self) -> str:
        """Says how it ends when it is overdue."""
        if self.caller is None:
            return f"nothing came for {limits.GREETING_SECONDS} s"
        return f"nothing whole came or was read for {limits.FRAME_SECONDS} s"

    def _drop(self) -> None:
        self.why = f"{limits.MAX_UNSENT} bytes of replies were not read"
        self.close()

    def close(self) -> None:
        """The reactor ends it soon after."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    # ---- a successor of the worker (the leader, with no request under way) ---------------------------------------

    def saved(self) -> Saved:
        caller = self.caller
        if caller is None:
            return Saved(0, NOT_GREETED, 0, self.peer, "", 0, self.refused, [], b"", b"", [])
        return Saved(
            caller.number,
            self.greeting,
            caller.codec.ulong_size,
            caller.peer,
            caller.program,
            caller.pid,
            self.refused,
            list(caller.counters.cells),
            self._buffer.rest(),
            bytes(self._unsent),
            self._parking.saved(caller),
        )

    def restore(self, saved: Saved, application: Application | None) -> None:
        """Becomes what `saved` was; requests that waited are asked again when `revive` is called.  Raises Ended."""
        if saved.greeting == NOT_GREETED:
            return
        self._negotiated(saved.greeting)
        assert self.caller is not None
        self.overdue_at = self._at_rest
        self.caller.codec.ulong_size = saved.ulong_size
        self.caller.number = take_number(saved.number)
        self.caller.program, self.caller.pid, self.caller.application_or_none = saved.program, saved.pid, application
        self.told = application is not None
        for key in saved.used:
            self.caller.counters.cell(*key)
        self._buffer.feed(saved.received)

    def revive(self, saved: Saved) -> None:
        """Goes on, now that the reactor has it."""
        if saved.unsent:
            self._unsent = saved.unsent
            self.overdue_at = monotonic() + limits.FRAME_SECONDS
            self.write_wanted(self)
        for frame, left in saved.parked:
            self._ask_again(frame, left)

    def _ask_again(self, frame: bytes, left: int) -> None:
        caller, buffer = self.caller, FrameBuffer()
        assert caller is not None
        buffer.feed(frame)
        with contextlib.suppress(BadMessage, WireError):  # it was decoded before
            parts = buffer.next_frame()
            if parts is not None:
                self._frame = parts
                request = replace(caller.codec.decode(*parts), deadline_ms=left)
                self._answer(caller, request)

    def end(self) -> None:
        """Once, by the reactor: gives everything back."""
        if self.caller is not None:
            self._parking.remove(self.caller)
            if self.caller.application_or_none is not None:
                self._token.leave(self.caller.application_or_none)
            self._token.remove_counters(self.caller.counters)
        self.sock.close()
        self.forget_room()

    def forget_room(self) -> None:
        """Gives back what it has of the module's room."""
        self._let_go()
        with self._lock:
            self._unsent = b""
            self._all_sent()
