"""The module as a USB device: which importer has it, and what the supervisor is told of that."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.canonical import Record

from hsmvisord.face.card.card import Card
from hsmvisord.face.card.slots import CardSettings
from hsmvisord.token.token import Token
from hsmvisord.transport.usb.device import UsbDevice
from hsmvisord.worker.plug import NoDevice

Announce = Callable[[Record], None]
Take = Callable[[socket.socket, str], None]


class UsbPlug:
    """`take` gets each channel's connection, `announce` what the supervisor is to know."""

    def __init__(self, take: Take, announce: Announce) -> None:
        self._take, self._announce = take, announce
        self._lock = threading.Lock()
        self._device: UsbDevice | None = None
        self._card: Card | None = None
        self._plug, self._protocol, self._shown = 0, "", b""
        self.settings = CardSettings()

    def plug(self, asked: m.PlugUsb, sock: socket.socket, token: Token) -> None:
        """Is the importer's device from now on, in the place of an earlier one's.  `sock` is its own.  Raises NoDevice."""
        self.unplug()
        card = Card(token, self.settings, asked.serial, time.monotonic, asked.shown or self._shown)
        try:
            device = UsbDevice(
                sock,
                asked.protocol,
                (asked.vendor, asked.product),
                card,
                self._take,
                lambda shown: self._has_shown(asked.plug, shown),
                lambda why: self._gone(asked.plug, why),
            )
        except (ValueError, OSError) as error:
            card.close()
            sock.close()
            raise NoDevice(f"there is no USB device: {error}") from None
        with self._lock:
            self._device, self._card = device, card
            self._plug, self._protocol = asked.plug, asked.protocol
        device.start()

    def unplug(self, why: str = "") -> None:
        """The importer's connection is closed, if there is one; the supervisor is told `why`, unless it asked for it."""
        with self._lock:
            device, plug = self._device, self._plug
            self._device, self._card, self._plug = None, None, 0
        if device is not None:
            device.close()
            if why:
                self._announce(m.UsbGone(plug, why))

    def query(self) -> m.UsbState:
        with self._lock:
            return m.UsbState(self._plug, self._protocol if self._plug else "", self._shown)

    def configure(self, settings: CardSettings) -> None:
        """The card has another slot map: what it shows may change."""
        self.settings = settings
        with self._lock:
            device, card = self._device, self._card
        if device is not None and card is not None:
            card.settings = settings
            device.look()

    def look(self) -> None:
        """The token has changed."""
        with self._lock:
            device = self._device
        if device is not None:
            device.look()

    # ---- the device's threads ------------------------------------------------------------------------------------

    def _has_shown(self, plug: int, shown: bytes) -> None:
        with self._lock:
            self._shown = shown
        self._announce(m.UsbShown(plug, shown))

    def _gone(self, plug: int, why: str) -> None:
        with self._lock:
            if self._plug != plug:
                return
            self._device, self._card, self._plug = None, None, 0
        self._announce(m.UsbGone(plug, why))
