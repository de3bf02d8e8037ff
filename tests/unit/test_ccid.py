"""The smart card reader: CCID 1.10's messages, their errors, and ABORT's two halves."""

from __future__ import annotations

import threading
from functools import reduce
from operator import xor

import pytest
from hsmvisord import limits
from hsmvisord.face.card.reader import ABORT, GET_CLOCK_FREQUENCIES, GET_DATA_RATES
from hsmvisord.wire import ccid
from hsmvisord.wire.ccid import Command
from support.smart_card import CardRig, Refused, extended, message, short

LEVELS = {"whole": 0, "begins": 1, "ends": 2, "goes on": 3, "give more": 0x10}
ECHO = short(0, 0xCB, 0x3F, 0xFF, b"\x5c\x01\x7e")
T1 = bytes.fromhex("1110004D00FE00")


@pytest.fixture
def rig() -> CardRig:
    rig = CardRig()
    rig.push("tls")
    return rig


@pytest.fixture
def on(rig: CardRig) -> CardRig:
    rig.connect()
    return rig


def status(answer: bytes) -> tuple[int, int, int]:
    """bmICCStatus, bmCommandStatus, bError."""
    assert ccid.is_whole(answer)
    return answer[7] & 3, answer[7] >> 6, answer[8]


def block(rig: CardRig, level: str, data: bytes = b"") -> bytes:
    return rig.ask(Command.XFR_BLOCK, data, b"\0" + LEVELS[level].to_bytes(2, "little"))


def test_the_length_of_a_message_is_in_its_head() -> None:
    head = message(Command.XFR_BLOCK, bytes(70000))[:10]
    assert len(head) == ccid.HEAD and ccid.length(head) == 70000
    assert ccid.length(b"\x6f\xff\xff\xff\xff" + bytes(5)) == 0xFFFFFFFF


# ---- power and status ---------------------------------------------------------------------------------------------------


def test_the_answer_to_reset(rig: CardRig) -> None:
    """TS, T0 with TD1 and the number of historical bytes, TD1, TD2, these, TCK; the bytes name PIV in COMPACT-TLV."""
    atr = rig.connect()
    assert atr[0] == 0x3B and atr[1] >> 4 == 8 and atr[2:4] == b"\x80\x01"
    assert len(atr) == 4 + (atr[1] & 15) + 1
    assert reduce(xor, atr[1:]) == 0
    historical = atr[4:-1]
    assert historical[0] == 0x80
    found, rest = {}, historical[1:]
    while rest:
        size = rest[0] & 15
        found[rest[0] >> 4], rest = rest[1 : 1 + size], rest[1 + size :]
    assert found[0xF] == bytes.fromhex("A00000030800001000")
    assert found[7][2] & 0xC0 == 0xC0, "chains and extended lengths"


def test_a_card_has_power_or_not(rig: CardRig) -> None:
    assert status(rig.ask(Command.GET_SLOT_STATUS)) == (2, 0, 0), "it is not in yet"
    rig.look()
    assert status(rig.ask(Command.GET_SLOT_STATUS)) == (1, 0, 0)
    assert rig.ask(Command.GET_SLOT_STATUS)[9] == 1, "the clock stands"
    answer = rig.ask(Command.ICC_POWER_ON, sequence=200)
    assert (answer[0], answer[5], answer[6]) == (0x80, 0, 200)
    assert status(rig.ask(Command.GET_SLOT_STATUS)) == (0, 0, 0)
    assert rig.ask(Command.ICC_POWER_OFF)[0] == 0x81
    assert status(rig.ask(Command.GET_SLOT_STATUS)) == (1, 0, 0)


@pytest.mark.parametrize("voltage", range(5))
def test_voltages(rig: CardRig, voltage: int) -> None:
    """The reader chooses, or 5 V: the functional descriptor has no other."""
    rig.look()
    answer = rig.ask(Command.ICC_POWER_ON, own=bytes([voltage, 0, 0]))
    assert status(answer) == ((0, 0, 0) if voltage < 2 else (1, 1, 7))


def test_without_a_card(rig: CardRig) -> None:
    rig.bench.keystore.set_token_present(False)
    rig.look()
    assert not rig.reader.present
    assert status(rig.ask(Command.ICC_POWER_ON)) == (2, 1, 0xFE)
    assert status(rig.ask(Command.XFR_BLOCK, ECHO)) == (2, 1, 0xFE)
    assert status(rig.ask(Command.GET_PARAMETERS)) == (2, 1, 0xFE)
    assert status(rig.ask(Command.ICC_POWER_OFF)) == (2, 0, 0)
    assert rig.reader.presence() == b"\x50\x02"


