"""Both dialects' decoders, and the framing that they share."""

from __future__ import annotations

from fuzz.samples import FIRST_BYTES, messages
from hsmvisord import ck
from hsmvisord.wire.calls import BadMessage, Call, WireError
from hsmvisord.wire.codec import Codec
from hsmvisord.wire.frames import FrameBuffer, frame
from hsmvisord.wire.handshake import negotiate
from hsmvisord.wire.native import NativeCodec

INVARIANT = (
    "a decoder raises nothing but BadMessage, a frame buffer nothing but WireError; fed whole, in pieces or byte by byte, a stream "
    "gives the same frames and ends the same way"
)
MAX_LENGTH = 1200

Frames = tuple[list[tuple[int, bytes, bytes]], str]


def frames(stream: bytes, piece: int) -> Frames:
    """Returns the frames of a stream that arrives in pieces of this size, and how it ended."""
    buffer, found = FrameBuffer(), []
    for start in range(0, len(stream), piece):
        buffer.feed(stream[start : start + piece])
        try:
            while (whole := buffer.next_frame()) is not None:
                found.append(whole)
        except WireError:
            return found, "broken"
    return found, "in a frame" if buffer.mid_frame else "at a frame's end"


def frames_do_not_depend_on_pieces(stream: bytes) -> None:
    whole = frames(stream, max(1, len(stream)))
    for piece in (1, 7, 30, 61):
        assert frames(stream, piece) == whole


def decode(codec: Codec, options: bytes, message: bytes) -> None:
    try:
        request = codec.decode(7, options, message)
    except BadMessage as error:
        assert error.request_id == 7
        assert error.rv != ck.CKR_OK
        codec.error(7, error.rv)
        return
    assert request.id == 7
    assert isinstance(request.call, Call)


def codec_of(first: int) -> Codec | None:
    try:
        codec, answer = negotiate(first)
    except WireError:
        assert first == 0x80
        return None
    assert len(answer) == 1
    assert answer[0] <= first
    return codec


def connection(data: bytes) -> None:
    """The whole of what a client may say: a first byte, then frames."""
    if not data:
        return
    codec = codec_of(data[0])
    frames_do_not_depend_on_pieces(data[1:])
    if codec is None:
        return
    if isinstance(codec, NativeCodec) and len(data) % 2:
        codec.ulong_size = 4
    for _, options, message in frames(data[1:], len(data))[0]:
        decode(codec, options, message)


def message(data: bytes) -> None:
    """One message in a whole frame: reaches deeper than `connection`."""
    codec = codec_of(data[0]) if data else None
    if codec is not None:
        decode(codec, b"", data[1:])


def run(data: bytes) -> None:
    """The input is taken both ways."""
    connection(data)
    message(data)


def seeds() -> dict[str, bytes]:
    made = {}
    for first in FIRST_BYTES:
        requests = list(messages(first))
        made |= {f"{first:02x}-{call.name}": bytes((first,)) + text for call, text in requests}
        stream = b"".join([frame(number, text) for number, (_, text) in enumerate(requests[:6])])
        made[f"{first:02x}-stream"] = bytes((first,)) + stream
    return made
