"""Frames of both dialects: `u32 id, u32 optlen, u32 msglen`, options, message.  Sans-IO."""

from __future__ import annotations

import struct

from hsmvisord.wire import limits
from hsmvisord.wire.calls import WireError

HEADER = struct.Struct(">III")
_HEADER_SIZE = HEADER.size


class FrameBuffer:
    """Takes bytes as they come and gives whole frames.

    The common case, one receipt that is one frame, copies nothing but the frame's parts.  A frame that comes in pieces is gathered
    and looked at again only when it can be whole, so that a peer that sends single bytes costs no more than one that does not.
    """

    __slots__ = ("_data", "_offset", "_partial", "_wanted")

    def __init__(self) -> None:
        self._data = b""
        self._offset = 0  #: how much of `_data` has been given
        self._partial: bytearray | None = None  #: instead of `_data`: a frame that is not whole, from its first byte
        self._wanted = _HEADER_SIZE  #: how many bytes `_partial` needs before it is worth a look

    def feed(self, data: bytes) -> None:
        if self._partial is not None:
            self._partial += data
        elif self._offset == len(self._data):
            self._data, self._offset = data, 0
        else:
            self._partial = bytearray(self._data[self._offset :])
            self._partial += data

    def next_frame(self) -> tuple[int, bytes, bytes] | None:
        """Returns (id, options, message), or None when bytes are missing; raises WireError on lengths past the limits."""
        if self._partial is not None:
            if len(self._partial) < self._wanted:
                return None
            self._data, self._offset, self._partial = bytes(self._partial), 0, None
        data, offset = self._data, self._offset
        available = len(data) - offset
        if available < _HEADER_SIZE:
            self._wanted = _HEADER_SIZE
            return None
        ident, option_size, message_size = HEADER.unpack_from(data, offset)
        if option_size > limits.MAX_OPTIONS or message_size > limits.MAX_MESSAGE:
            raise WireError(f"a frame with {option_size} bytes of options and {message_size} of message")
        middle = offset + _HEADER_SIZE + option_size
        end = middle + message_size
        if end > len(data):
            self._wanted = end - offset
            return None
        self._offset = end
        return ident, data[offset + _HEADER_SIZE : middle], data[middle:end]

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun that is not whole."""
        return self._partial is not None or self._offset < len(self._data)

    def rest(self) -> bytes:
        """Returns what came and was not given."""
        return self._data[self._offset :] if self._partial is None else bytes(self._partial)


def frame(ident: int, message: bytes) -> bytes:
    return HEADER.pack(ident, 0, len(message)) + message
