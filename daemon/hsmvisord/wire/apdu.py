"""Command and response APDUs (ISO/IEC 7816-4, 5.1 to 5.3): short and extended, commands in parts, answers in parts.  Sans-IO."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from hsmvisord import limits

CHAINED = 0x10  #: bit of CLA: more of this command comes (5.1.1)
GET_RESPONSE = 0xC0
MOST_SHORT, MOST_EXTENDED = 256, 65536


class SW(IntEnum):
    """Status words (ISO/IEC 7816-4, 5.1.3; NIST SP 800-73-4, part 2, 3.1 to 3.3)."""

    OK = 0x9000
    MORE = 0x6100  #: the low byte: how much more there is, 0: 256 bytes or more
    WRONG_PIN = 0x63C0  #: the low digit: how many tries are left
    MEMORY_FAILURE = 0x6581
    WRONG_LENGTH = 0x6700
    SECURITY_STATUS_NOT_SATISFIED = 0x6982
    BLOCKED = 0x6983
    CONDITIONS_NOT_SATISFIED = 0x6985
    WRONG_DATA = 0x6A80
    FUNCTION_NOT_SUPPORTED = 0x6A81
    NOT_FOUND = 0x6A82
    WRONG_P1_P2 = 0x6A86
    REFERENCE_NOT_FOUND = 0x6A88
    INS_NOT_SUPPORTED = 0x6D00
    CLA_NOT_SUPPORTED = 0x6E00
    FAILED = 0x6F00


class BadApdu(Exception):
    """`sw` is the answer."""

    def __init__(self, sw: int) -> None:
        super().__init__(f"{sw:04X}")
        self.sw = sw


class CommandApdu(NamedTuple):
    cla: int
    ins: int
    p1: int
    p2: int
    data: bytes
    expected: int  #: Le, bytes of answer at most; 0: it is absent
    extended: bool

    def __repr__(self) -> str:
        """Without the data: it may be a PIN."""
        return f"CommandApdu({bytes(self[:4]).hex()}, {len(self.data)} bytes, Le {self.expected})"

    @property
    def chained(self) -> bool:
        return bool(self.cla & CHAINED)

    @property
    def head(self) -> tuple[int, int, int, int]:
        """What all parts of a command have in common (5.1.1.1)."""
        return self.cla & ~CHAINED, self.ins, self.p1, self.p2

    @property
    def most(self) -> int:
        """How much is answered at once; without Le, which clients leave out and read on, all that its form could ask for."""
        return self.expected or (MOST_EXTENDED if self.extended else MOST_SHORT)


class ResponseApdu(NamedTuple):
    data: bytes
    sw: int

    def __repr__(self) -> str:
        """Without the data: it may be what a key has decrypted."""
        return f"ResponseApdu({len(self.data)} bytes, {self.sw:04X})"

    def encode(self) -> bytes:
        return self.data + self.sw.to_bytes(2, "big")


def decode(raw: bytes) -> CommandApdu:
    """Cases 1 to 4, short and extended (5.1, table 1).  Raises BadApdu(WRONG_LENGTH)."""
    if len(raw) < 4:
        raise BadApdu(SW.WRONG_LENGTH)
    head, body = raw[:4], raw[4:]
    if not body:
        return _command(head, b"", 0, False)
    if len(body) == 1:
        return _command(head, b"", body[0] or MOST_SHORT, False)
    if body[0] == 0:
        return _extended(head, body)
    size, rest = body[0], body[1:]
    if len(rest) == size:
        return _command(head, rest, 0, False)
    if len(rest) == size + 1:
        return _command(head, rest[:-1], rest[-1] or MOST_SHORT, False)
    raise BadApdu(SW.WRONG_LENGTH)


def _command(head: bytes, data: bytes, expected: int, extended: bool) -> CommandApdu:
    return CommandApdu(head[0], head[1], head[2], head[3], data, expected, extended)


def _extended(head: bytes, body: bytes) -> CommandApdu:
    first, rest = int.from_bytes(body[1:3], "big"), body[3:]
    if len(body) == 3:
        return _command(head, b"", first or MOST_EXTENDED, True)
    if first and len(rest) == first:
        return _command(head, rest, 0, True)
    if first and len(rest) == first + 2:
        return _command(head, rest[:-2], int.from_bytes(rest[-2:], "big") or MOST_EXTENDED, True)
    raise BadApdu(SW.WRONG_LENGTH)


class Chaining:
    """One card's command that comes in parts, and its answer that goes in parts.  One at a time each."""

    def __init__(self) -> None:
        self._parts = bytearray()
        self._head: tuple[int, int, int, int] | None = None  #: of the command that comes
        self._rest = b""  #: of the answer
        self.given = False  #: the newest answer has gone to its end

    def clear(self) -> None:
        self._parts.clear()
        self._head, self._rest, self.given = None, b"", False

    def take(self, command: CommandApdu) -> CommandApdu | ResponseApdu:
        """Returns the whole command when its last part has come, or the answer where there is nothing to carry out: to an earlier
        part, and to GET RESPONSE.

        A command of another kind amid a chain drops the chain, which then has had no effect (SP 800-73-4, part 2, 3.2.4).  Raises
        BadApdu.
        """
        if command.head[:2] == (0, GET_RESPONSE) and not command.chained:
            return self._go_on(command)
        self._rest, self.given = b"", False
        if self._head != command.head:
            self._drop()
        if len(self._parts) + len(command.data) > limits.MAX_APDU_CHAIN:
            self._drop()
            raise BadApdu(SW.WRONG_LENGTH)
        if command.chained:
            self._head = command.head
            self._parts += command.data
            return ResponseApdu(b"", SW.OK)
        whole = command._replace(data=bytes(self._parts) + command.data)
        self._drop()
        return whole

    def _drop(self) -> None:
        self._parts.clear()
        self._head = None

    def give(self, data: bytes, command: CommandApdu) -> ResponseApdu:
        """Returns as much of an answer as the command asks for; the rest is for GET RESPONSE (5.3.4)."""
        self._rest = data[command.most :]
        self.given = not self._rest
        left = len(self._rest)
        sw = SW.MORE | (left if left < MOST_SHORT else 0) if left else SW.OK
        return ResponseApdu(data[: command.most], sw)

    def _go_on(self, command: CommandApdu) -> ResponseApdu:
        self._drop()
        if not self._rest:
            raise BadApdu(SW.CONDITIONS_NOT_SATISFIED)
        return self.give(self._rest, command)
