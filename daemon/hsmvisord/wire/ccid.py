"""CCID 1.10: the messages between a host and a smart card reader with one slot, at the level of extended APDUs.  Sans-IO.

A message is `u8 type, u32 length, u8 slot, u8 sequence`, three bytes of its own, and data; little-endian (6.1, 6.2).
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

HEAD = 10  #: bytes
_HEAD = struct.Struct("<BIBB3s")


class Command(IntEnum):
    """PC_to_RDR_* (table 6.1-1)."""

    ICC_POWER_ON = 0x62
    ICC_POWER_OFF = 0x63
    GET_SLOT_STATUS = 0x65
    XFR_BLOCK = 0x6F
    GET_PARAMETERS = 0x6C
    RESET_PARAMETERS = 0x6D
    SET_PARAMETERS = 0x61
    ESCAPE = 0x6B
    ICC_CLOCK = 0x6E
    T0_APDU = 0x6A
    SECURE = 0x69
    MECHANICAL = 0x71
    ABORT = 0x72
    SET_DATA_RATE_AND_CLOCK_FREQUENCY = 0x73


DATA_BLOCK, SLOT_STATUS, PARAMETERS, ESCAPE_ANSWER, DATA_RATE = 0x80, 0x81, 0x82, 0x83, 0x84  #: RDR_to_PC_* (table 6.2-1)
NOTIFY_SLOT_CHANGE = 0x50

#: Which answer a command has.
ANSWER: dict[int, int] = {
    Command.ICC_POWER_ON: DATA_BLOCK,
    Command.ICC_POWER_OFF: SLOT_STATUS,
    Command.GET_SLOT_STATUS: SLOT_STATUS,
    Command.XFR_BLOCK: DATA_BLOCK,
    Command.GET_PARAMETERS: PARAMETERS,
    Command.RESET_PARAMETERS: PARAMETERS,
    Command.SET_PARAMETERS: PARAMETERS,
    Command.ESCAPE: ESCAPE_ANSWER,
    Command.ICC_CLOCK: SLOT_STATUS,
    Command.T0_APDU: SLOT_STATUS,
    Command.SECURE: DATA_BLOCK,
    Command.MECHANICAL: SLOT_STATUS,
    Command.ABORT: SLOT_STATUS,
    Command.SET_DATA_RATE_AND_CLOCK_FREQUENCY: DATA_RATE,
}


class Icc(IntEnum):
    """bmICCStatus (table 6.2-3)."""

    ACTIVE = 0
    INACTIVE = 1
    ABSENT = 2


class Failure(IntEnum):
    """bError (table 6.2-2); 1 to 127 is the offset of the field that is wrong."""

    COMMAND = 0  #: not supported
    LENGTH = 1
    SLOT = 5
    PARAMETER = 7  #: of a command's first own byte
    LEVEL = 8  #: wLevelParameter
    BUSY = 0xE0
    MUTE = 0xFE  #: there is no card, or it has no power
    ABORTED = 0xFF


class Message(NamedTuple):
    """One PC_to_RDR message.  `own`: its three bytes."""

    command: int
    slot: int
    sequence: int
    own: bytes
    data: bytes

    def __repr__(self) -> str:
        """Without the data: it may hold a PIN."""
        return f"Message({self.command:02x}, slot {self.slot}, sequence {self.sequence}, {self.own.hex()}, {len(self.data)} bytes)"


def length(head: bytes) -> int:
    """Returns how many bytes of data follow a head of ten bytes."""
    return int.from_bytes(head[1:5], "little")


def decode(message: bytes) -> Message:
    """Of one whole message; what its head lacks is zero."""
    command, _, slot, sequence, own = _HEAD.unpack_from(message.ljust(HEAD, b"\0"))
    return Message(command, slot, sequence, own, message[HEAD:])


def is_whole(message: bytes) -> bool:
    """Says whether there is as much data as the head tells."""
    return len(message) >= HEAD and length(message) == len(message) - HEAD


def answer(message: Message, icc: Icc, data: bytes = b"", last: int = 0) -> bytes:
    """`last`: the third of the answer's own bytes (chain parameter, clock status, protocol)."""
    return (
        _HEAD.pack(ANSWER.get(message.command, SLOT_STATUS), len(data), message.slot, message.sequence, bytes([icc, 0, last]))
        + data
    )


def failure(message: Message, icc: Icc, error: int) -> bytes:
    """bmCommandStatus 1: failed.  A message of no known type is answered as RDR_to_PC_SlotStatus."""
    own = bytes([0x40 | icc, error, 0])
    return _HEAD.pack(ANSWER.get(message.command, SLOT_STATUS), 0, message.slot, message.sequence, own)


def more_time(message: Message, icc: Icc) -> bytes:
    """bmCommandStatus 2: the card is at work; bError is a multiplier of the block waiting time."""
    own = bytes([0x80 | icc, 1, 0])
    return _HEAD.pack(ANSWER.get(message.command, SLOT_STATUS), 0, message.slot, message.sequence, own)


def slot_changed(present: bool) -> bytes:
    """RDR_to_PC_NotifySlotChange of slot 0, with its change bit (6.3.1)."""
    return bytes([NOTIFY_SLOT_CHANGE, 0x02 | present])
