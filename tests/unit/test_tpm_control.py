"""The TPM's control channel: what QEMU 7.2 and the TSS send, to the byte."""

from __future__ import annotations

import struct

import pytest
from hsmvisord import limits
from hsmvisord.wire import tpm_control as t
from hsmvisord.wire.tpm_control import Asked, BrokenControl, Command, Control
from hypothesis import given
from hypothesis import strategies as st

#: As QEMU sends them (backends/tpm/tpm_emulator.c), and what they ask.
QUESTIONS: dict[str, Asked] = {
    "00000001": Asked(Command.GET_CAPABILITY),
    "00000002 00000001": Asked(Command.INIT, 1),
    "00000003": Asked(Command.SHUTDOWN),
    "00000004": Asked(Command.GET_ESTABLISHED),
    "00000005 03000000": Asked(Command.SET_LOCALITY, 3),
    "00000006": Asked(Command.HASH_START),
    "00000007 00000002 6162": Asked(Command.HASH_DATA, data=b"ab"),
    "00000008": Asked(Command.HASH_END),
    "00000009": Asked(Command.CANCEL),
    "0000000a": Asked(Command.STORE_VOLATILE),
    "0000000b 02ffffff": Asked(Command.RESET_ESTABLISHED, 2),
    "0000000c 00000001 00000002 00000003": Asked(Command.GET_STATE_BLOB, flags=1, blob=2, offset=3),
    "0000000d 00000002 00000001 00000003 626c6f": Asked(Command.SET_STATE_BLOB, flags=2, blob=1, data=b"blo"),
    "0000000e": Asked(Command.STOP),
    "0000000f": Asked(Command.GET_CONFIG),
    "00000010": Asked(Command.SET_DATA_FD),
    "00000011 00000f80": Asked(Command.SET_BUFFER_SIZE, 3968),
    "00000012 0000000000000001 00000002 00000000": Asked(Command.GET_INFO, flags=1, offset=2),
    "00000013 0000000a": Asked(Command.LOCK_STORAGE, 10),
}
#: Bytes that QEMU 7.2 reads for an answer, whatever its result.
ANSWERS = {
    Command.GET_CAPABILITY: 8,
    Command.GET_ESTABLISHED: 8,
    Command.GET_STATE_BLOB: 16,
    Command.GET_CONFIG: 8,
    Command.SET_BUFFER_SIZE: 16,
    Command.GET_INFO: 12,
}
WHOLE = b"".join(map(bytes.fromhex, QUESTIONS))


def all_of(control: Control) -> list[Asked]:
    return list(iter(control.next, None))


def test_every_command_is_here() -> None:
    assert [asked.command for asked in QUESTIONS.values()] == list(Command)


@pytest.mark.parametrize(("text", "asked"), QUESTIONS.items(), ids=[asked.command.name for asked in QUESTIONS.values()])
def test_questions_whole_and_byte_by_byte(text: str, asked: Asked) -> None:
    data = bytes.fromhex(text)
    control = Control()
    control.receive(data)
    assert all_of(control) == [asked] and not control.pending
    for at, byte in enumerate(data):
        control.receive(bytes([byte]))
        assert control.next() == (asked if at == len(data) - 1 else None)


@given(st.lists(st.integers(0, len(WHOLE)), max_size=20))
def test_questions_in_any_pieces(cuts: list[int]) -> None:
    control, found, at = Control(), [], 0
    for cut in sorted({*cuts, len(WHOLE)}):
        control.receive(WHOLE[at:cut])
        found += all_of(control)
        at = cut
    assert found == list(QUESTIONS.values())


def test_the_tss_pads_no_locality() -> None:
    control = Control(padded=False)
    control.receive(bytes.fromhex("00000005 04"))
    assert control.next() == Asked(Command.SET_LOCALITY, 4) and not control.pending
    control.receive(bytes.fromhex("0000000b 01"))
    assert control.next() == Asked(Command.RESET_ESTABLISHED, 1)


@pytest.mark.parametrize("code", [0, 0x14, 0x80000001, 0xFFFFFFFF])
def test_commands_that_there_are_not(code: int) -> None:
    control = Control()
    control.receive(struct.pack(">I", code))
    with pytest.raises(BrokenControl, match=f"command {code:#x}"):
        control.next()


@pytest.mark.parametrize(
    ("head", "most"),
    [
        (struct.pack(">I", Command.HASH_DATA), limits.MAX_TPM_HASH),
        (struct.pack(">III", Command.SET_STATE_BLOB, 2, 1), limits.MAX_TPM_BLOB),
    ],
    ids=["HASH_DATA", "SET_STATE_BLOB"],
)
def test_lengths_at_their_limit_and_one_past_it(head: bytes, most: int) -> None:
    """One that is too long is refused by its head alone."""
    control = Control()
    control.receive(head + struct.pack(">I", most))
    assert control.next() is None
    control.receive(bytes(most))
    asked = control.next()
    assert asked is not None and asked.data == bytes(most)
    control.receive(head + struct.pack(">I", most + 1))
    with pytest.raises(BrokenControl, match=f"with {most + 1} bytes, at most {most}"):
        control.next()


def test_more_than_any_question_has_room_for() -> None:
    control = Control()
    control.receive(bytes(t.MOST))
    with pytest.raises(BrokenControl, match=f"{t.MOST + 1} bytes in one question"):
        control.receive(b"x")


@pytest.mark.parametrize("command", Command, ids=lambda command: command.name)
def test_every_answer_has_one_size(command: Command) -> None:
    """A shorter one would have QEMU wait for ever."""
    size = ANSWERS.get(command, 4)
    refusal = t.refusal(command, t.FAIL)
    assert len(refusal) == size
    assert command is Command.GET_CAPABILITY or refusal[:4] == struct.pack(">I", t.FAIL)
    if command is not Command.GET_CAPABILITY:
        values = {5: 1, 8: 1, 12: 2, 16: 3}.get(size, 0) if command is not Command.GET_INFO else 2
        assert len(t.answer(command, *range(values))) == size


def test_answers() -> None:
    assert t.answer(Command.GET_ESTABLISHED, 1) == bytes.fromhex("00000000 01000000")
    assert t.answer(Command.SET_BUFFER_SIZE, 3968, 1, 4096) == bytes.fromhex("00000000 00000f80 00000001 00001000")
    assert t.answer(Command.GET_STATE_BLOB, t.ENCRYPTED, 3, 3, data=b"abc") == bytes.fromhex(
        "00000000 00000002 00000003 00000003 616263"
    )
    assert t.capabilities(t.Capability.INIT | t.Capability.LOCK_STORAGE) == bytes.fromhex("0000000000010001")


def test_a_blob_is_not_shown() -> None:
    assert "secret" not in repr(Asked(Command.SET_STATE_BLOB, data=b"secret"))
