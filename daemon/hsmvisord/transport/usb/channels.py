"""The connections behind the channels of a USB device: one socketpair for each that is open, whose other end the listener has.

A channel is watched only while somebody of the importer waits for it: a level-triggered poll of one that nobody reads would spin.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from dataclasses import dataclass

from hsmvisord import limits


@dataclass
class _Channel:
    number: int
    sock: socket.socket
    watched: int = 0  #: events of epoll(7)
    over: bool = False  #: the other end is gone: neither reading nor writing waits any more


class Channels:
    """`take` gets the module's end of each connection, and who that is."""

    def __init__(self, epoll: select.epoll, take: Callable[[socket.socket, str], None]) -> None:
        self._epoll, self._take = epoll, take
        self._open: dict[int, _Channel] = {}
        self._by_fd: dict[int, _Channel] = {}

    def open(self, number: int) -> bool:
        """Begins a connection; says whether there is one."""
        self.close(number)
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError:  # no descriptors left
            return False
        ours.setblocking(False)
        self._epoll.register(ours, 0)
        channel = self._open[number] = self._by_fd[ours.fileno()] = _Channel(number, ours)
        self._take(theirs, f"usb channel {channel.number}")
        return True

    def close(self, number: int) -> None:
        """Ends its connection, if there is one."""
        channel = self._open.pop(number, None)
        if channel is not None:
            del self._by_fd[channel.sock.fileno()]
            if not channel.over:
                self._epoll.unregister(channel.sock)
            channel.sock.close()

    def close_all(self) -> None:
        for number in list(self._open):
            self.close(number)

    def __contains__(self, fd: int) -> bool:
        return fd in self._by_fd

    def write(self, number: int, data: memoryview) -> int:
        """Returns how many bytes were taken; fewer than there are: `ready` tells when it goes on."""
        channel = self._open.get(number)
        if channel is None:
            return len(data)
        try:
            taken = channel.sock.send(data)
        except (BlockingIOError, InterruptedError):
            taken = 0
        except OSError:
            return len(data)  # its reader learns that it has ended
        if taken < len(data):
            self._watch(channel, select.EPOLLOUT)
        return taken

    def read(self, number: int, most: int) -> bytes | None:
        """Returns what there is, b"" at the end, None when there is nothing: `ready` tells when there is."""
        channel = self._open.get(number)
        if channel is None:
            return b""
        try:
            return channel.sock.recv(min(most, limits.MAX_USB_READ))
        except (BlockingIOError, InterruptedError):
            self._watch(channel, select.EPOLLIN)
            return None
        except OSError:
            return b""

    def _watch(self, channel: _Channel, events: int) -> None:
        if not channel.watched & events and not channel.over:
            channel.watched |= events
            self._epoll.modify(channel.sock, channel.watched)

    def ready(self, fd: int, events: int) -> tuple[int, bool, bool]:
        """Returns number, readable and writable of a channel that epoll told of; it is not watched for that any more."""
        channel = self._by_fd[fd]
        if events & (select.EPOLLHUP | select.EPOLLERR):  # told without end, watched or not
            if not channel.over:
                channel.over = True
                self._epoll.unregister(channel.sock)
            return channel.number, True, True
        readable, writable = bool(events & select.EPOLLIN), bool(events & select.EPOLLOUT)
        channel.watched &= ~(select.EPOLLIN * readable | select.EPOLLOUT * writable)
        if not channel.over:
            self._epoll.modify(channel.sock, channel.watched)
        return channel.number, readable, writable
