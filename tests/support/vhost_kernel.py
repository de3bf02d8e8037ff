"""A guest of the kernel's own vsock device (/dev/vhost-vsock): what QEMU's vhost-vsock-pci tells the kernel, without QEMU.

Rings, driver and streams are those of fake_frontend.py and fake_guest.py; the device at their other end is the kernel's, and so is
the word about who the guest is.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from hsmvisord.wire.virtio_vsock import BOTH, Op
from support.fake_frontend import FROM_GUEST, GUEST_BASE, PORT, TO_GUEST, FakeFrontEnd
from support.fake_guest import Guest, GuestStream

DEVICE = Path("/dev/vhost-vsock")
VERSION_1 = 1 << 32

_WRITE = 1


def _request(number: int, size: int) -> int:
    """_IOW(VHOST_VIRTIO, number, ...) of linux/vhost.h."""
    return _WRITE << 30 | size << 16 | 0xAF << 8 | number


SET_OWNER = 0xAF << 8 | 0x01
SET_FEATURES = _request(0x00, 8)
SET_MEM_TABLE = _request(0x03, 8)  # of a struct that ends in an array without a length
SET_VRING_NUM, SET_VRING_BASE = _request(0x10, 8), _request(0x12, 8)
SET_VRING_ADDR = _request(0x11, 40)
SET_VRING_KICK, SET_VRING_CALL = _request(0x20, 8), _request(0x21, 8)
SET_GUEST_CID, SET_RUNNING = _request(0x60, 8), _request(0x61, 4)


class KernelFrontEnd(FakeFrontEnd):
    """Has a guest with `cid` while it is open.  Raises OSError (EADDRINUSE) when another guest has it."""

    def __init__(self, cid: int) -> None:
        super().__init__()
        self.cid = cid
        self._device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        self._place = ctypes.c_char.from_buffer(self._mapped)
        try:
            self._start(ctypes.addressof(self._place))
        except BaseException:
            self.close()
            raise

    def _start(self, user: int) -> None:
        fcntl.ioctl(self._device, SET_OWNER, 0)
        fcntl.ioctl(self._device, SET_GUEST_CID, struct.pack("=Q", self.cid))
        fcntl.ioctl(self._device, SET_FEATURES, struct.pack("=Q", VERSION_1))
        fcntl.ioctl(self._device, SET_MEM_TABLE, struct.pack("=IIQQQQ", 1, 0, GUEST_BASE, self.size, user, 0))
        self.load_driver()
        for index in (TO_GUEST, FROM_GUEST):
            ring = self.rings[index]
            fcntl.ioctl(self._device, SET_VRING_NUM, struct.pack("=II", index, self.num))
            fcntl.ioctl(self._device, SET_VRING_BASE, struct.pack("=II", index, 0))
            places = user + ring.table, user + ring.used, user + ring.avail, 0
            fcntl.ioctl(self._device, SET_VRING_ADDR, struct.pack("=IIQQQQ", index, 0, *places))
            fcntl.ioctl(self._device, SET_VRING_KICK, struct.pack("=Ii", index, self.kicks[index]))
            fcntl.ioctl(self._device, SET_VRING_CALL, struct.pack("=Ii", index, self.calls[index]))
        fcntl.ioctl(self._device, SET_RUNNING, struct.pack("=i", 1))

    def close(self) -> None:
        os.close(self._device)
        del self._place
        self.device_sock.close()
        super().close()


class KernelGuest:
    """A machine with `cid`; whoever connects to the unix socket `path` is a program of it that connects to our port of its host."""

    def __init__(self, cid: int, path: Path) -> None:
        self._front = KernelFrontEnd(cid)
        self._guest = Guest(self._front)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._streams: dict[socket.socket, GuestStream] = {}
        self._ended = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ended:
                self._turn()
        except BaseException as error:
            self.error = error
        for sock in self._streams:
            sock.close()

    def _turn(self) -> None:
        call = self._front.calls[TO_GUEST]
        asking = [sock for sock, stream in self._streams.items() if stream.state == "open"]
        ready = select.select([self._listener, call, *asking], [], [], 0.1)[0]
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(call)
        if self._listener in ready:
            self._streams[self._listener.accept()[0]] = self._guest.request(PORT)
        for sock in asking:
            if sock in ready:
                self._said(sock, self._streams[sock])
        while self._guest.step(0):
            pass
        for sock, stream in list(self._streams.items()):
            with contextlib.suppress(BrokenPipeError):  # a program that has ended
                sock.sendall(stream.took)
            stream.took.clear()
            if stream.state in ("gone", "refused"):
                del self._streams[sock]
                sock.close()

    def _said(self, sock: socket.socket, stream: GuestStream) -> None:
        """By a program."""
        data = sock.recv(65536)
        if data:
            stream.write(data)
        else:
            stream.say(Op.SHUTDOWN, flags=BOTH)  # the kernel's RST is not waited for
            del self._streams[sock]
            sock.close()

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        self._listener.close()
        self._front.close()
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