def test_a_card_without_power_is_mute(rig: CardRig) -> None:
    rig.look()
    for command in (Command.XFR_BLOCK, Command.GET_PARAMETERS, Command.RESET_PARAMETERS, Command.SET_PARAMETERS):
        data = T1 if command == Command.SET_PARAMETERS else ECHO if command == Command.XFR_BLOCK else b""
        assert status(rig.ask(command, data)) == (1, 1, 0xFE)


def test_another_slot(on: CardRig) -> None:
    for command in (*Command, 0x42):
        assert status(on.ask(command, slot=1)) == (2, 1, 5)
        assert status(on.reader.busy(message(command, slot=1))) == (2, 1, 5)


@pytest.mark.parametrize(
    "command", ["ICC_POWER_ON", "ICC_POWER_OFF", "GET_SLOT_STATUS", "GET_PARAMETERS", "RESET_PARAMETERS", "ABORT"]
)
def test_data_where_there_is_none(on: CardRig, command: str) -> None:
    assert status(on.ask(Command[command], b"x")) == (0, 1, 1)


def test_messages_of_another_length_than_they_say(on: CardRig) -> None:
    whole = message(Command.XFR_BLOCK, ECHO)
    for wrong in (whole[:-1], whole + b"x", b"\x6f\xff\xff\xff\xff" + whole[5:], whole[:9], whole[:1], b""):
        assert status(on.reader.answer(wrong)) == (0, 1, 1)
    assert status(on.ask(Command.XFR_BLOCK, ECHO)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("command", "answered"),
    [
        (Command.ESCAPE, 0x83),
        (Command.SECURE, 0x80),
        (Command.MECHANICAL, 0x81),
        (Command.T0_APDU, 0x81),
        (Command.ICC_CLOCK, 0x81),
        (Command.SET_DATA_RATE_AND_CLOCK_FREQUENCY, 0x84),
        (0x00, 0x81),
        (0xFF, 0x81),
    ],
)
def test_commands_that_there_are_not(on: CardRig, command: int, answered: int) -> None:
    """libccid sends Escape to readers of some makers at each connect."""
    answer = on.ask(command, bytes(8), sequence=9)
    assert (answer[0], answer[6], len(answer)) == (answered, 9, 10)
    assert status(answer) == (0, 1, 0)


# ---- parameters ---------------------------------------------------------------------------------------------------------


def test_parameters(on: CardRig) -> None:
    got = on.ask(Command.GET_PARAMETERS)
    assert (got[0], got[9], got[10:]) == (0x82, 1, T1)
    other = bytes.fromhex("1110004D002000")
    assert on.ask(Command.SET_PARAMETERS, other, b"\1\0\0")[10:] == other
    assert on.ask(Command.GET_PARAMETERS)[10:] == other
    assert on.ask(Command.RESET_PARAMETERS)[10:] == T1
    on.ask(Command.SET_PARAMETERS, other, b"\1\0\0")
    on.ask(Command.ICC_POWER_ON)
    assert on.ask(Command.GET_PARAMETERS)[10:] == T1, "as after a reset"


@pytest.mark.parametrize(
    ("protocol", "data", "error"), [(0, bytes(5), 7), (2, T1, 7), (1, T1[:-1], 1), (1, T1 + b"\0", 1), (1, b"", 1)]
)
def test_parameters_that_cannot_be(on: CardRig, protocol: int, data: bytes, error: int) -> None:
    assert status(on.ask(Command.SET_PARAMETERS, data, bytes([protocol, 0, 0]))) == (0, 1, error)


# ---- blocks -------------------------------------------------------------------------------------------------------------


def test_one_block_is_one_command(on: CardRig) -> None:
    answer = block(on, "whole", ECHO)
    assert answer[0] == 0x80 and answer[9] == 0 and answer[-2:] == b"\x90\x00"
    assert block(on, "whole", b"\0")[10:] == b"\x67\x00", "the card says that it is none"
    assert status(block(on, "whole")) == (0, 1, 1)


@pytest.mark.parametrize("sizes", [[3, 5], [1, 1, 1, 5], [0, 8], [4, 0, 0, 4], [8, 0]])
def test_a_command_in_several_blocks(on: CardRig, sizes: list[int]) -> None:
    parts, at = [], 0
    for size in sizes:
        parts.append(ECHO[at : at + size])
        at += size
    parts[-1] += ECHO[at:]
    for number, part in enumerate(parts[:-1]):
        answer = block(on, "goes on" if number else "begins", part)
        assert status(answer) == (0, 0, 0) and answer[9:] == b"\x10", "continuation of the command is expected"
    assert block(on, "ends", parts[-1])[10:] == block(on, "whole", ECHO)[10:]


