"""Guests with the kernel's own vsock device (vhost_vsock): one AF_VSOCK socket for all modules, which a guest's CID tells apart.

A CID is the whole machine's, and who has it is the kernel's word.  It is free again when its virtual machine ends.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable

from hsmvisor.host import limits
from hsmvisor.host.config import Config
from hsmvisor.host.intake import Intake
from hsmvisor.host.module import Module
from hsmvisor.serving.throttle import Throttle

_log = logging.getLogger(__name__)


class VhostVsock:
    def __init__(self, modules: Callable[[], Iterable[Module]]) -> None:
        self._modules = modules
        self._intake: Intake | None = None
        self._said = Throttle(5, 0.1)

    def start(self, config: Config) -> None:
        """Listens if it is to; what this kernel lacks is said."""
        if not config.guests.vsock:
            return
        try:
            listener = listen(config.guests.backlog)
        except OSError as error:
            hint = "load vhost_vsock, and start the service again; or set guests.vsock = false"
            _log.warning("guests.vsock: no AF_VSOCK socket on port %d: %s (%s)", limits.VSOCK_PORT, error.strerror, hint)
            return
        self.serve(listener)

    def serve(self, listener: socket.socket) -> None:
        """`listener`'s connections come from addresses (CID, port)."""
        self._intake = Intake(listener, self._arrived)

    def _arrived(self, sock: socket.socket, address: tuple[int, int]) -> None:
        cid, port = address
        module = next((one for one in self._modules() if one.faces.device.cid == cid), None)
        if module is None:
            sock.close()
            if self._said.admit():
                _log.warning("vsock: CID %d is no module's guest; its connection is closed", cid)
            return
        module.passing.pass_on(sock, f"vhost-vsock cid={cid} port={port}")

    def stop(self) -> None:
        if self._intake is not None:
            self._intake.close()
            self._intake = None


def listen(backlog: int) -> socket.socket:
    """Returns a socket for every guest of this kernel.  Raises OSError where it has no AF_VSOCK."""
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind((socket.VMADDR_CID_ANY, limits.VSOCK_PORT))
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock
