"""A large frame that is received where it stays is the frame that it would be otherwise; what is read of a view are bytes."""

from __future__ import annotations

from typing import Any

import pytest
from hsmvisord import ck, limits
from hsmvisord.wire.calls import Call, Mechanism
from hsmvisord.wire.frames import FrameBuffer, frame
from hsmvisord.wire.handshake import negotiate
from hypothesis import given
from hypothesis import strategies as st
from support.native_client import NativeEncoding
from support.p11kit_client import P11KitEncoding

Frames = list[tuple[int, bytes, bytes]]


def taken(buffer: FrameBuffer) -> Frames:
    found: Frames = []
    while (one := buffer.next_frame()) is not None:
        ident, options, message = one
        found.append((ident, options, bytes(message)))
    return found


def received(whole: bytes, sizes: list[int], large: int) -> tuple[Frames, FrameBuffer]:
    """As a connection does it: frames of more than `large` bytes get room for all of them."""
    buffer, came, at, turn = FrameBuffer(), [], 0, 0
    gathered = False
    while at < len(whole):
        size = sizes[turn % len(sizes)]
        turn += 1
        space = buffer.space
        if space is not None:
            piece = whole[at : at + min(size, len(space))]
            space[: len(piece)] = piece
            buffer.filled(len(piece))
        else:
            piece = whole[at : at + size]
            buffer.feed(piece)
        at += len(piece)
        found = taken(buffer)
        came += found
        gathered = gathered and not found
        if buffer.wanted > large and not gathered:
            buffer.gather()
            gathered = True
    return came, buffer


_FRAME = st.tuples(st.integers(0, 9), st.binary(max_size=5), st.binary(max_size=120))


@given(frames=st.lists(_FRAME, max_size=6), sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), large=st.integers(12, 150))
def test_frames_in_pieces(frames: Frames, sizes: list[int], large: int) -> None:
    whole = b"".join(_with_options(*one) for one in frames)
    came, buffer = received(whole, sizes, large)
    assert came == frames and not buffer.mid_frame and buffer.rest() == b""


@given(
    frames=st.lists(_FRAME, min_size=1, max_size=3), size=st.integers(1, 60), cut=st.integers(0, 400), large=st.integers(12, 150)
)
def test_what_came_goes_to_a_successor(frames: Frames, size: int, cut: int, large: int) -> None:
    whole = b"".join(_with_options(*one) for one in frames)
    came, first = received(whole[:cut], [size], large)
    second = FrameBuffer()
    second.feed(first.rest() + whole[cut:])
    assert came + taken(second) == frames


def _with_options(ident: int, options: bytes, message: bytes) -> bytes:
    plain = frame(ident, message)
    return plain[:4] + len(options).to_bytes(4) + plain[8:12] + options + message


def test_what_is_fed_past_the_end_of_a_gathered_frame_is_kept() -> None:
    buffer = FrameBuffer()
    whole = frame(1, b"m" * 100) + frame(2, b"n") + frame(3, b"o")
    buffer.feed(whole[:50])
    assert buffer.next_frame() is None and buffer.space is None
    buffer.gather()
    assert len(buffer.space or b"") == 62 and buffer.mid_frame and buffer.wanted == 112
    buffer.feed(whole[50:120])
    assert buffer.space is None, "nothing more belongs there"
    buffer.feed(whole[120:])
    assert taken(buffer) == [(1, b"", b"m" * 100), (2, b"", b"n"), (3, b"", b"o")]


# ---- views --------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> bool:
    """Whether there is no view anywhere in it."""
    if isinstance(value, tuple | list):
        return all(map(plain, value))
    return not isinstance(value, memoryview)


REQUESTS: list[tuple[Call, tuple[Any, ...]]] = [
    (Call.DIGEST_ONCE, (1, Mechanism(ck.CKM_SHA256), b"d" * 99, 32)),
    (Call.DIGEST_UPDATE, (1, b"d" * 99)),
    (Call.ENCRYPT, (1, b"d" * 99, 32)),
    (Call.SIGN_ONCE, (1, Mechanism(ck.CKM_ECDSA), 5, b"d" * 99, 64)),
    (Call.ENCRYPT_ONCE, (1, Mechanism(ck.CKM_AES_GCM, (b"i" * 12, 96, b"more", 128)), 5, b"d" * 99, 64)),
    (Call.CREATE_OBJECT, (1, ((ck.CKA_CLASS, ck.CKO_DATA), (ck.CKA_TOKEN, True), (ck.CKA_VALUE, b"d" * 99)))),
]


@pytest.mark.parametrize(("call", "args"), REQUESTS)
def test_a_view_is_decoded_as_the_bytes_are(call: Call, args: tuple[Any, ...]) -> None:
    for greeting, encoding in ((0x81, NativeEncoding(8)), (2, P11KitEncoding(2))):
        if greeting == 2 and (call > Call.HELLO or call is Call.ENCRYPT_ONCE):
            continue
        codec, _ = negotiate(greeting)
        message = encoding.request(call, *args)
        bytes_, view = codec.decode(7, b"", message), codec.decode(7, b"", memoryview(bytearray(message)))
        assert view == bytes_ and plain(view.args)
        assert bytes_.args == args or greeting == 2


def test_the_limit_has_room_for_a_mebibyte_and_its_head() -> None:
    call, args = REQUESTS[4]
    args = (*args[:3], bytes((1 << 20) + 16), 1 << 21)
    assert len(NativeEncoding(8).request(call, *args)) < limits.MAX_MESSAGE
