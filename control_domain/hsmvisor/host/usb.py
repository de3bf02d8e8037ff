"""A module as a USB device: where importers connect (QEMU by usbredir, a guest's kernel by USB/IP), and which of them has it.

The supervisor reads no byte of theirs, and keeps no connection that a worker has taken: it ends with the worker.  QEMU then
connects again by itself, and the next worker is plugged in; a kernel has to be told to (usbip attach).
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Callable

from hsmvisor import addresses
from hsmvisor.host import limits, places
from hsmvisor.host.config import Config
from hsmvisor.host.intake import Intake
from hsmvisor.host.link import LinkClosed, PeerError
from hsmvisor.host.places import Places
from hsmvisor.host.pluggable import Pluggable, unix_peer
from hsmvisor.host.usb_ids import UsbId
from hsmvisor.host.worker import WorkerProcess
from hsmvisor.serving import errors
from hsmvisor_rpc.internal import messages as m

_log = logging.getLogger(__name__)

USBREDIR, USBIP = "usbredir", "usbip"

Happened = Callable[[str, dict[str, object]], None]


class Usb(Pluggable):
    """`happened` is told "usb-plugged", "usb-unplugged" and "usb-refused", with what is known; `ident` gives the device's ids."""

    def __init__(self, where: Places, config: Config, name: str, ident: Callable[[], UsbId], happened: Happened) -> None:
        super().__init__()
        self.name, self.path = name, where.usb(name)
        self._where, self._config, self._ident, self._happened = where, config, ident, happened
        self._intake: Intake | None = None
        self._usbip: Intake | None = None
        self.usbip = ""  #: HOST:PORT where it listens for USB/IP
        self._waiting: socket.socket | None = None  #: an importer that no worker has taken yet
        self._next: socket.socket | None = None  #: one that came while there was another
        self._plug = 0  #: counts importers
        self.protocol = ""  #: of the importer that there is
        self.peer = ""
        self._shown = b""  #: what a worker told last of its card
        self._worker: WorkerProcess | None = None
        self._within = 0.0
        self._gone = 0  #: the last importer of which a worker has told that it is gone

    @property
    def plugged(self) -> bool:
        """Says whether an importer is connected."""
        return bool(self.protocol)

    # ---- the sockets --------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Takes QEMU's connections from now on.  Raises OSError, ServiceError."""
        if self._intake is None:
            listener = places.listen_for_usb(self._where, self.name, self._config)
            self._intake = Intake(listener, lambda sock, _: self._arrived(sock, USBREDIR, unix_peer(sock)))

    def listen_usbip(self, address: str, peers: tuple[str, ...]) -> None:
        """Takes kernels' connections at `address`, of `peers` alone (networks).  Raises ServiceError."""
        self.close_usbip()
        networks = [ipaddress.ip_network(peer) for peer in peers]
        host, port = addresses.split(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(limits.USBIP_BACKLOG)
        except OSError as error:
            listener.close()
            hint = "it is an address of this host's own, as that of the guest's tap device, and a port that is free there"
            raise errors.WrongState("USBIP_ADDRESS", f"{address}: {error.strerror}", hint) from None

        def arrived(sock: socket.socket, whence: tuple[str, int]) -> None:
            peer = f"tcp {whence[0]}:{whence[1]}"
            if not any(ipaddress.ip_address(whence[0]) in network for network in networks):
                self._refuse(sock, peer, "it is none of those that may import the device")
                return
            _keep_alive(sock)
            self._arrived(sock, USBIP, peer)

        self._usbip, self.usbip = Intake(listener, arrived), address

    def close_usbip(self) -> None:
        """Takes no kernel's connection any more; one that there is stays."""
        if self._usbip is not None:
            self._usbip.close()
        self._usbip, self.usbip = None, ""
        self._drop_next()

    def _arrived(self, sock: socket.socket, protocol: str, peer: str) -> None:
        if not self.plugged:
            self._take(sock, protocol, peer)
        elif self._next is None:
            self._next = sock
            self._run(self._after(sock, protocol, peer))
        else:
            self._refuse_second(sock, peer)

    async def _after(self, sock: socket.socket, protocol: str, peer: str) -> None:
        """An importer that has gone counts until its worker says so: one that comes right after it waits for that.

        Such are `usbip list`, which is a connection too, and then `usbip attach`.
        """
        try:
            await self.wait_unplugged(limits.USB_TURN_SECONDS)
        except TimeoutError:
            if self._next is sock:
                self._next = None
                self._refuse_second(sock, peer)
        if self._next is sock:
            self._next = None
            self._take(sock, protocol, peer)

    def _take(self, sock: socket.socket, protocol: str, peer: str) -> None:
        self._waiting, self.protocol, self.peer = sock, protocol, peer
        self._plug += 1
        self._happened("usb-plugged", {"peer": peer, "protocol": protocol})
        self._told_change()
        self._give()

    def _refuse_second(self, sock: socket.socket, peer: str) -> None:
        self._refuse(sock, peer, f"the device is {self.peer}'s")

    def _refuse(self, sock: socket.socket, peer: str, why: str) -> None:
        sock.close()  # before a byte was read, or told
        self._happened("usb-refused", {"peer": peer, "why": why})

    # ---- the worker ---------------------------------------------------------------------------------------------

    def serve(self, worker: WorkerProcess, within: float) -> None:
        """A worker serves: it becomes the device of an importer that waits."""
        self._worker, self._within = worker, within
        self._give()

    async def adopt(self, worker: WorkerProcess, within: float) -> None:
        """Learns which importer an earlier supervisor's worker has.  Raises LinkClosed, TimeoutError."""
        self._worker, self._within = worker, within
        try:
            state = await worker.usb(within)
        except PeerError:
            return  # of a release without USB
        self._shown = self._shown or state.shown  # what it told meanwhile is newer
        if state.plug and state.plug != self._gone:
            self._plug, self.protocol, self.peer = state.plug, state.protocol, "whoever was plugged in before"
            self._told_change()

    def _give(self) -> None:
        if self._waiting is not None and self._worker is not None:
            self._run(self._plug_in(self._worker, self._waiting))

    async def _plug_in(self, worker: WorkerProcess, sock: socket.socket) -> None:
        plug, ident = self._plug, self._ident()
        asked = m.PlugUsb(plug, self.protocol, ident.vendor, ident.product, self.name, self._shown)
        try:
            await worker.plug_usb(asked, sock.fileno(), self._within)
        except PeerError as error:
            if error.error.reason != m.REASON_PHASE:  # else its successor takes it
                self._unplug(plug, error.error.detail)
            return
        except (LinkClosed, TimeoutError, OSError, errors.ServiceError):
            _log.warning("module %s: its worker did not take the USB device's importer; the next one will", self.name)
            return
        if self._waiting is sock:
            self._waiting = None
        sock.close()

    def told(self, record: m.UsbCame | m.UsbGone | m.UsbShown, descriptors: list[int]) -> None:
        """What the worker says of it; the descriptors are ours."""
        if isinstance(record, m.UsbCame):
            try:
                sock = socket.socket(fileno=descriptors[0])
            except OSError:  # no socket: whatever it is, it goes
                os.close(descriptors[0])
                return
            self._arrived(sock, USBIP, "vsock of its own guest")
        elif isinstance(record, m.UsbShown):
            self._shown = record.shown
        else:
            self._gone = record.plug
            self._unplug(record.plug, record.why)

    def lost_worker(self) -> None:
        """What it had taken has ended with it."""
        self._worker = None
        if self.plugged and self._waiting is None:
            self._unplug(self._plug, "its worker ended")

    def _unplug(self, plug: int, why: str) -> None:
        if plug == self._plug and self.plugged:
            self._drop()
            self._happened("usb-unplugged", {"why": why})
            self._told_change()

    # ---- the end ------------------------------------------------------------------------------------------------

    async def unplug(self) -> None:
        """Takes the device out, by the host alone; QEMU connects again where its chardev says so.  Raises ServiceError."""
        self._drop_next()
        if self._worker is not None and self.plugged and self._waiting is None:
            await self._worker.ask(m.UnplugUsb(), m.Done, self._within)
        self._unplug(self._plug, "the host took it out")

    def close(self) -> None:
        """Lets go of everything; an importer that a worker has is not told by that."""
        self._worker = None
        if self._intake is not None:
            self._intake.close()
            self._intake = None
        self.close_usbip()
        self._drop()
        self._told_change()

    def _drop_next(self) -> None:
        if self._next is not None:
            self._next.close()
        self._next = None

    def _drop(self) -> None:
        if self._waiting is not None:
            self._waiting.close()
        self._waiting, self.protocol, self.peer = None, "", ""


def _keep_alive(sock: socket.socket) -> None:
    """A guest that is gone without a word is noticed, and its device free for the next one, within half a minute."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
