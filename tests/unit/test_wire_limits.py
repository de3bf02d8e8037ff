"""Each limit of a frame: the last value that is accepted and the first that is not."""

from __future__ import annotations

import struct

import pytest
from hsmvisord import ck, limits
from hsmvisord.wire.attributes import from_memory
from hsmvisord.wire.calls import Attribute, BadMessage, Call, Needed, WireError
from hsmvisord.wire.codec import TableCodec
from hsmvisord.wire.fields import Malformed, Reader, byte_array, ulong_array
from hsmvisord.wire.frames import FrameBuffer, frame
from hsmvisord.wire.native import NativeCodec
from hsmvisord.wire.p11kit import P11KitCodec
from hsmvisord.wire.table import CALLS, NATIVE_CALLS, P11KIT_CALLS
from support.native_client import NativeEncoding
from support.p11kit_client import RELEASES, P11KitEncoding
from support.wire_client import Encoding

BOTH: list[tuple[TableCodec, Encoding]] = [
    (NativeCodec(), NativeEncoding()),
    (P11KitCodec(2), P11KitEncoding(RELEASES["0.26.4"])),
]
both = pytest.mark.parametrize(("codec", "encoding"), BOTH, ids=["native", "p11-kit"])


def nested(depth: int) -> tuple[Attribute, ...]:
    return (Attribute(ck.CKA_WRAP_TEMPLATE, nested(depth - 1)),) if depth else ()


@both
def test_attributes_of_a_template(codec: NativeCodec | P11KitCodec, encoding: Encoding) -> None:
    most = tuple([Attribute(ck.CKA_TOKEN, True)] * limits.MAX_ATTRIBUTES)
    assert codec.decode(1, b"", encoding.request(Call.FIND_OBJECTS_INIT, 1, most)).args == (1, most)
    with pytest.raises(BadMessage):
        codec.decode(1, b"", encoding.request(Call.FIND_OBJECTS_INIT, 1, (*most, most[0])))


@both
def test_attributes_count_over_the_whole_message(codec: NativeCodec | P11KitCodec, encoding: Encoding) -> None:
    half = tuple([Attribute(ck.CKA_TOKEN, True)] * (limits.MAX_ATTRIBUTES // 2))
    wrapped = (*half[1:], Attribute(ck.CKA_WRAP_TEMPLATE, half))
    assert codec.decode(1, b"", encoding.request(Call.FIND_OBJECTS_INIT, 1, wrapped)).args == (1, wrapped)
    with pytest.raises(BadMessage):
        codec.decode(1, b"", encoding.request(Call.FIND_OBJECTS_INIT, 1, (half[0], *wrapped)))


@both
def test_rooms(codec: NativeCodec | P11KitCodec, encoding: Encoding) -> None:
    most = [(ck.CKA_LABEL, 10)] * limits.MAX_ATTRIBUTES
    assert codec.decode(1, b"", encoding.request(Call.GET_ATTRIBUTE_VALUE, 1, 2, most)).args == (1, 2, tuple(most))
    with pytest.raises(BadMessage):
        codec.decode(1, b"", encoding.request(Call.GET_ATTRIBUTE_VALUE, 1, 2, [*most, most[0]]))


@both
def test_nesting(codec: NativeCodec | P11KitCodec, encoding: Encoding) -> None:
    deepest = nested(limits.MAX_NESTING)
    assert codec.decode(1, b"", encoding.request(Call.FIND_OBJECTS_INIT, 1, deepest)).args == (1, deepest)
    with pytest.raises(BadMessage):
        codec.decode(1, b"", encoding.request(Call.FIND_OBJECTS_INIT, 1, nested(limits.MAX_NESTING + 1)))


def test_nesting_of_p11kits_rooms() -> None:
    def message(depth: int) -> bytes:
        rooms = struct.pack(">III", 1, ck.CKA_WRAP_TEMPLATE, 24) * depth + struct.pack(">I", 0)
        return P11KitEncoding(RELEASES["0.26.4"]).head(Call.GET_ATTRIBUTE_VALUE) + struct.pack(">QQ", 1, 2) + rooms

    assert P11KitCodec(2).decode(1, b"", message(limits.MAX_NESTING)).args == (1, 2, ((ck.CKA_WRAP_TEMPLATE, 24),))
    with pytest.raises(BadMessage):
        P11KitCodec(2).decode(1, b"", message(limits.MAX_NESTING + 1))


def test_arrays() -> None:
    most = limits.MAX_ARRAY
    codec, encoding = NativeCodec(), NativeEncoding()
    assert codec.decode(1, b"", encoding.request(Call.RESTORE_SESSIONS, tuple(range(most)))).args == (tuple(range(most)),)
    with pytest.raises(BadMessage):
        codec.decode(1, b"", encoding.request(Call.RESTORE_SESSIONS, tuple(range(most + 1))))
    assert len(from_memory(ck.CKA_ALLOWED_MECHANISMS, bytes(8 * most), 8)) == most
    assert isinstance(from_memory(ck.CKA_ALLOWED_MECHANISMS, bytes(8 * most + 8), 8), bytes)


def test_an_array_that_claims_more_than_there_is_allocates_nothing() -> None:
    with pytest.raises(Malformed):
        Reader(b"\1\xff\xff\xff\xff").ulong_array()
    with pytest.raises(Malformed):
        Reader(b"\1\x00\x00\x10\x00").ulong_array()


def test_frames() -> None:
    buffer = FrameBuffer()
    buffer.feed(struct.pack(">III", 1, limits.MAX_OPTIONS, limits.MAX_MESSAGE))
    assert buffer.next_frame() is None
    for options, message in ((limits.MAX_OPTIONS + 1, 0), (0, limits.MAX_MESSAGE + 1)):
        buffer = FrameBuffer()
        buffer.feed(struct.pack(">III", 1, options, message))
        with pytest.raises(WireError):
            buffer.next_frame()


@pytest.mark.parametrize("step", [1000, 65536, 3 << 20])
def test_a_message_past_the_limit_is_passed_over(step: int) -> None:
    """p11-kit's client kills its program when the connection is closed."""
    buffer = FrameBuffer()
    buffer.patient = True
    size = limits.MAX_MESSAGE + 70000
    whole = frame(6, b"before") + struct.pack(">III", 7, 3, size) + bytes(3) + b"m" * size + frame(8, b"after")
    came: list[object] = []
    for start in range(0, len(whole), step):
        buffer.feed(whole[start : start + step])
        assert len(buffer.rest()) <= step + 30, "nothing of it is kept"
        while True:
            try:
                found = buffer.next_frame()
            except BadMessage as error:
                came.append((error.request_id, error.rv))
                continue
            if found is None:
                break
            came.append(found)
    assert came == [(6, b"", b"before"), (7, ck.CKR_DATA_LEN_RANGE), (8, b"", b"after")]
    assert not buffer.mid_frame


def test_what_remains_of_a_message_that_is_passed_over_goes_to_a_successor() -> None:
    for size, sent in ((limits.MAX_MESSAGE * 3, 100), (limits.MAX_MESSAGE + 10, 500)):
        first, second = FrameBuffer(), FrameBuffer()
        first.patient = second.patient = True
        whole = struct.pack(">III", 7, 0, size) + b"m" * size + frame(8, b"after")
        first.feed(whole[:sent])
        assert first.next_frame() is None
        assert first.mid_frame
        second.feed(first.rest() + whole[sent:])
        try:
            assert second.next_frame() == (7, b"", b"m" * (size + 12 - sent))  # an ordinary message, that no codec takes
        except BadMessage as error:
            assert error.request_id == 7
        assert second.next_frame() == (8, b"", b"after")


def test_the_largest_frame_arrives_whole() -> None:
    buffer = FrameBuffer()
    whole = struct.pack(">III", 1, limits.MAX_OPTIONS, limits.MAX_MESSAGE) + bytes(limits.MAX_OPTIONS) + b"m" * limits.MAX_MESSAGE
    for start in range(0, len(whole), 65536):
        assert buffer.next_frame() is None
        buffer.feed(whole[start : start + 65536])
    assert buffer.next_frame() == (1, bytes(limits.MAX_OPTIONS), b"m" * limits.MAX_MESSAGE)
    assert not buffer.mid_frame


def test_mid_frame() -> None:
    buffer = FrameBuffer()
    assert not buffer.mid_frame
    for byte in frame(1, b"ab")[:-1]:
        buffer.feed(bytes((byte,)))
        assert buffer.next_frame() is None
        assert buffer.mid_frame
    buffer.feed(b"b" + frame(2, b"")[:5])
    assert buffer.next_frame() == (1, b"", b"ab")
    assert buffer.next_frame() is None
    assert buffer.mid_frame
    buffer.feed(frame(2, b"")[5:])
    assert buffer.next_frame() == (2, b"", b"")
    assert not buffer.mid_frame


def test_a_frame_that_begins_behind_another() -> None:
    first, second = frame(1, b"a" * 20), frame(2, b"b" * 20)
    buffer = FrameBuffer()
    buffer.feed(first + second[:16])
    assert buffer.next_frame() == (1, b"", b"a" * 20)
    assert buffer.next_frame() is None
    buffer.feed(second[16:])
    assert buffer.next_frame() == (2, b"", b"b" * 20)


def test_each_field_ends_with_the_message() -> None:
    for read, size in ((Reader.u8, 1), (Reader.u32, 4), (Reader.u64, 8), (Reader.version, 2)):
        read(Reader(bytes(size)))
        with pytest.raises(Malformed):
            read(Reader(bytes(size - 1)))
    assert Reader(b"\0\0\0\2ab").prefixed() == b"ab"
    with pytest.raises(Malformed):
        Reader(b"\0\0\0\3ab").prefixed()
    with pytest.raises(Malformed):
        Reader(b"\0\0\0\3a\0b").text()


def test_outputs() -> None:
    assert byte_array(Needed(5)) == b"\0\0\0\0\5"
    assert ulong_array(Needed(5)) == b"\0\0\0\0\5"
    assert ulong_array(()) == b"\1\0\0\0\0"


def test_every_call_has_its_signatures() -> None:
    assert P11KIT_CALLS | NATIVE_CALLS == set(CALLS) == set(Call)
    assert "".join(CALLS[Call.GET_TOKEN_INFO][1]) == "ssssuuuuuuuuuuuvvs"
    assert CALLS[Call.UNWRAP_KEY] == (("u", "M", "u", "ay", "aA"), ("u",))
