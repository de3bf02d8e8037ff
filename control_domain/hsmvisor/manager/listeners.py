"""What the manager's gRPC server offers, and where, as the configuration has it."""

from __future__ import annotations

from hsmvisor.manager.config import Config
from hsmvisor.manager.inventory.identities import OwnCertificate
from hsmvisor.serving.server import Listeners, TlsListener, UnixListener
from hsmvisor_rpc.v1 import manager_pb2

SERVICES = tuple(service.full_name for service in manager_pb2.DESCRIPTOR.services_by_name.values())


def listeners(config: Config, own: OwnCertificate) -> Listeners:
    """Hosts are certified by the manager's own authority, owners by somebody else's."""
    certificate, key = server_files(config, own)
    believed = (str(own.authorities), *((config.tls.client_ca,) if config.tls.client_ca else ()))
    found = []
    if config.tls.address:
        found.append(TlsListener("tls", config.tls.address, certificate, key, believed))
    if config.join.address:
        found.append(TlsListener("join", config.join.address, certificate, key))
    control = UnixListener(config.control_socket, config.control.socket_mode, config.control.socket_group)
    return Listeners(control, tuple(found))


def server_files(config: Config, own: OwnCertificate) -> tuple[str, str]:
    """Returns certificate and key that the manager shows: somebody else's, or its own in one file."""
    if config.tls.certificate:
        return config.tls.certificate, config.tls.key
    return str(own.file), str(own.file)
