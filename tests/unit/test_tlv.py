"""BER-TLV: what is encoded is decoded, and of what is not BER-TLV nothing but BadTlv comes."""

from __future__ import annotations

import contextlib

import pytest
from hsmvisord import limits
from hsmvisord.wire import tlv
from hsmvisord.wire.tlv import BadTlv
from hypothesis import example, given
from hypothesis import strategies as st

TAGS = st.sampled_from([0x4F, 0x53, 0x5C, 0x70, 0x7C, 0x7E, 0x81, 0x82, 0x5F2F, 0x7F49, 0x7F61, 0x5F8102])
ROWS = st.lists(st.tuples(TAGS, st.binary(max_size=400)), max_size=limits.MAX_TLV_OBJECTS)


@given(ROWS)
def test_what_is_encoded_is_decoded(row: list[tuple[int, bytes]]) -> None:
    assert tlv.decode(b"".join(tlv.encode(tag, value) for tag, value in row)) == row


@given(st.binary(max_size=300))
@example(b"\x7c" * 300)
@example(b"\x7c\x02" * 150)
def test_nothing_but_bad_tlv_is_raised(data: bytes) -> None:
    with contextlib.suppress(BadTlv):
        assert sum(len(value) for _, value in tlv.decode(data)) <= len(data)


@pytest.mark.parametrize("size", [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x10000])
def test_lengths(size: int) -> None:
    coded = tlv.encode(0x53, bytes(size))
    assert tlv.decode(coded) == [(0x53, bytes(size))]
    head = {0x7F: b"\x53\x7f", 0x80: b"\x53\x81\x80", 0x100: b"\x53\x82\x01\x00", 0x10000: b"\x53\x83\x01\x00\x00"}
    if size in head:
        assert coded.startswith(head[size])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("53", "without a length"),
        ("5F", "without its end"),
        ("5F81", "without its end"),
        ("5F818101 00", "more than three bytes"),
        ("5380 0000", "a length of 0 bytes"),  # indefinite
        ("5384 00000000", "a length of 4 bytes"),
        ("53FF", "a length of 127 bytes"),
        ("5382 01", "a length of 2 bytes"),
        ("5301", "1 bytes where 0 are left"),
        ("53 83 FFFFFF 00", "16777215 bytes where 1 are left"),
    ],
)
def test_what_is_no_tlv(data: str, why: str) -> None:
    with pytest.raises(BadTlv, match=why):
        tlv.decode(bytes.fromhex(data))


def test_objects_in_a_row_are_bounded() -> None:
    assert len(tlv.decode(b"\x81\0" * limits.MAX_TLV_OBJECTS)) == limits.MAX_TLV_OBJECTS
    with pytest.raises(BadTlv, match="more than"):
        tlv.decode(b"\x81\0" * (limits.MAX_TLV_OBJECTS + 1))


def test_a_bomb_of_nested_objects_is_one_object() -> None:
    """Nobody looks deeper than he asks."""
    bomb = b""
    for _ in range(5000):
        bomb = tlv.encode(0x7C, bomb)
    ((tag, value),) = tlv.decode(bomb)
    assert tag == 0x7C and len(value) == len(bomb) - 4
