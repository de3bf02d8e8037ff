"""The smart card: one application (PIV) over a module's token, behind the chaining of ISO/IEC 7816-4.

All of it runs on one thread, but for `settings`, which is taken over at the next look.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import xor

from hsmvisord.face.card import objects
from hsmvisord.face.card.generations import OUT, Generations, Move
from hsmvisord.face.card.holdings import Holdings
from hsmvisord.face.card.piv import Piv
from hsmvisord.face.card.slots import CardSettings
from hsmvisord.token.token import Token
from hsmvisord.wire import apdu
from hsmvisord.wire.apdu import SW, BadApdu, Chaining, CommandApdu, ResponseApdu

SELECT = 0xA4
_BY_NAME, _FIRST = 0x04, 0x00
_HISTORICAL = b"hsmvisor"
_LEAST_AID = 5  #: bytes: the registered provider's


def _atr() -> bytes:
    """T=1 alone (ISO/IEC 7816-3, 8.2)."""
    body = bytes([0x80 | len(_HISTORICAL), 0x80, 0x01]) + _HISTORICAL
    return b"\x3b" + body + bytes([reduce(xor, body)])


ATR = _atr()


class Card:
    def __init__(
        self, token: Token, settings: CardSettings, serial: str, monotonic: Callable[[], float], shown: bytes = b""
    ) -> None:
        """`shown`: what an earlier card of this module had shown."""
        self.settings = settings
        self._monotonic = monotonic
        self._holdings = Holdings(token)
        self._generations = Generations(shown)
        self._piv = Piv(self._holdings, self._generations, serial)
        self._chaining = Chaining()
        self._selected = False

    def close(self) -> None:
        self._holdings.close()

    @property
    def present(self) -> bool:
        return self._generations.inserted

    @property
    def shown(self) -> bytes:
        """For the next card of this module."""
        return self._generations.shown

    def look(self) -> Move:
        """Takes over what the token has now; says whether the card is to go out or in, and when to look again."""
        settings = self._piv.settings = self.settings
        wanted = self._holdings.contents(settings) if self._holdings.present else None
        move = self._generations.look(self._monotonic(), wanted)
        if move.step == OUT:
            self.power_down()
        return move

    def power_up(self) -> bytes:
        """Returns the ATR."""
        self.power_down()
        return ATR

    def power_down(self) -> None:
        self._piv.reset()
        self._chaining.clear()
        self._selected = False

    def transmit(self, raw: bytes) -> bytes:
        """Answers one command APDU, whatever it is."""
        try:
            command = self._chaining.take(apdu.decode(raw))
            if command is None:
                return ResponseApdu(b"", SW.OK).encode()
            if command.ins == apdu.GET_RESPONSE:
                return self._chaining.rest(command).encode()
            return self._chaining.give(self._handle(command), command).encode()
        except BadApdu as error:
            return ResponseApdu(b"", getattr(error, "status", error.sw)).encode()

    def _handle(self, command: CommandApdu) -> ResponseApdu:
        if command.ins == SELECT:
            return self._select(command)
        if not self._selected:
            raise BadApdu(SW.INS_NOT_SUPPORTED)
        return self._piv.handle(command)

    def _select(self, command: CommandApdu) -> ResponseApdu:
        if (command.cla, command.p1, command.p2) != (0, _BY_NAME, _FIRST):
            raise BadApdu(SW.FUNCTION_NOT_SUPPORTED)
        if len(command.data) < _LEAST_AID or not objects.AID.startswith(command.data):
            raise BadApdu(SW.NOT_FOUND)  # the application that was selected stays so (part 2, 3.1.1)
        if not self._selected:
            self._piv.reset()
        self._selected = True
        return ResponseApdu(self._piv.select(), SW.OK)
