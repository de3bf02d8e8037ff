"""A guest that says anything to its card: all is answered; nothing is raised, kept without bound, or done without the PIN."""

from __future__ import annotations

import tracemalloc
from functools import cache
from itertools import pairwise

import pytest
from fuzz.world import components
from hsmvisord import limits
from hsmvisord.face.card import piv
from hsmvisord.face.card.reader import ABORT
from hsmvisord.face.card.slots import CardSettings, card_settings
from hsmvisord.wire import ccid, tlv
from hsmvisord.wire.ccid import Command
from hypothesis import given, settings
from hypothesis import strategies as st
from support.keystores import Bench
from support.smart_card import (
    ED25519,
    P_256,
    P_384,
    PIN,
    RSA_2048,
    CardRig,
    Refused,
    extended,
    message,
    shared_key,
    short,
    template,
)

SLOTS = {"9a": "a", "9c": "c", "9d": "d", "9e": "e", "82": "r", "83": "s"}
KINDS = {"a": "p256", "c": "rsa2048", "d": "p384", "e": "p256", "r": "ed25519", "s": "rsa2048"}


@cache
def module() -> Bench:
    """All slots and kinds; each test makes a token and a card of its own over it."""
    rig = CardRig()
    for name, kind in KINDS.items():
        rig.push(name, kind, profile="any", key=shared_key(kind))
    return rig.bench


def new_rig(with_pin: bool = False, yubikey: bool = False) -> CardRig:
    bench = module()
    bench.now += 1000  # a lock of an earlier example is over
    rig = CardRig(bench, CardSettings(card_settings({"slots": SLOTS}).slots, yubikey))
    rig.set_pin(PIN if with_pin else b"")
    rig.connect()
    return rig


bytes_ = st.binary(max_size=300)
words = st.integers(0, 0xFFFF)
references = st.one_of(st.sampled_from([0x80, 0x9A, 0x9B, 0x9C, 0x9D, 0x9E, 0x82, 0x83, 0x84, 0x00, 0xFF]), st.integers(0, 255))
algorithms = st.one_of(st.sampled_from([0x00, 0xFF, P_256, P_384, RSA_2048, ED25519]), st.integers(0, 255))
values = st.one_of(bytes_, st.sampled_from([b"\4" + b"p" * 64, b"\4" + b"p" * 96, bytes(256)]))
tags = st.sampled_from([0x5FC105, 0x5FC10A, 0x5FC10B, 0x5FC101, 0x5FC10D, 0x5FC102, 0x5FC107, 0x5FC10C, 0x7E])
bodies = st.one_of(
    bytes_,
    st.builds(template, st.sampled_from([0x80, 0x81, 0x82, 0x85]), values),
    tags.map(lambda tag: tlv.encode(0x5C, tag.to_bytes((tag.bit_length() + 7) // 8, "big"))),
    st.sampled_from([PIN + b"\xff\xff", b"000000\xff\xff", bytes.fromhex("A000000308")]),
)
instructions = st.one_of(st.sampled_from([0x20, 0x87, 0xA4, 0xC0, 0xCB, 0xDB, 0x47, 0x24, 0xF7, 0xF8, 0xFD]), st.integers(0, 255))
expected = st.one_of(st.none(), st.integers(1, 256))
heads = st.tuples(
    st.sampled_from([0x00, 0x00, 0x00, 0x10, 0x0C, 0x80]),
    instructions,
    st.one_of(st.just(0x3F), algorithms),
    st.one_of(st.just(0xFF), references),
)
#: What each key does, and the same with a byte changed.
BLOCK = b"\0\1" + b"\xff" * 250 + b"\0abc"
USES = [
    extended(0, 0x87, algorithm, slot, template(tag, value))
    for slot, algorithm, tag, value in (
        (0x9A, P_256, 0x81, bytes(32)),
        (0x9C, RSA_2048, 0x81, BLOCK),
        (0x9D, P_384, 0x81, bytes(48)),
        (0x9E, P_256, 0x81, bytes(32)),
        (0x82, ED25519, 0x81, b"message"),
        (0x83, RSA_2048, 0x81, bytes(255) + b"\2"),
    )
]
changed = st.builds(
    lambda use, at, byte: use[: at % len(use)] + bytes([byte]) + use[at % len(use) + 1 :],
    st.sampled_from(USES),
    st.integers(0, 400),
    st.integers(0, 255),
)
commands = st.one_of(
    st.sampled_from(USES),
    changed,
    st.builds(lambda head, data, le: short(*head, data[:255], le), heads, bodies, expected),
    st.builds(lambda head, data, le: extended(*head, data, le), heads, bodies, st.one_of(st.none(), st.integers(1, 65536))),
    bytes_,
)
messages = st.one_of(
    st.binary(max_size=80),
    st.builds(
        lambda kind, data, own, slot, sequence: message(kind, data, own, slot, sequence),
        st.one_of(st.sampled_from([int(kind) for kind in Command]), st.integers(0, 255)),
        commands,
        st.one_of(
            st.just(bytes(3)), st.binary(min_size=3, max_size=3), st.sampled_from([b"\0\1\0", b"\0\2\0", b"\0\3\0", b"\0\x10\0"])
        ),
        st.sampled_from([0, 0, 0, 0, 1, 255]),
        st.integers(0, 255),
    ),
)


def sound(rig: CardRig, asked: bytes, answer: bytes) -> None:
    assert ccid.is_whole(answer) and len(answer) <= limits.MAX_CCID_MESSAGE
    assert 0x80 <= answer[0] <= 0x84 and answer[5:7] == asked.ljust(10, b"\0")[5:7]
    icc, command = answer[7] & 0x3F, answer[7] >> 6
    assert icc < 3 and command < 2
    assert not rig.faults


@settings(deadline=None)
@given(st.lists(messages, max_size=12))
def test_every_message_has_one_answer(said: list[bytes]) -> None:
    rig = new_rig()
    for one in said:
        sound(rig, one, rig.reader.answer(one))
        assert ccid.is_whole(rig.reader.busy(one)) and ccid.is_whole(rig.reader.more_time(one))
    rig.reader.power_down()
    rig.connect()
    rig.guid()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)), max_size=5),
    st.lists(messages, max_size=5),
)
def test_requests_of_the_class_between_them(requests: list[tuple[int, int, int]], said: list[bytes]) -> None:
    rig = new_rig()
    for request, one in zip(requests, said, strict=False):
        answer = rig.reader.control(*request)
        assert answer is None or len(answer) <= min(4, request[2])
        sound(rig, one, rig.reader.answer(one))


