"""The connection of a front-end: whole messages in, answers out; and what each message changes.

A message is looked at and taken away only when a successor has been told what it changed: if this process is killed before, the
message is still there.  Between taking it away and answering lie two system calls, and nothing else.
"""

from __future__ import annotations

import array
import contextlib
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from hsmvisor_rpc.internal.descriptors import close_descriptors

from hsmvisord import limits
from hsmvisord.transport.vsock.saved import Saved, SavedRegion
from hsmvisord.wire import vhost_user
from hsmvisord.wire.vhost_user import (
    HEADER,
    BrokenMessage,
    Config,
    Message,
    Request,
    RingAddresses,
    RingFile,
    RingState,
)

FROM_GUEST = 1  #: the ring whose begin at 0 means that the driver has begun anew

_ROOM = socket.CMSG_SPACE(limits.MAX_REGIONS * array.array("i").itemsize)


class Ended(Exception):
    """The front-end is gone, or does not do its part."""


class FrontEnd:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._unread = 0  #: bytes of the message that was looked at
        sock.setblocking(False)

    def look(self) -> Message | None:
        """Returns the next message, which stays until `take`; None when none waits.  Raises Ended, BrokenMessage."""
        descriptors: list[int] = []
        try:
            data = self._whole(descriptors)
            if data is None:
                return None
            head = vhost_user.decode_head(data[: HEADER.size])
            return vhost_user.decode(head, data[HEADER.size :], descriptors)
        except OSError as error:
            close_descriptors(descriptors)
            raise Ended(f"the front-end's connection is lost: {error.strerror}") from None
        except BaseException:
            close_descriptors(descriptors)
            raise

    def _whole(self, descriptors: list[int]) -> bytes | None:
        self._unread = 0
        try:
            data = self.sock.recv(HEADER.size, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        if len(data) == HEADER.size:
            head = vhost_user.decode_head(data)
            whole = HEADER.size + head.size
            data = self.sock.recv(whole, socket.MSG_PEEK)
            if len(data) == whole:
                # Only where some belong to it: a look at a message without any may bring those of the next (unix(7) streams).
                if vhost_user.has_descriptors(head, data[HEADER.size :]):
                    self._receive(whole, descriptors, socket.MSG_PEEK)
                self._unread = whole
                return data
        return self._gather(descriptors)

    def _gather(self, descriptors: list[int]) -> bytes:
        """One that was sent in pieces cannot be looked at: it is taken away at once."""
        until = monotonic() + limits.VHOST_MESSAGE_SECONDS
        data, wanted = b"", HEADER.size
        while len(data) < wanted:
            try:
                data += self._receive(wanted - len(data), descriptors, 0)
            except BlockingIOError:
                self._wait(until)
            if len(data) == wanted == HEADER.size:
                wanted += vhost_user.decode_head(data).size
        return data

    def _receive(self, count: int, descriptors: list[int], flags: int) -> bytes:
        data, ancillary, came, _ = self.sock.recvmsg(count, _ROOM, flags | socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(content[: len(content) // received.itemsize * received.itemsize])
                descriptors.extend(received)
        if came & socket.MSG_CTRUNC or len(descriptors) > limits.MAX_REGIONS:
            raise BrokenMessage(f"a message with more than {limits.MAX_REGIONS} descriptors")
        if not data:
            raise Ended("the front-end has closed the connection")
        return data

    def _wait(self, until: float) -> None:
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if not poll.poll(max(0.0, until - monotonic()) * 1000):
            raise Ended(f"a message of the front-end is not whole after {limits.VHOST_MESSAGE_SECONDS:g} s")

    def take(self) -> None:
        """Takes away the message that was looked at.  Raises Ended."""
        with contextlib.suppress(OSError):
            while self._unread and (data := self.sock.recv(self._unread)):
                self._unread -= len(data)
        if self._unread:
            raise Ended("the front-end's connection is lost")

    def answer(self, data: bytes) -> None:
        """Raises Ended."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise Ended(f"the front-end's connection is lost: {error.strerror}") from None
        if sent != len(data):
            raise Ended("the front-end takes no answers")


@dataclass(frozen=True)
class Change:
    """What a message makes of a device."""

    saved: Saved
    answer: bytes = b""
    closed: tuple[int, ...] = ()  #: descriptors that are of no use any more
    begins: bool = False  #: the driver begins anew


def change(saved: Saved, message: Message, config: bytes, position: Callable[[int], int]) -> Change:
    """`config`: the device's; `position`: where a ring is.  The message's descriptors are in `saved` or `closed` of the answer.

    Raises BrokenMessage; then they are closed.
    """
    request, body = message.request, message.body
    match request, body:
        case Request.GET_FEATURES, _:
            return Change(saved, vhost_user.reply_number(request, vhost_user.FEATURES))
        case Request.SET_FEATURES, int():
            made = Change(_with_features(saved, body))
        case Request.GET_PROTOCOL_FEATURES, _:
            return Change(saved, vhost_user.reply_number(request, vhost_user.PROTOCOL_FEATURES))
        case Request.SET_PROTOCOL_FEATURES, int():
            if body & ~vhost_user.PROTOCOL_FEATURES:
                raise BrokenMessage(f"protocol features 0x{body:x}")
            made = Change(replace(saved, protocol_features=body))
        case Request.GET_QUEUE_NUM, _:
            return Change(saved, vhost_user.reply_number(request, vhost_user.QUEUES))
        case Request.GET_CONFIG, Config():
            return Change(saved, vhost_user.reply_config(body, config))
        case Request.SET_MEM_TABLE, tuple():
            regions = tuple(SavedRegion(*region) for region in body)
            rings = tuple(replace(ring, base=position(index)) for index, ring in enumerate(saved.rings))
            closed = tuple(region.fd for region in saved.regions)
            made = Change(replace(saved, regions=regions, rings=rings), closed=closed)
        case Request.SET_VRING_NUM, RingState(index, number):
            made = Change(_with_ring(saved, index, num=number, base=position(index)))
        case Request.SET_VRING_ADDR, RingAddresses(index, table, used, avail):
            made = Change(_with_ring(saved, index, table=table, used=used, avail=avail, base=position(index)))
        case Request.SET_VRING_BASE, RingState(index, number):
            made = Change(_with_ring(saved, index, base=number), begins=index == FROM_GUEST and number == 0)
        case Request.GET_VRING_BASE, RingState(index, _):
            at, ring = position(index), saved.rings[index]
            stopped = _with_ring(saved, index, base=at, started=False, kick=-1, call=-1)
            return Change(stopped, vhost_user.reply_state(request, index, at), (ring.kick, ring.call))
        case Request.SET_VRING_KICK, RingFile(index, fd):
            made = Change(_with_ring(saved, index, kick=fd, started=True, base=position(index)), closed=(saved.rings[index].kick,))
        case Request.SET_VRING_CALL, RingFile(index, fd):
            made = Change(_with_ring(saved, index, call=fd, base=position(index)), closed=(saved.rings[index].call,))
        case Request.SET_VRING_ERR, RingFile(_, fd):
            made = Change(saved, closed=(fd,))
        case Request.SET_VRING_ENABLE, RingState(index, number):
            made = Change(_with_ring(saved, index, enabled=bool(number), base=position(index)))
        case _:  # SET_OWNER; SET_STATUS, which says nothing that can be relied on
            made = Change(saved)
    # Also where REPLY_ACK was not acknowledged on this connection: a front-end that comes back does not say it again.
    return replace(made, answer=vhost_user.reply_number(request, 0)) if message.need_reply else made


def _with_features(saved: Saved, features: int) -> Saved:
    if features & ~vhost_user.FEATURES:
        raise BrokenMessage(f"features 0x{features:x}")
    if features & vhost_user.F_PROTOCOL_FEATURES:
        return replace(saved, features=features)
    rings = tuple(replace(ring, enabled=True) for ring in saved.rings)  # nobody will enable them
    return replace(saved, features=features, rings=rings)


def _with_ring(saved: Saved, index: int, **values: Any) -> Saved:
    rings = list(saved.rings)
    rings[index] = replace(rings[index], **values)
    return replace(saved, rings=tuple(rings))
