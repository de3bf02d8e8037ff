"""Commands out of a connection, whole, and what a successor of this process must know of the one that it answers."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Callable

from hsmvisor_rpc.internal.phases import TPM_BUSY_SIZE

from hsmvisord import limits
from hsmvisord.tpm import library
from hsmvisord.tpm.plain import Left
from hsmvisord.wire.tpm2 import HEAD
from hsmvisord.wire.tpm_control import BrokenControl


class Busy:
    """Memory that a successor sees too: whether a command was taken, and not answered yet.

    The kernel puts what is taken there (a command begins with no zero), and what it has sent (plain.c): so there is no moment
    between.  Raises NoLibrary.
    """

    def __init__(self, descriptor: int = -1) -> None:
        """`descriptor`: of that memory, TPM_BUSY_SIZE; the caller's.  Raises OSError."""
        self.page = mmap.mmap(descriptor, TPM_BUSY_SIZE)
        self._lib, self._bytes = library.load().plain, library.ffi.from_buffer("uint8_t[]", self.page, require_writable=True)
        self.descriptor = os.dup(descriptor) if descriptor >= 0 else -1  #: for a supervisor that has lost its own

    def release(self) -> None:
        """Nobody needs the descriptor any more; the memory stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    @property
    def is_so(self) -> bool:
        return bool(self._lib.plain_owes(self._bytes))

    def forget(self) -> None:
        """Nothing was taken."""
        self.page[0] = 0

    def take(self, sock: socket.socket, flags: int = 0) -> bytes:
        """As recv.  Nothing but that it was taken stays in the memory."""
        count = sock.recv_into(self.page, limits.MAX_TPM_COMMAND, flags)
        data = self.page[:count]
        if data:
            self.page[:count] = b"\1" + bytes(count - 1)
        return data

    def answer(self, sock: socket.socket, response: bytes, more: bool) -> None:
        """`more`: of what was taken there is more.  Raises OSError."""
        sent = self._lib.plain_send(sock.fileno(), self._bytes, response, len(response), more)
        if sent < len(response):
            sock.sendall(response[sent:])
            self.page[0] = more


class CommandStream:
    """Whole commands out of a connection.  Raises BrokenControl, OSError."""

    def __init__(self, sock: socket.socket, linger: float, busy: Busy, plain: Callable[[], Left]) -> None:
        """`plain`: answers those that come soon after each other, where nobody has to look at them."""
        self._sock, self._linger, self._busy, self._plain = sock, linger, busy, plain
        self._in = b""
        self._soon = bool(linger)
        sock.setblocking(True)
        micros = max(1, int((linger or limits.TPM_QUESTION_SECONDS) * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", micros // 1_000_000, micros % 1_000_000))

    def wait(self) -> bool:
        """Returns when something has come; False: the peer has gone."""
        if self._in:
            return True
        wait(self._sock)
        return bool(self._sock.recv(1, socket.MSG_PEEK))

    def next(self) -> bytes | None:
        """Returns the next one; None: there is none at the moment."""
        until = 0.0
        while (command := self._whole()) is None:
            part = self._receive()
            if not part and not self._in:
                return None
            if part == b"":
                raise BrokenControl("a command that ends early")
            until = until or time.monotonic() + limits.TPM_QUESTION_SECONDS if self._in else 0.0
            if until and time.monotonic() > until:
                raise BrokenControl("a command that does not go on")
            self._in += part or b""
        return command

    def _receive(self) -> bytes | None:
        """Returns what came, empty at the end; None: nothing has come within the time.

        Where the one before came soon, the next one is looked for before this sleeps: to be woken takes longer than to look.
        """
        if self._soon and not self._in:
            left = self._plain()
            if left.unsent:
                self.answer(left.unsent)
            if left.taken:
                return left.taken
        began = time.perf_counter()
        try:
            part = self._busy.take(self._sock, 0 if self._linger or self._in else socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._soon = False
            return None
        self._soon = bool(self._linger) and time.perf_counter() < began + limits.SPIN
        return part

    def _whole(self) -> bytes | None:
        if len(self._in) < HEAD.size:
            return None
        _, length, _ = HEAD.unpack_from(self._in)
        if not HEAD.size <= length <= limits.MAX_TPM_COMMAND:
            raise BrokenControl(f"a command of {length} bytes, {HEAD.size} to {limits.MAX_TPM_COMMAND}")
        if len(self._in) < length:
            return None
        command, self._in = self._in[:length], self._in[length:]
        return command

    def answer(self, response: bytes) -> None:
        self._busy.answer(self._sock, response, bool(self._in))


def wait(sock: socket.socket) -> None:
    """Returns when something has come, or the peer has gone."""
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    waiting.poll()
