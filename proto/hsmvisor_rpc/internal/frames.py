"""Frames on the host's internal sockets.  Sans-IO: bytes in, frames out; descriptors are the transport's matter.

    u32 length of what follows, u32 id, u8 kind, payload        (big-endian)

The payload is an encoded Record (of an Error for kind ERROR).  A reply carries its request's id; each end counts its
own requests from 1; a notification has id 0.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from hsmvisor_rpc.sealed.canonical import MAX_RECORD, MalformedRecord

_HEADER = struct.Struct(">IIB")
_OVERHEAD = 5


class Kind(enum.IntEnum):
    REQUEST = 0
    REPLY = 1
    ERROR = 2
    NOTIFICATION = 3


@dataclass(frozen=True)
class Frame:
    """One frame; `payload` is an encoded record."""

    id: int
    kind: Kind
    payload: bytes

    def __repr__(self) -> str:
        return f"Frame(id={self.id}, kind={self.kind.name}, {len(self.payload)} bytes)"


def encode_frame(frame: Frame) -> bytes:
    return _HEADER.pack(_OVERHEAD + len(frame.payload), frame.id, frame.kind) + frame.payload


class FrameReader:
    """Collects bytes and gives whole frames; raises MalformedRecord on a length or kind that cannot be.

    The frames before a broken one are given first, however the bytes came in pieces.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Gives the frames that `data` completes, one by one."""
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            length, ident, kind = _HEADER.unpack_from(self._buffer)
            if not _OVERHEAD <= length <= _OVERHEAD + MAX_RECORD:
                raise MalformedRecord(f"a frame of {length} bytes")
            if kind > max(Kind):
                raise MalformedRecord(f"a frame of kind {kind}")
            if len(self._buffer) < 4 + length:
                break
            frame = Frame(ident, Kind(kind), bytes(self._buffer[_HEADER.size : 4 + length]))
            del self._buffer[: 4 + length]
            yield frame
