"""What a guest says to its smart card reader: messages of CCID, commands within them, while the operator rotates and time passes.

An input is a row of steps, each begun by one byte: three bits say what happens, the rest how.
"""

from __future__ import annotations

from collections.abc import Callable

from fuzz.harness import Input, block
from fuzz.world import PIN, shows_a_key, world
from hsmvisor_rpc.sealed.refusal import Refusal
from hsmvisord import limits
from hsmvisord.face.card import objects
from hsmvisord.face.card.card import Card
from hsmvisord.face.card.generations import IN, OUT
from hsmvisord.face.card.reader import Reader
from hsmvisord.face.card.slots import CardSettings
from hsmvisord.keystore.keystore import Cause
from hsmvisord.token.token import Token
from hsmvisord.wire import ccid, tlv
from hsmvisord.wire.ccid import Command

INVARIANT = (
    "every message has one answer: whole, of its command's type, with its sequence number and its slot, not longer than a message, "
    "with an error only where it failed; it shows no 16 bytes of a private key; nothing is raised, inside the card neither; what "
    "is kept of commands and answers in parts, and what the card remembers, stays within its limits; a card that was out has "
    "forgotten its PIN and its power"
)
MAX_LENGTH = 2000
STEPS = 64  #: of one input

MESSAGE, COMMAND, PART, BUSY, REQUEST, OPERATE, TIME, AGAIN = range(8)
LEVELS = (0, 1, 2, 3, 0x10, 0x11, 0x100)
STATES = (ccid.Icc.ACTIVE, ccid.Icc.INACTIVE, ccid.Icc.ABSENT)


class Guest:
    """A reader with its card, and the reset and the importer that a device would be for it."""

    def __init__(self, token: Token, settings: CardSettings, shown: bytes = b"") -> None:
        self.token, self.faults = token, list[Exception]()
        token.on_fault = lambda what, error: self.faults.append(error)
        self.begin(settings, shown)

    def begin(self, settings: CardSettings, shown: bytes) -> None:
        self.card = Card(self.token, settings, "fuzz", lambda: world().bench.monotonic, shown)
        self.reader = Reader(self.card)
        self.look()

    def look(self) -> None:
        move = self.card.look()
        if move.step in (IN, OUT):
            told = self.reader.insert() if move.step == IN else self.reader.remove()
            assert told == bytes((0x50, 2 | self.card.present))
            assert self.reader._icc is not ccid.Icc.ACTIVE and self.card._piv._verified is None
        assert move.again is None or 0 < move.again <= limits.CARD_OUT_SECONDS

    def say(self, message: bytes, to: Callable[[bytes], bytes] | None = None) -> None:
        self.look()
        answer = (to or self.reader.answer)(message)
        head = message.ljust(ccid.HEAD, b"\0")
        assert answer[0] == ccid.ANSWER.get(head[0], ccid.SLOT_STATUS) and answer[5:7] == head[5:7]
        assert ccid.is_whole(answer) and len(answer) <= limits.MAX_CCID_MESSAGE
        status, icc = answer[7] >> 6, answer[7] & 0x3F
        assert icc in STATES and status in (0, 1)
        assert status or not answer[8]
        assert not status or len(answer) == ccid.HEAD
        assert not shows_a_key(answer), "an answer with a private key"
        assert not self.faults, self.faults[0]
        self.within_limits()

    def within_limits(self) -> None:
        assert len(self.reader._coming or b"") <= limits.MAX_APDU
        chaining = self.card._chaining
        assert len(chaining._parts) <= limits.MAX_APDU_CHAIN and (chaining._head is not None or not chaining._parts)
        assert len(self.card.shown) <= limits.MAX_CARD_SHOWN


