"""APDUs: the cases of ISO/IEC 7816-4, commands in parts, answers in parts."""

from __future__ import annotations

import pytest
from hsmvisord import limits
from hsmvisord.wire import apdu
from hsmvisord.wire.apdu import SW, BadApdu, Chaining, CommandApdu, ResponseApdu
from hypothesis import given
from hypothesis import strategies as st
from support.smart_card import extended, short


def refused(sw: int, act: object, *arguments: object) -> None:
    with pytest.raises(BadApdu) as caught:
        act(*arguments)  # type: ignore[operator]
    assert caught.value.sw == sw


@pytest.mark.parametrize(
    ("text", "data", "expected", "most", "is_extended"),
    [
        ("00CB3FFF", b"", 0, 256, False),  # case 1
        ("00CB3FFF 10", b"", 16, 16, False),  # 2
        ("00CB3FFF 00", b"", 256, 256, False),
        ("00CB3FFF 02 AABB", b"\xaa\xbb", 0, 256, False),  # 3
        ("00CB3FFF 02 AABB 05", b"\xaa\xbb", 5, 5, False),  # 4
        ("00CB3FFF 02 AABB 00", b"\xaa\xbb", 256, 256, False),
        ("00CB3FFF 00 0100", b"", 256, 256, True),  # 2, extended
        ("00CB3FFF 00 0000", b"", 65536, 65536, True),
        ("00CB3FFF 00 0002 AABB", b"\xaa\xbb", 0, 65536, True),  # 3
        ("00CB3FFF 00 0002 AABB 0005", b"\xaa\xbb", 5, 5, True),  # 4
        ("00CB3FFF 00 0002 AABB 0000", b"\xaa\xbb", 65536, 65536, True),
    ],
)
def test_cases(text: str, data: bytes, expected: int, most: int, is_extended: bool) -> None:
    command = apdu.decode(bytes.fromhex(text))
    assert command == CommandApdu(0, 0xCB, 0x3F, 0xFF, data, expected, is_extended)
    assert command.most == most


@pytest.mark.parametrize(
    "text",
    [
        "", "00", "00CB3F",
        "00CB3FFF 02 AA", "00CB3FFF 02 AABBCCDD",
        "00CB3FFF 0000", "00CB3FFF 00 0000 AA", "00CB3FFF 00 0003 AABB", "00CB3FFF 00 0002 AABB 00", "00CB3FFF 00 0001 AABBCCDD",
    ],
)  # fmt: skip
def test_what_is_no_command(text: str) -> None:
    refused(SW.WRONG_LENGTH, apdu.decode, bytes.fromhex(text))


@given(st.binary(max_size=400))
def test_all_bytes_of_a_command_are_understood_or_refused(raw: bytes) -> None:
    try:
        command = apdu.decode(raw)
    except BadApdu as error:
        assert error.sw == SW.WRONG_LENGTH
        return
    again = extended if command.extended else short
    le = command.expected or None
    assert again(*raw[:4], command.data, le) == raw or (len(raw) == 5 and not command.data)


def test_the_longest_command() -> None:
    raw = extended(0, 0x87, 0, 0, bytes(65535))
    assert len(raw) == limits.MAX_APDU
    assert len(apdu.decode(raw).data) == 65535


# ---- commands in parts --------------------------------------------------------------------------------------------------


class Talk:
    """A card that echoes."""

    def __init__(self) -> None:
        self.chaining = Chaining()
        self.ran: list[CommandApdu] = []

    def say(self, raw: bytes, answer: bytes | None = None) -> tuple[bytes, int]:
        try:
            taken = self.chaining.take(apdu.decode(raw))
            if isinstance(taken, CommandApdu):
                self.ran.append(taken)
                taken = self.chaining.give(taken.data if answer is None else answer, taken)
        except BadApdu as error:
            taken = ResponseApdu(b"", error.sw)
        return taken.data, taken.sw


@given(st.binary(min_size=1, max_size=2000), st.integers(1, 255))
def test_a_command_in_parts_is_one(data: bytes, piece: int) -> None:
    talk = Talk()
    parts = [data[at : at + piece] for at in range(0, len(data), piece)]
    for part in parts[:-1]:
        assert talk.say(short(0x10, 0x87, 7, 0x9A, part, None)) == (b"", SW.OK)
    talk.say(short(0, 0x87, 7, 0x9A, parts[-1]))
    assert talk.ran == [CommandApdu(0, 0x87, 7, 0x9A, data, 256, False)]


