"""Commands that nobody has to look at, without the interpreter (plain.c): a few lines of Python take as long as a short command.

Which those are is said once, by what is not: codes that are followed, and whatever has the platform for its first handle.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from hsmvisord import limits
from hsmvisord.tpm.library import TpmFault, ffi

MAX_FOLLOWED = 16  #: as plain.c has it


class _Outcome(IntEnum):
    """As plain.c has them."""

    NOTHING, TAKEN, UNSENT, FAULT = range(4)


@dataclass(frozen=True)
class Left:
    """What is left to do: a command that is the interpreter's, or its beginning; what the socket did not take of a response."""

    taken: bytes = b""
    unsent: bytes = b""


class Plain:
    """Who answers commands by libtpms; one call at a time, whose calls must be libtpms' only ones (but for CancelCommand)."""

    def __init__(self, library: Any, process: Any, followed: Iterable[int]) -> None:
        """`library`: plain.c; `process`: TPMLIB_Process; `followed`: codes of commands that are the interpreter's.  Raises
        ValueError, MemoryError."""
        self._lib, codes = library, sorted(followed)
        if len(codes) > MAX_FOLLOWED:
            raise ValueError(f"{len(codes)} codes, at most {MAX_FOLLOWED}")
        made = library.plain_new(ffi.cast("void *", process), codes, len(codes))
        if made == ffi.NULL:
            raise MemoryError("plain commands")
        self._plain = ffi.gc(made, self._lib.plain_free)
        self._size, self._length = ffi.new("uint32_t *"), ffi.new("size_t *")

    @contextlib.contextmanager
    def held_off(self) -> Iterator[None]:
        """Meanwhile `serve` takes no command: one that runs returns after the command under way."""
        self._lib.plain_wait(self._plain, 1)
        try:
            yield
        finally:
            self._lib.plain_wait(self._plain, -1)

    def at_locality(self, locality: int) -> None:
        """From now on, whoever asks libtpms."""
        self._lib.plain_locality = locality

    def answer(self, command: bytes) -> bytes:
        """Raises TpmFault."""
        response = self._lib.plain_answer(self._plain, command, len(command), self._size)
        if response == ffi.NULL:
            raise self._fault()
        return bytes(ffi.buffer(response, self._size[0]))

    def serve(self, sock: socket.socket, page: mmap.mmap) -> Left:
        """Answers commands as long as they come soon, one after the other and whole, and are plain; none was left where what it
        returns is empty.  Raises TpmFault.

        `page`: TPM_BUSY_SIZE bytes, which say whether an answer is owed (stream.Busy).
        """
        with ffi.from_buffer("uint8_t[]", page, require_writable=True) as bytes_of_page:
            outcome = self._lib.plain_serve(self._plain, sock.fileno(), bytes_of_page, int(limits.SPIN * 1e9))
        match outcome:
            case _Outcome.TAKEN:
                return Left(taken=self._bytes(self._lib.plain_taken))
            case _Outcome.UNSENT:
                return Left(unsent=self._bytes(self._lib.plain_unsent))
            case _Outcome.FAULT:
                raise self._fault()
        return Left()

    def _fault(self) -> TpmFault:
        return TpmFault(f"Process: {self._lib.plain_result(self._plain):#x}")

    def _bytes(self, get: Callable[..., Any]) -> bytes:
        start = get(self._plain, self._length)
        return bytes(ffi.buffer(start, self._length[0]))
