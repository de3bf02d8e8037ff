"""The smart card reader: CCID messages in, answers out; one slot, extended APDUs, T=1 (CCID 1.10, sections 6.1 to 6.3).

`answer` and what moves the card run on the card's thread; the rest may be asked by any.
"""

from __future__ import annotations

import struct

from hsmvisord import limits
from hsmvisord.face.card.card import Card
from hsmvisord.wire import ccid
from hsmvisord.wire.ccid import Command, Failure, Icc, Message

ABORT, GET_CLOCK_FREQUENCIES, GET_DATA_RATES = 0x01, 0x02, 0x03  #: requests of the class (table 5.3-1)
_CLOCK, _RATE = struct.pack("<I", 4000), struct.pack("<I", 10752)  #: kHz, bit/s: as in the functional descriptor
_T1 = 1
_PARAMETERS = bytes([0x11, 0x10, 0x00, 0x4D, 0x00, 0xFE, 0x00])  #: T=1: Fi/Di, checksum, guard time, waiting, clock stop, IFSC, NAD
_BEGINS, _ENDS, _GOES_ON, _GIVE_MORE = 1, 2, 3, 0x10  #: wLevelParameter, and bChainParameter of an answer


class Reader:
    def __init__(self, card: Card) -> None:
        self._card = card
        self._powered = False
        self._coming = bytearray()  #: a command in parts
        self._going = b""  #: what is left of an answer in parts

    # ---- the card's thread --------------------------------------------------------------------------------------

    def answer(self, message: bytes) -> bytes:
        """Answers one whole message, whatever it is."""
        asked = ccid.decode(message)
        if asked.slot:
            return ccid.failure(asked, Icc.ABSENT, Failure.SLOT)
        match asked.command:
            case Command.ICC_POWER_ON:
                return self._power_on(asked)
            case Command.ICC_POWER_OFF:
                self.power_down()
                return self._told(asked)
            case Command.GET_SLOT_STATUS | Command.ABORT | Command.ICC_CLOCK:
                return self._told(asked)
            case Command.XFR_BLOCK:
                return self._transfer(asked)
            case Command.GET_PARAMETERS | Command.RESET_PARAMETERS:
                return self._parameters(asked)
            case Command.SET_PARAMETERS:
                return self._set_parameters(asked)
        return ccid.failure(asked, self._icc, Failure.COMMAND)

    def insert(self) -> bytes:
        """The card has come: returns what the importer is told."""
        self._forget()
        return ccid.slot_changed(True)

    def remove(self) -> bytes:
        """The card has gone: returns what the importer is told."""
        self._forget()
        return ccid.slot_changed(False)

    def presence(self) -> bytes:
        """Returns what an importer is told that has just come."""
        return ccid.slot_changed(self._card.present)

    def power_down(self) -> None:
        self._forget()
        self._card.power_down()

    def _forget(self) -> None:
        self._powered, self._going = False, b""
        self._coming.clear()

    @property
    def _icc(self) -> Icc:
        if not self._card.present:
            return Icc.ABSENT
        return Icc.ACTIVE if self._powered else Icc.INACTIVE

    def _told(self, asked: Message) -> bytes:
        return ccid.answer(asked, self._icc, last=0 if self._powered else 1)

    def _power_on(self, asked: Message) -> bytes:
        if not self._card.present:
            return ccid.failure(asked, Icc.ABSENT, Failure.MUTE)
        if asked.own[0] > 3:
            return ccid.failure(asked, self._icc, Failure.PARAMETER)
        self._forget()
        atr = self._card.power_up()
        self._powered = True
        return ccid.answer(asked, self._icc, atr)

    def _parameters(self, asked: Message) -> bytes:
        if not self._powered:
            return ccid.failure(asked, self._icc, Failure.MUTE)
        return ccid.answer(asked, self._icc, _PARAMETERS, _T1)

    def _set_parameters(self, asked: Message) -> bytes:
        if not self._powered:
            return ccid.failure(asked, self._icc, Failure.MUTE)
        if asked.own[0] != _T1 or len(asked.data) != len(_PARAMETERS):
            return ccid.failure(asked, self._icc, Failure.PARAMETER)
        return ccid.answer(asked, self._icc, asked.data, _T1)

    def _transfer(self, asked: Message) -> bytes:
        """One block: a whole command, or a part of one (6.1.4, table 6.1-4 for extended APDUs)."""
        if not self._powered or not self._card.present:
            return ccid.failure(asked, self._icc, Failure.MUTE)
        level = int.from_bytes(asked.own[1:3], "little")
        if level == _GIVE_MORE:
            if asked.data or not self._going:
                return ccid.failure(asked, self._icc, Failure.LEVEL)
            return self._given(asked, self._going, _GOES_ON, _ENDS)
        if level not in (0, _BEGINS, _ENDS, _GOES_ON) or (level in (0, _BEGINS)) == bool(self._coming):
            self._coming.clear()
            return ccid.failure(asked, self._icc, Failure.LEVEL)
        if len(self._coming) + len(asked.data) > limits.MAX_APDU:
            self._coming.clear()
            return ccid.failure(asked, self._icc, Failure.LENGTH)
        self._coming += asked.data
        if level in (_BEGINS, _GOES_ON):
            return ccid.answer(asked, self._icc, last=_GIVE_MORE)
        command = bytes(self._coming)
        self._coming.clear()
        self._going = b""
        return self._given(asked, self._card.transmit(command), _BEGINS, 0)

    def _given(self, asked: Message, data: bytes, more: int, whole: int) -> bytes:
        """As much as a message holds; the rest is asked for by empty blocks."""
        most = limits.MAX_CCID_MESSAGE - ccid.HEAD
        self._going = data[most:]
        return ccid.answer(asked, self._icc, data[:most], more if self._going else whole)

    # ---- any thread ---------------------------------------------------------------------------------------------

    def busy(self, message: bytes) -> bytes:
        """Answers what came while another message is worked on."""
        return ccid.failure(ccid.decode(message), self._icc, Failure.BUSY)

    def more_time(self, message: bytes) -> bytes:
        """Has the importer wait on for the answer to a message."""
        return ccid.more_time(ccid.decode(message), self._icc)

    def control(self, request: int, value: int, length: int) -> bytes | None:
        """Answers a request of the reader's class; None: there is no such one."""
        match request:
            case 0x01:  # ABORT: an operation of a key is not cut short; what is answered to it is the answer
                return b""
            case 0x02:
                return _CLOCK
            case 0x03:
                return _RATE
        return None
