"""The module as a virtual machine's device: who it is, and what the supervisor and a successor are told of it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.descriptors import close_descriptors
from hsmvisor_rpc.sealed.canonical import Record

from hsmvisord import limits
from hsmvisord.budget import Pace
from hsmvisord.transport.vsock.device import Device
from hsmvisord.transport.vsock.keys import StreamKeys
from hsmvisord.transport.vsock.saved import Saved

Announce = Callable[[Record, list[int]], None]
Take = Callable[[socket.socket, str], None]


class NoDevice(Exception):
    """It cannot be a device; the text says why."""


@dataclass
class Plugged:
    """One front-end.  Connection and keys are duplicates, for who comes after."""

    plug: int
    cid: int
    connection: int
    keys: int
    device: Device | None = None
    state: bytes = b""
    descriptors: list[int] = field(default_factory=list)  #: of `state`, ours
    rests: bool = False  #: its thread does not run

    def keep(self, saved: Saved) -> list[int]:
        """Duplicates what another worker would need; returns the descriptors of what was kept before, to be closed.  Raises
        OSError."""
        before = self.descriptors
        self.state, self.descriptors = saved.encode(), _duplicates(saved.descriptors())
        return before

    def given(self) -> list[int]:
        return [self.connection, self.keys, *self.descriptors]

    def close(self) -> None:
        close_descriptors(self.given())
        self.descriptors = []


class Plug:
    """`take` gets each stream of the guest, `announce` what the supervisor is to know."""

    def __init__(self, take: Take, announce: Announce) -> None:
        self._take, self._announce = take, announce
        self._imports = Pace(limits.USB_IMPORT_BURST, limits.USB_IMPORT_RATE, time.monotonic)
        self._plugged: Plugged | None = None
        self._lock = threading.Lock()

    # ---- the supervisor's requests ------------------------------------------------------------------------------

    def plug(self, plug: int, cid: int, state: bytes, descriptors: list[int], start: bool = True) -> None:
        """Is the device from now on, in the place of an earlier one; or from `resume` on.  All descriptors are its own.
        Raises NoDevice."""
        self.unplug()
        if len(descriptors) < 2:
            close_descriptors(descriptors)
            raise NoDevice("a device needs its connection and the memory of its keys")
        with contextlib.ExitStack() as undo:
            undo.callback(close_descriptors, descriptors)
            try:
                connection, keys_memory = _duplicates(descriptors[:2])
                plugged = Plugged(plug, cid, connection, keys_memory)
                undo.callback(plugged.close)
                saved = Saved.decode(state, descriptors[2:]) if state else None
                if saved is None and descriptors[2:]:
                    raise ValueError("descriptors of nothing")
                if saved is not None:
                    plugged.keep(replace(saved, streams=(), resets=()))
                keys = StreamKeys(descriptors[1])
                sock = socket.socket(fileno=descriptors[0])
                undo.callback(sock.detach)  # closed with all descriptors
                plugged.device = Device(
                    sock,
                    cid,
                    self._accept,
                    keys,
                    saved,
                    lambda saved: self._changed(plugged, saved),
                    lambda why: self._ended(plugged, why),
                )
            except (ValueError, OSError, RecursionError) as error:  # RecursionError: of JSON
                raise NoDevice(f"what is kept of the device cannot be: {error}") from None
            undo.pop_all()
        os.close(descriptors[1])
        plugged.rests = not start
        with self._lock:
            self._plugged = plugged
        if start:
            plugged.device.start()

    def unplug(self) -> None:
        """Streams are reset, the front-end's connection is closed."""
        with self._lock:
            plugged, self._plugged = self._plugged, None
        if plugged is not None:
            if plugged.device is not None:
                with contextlib.suppress(TimeoutError):
                    plugged.device.close()
            plugged.close()

    def query(self) -> tuple[m.DeviceState, list[int]]:
        """Returns the device with duplicates of its descriptors, the caller's to close; none: without."""
        with self._lock:
            plugged = self._plugged
            if plugged is None:
                return m.DeviceState(0, b"", 0), []
            descriptors = _duplicates(plugged.given())
            return m.DeviceState(plugged.plug, plugged.state, len(descriptors)), descriptors

    # ---- a successor ---------------------------------------------------------------------------------------------

    def suspend(self) -> tuple[int, int, bytes, list[int]] | None:
        """Stops between two packets.  Returns plug, cid, state and descriptors of the device with all its streams, or None without
        one.  The descriptors stay its own.  Then `resume`, or the end of the process.  Raises TimeoutError; then it goes on."""
        with self._lock:
            plugged = self._plugged
        if plugged is None or plugged.device is None:
            return None
        try:
            saved = plugged.device.suspend()
        except TimeoutError:
            raise
        except OSError:  # it has ended, and `_ended` tells
            return None
        plugged.rests = True
        return plugged.plug, plugged.cid, saved.encode(), [plugged.connection, plugged.keys, *saved.descriptors()]

    def resume(self) -> None:
        with self._lock:
            plugged = self._plugged
        if plugged is not None and plugged.device is not None and plugged.rests:  # else a second thread would begin
            plugged.rests = False
            plugged.device.resume()

    # ---- the device's thread -------------------------------------------------------------------------------------

    def _accept(self, port: int, peer: str) -> socket.socket | None:
        if port != limits.VSOCK_PORT and not (port == limits.USBIP_PORT and self._imports.may()):
            return None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        if port == limits.VSOCK_PORT:
            self._take(theirs, peer)
        else:  # the supervisor knows who else imports, and gives it back
            self._imports.take()
            with theirs:
                self._announce(m.UsbCame(), [theirs.fileno()])
        return ours

    def _changed(self, plugged: Plugged, saved: Saved) -> None:
        with self._lock:
            before = plugged.keep(saved)
        close_descriptors(before)
        self._announce(m.DeviceState(plugged.plug, plugged.state, len(plugged.descriptors)), plugged.descriptors)

    def _ended(self, plugged: Plugged, why: str) -> None:
        with self._lock:
            if self._plugged is not plugged:
                return
            self._plugged = None
        plugged.close()
        self._announce(m.DeviceGone(plugged.plug, why), [])


def _duplicates(descriptors: list[int]) -> list[int]:
    """Raises OSError; then there are none."""
    made: list[int] = []
    try:
        for descriptor in descriptors:
            made.append(os.dup(descriptor))
    except OSError:
        close_descriptors(made)
        raise
    return made
