"""Frames of both dialects: `u32 id, u32 optlen, u32 msglen`, options, message.  Sans-IO."""

from __future__ import annotations

import struct

from hsmvisord.wire import limits
from hsmvisord.wire.calls import WireError

HEADER = struct.Struct(">III")


class FrameBuffer:
    """Takes bytes as they come and gives whole frames; the common case, one receipt that is one frame, copies nothing twice."""

    __slots__ = ("_data", "_offset")

    def __init__(self) -> None:
        self._data = b""
        self._offset = 0

    def feed(self, data: bytes) -> None:
        self._data = self._data[self._offset :] + data if self._offset < len(self._data) else data
        self._offset = 0

    def next_frame(self) -> tuple[int, bytes, bytes] | None:
        """Returns (id, options, message), or None when bytes are missing; raises WireError on lengths past the limits."""
        data, offset = self._data, self._offset
        start = offset + 12
        if len(data) < start:
            return None
        ident, option_size, message_size = HEADER.unpack_from(data, offset)
        if option_size > limits.MAX_OPTIONS or message_size > limits.MAX_MESSAGE:
            raise WireError(f"a frame with {option_size} bytes of options and {message_size} of message")
        middle = start + option_size
        end = middle + message_size
        if len(data) < end:
            return None
        self._offset = end
        return ident, data[start:middle], data[middle:end]

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun that is not whole."""
        return self._offset < len(self._data)


def frame(ident: int, message: bytes) -> bytes:
    return HEADER.pack(ident, 0, len(message)) + message