@settings(deadline=None)
@given(st.lists(commands, max_size=12), st.booleans())
def test_every_command_has_a_status_word(said: list[bytes], yubikey: bool) -> None:
    rig = new_rig(yubikey=yubikey)
    for one in said:
        answer = rig.card.transmit(one)
        assert len(answer) >= 2
        sw = int.from_bytes(answer[-2:], "big")
        assert sw >> 12 in (6, 9) and (len(answer) == 2 or sw == 0x9000 or sw >> 8 == 0x61)
    assert not rig.faults
    rig.guid()


@settings(deadline=None)
@given(st.lists(commands.filter(lambda c: PIN not in c), max_size=15))
def test_without_the_pin_no_key_but_9es_is_used(said: list[bytes]) -> None:
    rig = new_rig(with_pin=True)
    rig.read(0x9A, 0x9C, 0x9D, 0x9E, 0x82, 0x83)
    for one in said:
        rig.card.transmit(one)
    used = {generation for _, _, generation in rig.token.statistics() if generation}
    assert used <= {("e", 1)}
    assert not rig.card._piv._is_verified


@settings(deadline=None, max_examples=30)
@given(st.lists(commands, max_size=10))
def test_no_part_of_a_key_comes_out(said: list[bytes]) -> None:
    rig = new_rig(yubikey=True)
    rig.read(0x9A, 0x9C, 0x9D, 0x9E, 0x82, 0x83)
    assert all(rig.card.transmit(use)[-2:] == b"\x90\0" for use in USES)
    heard = b"".join(rig.card.transmit(one) for one in said)
    for kind in set(KINDS.values()):
        for part in components(shared_key(kind)):
            assert part[:16] not in heard and part[-16:] not in heard


@settings(deadline=None, max_examples=40)
@given(commands.filter(bool), st.lists(st.integers(0, 300), max_size=6), st.booleans())
def test_a_command_is_the_same_however_it_is_cut(command: bytes, cuts: list[int], yubikey: bool) -> None:
    """In one block, in several anywhere, and byte by byte: the same status, and the same data where no signature is random."""
    answers = []
    for at in ([], sorted(cut for cut in cuts if cut < len(command)), list(range(1, min(len(command), 60)))):
        rig = new_rig(yubikey=yubikey)
        edges = [0, *at, len(command)]
        parts = [command[begin:end] for begin, end in pairwise(edges)]
        for number, part in enumerate(parts[:-1]):
            told = rig.ask(Command.XFR_BLOCK, part, b"\0" + (b"\3" if number else b"\1") + b"\0")
            assert told[7:] == b"\0\0\x10"
        answers.append(rig.ask(Command.XFR_BLOCK, parts[-1], b"\0" + (b"\2" if len(parts) > 1 else b"\0") + b"\0"))
    assert len({answer[7:10] + answer[-2:] for answer in answers}) == 1
    if command[1:2] != b"\x87":
        assert len(set(answers)) == 1


