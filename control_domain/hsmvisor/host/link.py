"""Our end of one internal socket: frames out and in, descriptors beside them, requests and their replies.

It knows nothing of what is said.  The other end may be hostile: a frame that cannot be, a reply to nothing, a descriptor that
nobody expects or a sender that is not the expected process closes the link with a Violation.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.internal.phases import MAX_DESCRIPTORS
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record

R = TypeVar("R", bound=Record)

_MAX_REQUESTS = 16  #: of the other end, that wait for our reply
_READ = 256 * 1024
_CREDENTIALS = struct.Struct("3i")
_ANCILLARY = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)


class LinkClosed(Exception):
    """The other end is gone; whether it carried out what it was asked last is not known."""


class Violation(Exception):
    """The other end sent what it may not; the message is for the log."""


class PeerError(Exception):
    """The other end answered a request with an Error."""

    def __init__(self, error: m.Error) -> None:
        super().__init__(f"{error.reason}: {error.detail}")
        self.error = error


@dataclass
class _Pending:
    expected: type[Record]
    answer: asyncio.Future[tuple[Record, list[int]]]
    descriptors: int


class Link:
    """One connection.  `on_request` is called for each request in the order of arrival, may raise Violation, and returns what is
    awaited for the reply; `on_notification` likewise, without a reply; None: the other end may not.  `on_closed` is called once,
    with the Violation or None.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_closed: Callable[[Violation | None], None],
        on_request: Callable[[Frame], Coroutine[Any, Any, Record]] | None = None,
        on_notification: Callable[[Frame], None] | None = None,
    ) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock, self._on_closed = sock, on_closed
        self._on_request, self._on_notification = on_request, on_notification
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader()
        self._pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._outgoing: deque[tuple[memoryview, list[int]]] = deque()
        self._descriptors: deque[int] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.sender_pid = 0  #: the process that sent the last bytes, by the kernel's word
        self.expected_pid = 0  #: 0 = the first sender decides
        self._loop.add_reader(sock, self._readable)

    # ---- asking -------------------------------------------------------------------------------------------------

    async def ask(
        self, request: Record, expected: type[R], descriptors: Sequence[int] = (), *, within: float, take: int = 0
    ) -> tuple[R, list[int]]:
        """Returns the reply and up to `take` descriptors that came with it (the caller's to close).

        `descriptors` are duplicated at once: the caller may close its own when this returns or raises.
        Raises PeerError, LinkClosed, TimeoutError.
        """
        if self._closed:
            raise LinkClosed("the other end is gone")
        self._last_id += 1
        ident = self._last_id
        frame = Frame(ident, Kind.REQUEST, request.encode())
        given = _duplicates(descriptors)
        pending = _Pending(expected, self._loop.create_future(), take)
        self._pending[ident] = pending
        self._send(frame, given)
        try:
            async with asyncio.timeout(within):
                reply, received = await pending.answer
        except BaseException:
            if not pending.answer.cancel() and not pending.answer.cancelled() and pending.answer.exception() is None:
                _close_all(pending.answer.result()[1])  # it came at the same moment
            raise  # the entry stays: its reply may still come, and is then thrown away
        assert isinstance(reply, expected)
        return reply, received

    def _send(self, frame: Frame, descriptors: list[int]) -> None:
        self._outgoing.append((memoryview(encode_frame(frame)), descriptors))
        if len(self._outgoing) == 1:
            self._writable()

    def _writable(self) -> None:
        try:
            while self._outgoing:
                data, descriptors = self._outgoing[0]
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
                sent = self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
                _close_all(descriptors)
                if sent < len(data):
                    self._outgoing[0] = (data[sent:], [])
                else:
                    self._outgoing.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._sock, self._writable)
            return
        except OSError:
            self._close(None)
            return
        self._loop.remove_writer(self._sock)

    # ---- hearing ------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(_READ, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            self._close(None)
            return
        try:
            self._take_ancillary(ancillary, flags)
            if not data:
                self._close(None)
                return
            for frame in self._reader.feed(data):
                self._take(frame)
            if len(self._descriptors) > MAX_DESCRIPTORS:
                raise Violation("descriptors that nobody expects")
        except (MalformedRecord, Violation) as error:
            self._close(error if isinstance(error, Violation) else Violation(f"malformed: {error}"))

    def _take_ancillary(self, ancillary: list[tuple[int, int, bytes]], flags: int) -> None:
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._descriptors.extend(array.array("i", content[: len(content) - len(content) % 4]))
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                pid = _CREDENTIALS.unpack_from(content)[0]
                if pid and self.expected_pid and pid != self.expected_pid:
                    raise Violation(f"process {pid} spoke in the place of process {self.expected_pid}")
                self.sender_pid = pid or self.sender_pid
        if flags & socket.MSG_CTRUNC:
            raise Violation("more descriptors than one message may carry")

    def _take(self, frame: Frame) -> None:
        if frame.kind in (Kind.REPLY, Kind.ERROR):
            self._take_reply(frame)
        elif frame.kind is Kind.NOTIFICATION and self._on_notification is not None:
            self._on_notification(frame)
        elif frame.kind is Kind.REQUEST and self._on_request is not None and len(self._tasks) < _MAX_REQUESTS:
            task = self._loop.create_task(self._serve(self._on_request(frame), frame))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            raise Violation(f"a {frame.kind.name.lower()} that it may not send, or one too many")

    def _take_reply(self, frame: Frame) -> None:
        pending = self._pending.pop(frame.id, None)
        if pending is None:
            raise Violation("a reply to nothing")
        claimed: list[int] = []
        try:
            if frame.kind is Kind.ERROR:
                error = m.Error.decode(frame.payload)
                if not pending.answer.done():
                    pending.answer.set_exception(PeerError(error))
                return
            reply = pending.expected.decode(frame.payload)
            claimed = [self._descriptors.popleft() for _ in range(min(pending.descriptors, len(self._descriptors)))]
        except MalformedRecord as error:
            if not pending.answer.done():
                pending.answer.set_exception(LinkClosed("the other end answered what it may not"))
            raise Violation(f"malformed: {error}") from None
        if pending.answer.done():
            _close_all(claimed)
        else:
            pending.answer.set_result((reply, claimed))

    def claim(self, count: int) -> list[int]:
        """For `on_notification`: returns the descriptors that came with it, the caller's to close.  Raises Violation."""
        if count > len(self._descriptors):
            raise Violation(f"{len(self._descriptors)} descriptors where {count} should be")
        return [self._descriptors.popleft() for _ in range(count)]

    async def _serve(self, work: Coroutine[Any, Any, Record], frame: Frame) -> None:
        try:
            reply = await work
        except Violation as violation:
            self._close(violation)
            return
        if not self._closed:
            kind = Kind.ERROR if isinstance(reply, m.Error) else Kind.REPLY
            self._send(Frame(frame.id, kind, reply.encode()), [])

    # ---- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Closes our end; `on_closed` is not called."""
        self._on_closed = lambda violation: None
        self._close(None)

    def _close(self, violation: Violation | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for _, descriptors in self._outgoing:
            _close_all(descriptors)
        self._outgoing.clear()
        _close_all(self._descriptors)
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(LinkClosed("the other end is gone"))
        self._pending.clear()
        self._on_closed(violation)

    @property
    def closed(self) -> bool:
        return self._closed


def _duplicates(descriptors: Sequence[int]) -> list[int]:
    """Raises OSError; then there are none."""
    made: list[int] = []
    try:
        for descriptor in descriptors:
            made.append(os.dup(descriptor))
    except OSError:
        _close_all(made)
        raise
    return made


def _close_all(descriptors: list[int] | deque[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    descriptors.clear()
