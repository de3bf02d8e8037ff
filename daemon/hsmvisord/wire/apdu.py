"""Command and response APDUs (ISO/IEC 7816-4, 5.1 to 5.3): short and extended, chained commands, answers in pieces.  Sans-IO."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from hsmvisord import limits

CHAINED = 0x10  #: bit of CLA: more of this command comes
GET_RESPONSE = 0xC0
MOST_SHORT, MOST_EXTENDED = 256, 65536


class SW(IntEnum):
    """Status words (ISO/IEC 7816-4, 5.1.3; NIST SP 800-73-4, part 2, table 2)."""

    OK = 0x9000
    MORE = 0x6100  #: the low byte: how much more there is
    WRONG_PIN = 0x63C0  #: the low digit: how many tries are left
    LAST_EXPECTED = 0x6883  #: of a chain
    CHAINING_NOT_SUPPORTED = 0x6884
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

    def __init__(self, sw: SW) -> None:
        super().__init__(sw.name)
        self.sw = sw


class CommandApdu(NamedTuple):
    """`expected`: Le, how many bytes of answer at most; 0: none."""

    cla: int
    ins: int
    p1: int
    p2: int
    data: bytes
    expected: int
    extended: bool

    @property
    def chained(self) -> bool:
        return bool(self.cla & CHAINED)


class ResponseApdu(NamedTuple):
    data: bytes
    sw: int

    def encode(self) -> bytes:
        return self.data + self.sw.to_bytes(2, "big")


def decode(raw: bytes) -> CommandApdu:
    """Cases 1 to 4, short and extended (5.1, table 1).  Raises BadApdu(WRONG_LENGTH)."""
    if len(raw) < 4:
        raise BadApdu(SW.WRONG_LENGTH)
    head, body = raw[:4], raw[4:]
    if not body:
        return _command(head, b"", 0, False)
    if body[0] == 0 and len(body) > 1:
        return _extended(head, body)
    if len(body) == 1:
        return _command(head, b"", body[0] or MOST_SHORT, False)
    size, rest = body[0], body[1:]
    if len(rest) == size:
        return _command(head, rest, 0, False)
    if len(rest) == size + 1:
        return _command(head, rest[:-1], rest[-1] or MOST_SHORT, False)
    raise BadApdu(SW.WRONG_LENGTH)


def _command(head: bytes, data: bytes, expected: int, extended: bool) -> CommandApdu:
    return CommandApdu(head[0], head[1], head[2], head[3], data, expected, extended)


def _extended(head: bytes, body: bytes) -> CommandApdu:
    if len(body) < 3:
        raise BadApdu(SW.WRONG_LENGTH)
    first = int.from_bytes(body[1:3], "big")
    rest = body[3:]
    if not rest:
        return _command(head, b"", first or MOST_EXTENDED, True)
    if first and len(rest) == first:
        return _command(head, rest, 0, True)
    if first and len(rest) == first + 2:
        return _command(head, rest[:-2], int.from_bytes(rest[-2:], "big") or MOST_EXTENDED, True)
    raise BadApdu(SW.WRONG_LENGTH)


class Chaining:
    """One card's command that comes in parts, and its answer that goes in pieces.  One at a time each."""

    def __init__(self) -> None:
        self._parts = bytearray()
        self._head = b""
        self._answer = b""

    def clear(self) -> None:
        self._parts.clear()
        self._head, self._answer = b"", b""

    def take(self, command: CommandApdu) -> CommandApdu | None:
        """Returns the whole command, None while parts of it are missing.  Raises BadApdu; then the chain is dropped."""
        head = bytes([command.cla & ~CHAINED, command.ins, command.p1, command.p2])
        if command.ins != GET_RESPONSE:
            self._answer = b""
        if self._head and head != self._head:
            self.clear()
            if command.chained:
                raise BadApdu(SW.LAST_EXPECTED)
        if len(self._parts) + len(command.data) > limits.MAX_APDU_CHAIN:
            self.clear()
            raise BadApdu(SW.WRONG_LENGTH)
        if command.chained:
            self._head = head
            self._parts += command.data
            return None
        whole = command._replace(cla=command.cla & ~CHAINED, data=bytes(self._parts) + command.data)
        self._parts.clear()
        self._head = b""
        return whole

    def give(self, response: ResponseApdu, command: CommandApdu) -> ResponseApdu:
        """Returns as much of an answer as the command expects; the rest is for GET RESPONSE."""
        most = command.expected or (MOST_EXTENDED if command.extended else MOST_SHORT)
        if response.sw != SW.OK or len(response.data) <= most:
            return response
        self._answer = response.data[most:]
        left = len(self._answer)
        return ResponseApdu(response.data[:most], SW.MORE | (left if left < 0x100 else 0))

    def rest(self, command: CommandApdu) -> ResponseApdu:
        """GET RESPONSE.  Raises BadApdu when there is nothing to give."""
        if not self._answer:
            raise BadApdu(SW.CONDITIONS_NOT_SATISFIED)
        answer, self._answer = self._answer, b""
        return self.give(ResponseApdu(answer, SW.OK), command)