# ---- resources ----------------------------------------------------------------------------------------------------------


def test_what_never_ends_takes_no_memory() -> None:
    rig = new_rig()
    piece = extended(0x10, 0x87, RSA_2048, 0x9C, bytes(20000), None)
    begins = message(Command.XFR_BLOCK, bytes(60000), b"\0\1\0")
    goes_on = message(Command.XFR_BLOCK, bytes(60000), b"\0\3\0")
    tracemalloc.start()
    for _ in range(200):
        rig.reader.answer(message(Command.XFR_BLOCK, piece))
        rig.reader.answer(begins)
        rig.reader.answer(goes_on)
        rig.reader.control(ABORT, 0, 0)
        rig.reader.answer(message(Command.ABORT, sequence=0))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1_000_000


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x7c" * 60000,
        b"\x7c\x82\xff\xff" * 15000,
        b"\x7c\x80" * 30000,
        b"\x81\0" * 30000,
        b"\x5c\x83\xff\xff\xff" + bytes(60000),
        b"\x7f" + b"\xff" * 60000,
    ],
)
def test_bombs_of_tlv(bomb: bytes) -> None:
    rig = new_rig()
    for command in (extended(0, 0x87, P_256, 0x9A, bomb), extended(0, 0xCB, 0x3F, 0xFF, bomb)):
        with pytest.raises(Refused, match="6A80"):
            rig.send(command)
        with pytest.raises(Refused, match="6A80"):
            rig.send(extended(0, 0x87, P_256, 0x9A, tlv.encode(0x7C, bomb[:50000])))


def test_tries_of_the_pin_are_the_tokens() -> None:
    """However they are sent: in chains, in blocks, after power, by another card of the same module."""
    rig = CardRig()
    rig.push("tls")
    rig.set_pin()
    rig.connect()
    whole = short(0, 0x20, 0, 0x80, b"000000\xff\xff", None)
    for _ in range(3):
        rig.ask(Command.XFR_BLOCK, short(0x10, 0x20, 0, 0x80, b"000000\xff", None))
        assert rig.ask(Command.XFR_BLOCK, short(0, 0x20, 0, 0x80, b"\xff", None))[-2] == 0x63
        rig.ask(Command.ICC_POWER_OFF)
        rig.connect()
    other = CardRig(rig.bench)
    other.token = rig.token
    other.connect()
    with pytest.raises(Refused, match="6983"):
        other.send(whole)
    failures = rig.bench.keystore.state.pin.failures
    assert failures == 3
    locked = 0
    for _ in range(50):
        with pytest.raises(Refused) as caught:
            other.verify(b"000000")
        locked += caught.value.sw == 0x6983
    assert locked == 50, "a try while it is locked is none"


def test_who_knows_the_pin_has_the_host_store_no_more_than_by_other_ways() -> None:
    """A wrong one before each right one: PIN_BURST of them, and then PIN_RATE a second."""
    rig = CardRig()
    rig.set_pin()
    rig.connect()
    before = rig.bench.version
    for _ in range(limits.PIN_BURST // 2):
        with pytest.raises(Refused, match="63C2"):
            rig.verify(b"000000")
        rig.verify()
    assert rig.bench.version == before + limits.PIN_BURST
    with pytest.raises(Refused, match="6983"):
        rig.verify(b"000000")
    rig.bench.now += 1 / limits.PIN_RATE
    with pytest.raises(Refused, match="63C2"):
        rig.verify(b"000000")
    assert rig.bench.version == before + limits.PIN_BURST + 1


def test_the_table_of_commands_is_short() -> None:
    """Whatever is added there is thought of here: nothing changes the card."""
    assert set(piv._COMMANDS) == {0x20, 0x47, 0x87, 0xA4, 0xCB, 0xDB}
    assert set(piv._OF_YUBIKEY) == {0xF7, 0xF8, 0xFD}


def test_one_card_is_nothing_to_another() -> None:
    first, second = new_rig(with_pin=True), CardRig()
    second.push("tls")
    second.connect()
    second.read(0x9A)
    first.verify()
    for _ in range(3):
        with pytest.raises(Refused):
            first.verify(b"000000")
    second.verified()
    second.use(0x9A, P_256, bytes(32))
