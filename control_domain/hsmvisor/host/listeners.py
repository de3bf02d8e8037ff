"""What the host's gRPC server offers, and where, as the configuration has it."""

from __future__ import annotations

from pathlib import Path

from hsmvisor.host.config import Config
from hsmvisor.serving.server import Listeners, TlsListener, UnixListener
from hsmvisor_rpc.v1 import hsmvisor_pb2

SERVICES = tuple(service.full_name for service in hsmvisor_pb2.DESCRIPTOR.services_by_name.values())
_UNIX = "unix:"


def listeners(config: Config) -> Listeners:
    tls = config.tls
    return Listeners(
        _unix(config.control_socket, config),
        TlsListener(tls.address, tls.certificate, tls.key, tls.client_ca) if tls.address else None,
        _signed(config),
    )


def _signed(config: Config) -> UnixListener | TlsListener | None:
    signed = config.signed
    if signed.address.startswith(_UNIX):
        return _unix(Path(signed.address.removeprefix(_UNIX)), config)
    return TlsListener(signed.address, signed.certificate, signed.key) if signed.address else None


def _unix(path: Path, config: Config) -> UnixListener:
    return UnixListener(path, config.control.socket_mode, config.control.socket_group)