def operate(guest: Guest, what: int) -> None:
    """One act of the operator, from outside of the guest."""
    bench = world().bench
    bench.now += 1
    try:
        match what % 8:
            case 0:
                bench.execute("activate", "tls", 3)
            case 1:
                bench.execute("roll-back", "tls", 1)
            case 2:
                bench.execute("destroy", "tls", 2)
            case 3:
                bench.keystore.set_token_present(False)
            case 4:
                bench.keystore.set_token_present(True)
            case 5:
                bench.keystore.set_pin(PIN if what & 8 else b"", Cause())
            case 6:
                guest.card.settings = SETTINGS[what >> 3 & 3]
            case 7:
                guest.reader.power_down()  # the guest's kernel resets the device
    except Refusal:
        pass


SETTINGS = (
    CardSettings(),
    CardSettings(yubikey=True),
    CardSettings(((0x82, "ed"), (0x9A, "rsa"), (0x9C, "tls"), (0x9E, "follow"))),
    CardSettings(((0x82, "large"), (0x9D, "rsa"))),
)


def run(data: bytes) -> None:
    given = Input(data)
    first = given.byte()
    bench = world().bench
    guest = Guest(world().token(with_pin=bool(first & 1)), SETTINGS[first >> 1 & 3])
    steps = 0
    while given.more and steps < STEPS:
        steps += 1
        head = given.byte()
        what, much = head & 7, head >> 3
        if what == MESSAGE:
            guest.say(given.block())
        elif what == COMMAND:
            guest.say(xfr(given.block(), sequence=much))
        elif what == PART:
            guest.say(xfr(given.block(), LEVELS[much % len(LEVELS)]))
        elif what == BUSY:
            guest.say(given.block(), guest.reader.busy)
        elif what == REQUEST:
            answer = guest.reader.control(much & 7, given.byte() << 8 | much >> 3, 8)
            assert answer is None or len(answer) <= 8
        elif what == OPERATE:
            operate(guest, given.byte())
            guest.look()
        elif what == TIME:
            bench.monotonic += given.byte() / 16
            guest.look()
        elif what == AGAIN:  # the worker ends, and the next one goes on
            shown = guest.card.shown if much & 1 else given.block()
            guest.card.close()
            guest.begin(guest.card.settings, shown)
            assert len(guest.card.shown) <= limits.MAX_CARD_SHOWN
    guest.card.close()
    assert not guest.token._counters, "counters that nobody gives back"


# ---- seeds ------------------------------------------------------------------------------------------------------------


def step(what: int, much: int, *rest: bytes) -> bytes:
    return bytes((what | much << 3,)) + b"".join(rest)


def message(command: int, data: bytes = b"", own: bytes = bytes(3), sequence: int = 7) -> bytes:
    return bytes((command,)) + len(data).to_bytes(4, "little") + bytes((0, sequence)) + own + data


def xfr(data: bytes, level: int = 0, sequence: int = 7) -> bytes:
    return message(Command.XFR_BLOCK, data, b"\0" + level.to_bytes(2, "little"), sequence)


ON = step(MESSAGE, 0, block(message(Command.ICC_POWER_ON)))


def said(*commands: bytes) -> bytes:
    return ON + b"".join(step(COMMAND, 0, block(command)) for command in commands)


def short(ins: int, p1: int, p2: int, data: bytes = b"", cla: int = 0) -> bytes:
    return bytes((cla, ins, p1, p2)) + (bytes((len(data),)) + data if data else b"") + b"\0"


def get_data(tag: int) -> bytes:
    return short(0xCB, 0x3F, 0xFF, tlv.encode(0x5C, tag.to_bytes(3 if tag > 0xFF else 1, "big")))


def authenticate(slot: int, algorithm: int, value: bytes, tag: int = 0x81) -> bytes:
    data = tlv.encode(0x7C, tlv.encode(0x82, b"") + tlv.encode(tag, value))
    return bytes((0, 0x87, algorithm, slot, 0)) + len(data).to_bytes(2, "big") + data + b"\0\0"


