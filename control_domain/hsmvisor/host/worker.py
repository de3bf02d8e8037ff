"""One living worker: what it is asked, and what it asks and tells."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hsmvisor.host import limits
from hsmvisor.host.forked import Forked, ProcessFault
from hsmvisor.host.link import LinkClosed, PeerError, Violation
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame
from hsmvisor_rpc.internal.phases import MAX_DESCRIPTORS, USB_PROTOCOLS, WORKER_MAY, Phase, descriptors_of
from hsmvisor_rpc.sealed.canonical import Record

__all__ = ["ProcessFault", "WorkerProcess"]

Store = Callable[[m.StoreState], Awaitable[None]]
Told = Callable[[m.Event], None]
UsbTold = Callable[[m.UsbCame | m.UsbGone | m.UsbShown, list[int]], None]  #: the descriptors are its own to close
DeviceTold = Callable[[m.DeviceState | m.DeviceGone, list[int]], None]  #: the descriptors are its own to close


class WorkerProcess(Forked):
    """A worker that runs."""

    WHAT: ClassVar[str] = "worker"
    LISTENERS: ClassVar[int] = 1
    MAY: ClassVar[Mapping[Phase, frozenset[type[Record]]]] = WORKER_MAY

    def __init__(self, name: str, pid: int, pidfd: int, phase: Phase | None) -> None:
        super().__init__(name, pid, pidfd, phase)
        self._store: Store | None = None
        self._told: Told | None = None
        self._device: DeviceTold | None = None
        self._usb: UsbTold | None = None

    # ---- beginning ----------------------------------------------------------------------------------------------

    def connect(self, path: Path, store: Store, told: Told, device: DeviceTold | None = None, usb: UsbTold | None = None) -> None:
        """Connects to its control socket, which listens from before it was forked.  Raises OSError."""
        self._store, self._told, self._device, self._usb = store, told, device, usb
        self._connect(path, self._asked, self._notified)

    async def load(self, records: Sequence[tuple[str, bytes]], within: float) -> None:
        """Hands over the stored state in parts of bounded size."""
        part: list[tuple[str, bytes]] = []
        size = 0
        for name, blob in records:
            if part and size + len(blob) > limits.LOAD_PART:
                await self._load_part(part, within)
                part, size = [], 0
            part.append((name, blob))
            size += len(blob)
        if part:
            await self._load_part(part, within)

    async def _load_part(self, part: list[tuple[str, bytes]], within: float) -> None:
        await self._ask(m.LoadState(tuple(n for n, _ in part), tuple(b for _, b in part)), m.Done, within)

    async def boot(self, boot: m.Boot, within: float) -> m.Booted:
        self.phase = Phase.BOOTING
        booted, _ = await self._ask(boot, m.Booted, within)
        self.phase = Phase.SERVING
        return booted

    async def freeze(self, within: float) -> int:
        """Returns the version of the state that it keeps from now on."""
        frozen, _ = await self._ask(m.Freeze(), m.Frozen, within)
        return frozen.version

    async def thaw(self, within: float) -> None:
        """There is no successor; never raises."""
        with contextlib.suppress(PeerError, LinkClosed, TimeoutError):
            await self._ask(m.Thaw(), m.Done, within)

    async def hand_over(self, sock: socket.socket, linger: float, within: float) -> m.HandedOver:
        """Has it give its connections to the worker at the other end of `sock`; it ends by itself, after `linger` seconds at the
        latest."""
        handed, _ = await self._ask(m.HandOver(int(linger * 1000)), m.HandedOver, within, give=[sock.fileno()])
        self.phase = Phase.LEAVING
        return handed

    async def succeed(self, succeed: m.Succeed, sock: socket.socket, within: float) -> m.Booted:
        self.phase = Phase.BOOTING
        booted, _ = await self._ask(succeed, m.Booted, within, give=[sock.fileno()])
        self.phase = Phase.SERVING
        return booted

    async def use_hsm(self, sock: socket.socket, within: float) -> None:
        """Has it use its keys through the helper at the other end of `sock`."""
        await self._ask(m.UseHsm(), m.Done, within, give=[sock.fileno()])

    async def plug(self, plug: m.PlugDevice, descriptors: Sequence[int], within: float) -> None:
        """Has it be the device of the front-end at the other end of the first descriptor."""
        await self._ask(plug, m.Done, within, give=descriptors)

    async def take(self, taken: m.TakeConnection, descriptor: int, within: float) -> None:
        await self._ask(taken, m.Done, within, give=[descriptor])

    async def plugged(self, within: float) -> tuple[m.DeviceState, list[int]]:
        """Returns the device that it is, with the descriptors of PlugDevice; without descriptors it is none."""
        return await self._ask(m.QueryDevice(), m.DeviceState, within, take=MAX_DESCRIPTORS)

    async def plug_usb(self, plug: m.PlugUsb, descriptor: int, within: float) -> None:
        """Has it be the USB device of the importer at the other end of the descriptor."""
        await self._ask(plug, m.Done, within, give=[descriptor])

    async def serve_tpm(self, sock: socket.socket, within: float) -> None:
        """Has it say to the TPM's process at the other end which keys are wanted there."""
        await self._ask(m.ServeTpm(), m.Done, within, give=[sock.fileno()])

    async def usb(self, within: float) -> m.UsbState:
        """Returns which importer it has.  Raises ProcessFault."""
        state, _ = await self._ask(m.QueryUsb(), m.UsbState, within)
        if len(state.shown) > limits.MAX_USB_SHOWN or (state.plug and state.protocol not in USB_PROTOCOLS):
            raise ProcessFault("what it says of its USB device cannot be")
        return state

    # ---- being asked --------------------------------------------------------------------------------------------

    def _asked(self, frame: Frame) -> Coroutine[Any, Any, Record]:
        record = self._allowed(frame)
        if not isinstance(record, m.StoreState) or self._store is None:
            raise Violation(f"{record.TYPE} as a request")
        return self._stored(self._store(record))

    def _notified(self, frame: Frame) -> None:
        record = self._allowed(frame)
        if isinstance(record, (m.DeviceState, m.DeviceGone)) and self._device is not None and self._link is not None:
            if isinstance(record, m.DeviceState) and len(record.state) > limits.MAX_DEVICE_STATE:
                raise Violation(f"a device's state of {len(record.state)} bytes")
            self._device(record, self._link.claim(descriptors_of(record)))
        elif isinstance(record, (m.UsbCame, m.UsbGone, m.UsbShown)) and self._usb is not None and self._link is not None:
            if isinstance(record, m.UsbShown) and len(record.shown) > limits.MAX_USB_SHOWN:
                raise Violation(f"a card's memory of {len(record.shown)} bytes")
            self._usb(record, self._link.claim(descriptors_of(record)))
        elif isinstance(record, m.Event) and record.kind in m.EVENT_KINDS and self._told is not None:
            self._told(record)
        else:
            raise Violation(f"{record.TYPE} as a notification")
