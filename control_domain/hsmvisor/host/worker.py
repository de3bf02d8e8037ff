"""One living worker: its control connection, its phase, and what it may ask of us by the table of phases.

A worker may be in its guest's hands.  Whatever is not in its row, is malformed or comes from another process ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hsmvisor.host import limits
from hsmvisor.host.link import Link, LinkClosed, PeerError, Violation
from hsmvisor.host.refusals import refused
from hsmvisor.serving import errors
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame
from hsmvisor_rpc.internal.phases import MAX_DESCRIPTORS, USB_PROTOCOLS, WORKER_MAY, Phase, by_type, descriptors_of
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record, record_type

R = TypeVar("R", bound=Record)
_log = logging.getLogger(__name__)

Store = Callable[[m.StoreState], Awaitable[None]]
Told = Callable[[m.Event], None]
UsbTold = Callable[[m.UsbCame | m.UsbGone | m.UsbShown, list[int]], None]  #: the descriptors are its own to close
DeviceTold = Callable[[m.DeviceState | m.DeviceGone, list[int]], None]  #: the descriptors are its own to close


class WorkerFault(Exception):
    """A worker could not be started, adopted or understood; it is ended.  The message says why."""


class WorkerProcess:
    """A worker that runs.  Owns its pidfd and its control connection."""

    def __init__(self, name: str, pid: int, pidfd: int, phase: Phase | None) -> None:
        """`phase` None: an earlier supervisor's worker; its phase is not known before it answers Attach."""
        self.name, self.pid, self._pidfd = name, pid, pidfd
        self.phase = phase
        self.violation = ""
        self._link: Link | None = None
        self._store: Store | None = None
        self._told: Told | None = None
        self._device: DeviceTold | None = None
        self._usb: UsbTold | None = None
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, self._process_ended)

    # ---- beginning ----------------------------------------------------------------------------------------------

    def connect(self, path: Path, store: Store, told: Told, device: DeviceTold | None = None, usb: UsbTold | None = None) -> None:
        """Connects to its control socket, which listens from before it was forked.  Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            sock.connect(str(path))  # a listening unix socket with room takes us at once, another one says EAGAIN
        except OSError:
            sock.close()
            raise
        self._store, self._told, self._device, self._usb = store, told, device, usb
        self._link = Link(sock, self._closed, self._asked, self._notified)
        self._link.expected_pid = self.pid

    async def attach(self, stored_version: int, within: float) -> tuple[m.Attached, list[int]]:
        """Returns what it says of itself, and the guest listener if it serves.  Raises WorkerFault, LinkClosed, TimeoutError."""
        attached, descriptors = await self._ask(m.Attach(m.PROTOCOL, stored_version), m.Attached, within, take=1)
        try:
            self.phase = Phase(attached.phase)
        except ValueError:
            raise WorkerFault(f"a phase that cannot be: {attached.phase[:20]!r}") from None
        if attached.pid != self.pid or attached.name != self.name:
            raise WorkerFault("it says that it is another one")
        return attached, descriptors

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

    async def usb(self, within: float) -> m.UsbState:
        """Returns which importer it has.  Raises WorkerFault."""
        state, _ = await self._ask(m.QueryUsb(), m.UsbState, within)
        if len(state.shown) > limits.MAX_USB_SHOWN or (state.plug and state.protocol not in USB_PROTOCOLS):
            raise WorkerFault("what it says of its USB device cannot be")
        return state

    # ---- asking -------------------------------------------------------------------------------------------------

    async def _ask(
        self, request: Record, expected: type[R], within: float, take: int = 0, give: Sequence[int] = ()
    ) -> tuple[R, list[int]]:
        if self._link is None:
            raise LinkClosed("there is no connection to the worker")
        return await self._link.ask(request, expected, give, within=within, take=take)

    async def ask(self, request: Record, expected: type[R], within: float) -> R:
        """Raises ServiceError: Refused by the worker, or Unavailable."""
        try:
            reply, _ = await self._ask(request, expected, within)
        except PeerError as error:
            raise refused(error.error) from None
        except LinkClosed:
            raise errors.Unavailable(
                "WORKER", f"the worker of module {self.name} ended meanwhile", "try again with the same request_id"
            ) from None
        except TimeoutError:
            raise errors.Unavailable(
                "WORKER", f"the worker of module {self.name} did not answer in {within:.0f} s", "try again with the same request_id"
            ) from None
        return reply

    # ---- being asked --------------------------------------------------------------------------------------------

    def _allowed(self, frame: Frame) -> Record:
        """Returns the record if this phase's row has it; raises Violation.

        A worker that we adopt may finish what it had asked of the supervisor before us: as in phase serving.
        """
        row = WORKER_MAY[self.phase or Phase.SERVING]
        try:
            kind = by_type(row).get(record_type(frame.payload))
            if kind is None:
                raise Violation(f"{record_type(frame.payload)[:40]!r} in phase {self.phase}")
            return kind.decode(frame.payload)
        except MalformedRecord as error:
            raise Violation(f"malformed: {error}") from None

    def _asked(self, frame: Frame) -> Coroutine[Any, Any, Record]:
        record = self._allowed(frame)
        if not isinstance(record, m.StoreState) or self._store is None:
            raise Violation(f"{record.TYPE} as a request")
        return self._stored(self._store, record)

    async def _stored(self, store: Store, change: m.StoreState) -> Record:
        try:
            await store(change)
        except errors.ServiceError as error:
            return m.Error(m.REASON_STORAGE, error.detail)
        except Exception:
            _log.exception("module %s: a change could not be stored", self.name)
            return m.Error(m.REASON_INTERNAL, "an error inside the host service")
        return m.Done()

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

    def _closed(self, violation: Violation | None) -> None:
        """Without its connection it is not ours any more, whoever's fault that is."""
        if violation is not None:
            self.violation = str(violation)
            _log.error("module %s: its worker broke the protocol and is ended: %s", self.name, violation)
        self.kill()

    # ---- the end ------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _process_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        with contextlib.suppress(ChildProcessError):  # ours to reap only if its launcher died
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        self._ended.set()

    async def ended(self) -> None:
        """Returns when the process has ended."""
        await self._ended.wait()

    async def shut_down(self, drain: float, within: float = 2.0) -> None:
        """Has it drain for at most `drain` seconds and end; ends it by force after that and `within`."""
        self.phase = Phase.CLOSING
        with contextlib.suppress(PeerError, LinkClosed, TimeoutError):
            await self._ask(m.Shutdown(int(drain * 1000)), m.Done, drain + within)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self.ended()
                return
        self.kill()
        await self.ended()

    async def out(self, within: float) -> None:
        """Returns when it has ended and is let go of; it is ended by force after `within` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self.ended()
        self.kill()
        await self.ended()
        self.leave()

    def leave(self) -> None:
        """Lets go of it; one that still runs goes on, and the next supervisor adopts it."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        if self._link is not None:
            self._link.close()
        os.close(self._pidfd)