@pytest.mark.parametrize("other", [short(0, 0xCB, 7, 0x9A, b"b"), short(0, 0x87, 7, 0x9C, b"b"), short(0, 0x87, 8, 0x9A, b"b")])
def test_another_command_drops_a_chain(other: bytes) -> None:
    talk = Talk()
    talk.say(short(0x10, 0x87, 7, 0x9A, b"a"))
    assert talk.say(other) == (b"b", SW.OK)
    assert talk.say(short(0, 0x87, 7, 0x9A, b"c")) == (b"c", SW.OK), "nothing of the chain is left"


def test_get_response_drops_a_chain() -> None:
    talk = Talk()
    talk.say(short(0x10, 0x87, 7, 0x9A, b"a"))
    assert talk.say(short(0, 0xC0, 0, 0)) == (b"", SW.CONDITIONS_NOT_SATISFIED)
    assert talk.say(short(0, 0x87, 7, 0x9A, b"c")) == (b"c", SW.OK)


def test_a_chain_is_bounded() -> None:
    talk = Talk()
    first = extended(0x10, 0x87, 7, 0x9A, bytes(limits.MAX_APDU_CHAIN - 1), None)
    assert talk.say(first) == (b"", SW.OK)
    assert talk.say(short(0, 0x87, 7, 0x9A, b"a"))[1] == SW.MORE
    assert len(talk.ran.pop().data) == limits.MAX_APDU_CHAIN, "at the limit"
    assert talk.say(first) == (b"", SW.OK)
    assert talk.say(short(0x10, 0x87, 7, 0x9A, b"ab")) == (b"", SW.WRONG_LENGTH), "one past it"
    assert talk.say(short(0, 0x87, 7, 0x9A, b"c")) == (b"c", SW.OK), "the chain is dropped"


def test_a_chain_without_end_takes_no_memory() -> None:
    talk = Talk()
    for _ in range(1000):
        talk.say(extended(0x10, 0x87, 7, 0x9A, bytes(4096), None))
        assert len(talk.chaining._parts) <= limits.MAX_APDU_CHAIN
    assert talk.ran == []


# ---- answers in parts ---------------------------------------------------------------------------------------------------


def test_a_long_answer_is_read_by_get_response() -> None:
    talk, answer = Talk(), bytes(range(256)) * 3
    assert talk.say(short(0, 0xCB, 0, 0, b"x"), answer) == (answer[:256], 0x6100)
    assert not talk.chaining.given
    assert talk.say(short(0, 0xC0, 0, 0)) == (answer[256:512], 0x6100)
    assert talk.say(short(0, 0xC0, 0, 0, b"", 56)) == (answer[512:568], 0x61C8)
    assert talk.say(short(0, 0xC0, 0, 0, b"", None)) == (answer[568:], SW.OK)
    assert talk.chaining.given
    assert talk.say(short(0, 0xC0, 0, 0)) == (b"", SW.CONDITIONS_NOT_SATISFIED)


@given(st.binary(min_size=1, max_size=1500), st.lists(st.integers(1, 256), min_size=1))
def test_no_byte_of_an_answer_is_lost(answer: bytes, sizes: list[int]) -> None:
    talk, got = Talk(), b""
    data, sw = talk.say(short(0, 0xCB, 0, 0, b"x", sizes[0]), answer)
    for turn in range(len(answer)):
        got += data
        if sw == SW.OK:
            break
        left = len(answer) - len(got)
        assert sw == SW.MORE | (left if left < 256 else 0)
        data, sw = talk.say(short(0, 0xC0, 0, 0, b"", sizes[turn % len(sizes)]))
    assert got == answer


def test_an_extended_command_gets_all_at_once() -> None:
    talk, answer = Talk(), bytes(5000)
    assert talk.say(extended(0, 0xCB, 0, 0, b"x"), answer) == (answer, SW.OK)
    assert talk.say(extended(0, 0xCB, 0, 0, b"x", None), answer) == (answer, SW.OK)
    assert talk.say(extended(0, 0xCB, 0, 0, b"x", 4000), answer) == (answer[:4000], 0x6100)


@pytest.mark.parametrize("between", [short(0, 0xCB, 0, 0, b"y"), short(0x10, 0x87, 0, 0, b"y")])
def test_another_command_drops_an_answer(between: bytes) -> None:
    talk = Talk()
    talk.say(short(0, 0xCB, 0, 0, b"x"), bytes(300))
    talk.say(between)
    assert talk.say(short(0, 0xC0, 0, 0)) == (b"", SW.CONDITIONS_NOT_SATISFIED)
