"""The smart card reader: CCID messages in, answers out; one slot, extended APDUs, T=1 (CCID 1.10, sections 5.3, 6.1 to 6.3).

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
_VOLTAGES = (0, 1)  #: bPowerSelect: the reader's choice, 5 V
_T1 = 1
_PARAMETERS = bytes([0x11, 0x10, 0x00, 0x4D, 0x00, 0xFE, 0x00])  #: T=1: Fi/Di, checksum, guard time, waiting, clock stop, IFSC, NAD
_BEGINS, _ENDS, _GOES_ON, _GIVE_MORE = 1, 2, 3, 0x10  #: wLevelParameter, and bChainParameter of an answer

#: Commands without data.
_BARE = frozenset(
    {
        Command.ICC_POWER_ON,
        Command.ICC_POWER_OFF,
        Command.GET_SLOT_STATUS,
        Command.GET_PARAMETERS,
        Command.RESET_PARAMETERS,
        Command.ABORT,
    }
)


class Reader:
    def __init__(self, card: Card) -> None:
        self._card = card
        self.hides = False  #: the card, from an importer that has just come
        self._powered = False
        self._parameters = _PARAMETERS
        self._coming: bytearray | None = None  #: a command in parts
        self._going = b""  #: what is left of an answer in parts
        # Of an ABORT two halves come, by two ways and in any order: a request and a message, of one sequence number.
        self._aborting: int | None = None  #: of the request, while its message has not come
        self._aborted: int | None = None  #: of the message, while its request has not come
        self._at_work: int | None = None  #: the sequence number of what is carried out
        self._cut: int | None = None  #: of what is to be answered as aborted

    # ---- the card's thread --------------------------------------------------------------------------------------

    def answer(self, message: bytes) -> bytes:
        """Answers one whole message, whatever it is."""
        asked = ccid.decode(message)
        if asked.slot:
            return ccid.failure(asked, Icc.ABSENT, Failure.SLOT)
        if asked.command == Command.ABORT:
            return self._abort(asked, message)
        self._aborted = None
        if self._aborting is not None:
            return ccid.failure(asked, self._icc, Failure.ABORTED)
        if not ccid.is_whole(message) or (asked.command in _BARE and asked.data):
            return ccid.failure(asked, self._icc, Failure.LENGTH)
        self._at_work = asked.sequence
        try:
            done = self._carry_out(asked)
            if self._cut == asked.sequence:
                self._coming, self._going = None, b""
                return ccid.failure(asked, self._icc, Failure.ABORTED)
            return done
        finally:
            self._at_work = self._cut = None

    def _carry_out(self, asked: Message) -> bytes:
        match asked.command:
            case Command.ICC_POWER_ON:
                return self._power_on(asked)
            case Command.ICC_POWER_OFF:
                self._switch_off()
                return self._told(asked)
            case Command.GET_SLOT_STATUS:
                return self._told(asked)
            case Command.XFR_BLOCK:
                return self._transfer(asked)
            case Command.GET_PARAMETERS | Command.RESET_PARAMETERS | Command.SET_PARAMETERS:
                return self._parametrize(asked)
        return ccid.failure(asked, self._icc, Failure.COMMAND)

    def insert(self) -> bytes:
        """The card has come: returns what the importer is told."""
        self.hides = False
        self._forget()
        return ccid.slot_changed(True)

    def remove(self) -> bytes:
        """The card has gone: returns what the importer is told."""
        self._forget()
        return ccid.slot_changed(False)

    def hide(self) -> bytes:
        """An importer has come: it finds an empty reader, and sees the card come by `show`, or when it asks for power.

        pcscd counts the cards that it sees come and go.  While it has counted none, OpenSC 0.23 is told of no change that it slept
        through, so it would stay with the old card until it is initialized anew.
        """
        self.hides = True
        return self.presence()

    def show(self) -> bytes:
        self.hides = False
        return self.presence()

    def presence(self) -> bytes:
        """Returns what an importer is told."""
        return ccid.slot_changed(self.present)

    def power_down(self) -> None:
        """The importer has reset the device: nothing of what was before counts."""
        self._aborting = self._aborted = None
        self._switch_off()

    def _switch_off(self) -> None:
        self._forget()
        self._card.power_down()

    def _forget(self) -> None:
        self._powered, self._parameters = False, _PARAMETERS
        self._coming, self._going = None, b""

    @property
    def present(self) -> bool:
        return self._card.present and not self.hides

    @property
    def _icc(self) -> Icc:
        if not self.present:
            return Icc.ABSENT
        return Icc.ACTIVE if self._powered else Icc.INACTIVE

    def _told(self, asked: Message) -> bytes:
        return ccid.answer(asked, self._icc, last=0 if self._powered else 1)  # bClockStatus: it runs, or stands

    def _power_on(self, asked: Message) -> bytes:
        self.hides = False
        if not self._card.present:
            return ccid.failure(asked, Icc.ABSENT, Failure.MUTE)
        if asked.own[0] not in _VOLTAGES:
            return ccid.failure(asked, self._icc, Failure.PARAMETER)
        self._forget()
        atr = self._card.power_up()
        self._powered = True
        return ccid.answer(asked, self._icc, atr)

    def _parametrize(self, asked: Message) -> bytes:
        """The reader sees to all parameters itself; whoever sets them is told that they are so."""
        if not self._powered:
            return ccid.failure(asked, self._icc, Failure.MUTE)
        if asked.command == Command.RESET_PARAMETERS:
            self._parameters = _PARAMETERS
        elif asked.command == Command.SET_PARAMETERS:
            if asked.own[0] != _T1:
                return ccid.failure(asked, self._icc, Failure.PARAMETER)
            if len(asked.data) != len(_PARAMETERS):
                return ccid.failure(asked, self._icc, Failure.LENGTH)
            self._parameters = asked.data
        return ccid.answer(asked, self._icc, self._parameters, _T1)

    def _transfer(self, asked: Message) -> bytes:
        """One block: a whole command, or a part of one (6.1.4); what begins one drops what was begun before."""
        if not self._powered or not self._card.present:
            return ccid.failure(asked, self._icc, Failure.MUTE)
        level = int.from_bytes(asked.own[1:3], "little")
        if level == _GIVE_MORE:
            if asked.data:
                return ccid.failure(asked, self._icc, Failure.LENGTH)
            return self._given(asked, self._going, _GOES_ON, _ENDS) if self._going else self._out_of_turn(asked)
        self._going = b""
        if level in (0, _BEGINS):
            self._coming = bytearray()
        elif level not in (_ENDS, _GOES_ON) or self._coming is None:
            return self._out_of_turn(asked)
        assert self._coming is not None
        if len(self._coming) + len(asked.data) > limits.MAX_APDU or (not asked.data and not level):
            self._coming = None
            return ccid.failure(asked, self._icc, Failure.LENGTH)
        self._coming += asked.data
        if level in (_BEGINS, _GOES_ON):
            return ccid.answer(asked, self._icc, last=_GIVE_MORE)
        command, self._coming = bytes(self._coming), None
        return self._given(asked, self._card.transmit(command), _BEGINS, 0)

    def _out_of_turn(self, asked: Message) -> bytes:
        self._coming = None
        return ccid.failure(asked, self._icc, Failure.LEVEL)

    def _given(self, asked: Message, data: bytes, more: int, whole: int) -> bytes:
        """As much as a message holds; the rest is asked for by empty blocks."""
        most = limits.MAX_CCID_MESSAGE - ccid.HEAD
        self._going = data[most:]
        return ccid.answer(asked, self._icc, data[:most], more if self._going else whole)

    # ---- any thread ---------------------------------------------------------------------------------------------

    def busy(self, message: bytes) -> bytes:
        """Answers what came while another message is worked on.  That is not cut short, but answered as aborted if it is to be."""
        asked = ccid.decode(message)
        if asked.slot:
            return ccid.failure(asked, Icc.ABSENT, Failure.SLOT)
        if asked.command == Command.ABORT:
            return self._abort(asked, message)
        return ccid.failure(asked, self._icc, Failure.BUSY if self._aborting is None else Failure.ABORTED)

    def _abort(self, asked: Message, message: bytes) -> bytes:
        """The message's half of an ABORT (5.3.1, 6.1.13)."""
        if not ccid.is_whole(message) or asked.data:
            return ccid.failure(asked, self._icc, Failure.LENGTH)
        if self._aborting not in (None, asked.sequence):
            return ccid.failure(asked, self._icc, Failure.ABORTED)
        self._aborted = asked.sequence if self._aborting is None else None
        self._aborting = None
        self._cut = self._at_work
        return self._told(asked)

    def more_time(self, message: bytes) -> bytes:
        """Has the importer wait on for the answer to a message."""
        return ccid.more_time(ccid.decode(message), self._icc)

    def control(self, request: int, value: int, length: int) -> bytes | None:
        """Answers a request of the reader's class; None: there is no such one."""
        match request:
            case 0x01:  # ABORT: slot, and above it the sequence number
                if value & 0xFF:
                    return None
                sequence = value >> 8 & 0xFF
                # All messages fail until that of the same number has come, unless it was the last one.
                self._aborting = None if self._aborted == sequence else sequence
                self._aborted = None
                return b""
            case 0x02:
                return _CLOCK[:length]
            case 0x03:
                return _RATE[:length]
        return None