def seeds() -> dict[str, bytes]:
    verify = short(0x20, 0, 0x80, PIN.ljust(8, b"\xff"))
    sign = authenticate(0x9A, 0x11, b"d" * 32)
    read = {slot: get_data(tag) for tag, slot in objects.CERTIFICATES.items()}
    again = short(0xC0, 0, 0)
    read_all = (read[0x9A], again, again)
    point = b"\4" + bytes.fromhex(  # of P-256: its base point
        "6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296"
        "4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5"
    )
    padded = b"\0\1" + b"\xff" * 202 + b"\0" + b"i" * 51
    later, detached, attached = step(TIME, 0, b"\x30"), step(OPERATE, 0, b"\3"), step(OPERATE, 0, b"\4")
    whole = bytes((0, 0xCB, 0x3F, 0xFF, 0, 0, 5)) + b"\x5c\3\x5f\xc1\x0d" + b"\0\0"
    managed = [short(ins, 0, 0x9A, b"\xac\3\x80\1\x11") for ins in (0x24, 0x2C, 0x47, 0xDB, 0xFF, 0xFE, 0xFB)]
    asked = [short(0xF7, 0, what) for what in (0x9A, 0x80, 0x81, 0x9B)]
    made = {
        "sign": b"\0" + said(short(0xA4, 4, 0, objects.AID[:5]), *read_all, sign, authenticate(0x9A, 0x11, b"d")),
        "pin": b"\1" + said(short(0x20, 0, 0x80), verify, *read_all, sign, short(0x20, 0xFF, 0x80)),
        "wrong-pin": b"\1" + said(*[short(0x20, 0, 0x80, b"wrong\xff\xff\xff")] * 4),
        "agree": b"\0" + said(*read_all, authenticate(0x9A, 0x11, point, 0x85)),
        "rsa": b"\4" + said(*read_all, again, authenticate(0x9A, 7, padded), authenticate(0x9A, 7, bytes(255) + b"\2")),
        "eddsa": b"\4" + said(read[0x82], again, again, authenticate(0x82, 0xE0, b"text")),
        "p384": b"\4" + said(read[0x9E], authenticate(0x9E, 0x14, b"d" * 48)),
        "large": b"\6" + said(whole, read[0x82], again),
        "objects": b"\0" + said(*map(get_data, (objects.CHUID, objects.CCC, objects.DISCOVERY, objects.KEY_HISTORY, 0x5FC109))),
        "yubikey": b"\2" + said(short(0xFD, 0, 0), short(0xF8, 0, 0), *asked),
        "chain": b"\0" + said(*read_all, short(0x87, 0x11, 0x9A, sign[7:20], 0x10), short(0x87, 0x11, 0x9A, sign[20:-2])),
        "management": b"\0" + said(*managed),
        "parts": b"\0" + ON + step(PART, 1, block(sign[:9])) + step(PART, 3, block(sign[9:30])) + step(PART, 2, block(sign[30:])),
        "rest": b"\0" + ON + step(PART, 4, block(b"")),
        "rotated": b"\0" + said(*read_all, sign) + step(OPERATE, 0, b"\0") + said(sign) + later + said(sign, *read_all, sign),
        "destroyed": b"\0" + said(*read_all) + step(OPERATE, 0, b"\2") + said(sign),
        "detached": b"\0" + ON + detached + said(sign) + attached + later + said(sign),
        "settings": b"\0" + ON + step(OPERATE, 0, b"\x16") + later + said(read[0x9C]),
        "restart": b"\0" + said(*read_all) + step(AGAIN, 1) + said(sign) + step(AGAIN, 0, block(b'{"9a":"x"}')),
        "abort": b"\0" + ON + step(REQUEST, 1, b"\7") + step(MESSAGE, 0, block(message(Command.GET_SLOT_STATUS)))
        + step(BUSY, 0, block(message(Command.ABORT))) + step(MESSAGE, 0, block(message(Command.ABORT))),
    }  # fmt: skip
    for command in Command:
        data = bytes.fromhex("1110004D00FE00") if command == Command.SET_PARAMETERS else b""
        own = b"\1\0\0" if data else bytes(3)
        made[command.name] = (
            b"\0" + ON + step(MESSAGE, 0, block(message(command, data, own))) + step(BUSY, 0, block(message(command)))
        )
    return made