@pytest.mark.parametrize("level", ["ends", "goes on", "give more"])
def test_blocks_out_of_turn(on: CardRig, level: str) -> None:
    assert status(block(on, level, b"" if level == "give more" else ECHO)) == (0, 1, 8)
    assert status(block(on, "whole", ECHO)) == (0, 0, 0)


def test_levels_that_there_are_not(on: CardRig) -> None:
    for level in (4, 0x11, 0x100, 0xFFFF):
        assert status(on.ask(Command.XFR_BLOCK, ECHO, b"\0" + level.to_bytes(2, "little"))) == (0, 1, 8)


def test_a_new_command_drops_a_half_one(on: CardRig) -> None:
    block(on, "begins", b"\0\0\0\0")
    assert block(on, "whole", ECHO)[-2:] == b"\x90\x00"
    assert status(block(on, "ends", b"\0")) == (0, 1, 8)
    block(on, "begins", b"\0\0\0\0")
    block(on, "begins", ECHO[:4])
    assert block(on, "ends", ECHO[4:])[-2:] == b"\x90\x00"


def test_blocks_of_one_command_are_bounded(on: CardRig) -> None:
    long = extended(0, 0x87, 0x11, 0x9A, bytes(65535))
    assert len(long) == limits.MAX_APDU
    block(on, "begins", long[:40000])
    assert block(on, "ends", long[40000:])[10:] == b"\x6a\x80", "at the limit the card has it"
    block(on, "begins", long[:40000])
    assert status(block(on, "ends", long[40000:] + b"x")) == (0, 1, 1), "one past it"
    assert status(block(on, "ends", b"x")) == (0, 1, 8), "nothing is kept"


def test_blocks_without_end_take_no_memory(on: CardRig) -> None:
    block(on, "begins", b"")
    for _ in range(50):
        block(on, "goes on", bytes(30000))
        assert len(on.reader._coming or b"") <= limits.MAX_APDU


