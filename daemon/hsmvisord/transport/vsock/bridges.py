"""Each stream of a guest and the local socket that it is joined to; the device's thread alone is here.

A socket is watched only for what can be done now: to be read while the guest has credit and buffers, to be written while data of
the guest waits.  One that can do neither is taken out of the poll altogether, for a hang-up is always reported.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic

from hsmvisor_rpc.internal.descriptors import close_descriptors

from hsmvisord import limits
from hsmvisord.transport.vsock.front_end import Ended
from hsmvisord.transport.vsock.keys import StreamKeys
from hsmvisord.transport.vsock.saved import Saved, SavedReset, SavedStream
from hsmvisord.wire.virtio_vsock import LAST, MASK, SENDS, Event, Owed, Packet, Reset, State, Stream, Streams

Receive = Callable[[list[memoryview]], int]
SendData = Callable[[Receive, int, Callable[[int], Packet]], int | None]

_UNWATCHED = -1


class Bridge:
    __slots__ = ("deadline", "drained", "fd", "shut", "sock", "starved", "stream", "watched")

    def __init__(self, stream: Stream, sock: socket.socket) -> None:
        self.stream, self.sock, self.fd = stream, sock, sock.fileno()
        self.watched = _UNWATCHED  #: events in the poll
        self.starved = False  #: there was no buffer of the guest for its data
        self.drained = False  #: the socket had less than there was room for
        self.shut = State.OPEN  #: for which the socket has been shut down: ONLY_IN, ONLY_OUT
        self.deadline = 0.0
        sock.setblocking(False)


class Bridges:
    def __init__(
        self,
        cid: int,
        streams: Streams,
        keys: StreamKeys,
        epoll: select.epoll,
        accept: Callable[[int, str], socket.socket | None],
        send_data: SendData,
    ) -> None:
        self._cid, self._streams, self._keys, self._epoll, self._accept = cid, streams, keys, epoll, accept
        self._send_data = send_data
        self._bridges: dict[tuple[int, int], Bridge] = {}
        self._by_fd: dict[int, Bridge] = {}
        self._starved: dict[Bridge, None] = {}
        self._ending: dict[Bridge, None] = {}  #: the oldest first

    # ---- events -----------------------------------------------------------------------------------------------------------

    def changed(self, stream: Stream) -> None:
        """By a packet of the guest."""
        if stream.state is State.REQUESTED and not self._open(stream):
            return
        bridge = self._bridges.get(stream.key)
        if bridge is not None:
            self._settle(bridge)

    def event(self, fd: int, events: int) -> None:
        """Of the poll."""
        bridge = self._by_fd.get(fd)
        if bridge is None:
            return
        if bridge.stream.state is State.ONLY_IN and events & select.EPOLLHUP:
            self._streams.happened(bridge.stream, Event.LOCAL_GONE)
        elif events & ~select.EPOLLOUT and bridge.stream.state in SENDS and bridge.watched & select.EPOLLIN:
            self._read(bridge, bool(events & select.EPOLLHUP))
        self._settle(bridge)

    def ready(self) -> None:
        """The guest has given buffers, or its ring has begun."""
        starved, self._starved = self._starved, {}
        for bridge in starved:
            bridge.starved = False
            self._settle(bridge)

    def wait(self) -> float | None:
        """Returns the seconds until `end_overdue` has something to do, None for ever."""
        first = next(iter(self._ending), None)
        return None if first is None else max(0.0, first.deadline - monotonic())

    def end_overdue(self) -> None:
        now = monotonic()
        while (first := next(iter(self._ending), None)) is not None and first.deadline <= now:
            self._streams.happened(first.stream, Event.OVERDUE)
            self._settle(first)

    # ---- one stream -------------------------------------------------------------------------------------------------------

    def _open(self, stream: Stream) -> bool:
        slot = self._keys.enter(*stream.key)
        stream.slot = -1 if slot is None else slot
        sock = None
        if slot is not None:
            with contextlib.suppress(OSError):  # no descriptors left
                sock = self._accept(stream.our_port, f"vsock cid={self._cid} port={stream.guest_port}")
        if sock is None:
            self._streams.happened(stream, Event.REFUSED)
            return False
        self._add(Bridge(stream, sock))
        self._streams.happened(stream, Event.ACCEPTED)
        return True

    def _add(self, bridge: Bridge) -> None:
        self._bridges[bridge.stream.key] = self._by_fd[bridge.fd] = bridge

    def _read(self, bridge: Bridge, hung_up: bool) -> None:
        """Local data goes to the guest, or the end of it: what fills several of its buffers at once, so that it is told once."""
        stream, left = bridge.stream, limits.MAX_PACKET
        for _ in range(limits.PACKETS_AT_ONCE):
            most = min(stream.room, left)
            if not most:
                return
            try:
                count = self._send_data(partial(_receive, bridge), most, partial(self._streams.data_packet, stream))
            except BlockingIOError:
                return
            except OSError:
                count, hung_up = 0, True
            if count is None:
                bridge.starved = True
                self._starved[bridge] = None
                return
            if count == 0:
                self._streams.happened(stream, Event.LOCAL_GONE if hung_up else Event.LOCAL_QUIET)
                return
            if not stream.room:
                self._streams.wants_credit(stream)
            if bridge.drained:
                return
            left -= count

    def _settle(self, bridge: Bridge) -> None:
        """Does what its stream's state asks for now."""
        stream = bridge.stream
        if stream.pending:
            self._pass_on(bridge)
        state = stream.state
        if state is State.GONE:
            self._drop(bridge)
            return
        if state is not bridge.shut and not stream.pending and state in (State.ONLY_IN, State.ONLY_OUT):
            bridge.shut = state
            with contextlib.suppress(OSError):
                bridge.sock.shutdown(socket.SHUT_RD if state is State.ONLY_IN else socket.SHUT_WR)
        if state in LAST and bridge not in self._ending:
            bridge.deadline = monotonic() + limits.STREAM_END_SECONDS
            self._ending[bridge] = None
        self._watch(bridge)

    def _pass_on(self, bridge: Bridge) -> None:
        stream = bridge.stream
        while stream.pending:
            try:
                sent = bridge.sock.send(stream.pending)
            except BlockingIOError:
                return
            except OSError:
                self._streams.happened(stream, Event.LOCAL_DEAF)
                return
            self._streams.passed_on(stream, sent)

    def _watch(self, bridge: Bridge) -> None:
        stream = bridge.stream
        events = select.EPOLLOUT if stream.pending else 0
        if stream.state in SENDS and stream.room and not bridge.starved:
            events |= select.EPOLLIN
        elif not events and stream.state is not State.ONLY_IN:
            events = _UNWATCHED
        if events == bridge.watched:
            return
        if events == _UNWATCHED:
            self._epoll.unregister(bridge.fd)
        elif bridge.watched == _UNWATCHED:
            self._epoll.register(bridge.fd, events)
        else:
            self._epoll.modify(bridge.fd, events)
        bridge.watched = events

    def _drop(self, bridge: Bridge) -> None:
        stream = bridge.stream
        if bridge.watched != _UNWATCHED:
            self._epoll.unregister(bridge.fd)
            bridge.watched = _UNWATCHED
        bridge.sock.close()
        del self._bridges[stream.key], self._by_fd[bridge.fd]
        self._starved.pop(bridge, None)
        self._ending.pop(bridge, None)
        if stream.slot >= 0:  # the guest knows; else its RST has the slot
            self._keys.clear(stream.slot)
            stream.slot = -1

    # ---- all of them ------------------------------------------------------------------------------------------------------

    def reset_all(self) -> None:
        for bridge in list(self._bridges.values()):
            self._streams.happened(bridge.stream, Event.VIOLATION)
            self._drop(bridge)

    def forget_all(self) -> None:
        """Without a word to the guest."""
        for reset in self._streams.forget_all():
            if reset.slot >= 0:
                self._keys.clear(reset.slot)
        self.close()

    def close(self) -> None:
        """Closes the local sockets; the keys are those of the streams that are not forgotten."""
        for bridge in list(self._bridges.values()):
            if bridge.stream.state is not State.GONE:
                bridge.stream.slot = -1
            self._drop(bridge)

    def saved(self, saved: Saved) -> Saved:
        """Returns `saved` with all streams, and the RST that wait."""
        streams = tuple(_saved(bridge.stream, bridge.fd) for bridge in self._bridges.values())
        resets = tuple(SavedReset(*reset) for reset in self._streams.resets)
        return replace(saved, streams=streams, resets=resets)

    def restore(self, saved: Saved) -> set[int]:
        """Takes over what a predecessor suspended; returns the slots of its keys.  Raises Ended when it cannot be."""
        keys = {key.slot: key for key in self._keys.found()}
        left = [stream.fd for stream in saved.streams]
        try:
            for one in saved.streams:
                stream = _stream(one)
                if one.fd < 0 or one.slot not in keys or keys[one.slot][1:] != stream.key:
                    raise ValueError("a stream without socket or key")
                self._streams.restore(stream)
                self._add(Bridge(stream, socket.socket(fileno=one.fd)))
                left.remove(one.fd)
            for reset in saved.resets:
                numbers = reset.guest_port, reset.our_port, reset.type << 16
                if not all(0 <= number <= MASK for number in numbers) or reset.slot not in (-1, *keys):
                    raise ValueError("an RST that cannot be")
        except (ValueError, OSError) as error:
            close_descriptors(left)
            raise Ended(f"what the predecessor left cannot be: {error}") from None
        self._streams.reset(Reset(reset.guest_port, reset.our_port, reset.type, reset.slot) for reset in saved.resets)
        for bridge in list(self._bridges.values()):
            self._settle(bridge)
        return {stream.slot for stream in saved.streams} | {reset.slot for reset in saved.resets}


