"""Frames of both dialects: `u32 id, u32 optlen, u32 msglen`, options, message.  Sans-IO."""

from __future__ import annotations

import struct

from hsmvisord import ck, limits
from hsmvisord.wire.calls import BadMessage, WireError

HEADER = struct.Struct(">III")
_HEADER_SIZE = HEADER.size


class FrameBuffer:
    """Takes bytes as they come and gives whole frames.

    The common case, one receipt that is one frame, copies nothing but the frame's parts.  A frame that comes in pieces is gathered
    and looked at again only when it can be whole, so that a peer that sends single bytes costs no more than one that does not.
    One that is large is received where it stays (`gather`, `space`), and its message is given as a view of that.
    """

    __slots__ = ("_data", "_filled", "_offset", "_partial", "_passed", "_passing", "_wanted", "_whole", "patient")

    def __init__(self) -> None:
        self.patient = False  #: a message past the limit is passed over and answered; else the connection cannot go on
        self._passing = 0  #: bytes that are still to come of such a message
        self._passed = 0  #: its frame's id
        self._data = b""
        self._offset = 0  #: how much of `_data` has been given
        self._partial: bytearray | None = None  #: instead of `_data`: a frame that is not whole, from its first byte
        self._wanted = _HEADER_SIZE  #: how many bytes `_partial` needs before it is worth a look
        self._whole: bytearray | None = None  #: instead of both: room for all of a frame, of which there is
        self._filled = 0

    def gather(self) -> None:
        """Makes room for all of the frame that has begun and told its length: `wanted` bytes."""
        begun = self._data[self._offset :] if self._partial is None else self._partial
        self._whole, self._filled = bytearray(self._wanted), len(begun)
        self._whole[: len(begun)] = begun
        self._data, self._offset, self._partial = b"", 0, None

    @property
    def space(self) -> memoryview | None:
        """Where the next bytes belong, while there is such room: then they are told by `filled`, and not fed."""
        if self._whole is None or self._filled == len(self._whole):
            return None
        return memoryview(self._whole)[self._filled :]

    def filled(self, count: int) -> None:
        self._filled += count

    def feed(self, data: bytes) -> None:
        if self._whole is not None:
            taken = min(len(data), len(self._whole) - self._filled)
            self._whole[self._filled : self._filled + taken] = data[:taken]
            self._filled += taken
            self._data, self._offset = self._data[self._offset :] + data[taken:], 0
            return
        if self._partial is not None:
            self._partial += data
        elif self._offset == len(self._data):
            self._data, self._offset = data, 0
        else:
            self._partial = bytearray(self._data[self._offset :])
            self._partial += data

    def next_frame(self) -> tuple[int, bytes, bytes | memoryview] | None:
        """Returns (id, options, message), or None when bytes are missing; raises WireError on lengths past the limits, or
        BadMessage at the end of a message that was passed over."""
        if self._passing and not self._pass_over():
            return None
        if self._whole is not None:
            return self._given()
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
        if self.patient and option_size <= limits.MAX_OPTIONS and limits.MAX_MESSAGE < message_size <= limits.MAX_PASSED:
            self._offset += _HEADER_SIZE
            self._passing, self._passed = option_size + message_size, ident
            return self.next_frame()
        if option_size > limits.MAX_OPTIONS or message_size > limits.MAX_MESSAGE:
            raise WireError(f"a frame with {option_size} bytes of options and {message_size} of message")
        middle = offset + _HEADER_SIZE + option_size
        end = middle + message_size
        if end > len(data):
            self._wanted = end - offset
            return None
        if end == len(data):
            self._data, self._offset = b"", 0  # an idle connection holds nothing
        else:
            self._offset = end
        return ident, data[offset + _HEADER_SIZE : middle], data[middle:end]

    def _given(self) -> tuple[int, bytes, memoryview] | None:
        whole = self._whole
        if whole is None or self._filled < len(whole):
            return None
        self._whole, self._wanted = None, _HEADER_SIZE
        ident, option_size, _ = HEADER.unpack_from(whole)
        view = memoryview(whole)
        middle = _HEADER_SIZE + option_size
        return ident, bytes(view[_HEADER_SIZE:middle]), view[middle:]

    def _pass_over(self) -> bool:
        """Drops what came; returns False while there is more to come, and raises BadMessage when that was all."""
        if self._partial is not None:
            self._data, self._offset, self._partial = bytes(self._partial), 0, None
        dropped = min(self._passing, len(self._data) - self._offset)
        self._offset += dropped
        self._passing -= dropped
        self._wanted = _HEADER_SIZE
        if not self._passing:
            raise BadMessage(self._passed, ck.CKR_DATA_LEN_RANGE, f"a message of more than {limits.MAX_MESSAGE} bytes")
        return False

    @property
    def wanted(self) -> int:
        """Returns the bytes of the frame that is not whole, as far as that is known."""
        return self._wanted if self.mid_frame else 0

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun that is not whole."""
        return self._passing > 0 or self._whole is not None or self._partial is not None or self._offset < len(self._data)

    def rest(self) -> bytes:
        """Returns what came and was not given."""
        if self._whole is not None:
            return bytes(self._whole[: self._filled]) + self._data[self._offset :]
        rest = self._data[self._offset :] if self._partial is None else bytes(self._partial)
        return HEADER.pack(self._passed, 0, self._passing) + rest if self._passing else rest


def frame(ident: int, message: bytes) -> bytes:
    return HEADER.pack(ident, 0, len(message)) + message
