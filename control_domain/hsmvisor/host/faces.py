"""As what a module is in its guest (vsock device, USB device, TPM, socket of a monitor), and into which one it was plugged."""

from __future__ import annotations

import logging
from collections.abc import Callable

from hsmvisor.host.device import Device
from hsmvisor.host.hybrid import Hybrid
from hsmvisor.host.intake import Passing
from hsmvisor.host.settings import Settings
from hsmvisor.host.state import AttachmentRow, ModuleRow, UsbAttachmentRow
from hsmvisor.host.surroundings import Surroundings
from hsmvisor.host.tpm import Tpm
from hsmvisor.host.usb import Usb
from hsmvisor.host.worker import WorkerProcess
from hsmvisor.serving import errors
from hsmvisor_rpc.internal.messages import Event

_log = logging.getLogger(__name__)


class Faces:
    """One module's; each has its guest's side wait while there is no worker."""

    def __init__(
        self,
        surroundings: Surroundings,
        row: ModuleRow,
        passing: Passing,
        settings: Callable[[], Settings],
        happened: Callable[[str, dict[str, object]], None],
        told: Callable[[Event], None],
    ) -> None:
        self.name = name = row.name
        self.device = Device(surroundings.places, surroundings.config, name, row.number, happened)
        self.usb = Usb(surroundings.places, surroundings.config, name, lambda: settings().card.usb_ids(), happened)
        self.tpm = Tpm(surroundings, name, row.module_id, row.number, lambda: settings().tpm, happened, told)
        self.hybrid = Hybrid(surroundings.config, passing)
        self.attachment: AttachmentRow | None = None  #: into which guest it was plugged by us
        self.usb_attachment: UsbAttachmentRow | None = None  #: the same, as a USB device

    def listen(self) -> None:
        """Takes QEMU's connections from now on.  Raises OSError, ServiceError."""
        self.device.listen()
        self.usb.listen()

    def listen_for_guest(self) -> None:
        """Where its guest's monitor or kernel connects; what is in the way is said, and keeps nobody else from the module."""
        try:
            if self.attachment is not None and self.attachment.hybrid:
                self.hybrid.listen(self.attachment.hybrid)
        except errors.ServiceError as error:
            _log.warning("module %s: its guest cannot reach it: %s (%s)", self.name, error.detail, error.hint)
        try:
            row = self.usb_attachment
            if row is not None and row.listen and self.usb.usbip != row.listen:
                self.usb.listen_usbip(row.listen, row.peers)
        except errors.ServiceError as error:
            _log.warning("module %s: its guest cannot import it: %s (%s)", self.name, error.detail, error.hint)

    def serve(self, worker: WorkerProcess, within: float) -> None:
        """A new worker serves."""
        self.device.serve(worker, within)
        self.usb.serve(worker, within)
        self._serve_tpm(worker)

    def _serve_tpm(self, worker: WorkerProcess) -> None:
        """The TPM begins with the first worker; what is in the way is said, and keeps nobody from the module."""
        try:
            self.tpm.begin()
        except (OSError, errors.ServiceError) as error:
            _log.error("module %s: it is no TPM for its guest: %s", self.name, error)
        self.tpm.serve(worker)

    def succeeded(self, worker: WorkerProcess, within: float) -> None:
        """Another worker has taken over from the one before."""
        self.device.succeeded(worker, within)
        self.usb.serve(worker, within)
        self.tpm.serve(worker)

    async def adopt(self, worker: WorkerProcess, within: float) -> None:
        """Learns what an earlier supervisor's worker is.  Raises LinkClosed, TimeoutError, ProcessFault."""
        await self.device.adopt(worker, within)
        await self.usb.adopt(worker, within)
        self._serve_tpm(worker)

    def lost_worker(self) -> None:
        self.device.lost_worker()
        self.usb.lost_worker()
        self.tpm.lost_worker()

    async def end_tpm(self, *, leave: bool) -> None:
        """Lets go of the TPM: its process is left to the next service, or ended."""
        await self.tpm.end(leave=leave)

    def close(self) -> None:
        """Lets go of everything; who is connected is not told by that as long as a worker has the connection."""
        self.device.close()
        self.usb.close()
        self.hybrid.close()