def _saved(stream: Stream, fd: int) -> SavedStream:
    return SavedStream(
        stream.guest_port, stream.our_port, stream.slot, stream.state.value, int(stream.owed), stream.shutdown, stream.buffer,
        stream.received, stream.forwarded, stream.told, stream.sent, stream.guest_buffer, stream.guest_forwarded,
        bytes(stream.pending), fd,
    )  # fmt: skip


def _receive(bridge: Bridge, room: list[memoryview]) -> int:
    count = bridge.sock.recvmsg_into(room)[0]
    bridge.drained = count < sum(map(len, room))
    return count


def _stream(one: SavedStream) -> Stream:
    numbers = (
        one.guest_port, one.our_port, one.buffer, one.received, one.forwarded, one.told, one.sent, one.guest_buffer,
        one.guest_forwarded, one.owed, one.shutdown,
    )  # fmt: skip
    if not all(0 <= number <= MASK for number in numbers) or one.shutdown > 3 or one.owed > 15:
        raise ValueError("a stream with numbers that cannot be")
    stream = Stream(one.guest_port, one.our_port, one.buffer)
    stream.state, stream.slot, stream.owed, stream.shutdown = State(one.state), one.slot, Owed(one.owed), one.shutdown
    stream.received, stream.forwarded, stream.told, stream.sent = one.received, one.forwarded, one.told, one.sent
    stream.guest_buffer, stream.guest_forwarded = one.guest_buffer, one.guest_forwarded
    stream.pending += one.pending
    return stream
