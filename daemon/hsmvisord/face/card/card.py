"""The smart card: one application (PIV) over a module's token, behind the chaining of ISO/IEC 7816-4.

All of it runs on one thread, but for `settings`, which is taken over at the next look.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import xor

from hsmvisord.face.card import objects
from hsmvisord.face.card.generations import IN, OUT, Generations, Move
from hsmvisord.face.card.holdings import Contents, Holdings
from hsmvisord.face.card.piv import Piv
from hsmvisord.face.card.slots import CardSettings
from hsmvisord.token.token import Token
from hsmvisord.wire import apdu
from hsmvisord.wire.apdu import SW, BadApdu, Chaining, CommandApdu, ResponseApdu

#: ISO/IEC 7816-4, 12.1.1: objects in COMPACT-TLV follow; the card is selected by name, takes chains and extended lengths, and has
#: PIV (without its version): so OpenSC takes it for a card of the standard, whose VERIFY can be asked for the status.
_HISTORICAL = bytes.fromhex("8073C021C0F9") + objects.AID[:9]


def _atr() -> bytes:
    """T=0 and T=1, as of a card without contacts; readers at the level of APDUs take T=1 (ISO/IEC 7816-3, 8.2)."""
    body = bytes([0x80 | len(_HISTORICAL), 0x80, 0x01]) + _HISTORICAL
    return b"\x3b" + body + bytes([reduce(xor, body)])


ATR = _atr()


class Card:
    """The card's thread calls `look` when the token or the settings have changed, and when a look has asked for another one."""

    def __init__(
        self, token: Token, settings: CardSettings, serial: str, monotonic: Callable[[], float], shown: bytes = b""
    ) -> None:
        """`serial`: the module's; `shown`: what an earlier card of this module had shown."""
        self.settings = settings
        self._monotonic, self._name = monotonic, serial
        self._holdings = Holdings(token)
        self._generations = Generations(shown)
        self._piv = Piv(self._holdings, self._generations, serial)
        self._chaining = Chaining()
        self._named: tuple[Contents, str] | None = None  #: the last serial number, and of which contents it is

    def close(self) -> None:
        self._holdings.close()

    @property
    def present(self) -> bool:
        return self._generations.inserted

    @property
    def shown(self) -> bytes:
        """For the next card of this module."""
        return self._generations.shown

    def serial_number(self) -> str:
        """Of the USB device that the card is to be in.

        Programs know a reader by its device's serial number.  With `replug` they lose the reader together with its keys, so that
        none goes on with an older certificate, whatever others have read meanwhile.
        """
        settings = self.settings
        if not settings.replug:
            return self._name
        contents = self._holdings.picture(settings)
        if self._named is None or contents is not self._named[0]:
            self._named = contents, objects.serial_number(self._name, contents)
        return self._named[1]

    def look(self) -> Move:
        """Takes over what the token has now; says whether the card has gone out or in, and when to look again."""
        settings = self._piv.settings = self.settings
        move = self._generations.look(self._monotonic(), self._holdings.contents(settings))
        if move.step == OUT:
            self.power_down()
        elif move.step == IN:
            self._holdings.begin()
        return move

    def power_up(self) -> bytes:
        """Returns the ATR."""
        self.power_down()
        return ATR

    def power_down(self) -> None:
        self._piv.reset()
        self._chaining.clear()

    def transmit(self, raw: bytes) -> bytes:
        """Answers one command APDU, whatever it is."""
        try:
            taken = self._chaining.take(apdu.decode(raw))
            if isinstance(taken, CommandApdu):
                taken = self._chaining.give(self._piv.handle(taken), taken)
        except BadApdu as error:
            return ResponseApdu(b"", error.sw).encode()
        except Exception as error:  # a fault of ours is the command's error, not the device's end
            self._holdings.fault("APDU", error)
            return ResponseApdu(b"", SW.FAILED).encode()
        if self._chaining.given and self._piv.reading is not None:
            self._generations.was_read(self._piv.reading)
            self._piv.reading = None
        return taken.encode()
