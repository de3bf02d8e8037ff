"""What the host's gRPC server offers, and where, as the configuration has it."""

from __future__ import annotations

from pathlib import Path

from hsmvisor.host.config import UNIX, Config
from hsmvisor.serving.server import Listeners, TlsListener, UnixListener
from hsmvisor_rpc.v1 import hsmvisor_pb2

SERVICES = tuple(service.full_name for service in hsmvisor_pb2.DESCRIPTOR.services_by_name.values())


def listeners(config: Config) -> Listeners:
    """Callers at signed.address show no certificate: they sign."""
    tls, signed, found = config.tls, config.signed, []
    if tls.address:
        found.append(TlsListener("tls", tls.address, tls.certificate, tls.key, (tls.client_ca,)))
    local = signed.address.startswith(UNIX)
    if signed.address and not local:
        found.append(TlsListener("signed", signed.address, signed.certificate, signed.key))
    control = _unix(config.control_socket, config)
    return Listeners(control, tuple(found), _unix(Path(signed.address.removeprefix(UNIX)), config) if local else None)


def _unix(path: Path, config: Config) -> UnixListener:
    return UnixListener(path, config.control.socket_mode, config.control.socket_group)