def test_an_answer_in_several_blocks(on: CardRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a message: the rest is asked for by empty blocks."""
    size = limits.MAX_CCID_MESSAGE - ccid.HEAD
    for length, chain in ((size, [0]), (size + 1, [1, 2]), (2 * size + 5, [1, 3, 2])):
        answer = bytes(index % 251 for index in range(length))
        monkeypatch.setattr(on.card, "transmit", lambda raw, answer=answer: answer)
        got = block(on, "whole", ECHO)
        told, data = [got[9]], got[10:]
        while told[-1] in (1, 3):
            got = block(on, "give more")
            assert len(got) <= limits.MAX_CCID_MESSAGE
            told.append(got[9])
            data += got[10:]
        assert (told, data) == (chain, answer)
        assert status(block(on, "give more")) == (0, 1, 8)


def test_the_rest_of_an_answer_is_asked_for_without_data(on: CardRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on.card, "transmit", lambda raw: bytes(70000))
    block(on, "whole", ECHO)
    assert status(block(on, "give more", b"x")) == (0, 1, 1)
    block(on, "whole", ECHO)
    on.ask(Command.ICC_POWER_ON)
    assert status(block(on, "give more")) == (0, 1, 8), "power ends it"


# ---- insertion, time, ABORT ---------------------------------------------------------------------------------------------


def test_what_the_interrupt_endpoint_tells(rig: CardRig) -> None:
    assert rig.reader.presence() == b"\x50\x02"
    rig.look()
    assert rig.told == [b"\x50\x03"]
    assert rig.reader.presence() == b"\x50\x03"
    rig.bench.keystore.set_token_present(False)
    rig.look()
    assert rig.told == [b"\x50\x03", b"\x50\x02"]


def test_an_importer_that_comes_finds_the_reader_empty(on: CardRig) -> None:
    """Until it is shown the card, asks for power, or the card comes by itself."""
    assert on.reader.hide() == b"\x50\x02"
    assert status(on.ask(Command.GET_SLOT_STATUS)) == (2, 0, 0)
    assert on.reader.show() == b"\x50\x03"
    assert status(on.ask(Command.GET_SLOT_STATUS))[0] != 2
    on.reader.hide()
    assert status(on.ask(Command.ICC_POWER_ON)) == (0, 0, 0)
    assert status(block(on, "whole", ECHO)) == (0, 0, 0)
    on.reader.hide()
    assert on.reader.insert() == b"\x50\x03"
    assert status(on.ask(Command.GET_SLOT_STATUS)) == (1, 0, 0)


def test_there_is_no_card_to_show(rig: CardRig) -> None:
    assert rig.reader.hide() == b"\x50\x02"
    assert rig.reader.show() == b"\x50\x02"
    assert status(rig.ask(Command.ICC_POWER_ON)) == (2, 1, 0xFE)


def test_time_is_asked_for_in_the_answer_of_the_command(on: CardRig) -> None:
    for command, kind in ((Command.XFR_BLOCK, 0x80), (Command.GET_SLOT_STATUS, 0x81)):
        answer = on.reader.more_time(message(command, sequence=77))
        assert (answer[0], answer[6]) == (kind, 77)
        assert status(answer) == (0, 2, 1)


def test_while_the_card_is_at_work(on: CardRig) -> None:
    assert status(on.reader.busy(message(Command.XFR_BLOCK, ECHO))) == (0, 1, 0xE0)
    assert status(on.reader.busy(message(Command.GET_SLOT_STATUS))) == (0, 1, 0xE0)


def test_requests_of_the_class(on: CardRig) -> None:
    assert on.reader.control(GET_CLOCK_FREQUENCIES, 0, 4) == (4000).to_bytes(4, "little")
    assert on.reader.control(GET_DATA_RATES, 0, 256) == (10752).to_bytes(4, "little")
    assert on.reader.control(GET_DATA_RATES, 0, 2) == b"\0\x2a"
    assert on.reader.control(4, 0, 4) is None
    assert on.reader.control(ABORT, 1, 0) is None, "another slot"


def abort(rig: CardRig, sequence: int) -> None:
    assert rig.reader.control(ABORT, sequence << 8, 0) == b""


def test_abort_the_request_first(on: CardRig) -> None:
    abort(on, 7)
    assert status(on.ask(Command.GET_SLOT_STATUS, sequence=7)) == (0, 1, 0xFF)
    assert status(on.ask(Command.ABORT, sequence=8)) == (0, 1, 0xFF), "another's"
    assert status(on.reader.busy(message(Command.XFR_BLOCK, ECHO))) == (0, 1, 0xFF)
    answer = on.ask(Command.ABORT, sequence=7)
    assert answer[0] == 0x81 and status(answer) == (0, 0, 0)
    assert status(on.ask(Command.GET_SLOT_STATUS)) == (0, 0, 0)


def test_abort_the_message_first(on: CardRig) -> None:
    assert status(on.ask(Command.ABORT, sequence=7)) == (0, 0, 0)
    abort(on, 7)
    assert status(on.ask(Command.GET_SLOT_STATUS)) == (0, 0, 0), "both halves have come"
    on.ask(Command.ABORT, sequence=7)
    on.ask(Command.GET_SLOT_STATUS)
    abort(on, 7)
    assert status(on.ask(Command.GET_SLOT_STATUS)) == (0, 1, 0xFF), "the message was not the last one"


def test_abort_ends_with_the_device(on: CardRig) -> None:
    abort(on, 7)
    on.reader.power_down()
    assert status(on.ask(Command.GET_SLOT_STATUS)) == (1, 0, 0)


def test_what_is_at_work_is_answered_as_aborted(on: CardRig, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, over = threading.Event(), threading.Event()

    def transmit(raw: bytes) -> bytes:
        begun.set()
        over.wait(10)
        return b"\x90\x00"

    monkeypatch.setattr(on.card, "transmit", transmit)
    answers: list[bytes] = []
    thread = threading.Thread(target=lambda: answers.append(on.ask(Command.XFR_BLOCK, ECHO, sequence=3)))
    thread.start()
    assert begun.wait(10)
    abort(on, 7)
    assert status(on.reader.busy(message(Command.ABORT, sequence=7))) == (0, 0, 0)
    over.set()
    thread.join(10)
    assert answers[0][6] == 3 and status(answers[0]) == (0, 1, 0xFF)
    assert status(block(on, "whole", ECHO)) == (0, 0, 0), "and nothing after it"


def test_a_reset_of_the_device_resets_the_card(on: CardRig) -> None:
    on.set_pin()
    on.verify()
    block(on, "begins", ECHO[:3])
    on.reader.power_down()
    on.connect()
    with pytest.raises(Refused, match="63C3"):
        on.verified()
    assert status(block(on, "ends", ECHO[3:])) == (0, 1, 8)
