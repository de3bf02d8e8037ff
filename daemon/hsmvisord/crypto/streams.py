"""Encryptions and decryptions in parts.

`room` and `last` say what comes out of the next `update` and of `finish`, at most, before it is asked for: a caller whose buffer is
too small is told so, and nothing has happened (PKCS#11 3.1, 5.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hsmvisord import ck, limits
from hsmvisord.budget import Budget
from hsmvisord.ck import CkError

#: For the parts of all messages that are kept whole.
_parts = Budget(limits.MAX_MULTIPART_ALL)


class Kept:
    """The parts of a message that is needed whole."""

    __slots__ = ("_message",)

    def __init__(self) -> None:
        self._message = bytearray()

    def update(self, data: bytes) -> None:
        if len(self._message) + len(data) > limits.MAX_MULTIPART:
            raise CkError(ck.CKR_DATA_LEN_RANGE, f"this mechanism takes at most {limits.MAX_MULTIPART} bytes in parts")
        if not _parts.take(len(data)):
            raise CkError(ck.CKR_DEVICE_MEMORY, "the module's messages in parts have used up their room")
        self._message += data

    def whole(self) -> bytes:
        return bytes(self._message)

    def __len__(self) -> int:
        return len(self._message)

    def __del__(self) -> None:
        _parts.give(len(self._message))


class WholeStream:
    """Of a mechanism that gives nothing before it has all: what is not authenticated yet, and CCM, which begins with the length.

    `bound` says what comes out of so many bytes, at most.
    """

    __slots__ = ("_bound", "_kept", "_run")

    def __init__(self, run: Callable[[bytes], bytes], bound: Callable[[int], int]) -> None:
        self._kept, self._run, self._bound = Kept(), run, bound

    def room(self, size: int) -> int:
        return 0

    def update(self, data: bytes) -> bytes:
        self._kept.update(data)
        return b""

    def last(self) -> int:
        return self._bound(len(self._kept))

    def finish(self) -> bytes:
        return self._run(self._kept.whole())


class ByteStream:
    """Of a mechanism that gives as many bytes as it takes; `most` is how many it may take, `tag` what follows them."""

    __slots__ = ("_context", "_most", "_tag")

    def __init__(self, context: Any, most: int | None = None, tag: int = 0) -> None:
        self._context, self._most, self._tag = context, most, tag

    def room(self, size: int) -> int:
        return size

    def update(self, data: bytes) -> bytes:
        if self._most is not None:
            if len(data) > self._most:
                raise CkError(ck.CKR_DATA_LEN_RANGE, "the counter would come back to where it began")
            self._most -= len(data)
        return bytes(self._context.update(data))

    def last(self) -> int:
        return self._tag

    def finish(self) -> bytes:
        end = bytes(self._context.finalize())
        return end + bytes(self._context.tag[: self._tag]) if self._tag else end


class BlockStream:
    """Of a mechanism that works on blocks of 16 bytes, or of `block`.

    `pad`, `unpad`: contexts of `cryptography` for PKCS #7 padding; without either, the message is whole blocks, else `wrong` is the
    error.  With `unpad`, the last block stays until the end.
    """

    __slots__ = ("_block", "_context", "_pad", "_taken", "_unpad", "_wrong")

    def __init__(self, context: Any, wrong: int, pad: Any = None, unpad: Any = None, block: int = 16) -> None:
        self._context, self._wrong, self._pad, self._unpad, self._block = context, wrong, pad, unpad, block
        self._taken = 0

    def _out(self, taken: int) -> int:
        """Returns how many bytes are out when so many are in."""
        return max(0, taken // self._block - (self._unpad is not None)) * self._block

    def room(self, size: int) -> int:
        return self._out(self._taken + size) - self._out(self._taken)

    def update(self, data: bytes) -> bytes:
        self._taken += len(data)
        if self._pad is not None:
            data = self._pad.update(data)
        out = self._context.update(data)
        return bytes(self._unpad.update(out) if self._unpad is not None else out)

    def last(self) -> int:
        return self._block if self._pad is not None or self._unpad is not None else 0

    def finish(self) -> bytes:
        if self._pad is not None:
            return bytes(self._context.update(self._pad.finalize()) + self._context.finalize())
        if self._taken % self._block:
            raise CkError(self._wrong, f"{self._taken} bytes are no whole blocks")
        end = self._context.finalize()
        if self._unpad is None:
            return bytes(end)
        try:
            return bytes(self._unpad.update(end) + self._unpad.finalize())
        except ValueError:
            raise CkError(ck.CKR_ENCRYPTED_DATA_INVALID) from None
