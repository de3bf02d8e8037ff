"""A module as the USB device of one importer (QEMU by usbredir, a guest's kernel by USB/IP): one thread between the importer's
connection, the engine, the card and the channels.

An importer that does what it must not ends its device, with the reason; nothing of another module is near.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Protocol

from hsmvisord import limits, memory
from hsmvisord.face.card.card import Card
from hsmvisord.transport.usb.card_thread import CardThread, Outdated
from hsmvisord.transport.usb.channels import Channels
from hsmvisord.transport.usb.engine import Engine, Overload
from hsmvisord.wire.usb import BrokenPeer, Cancel, Done, Event, Reset, Setup, Submit
from hsmvisord.wire.usb_descriptors import Descriptors, Identity
from hsmvisord.wire.usbip import UsbipServer
from hsmvisord.wire.usbredir import UsbredirHost

EVENTS = 64  #: at once
RECEIVE = 64 * 1024  #: bytes of the importer's at once


class Codec(Protocol):
    """One end of usbredir or USB/IP; sans-IO."""

    @property
    def imported(self) -> bool:
        """The importer has the device."""

    def receive(self, data: bytes) -> Iterator[Event]: ...

    def done(self, done: Done) -> list[Event]: ...

    def cancelled(self, ident: int, was_parked: bool) -> None: ...

    def data_to_send(self) -> bytes: ...


def codec(protocol: str, descriptors: Descriptors) -> Codec:
    """Raises ValueError."""
    match protocol:
        case "usbredir":
            return UsbredirHost(descriptors)
        case "usbip":
            return UsbipServer(descriptors)
    raise ValueError(f"nothing here speaks {protocol!r}")


class Ended(Exception):
    """The device is over; the text says how."""


class UsbDevice:
    """Lives until its importer goes, it is closed, or the importer does what cannot be."""

    def __init__(
        self,
        sock: socket.socket,
        protocol: str,
        ids: tuple[int, int],
        card: Card,
        take: Callable[[socket.socket, str], None],
        shown: Callable[[bytes], None],
        ended: Callable[[str], None],
    ) -> None:
        """All callables are called by threads of the device and must not raise.

        `sock`: the importer's connection, the device's from now on, unless this raises.  It speaks `protocol`.
        `ids`: of vendor and product.
        `take`: gets the module's end of each channel that is opened.
        `shown`: what the card has shown, for the next one of this module.
        `ended`: once, at the end, with the reason; not after `close`.
        Raises ValueError, OSError.
        """
        self._card = CardThread(card, self._poke, shown, self._card_failed)
        descriptors = Descriptors(Identity(*ids, self._card.serial))
        self._sock, self._codec, self._ended = sock, codec(protocol, descriptors), ended
        self._epoll = select.epoll()
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  #: guarded by the lock
        self._channels = Channels(self._epoll, take)
        self._engine = Engine(descriptors, self)
        self._asked: bytes | None = None  #: the message that the card carries out
        self._turn = 0  #: of what the card was asked last
        self._more_at = 0.0
        self._unsent = bytearray()
        self._read = 0  #: bytes of channels that are not in it yet
        self._held: set[int] = set()  #: channels that are not read because of it
        self._watched = 0
        self._failure = ""
        self._begun = monotonic()
        self._closing = False
        self._over = threading.Event()

    # ---- any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._card.start()
        memory.start_thread("usb", self._run)

    def look(self) -> None:
        """The token has changed: the card may have to go out and in."""
        self._card.look()

    def close(self) -> None:
        """Closes the importer's connection and all channels; returns when all is given back, or after a while."""
        self._closing = True
        self._poke()
        self._over.wait(limits.SUSPEND_SECONDS)

    def _poke(self) -> None:
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _card_failed(self, error: Exception) -> None:
        self._failure = str(error) if isinstance(error, Outdated) else f"fault: {type(error).__name__}"
        self._poke()

    # ---- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        why = ""
        try:
            self._sock.setblocking(False)
            self._epoll.register(self._wake, select.EPOLLIN)
            self._epoll.register(self._sock, select.EPOLLIN)
            self._watched = select.EPOLLIN
            self._flush()  # usbredir: we speak first
            while not self._closing:
                self._turn_round()
        except (Ended, BrokenPeer, Overload) as error:
            why = str(error)
        except Exception as error:  # a fault of ours ends this device alone; its text may hold a guest's bytes
            why = f"fault: {type(error).__name__}"
        self._give_back()
        self._over.set()
        if why and not self._closing:
            self._ended(why)

    def _turn_round(self) -> None:
        importer = self._sock.fileno()
        happened = self._epoll.poll(self._pause(), EVENTS)
        happened.sort(key=lambda event: event[0] == importer)  # last: it may open a channel with the descriptor of one it closes
        for fd, events in happened:
            if fd == importer:
                if events & select.EPOLLOUT:
                    self._send()
                if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                    self._hear()
            elif fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            elif fd in self._channels:
                number, readable, writable = self._channels.ready(fd, events)
                if writable:
                    self._engine.writable(number)
                if readable:
                    self._engine.readable(number)
        self._take_answers()
        self._give_time()
        self._flush()
        if not self._codec.imported and monotonic() - self._begun > limits.USB_IMPORT_SECONDS:
            raise Ended(f"nothing was imported for {limits.USB_IMPORT_SECONDS:g} s")

    def _pause(self) -> float:
        until = []
        if self._asked is not None:
            until.append(self._more_at)
        if not self._codec.imported:
            until.append(self._begun + limits.USB_IMPORT_SECONDS)
        return max(0.0, min(until) - monotonic()) if until else -1

    def _hear(self) -> None:
        if len(self._unsent) > limits.MAX_USB_UNSENT:
            self._watch(select.EPOLLOUT)  # until the importer has read what was answered
            return
        try:
            data = self._sock.recv(RECEIVE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            raise Ended(f"connection lost: {error.strerror}") from None
        if not data:
            raise Ended("the importer is gone")
        for event in self._codec.receive(data):
            self._carry_out(event)
            self._tell()

    def _carry_out(self, event: Event) -> None:
        match event:
            case Submit(urb):
                self._engine.submit(urb)
            case Cancel(ident):
                self._answer_done()  # what was answered before is told before
                self._codec.cancelled(ident, self._engine.cancel(ident))
            case Reset():
                self._engine.reset()

    def _answer_done(self) -> None:
        while ended := self._engine.take_done():
            for done in ended:
                for event in self._codec.done(done):
                    self._carry_out(event)

    def _tell(self) -> None:
        self._answer_done()
        self._unsent += self._codec.data_to_send()
        self._read = 0

    def _flush(self) -> None:
        self._tell()
        self._send()
        while self._held and len(self._unsent) <= limits.MAX_USB_UNSENT:
            held, self._held = self._held, set()
            for channel in held:
                self._engine.readable(channel)
            self._tell()
            self._send()

    def _send(self) -> None:
        if self._unsent:
            try:
                sent = self._sock.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                raise Ended(f"connection lost: {error.strerror}") from None
            del self._unsent[:sent]
        reads = select.EPOLLIN if len(self._unsent) <= limits.MAX_USB_UNSENT else 0
        self._watch(reads | (select.EPOLLOUT if self._unsent else 0))

    def _watch(self, events: int) -> None:
        if events != self._watched:
            self._watched = events
            self._epoll.modify(self._sock, events)

    # ---- the card -----------------------------------------------------------------------------------------------

    def _take_answers(self) -> None:
        if self._failure:
            raise Ended(self._failure)
        for answer in self._card.take():
            if answer.notify:
                self._engine.ccid_notify(answer.message)
            elif answer.turn == self._turn and self._asked is not None:
                self._asked = None
                self._engine.ccid_answer(answer.message)

    def _give_time(self) -> None:
        if self._asked is not None and monotonic() >= self._more_at:
            self._more_at = monotonic() + limits.CARD_PATIENCE
            self._engine.ccid_answer(self._card.more_time(self._asked))

    # ---- behind the endpoints (engine.Function) -----------------------------------------------------------------

    def ccid(self, message: bytes) -> None:
        if self._asked is not None:
            self._engine.ccid_answer(self._card.busy(message))
            return
        self._turn += 1
        self._asked, self._more_at = message, monotonic() + limits.CARD_PATIENCE
        self._card.ask(self._turn, message)

    def ccid_control(self, setup: Setup) -> bytes | None:
        return self._card.control(setup.request, setup.w_value, setup.w_length)

    def ccid_reset(self) -> None:
        self._turn += 1  # an answer that is under way is nobody's
        self._asked = None
        self._card.power_down()

    def configured(self) -> None:
        self._card.tell_presence()

    def open(self, channel: int) -> bool:
        return self._channels.open(channel)

    def close_channel(self, channel: int) -> None:
        self._channels.close(channel)

    def write(self, channel: int, data: memoryview) -> int:
        return self._channels.write(channel, data)

    def read(self, channel: int, most: int) -> bytes | None:
        if len(self._unsent) + self._read > limits.MAX_USB_UNSENT:
            self._held.add(channel)  # until the importer has read what was answered
            return None
        data = self._channels.read(channel, most)
        self._read += len(data or b"")
        return data

    # ---- the end ------------------------------------------------------------------------------------------------

    def _give_back(self) -> None:
        self._channels.close_all()
        self._sock.close()
        self._epoll.close()
        self._card.stop()
        with self._lock:
            os.close(self._wake)
            self._wake = -1
