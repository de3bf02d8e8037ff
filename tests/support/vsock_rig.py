"""A device with its front-end, its guest and the host's service, all in this process."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Sequence

from hsmvisord import limits
from hsmvisord.transport.vsock.device import Device
from hsmvisord.transport.vsock.keys import StreamKeys
from hsmvisord.transport.vsock.saved import Saved
from support.fake_frontend import CID, PORT, WITHIN, FakeFrontEnd, key_memory
from support.fake_guest import Guest


class Service:
    """What listens here: sockets of accepted streams, in the order in which they came."""

    def __init__(self, ports: Sequence[int] = (PORT,)) -> None:
        self.ports, self.peers = ports, [""][:0]
        self._socks: list[socket.socket] = []
        self._all: list[socket.socket] = []
        self._came = threading.Condition()

    def accept(self, port: int, peer: str) -> socket.socket | None:
        if port not in self.ports:
            return None
        ours, theirs = socket.socketpair()
        ours.settimeout(WITHIN)
        with self._came:
            self.peers.append(peer)
            self._socks.append(ours)
            self._all.append(ours)
            self._came.notify()
        return theirs

    def next(self) -> socket.socket:
        with self._came:
            assert self._came.wait_for(lambda: self._socks, WITHIN), "nobody came"
            return self._socks.pop(0)

    def close(self) -> None:
        for sock in self._all:
            sock.close()


def echo(sock: socket.socket) -> None:
    """In a thread of its own, until the other end is done."""

    def run() -> None:
        with sock:
            sock.settimeout(None)
            with contextlib.suppress(OSError):
                while data := sock.recv(65536):
                    sock.sendall(data)

    threading.Thread(target=run, daemon=True).start()


class Rig:
    """A device and all around it, and what is kept for its successor."""

    def __init__(self, ports: Sequence[int] = (PORT,), **front: int) -> None:
        self.front, self.service = FakeFrontEnd(**front), Service(ports)
        self.guest = Guest(self.front)
        self.key_fd = key_memory()
        self.kept: tuple[Saved, list[int]] | None = None
        self.changes = 0
        self.why: str | None = None
        self._ended = threading.Event()
        self.device = self.make(self.front.device_sock, None)
        self.kept_sock = self.front.device_sock.dup()

    def make(self, sock: socket.socket, saved: Saved | None) -> Device:
        device = Device(sock, CID, self.service.accept, StreamKeys(self.key_fd), saved, self._keep, self._end)
        device.start()
        return device

    def _keep(self, saved: Saved) -> None:
        self.changes += 1
        self.drop_kept()
        self.kept = Saved.decode(saved.encode(), [os.dup(fd) for fd in saved.descriptors()]), []

    def _end(self, why: str) -> None:
        self.why = why
        self._ended.set()

    def drop_kept(self) -> None:
        if self.kept is not None:
            for fd in self.kept[0].descriptors():
                os.close(fd)
            self.kept = None

    def boot(self, at: int = 0) -> Rig:
        """QEMU starts, and the driver."""
        self.front.begin()
        self.front.load_driver(at)
        self.front.start((at, at))
        self.front.settled()
        return self

    def ended(self) -> str:
        """Waits for the device's end; returns its reason."""
        assert self._ended.wait(WITHIN), "the device lives"
        assert self.why is not None
        return self.why

    def keys(self) -> set[tuple[int, int]]:
        keys = StreamKeys(self.key_fd)
        try:
            return {key[1:] for key in keys.found()}
        finally:
            keys.close()

    def no_keys(self) -> None:
        """Waits until there are none."""
        until = time.monotonic() + WITHIN
        while self.keys():
            assert time.monotonic() < until, self.keys()
            time.sleep(0.005)

    def close(self) -> None:
        self.device.close()
        self.front.close()
        self.service.close()
        self.drop_kept()
        self.kept_sock.close()
        os.close(self.key_fd)


def limits_of(stream_number: int) -> int:
    """Returns the buffer of the stream that is opened when so many are open."""
    return limits.STREAM_BUFFER if stream_number < limits.LARGE_STREAMS else limits.SMALL_STREAM_BUFFER
