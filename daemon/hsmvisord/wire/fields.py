"""Reading and writing the fields that both dialects share: big-endian, each length checked against what the message still holds."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hsmvisord import ck, limits
from hsmvisord.wire.calls import MORE_FOLLOWS, Needed

_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
NULL = 0xFFFFFFFF
EMPTY_ROOM = 0xFFFFFFFF  #: in `fy`: a pointer with length 0
MAX_U64 = 0xFFFFFFFFFFFFFFFF


class Malformed(Exception):
    """A message is not what its signature says, or a value in it cannot be served; `rv` is the answer."""

    def __init__(self, detail: str, rv: int = ck.CKR_DEVICE_ERROR) -> None:
        super().__init__(detail)
        self.rv = rv


class Reader:
    """Reads one message from front to back; every method raises Malformed when bytes are missing."""

    __slots__ = ("attributes", "data", "end", "offset")

    def __init__(self, data: bytes, offset: int = 0) -> None:
        self.data, self.offset, self.end = data, offset, len(data)
        self.attributes = 0  #: how many this message has brought so far

    def take(self, count: int) -> bytes:
        start = self.offset
        stop = start + count
        if stop > self.end:
            raise Malformed(f"{count} bytes wanted, {self.end - start} left")
        self.offset = stop
        return self.data[start:stop]

    def u8(self) -> int:
        return self.take(1)[0]

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.take(8))[0])

    def prefixed(self) -> bytes:
        """u32 length, bytes."""
        return self.take(self.u32())

    def prefixed_or_null(self) -> bytes | None:
        """The same, length 0xffffffff for NULL."""
        length = self.u32()
        return None if length == NULL else self.take(length)

    def text(self) -> bytes:
        """`z`"""
        value = self.prefixed()
        if b"\0" in value:
            raise Malformed("a NUL in a text")
        return value

    def room(self) -> int | None:
        """`fy`"""
        return room_of(self.u32())

    def room_or_none(self) -> int | None:
        """`Ny`"""
        return self.room() if self.u8() else MORE_FOLLOWS

    def version(self) -> tuple[int, int]:
        """`v`"""
        return self.u8(), self.u8()

    def byte_array(self) -> bytes | None:
        """`ay`"""
        if self.u8():
            return self.prefixed()
        self.u32()
        return None

    def ulong_array(self) -> tuple[int, ...] | None:
        """`au`"""
        valid, count = self.u8(), self.u32()
        return self.ulongs(count) if valid else None

    def ulongs(self, count: int) -> tuple[int, ...]:
        if count > limits.MAX_ARRAY:
            raise Malformed(f"an array of {count} elements")
        return struct.unpack(f">{count}Q", self.take(8 * count))

    def count_attributes(self) -> int:
        """u32 count of an attribute array, within the message's limit."""
        count = self.u32()
        self.attributes += count
        if self.attributes > limits.MAX_ATTRIBUTES:
            raise Malformed(f"more than {limits.MAX_ATTRIBUTES} attributes")
        return count

    def finish(self) -> None:
        if self.offset != self.end:
            raise Malformed(f"{self.end - self.offset} bytes too many")


class ViewReader(Reader):
    """Of a message that is a view: what is read is copied out of it, once."""

    __slots__ = ()

    def __init__(self, data: bytes | memoryview, offset: int = 0) -> None:
        super().__init__(data, offset)  # type: ignore[arg-type]

    def take(self, count: int) -> bytes:
        return bytes(super().take(count))


def reader_of(message: bytes | memoryview, offset: int = 0) -> Reader:
    return Reader(message, offset) if type(message) is bytes else ViewReader(message, offset)


def check_parameter(size: int) -> None:
    """Raises Malformed for a mechanism's parameter that is too long."""
    if size > limits.MAX_PARAMETER:
        raise Malformed(f"a mechanism's parameter of {size} bytes", ck.CKR_MECHANISM_PARAM_INVALID)


def room_of(written: int) -> int | None:
    """Returns the room that a `fy` tells: None for a NULL pointer."""
    return written if 0 < written < EMPTY_ROOM else None if written == 0 else 0


def u8(value: int) -> bytes:
    return bytes((value & 0xFF,))


def u32(value: int) -> bytes:
    return _U32.pack(value)


def u64(value: int) -> bytes:
    return _U64.pack(value & MAX_U64)


def prefixed(value: bytes) -> bytes:
    return _U32.pack(len(value)) + value


def byte_array(value: bytes | Needed) -> bytes:
    """`ay` of a reply."""
    if isinstance(value, Needed):
        return b"\0" + _U32.pack(value.size)
    return b"\1" + _U32.pack(len(value)) + value


def ulong_array(values: Sequence[int] | Needed) -> bytes:
    """`au` of a reply."""
    if isinstance(values, Needed):
        return b"\0" + _U32.pack(values.size)
    return b"\1" + _U32.pack(len(values)) + struct.pack(f">{len(values)}Q", *values)
