"""The gRPC server: one server, its listeners (control socket, mutual TLS, signed requests), health and reflection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]
from grpc_reflection.v1alpha import reflection
from hsmvisor.host import limits
from hsmvisor.host.config import Config
from hsmvisor.host.errors import Broken
from hsmvisor.host.interceptor import Gate
from hsmvisor.host.places import Places
from hsmvisor.host.relay import LOCAL, SIGNED, Relay
from hsmvisor_rpc.v1 import hsmvisor_pb2

_log = logging.getLogger(__name__)

_OPTIONS = [
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE),
    ("grpc.max_send_message_length", limits.MAX_ANSWER),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.max_concurrent_streams", 256),
    ("grpc.so_reuseport", 0),
    # clients that hold a stream open may ask every 30 s whether we are still there
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
]
_GRACE = 2.0  #: seconds for calls that run when the service stops

SERVICES = tuple(hsmvisor_pb2.DESCRIPTOR.services_by_name[name].full_name for name in hsmvisor_pb2.DESCRIPTOR.services_by_name)


class Server:
    def __init__(self, gate: Gate, where: Places) -> None:
        self._server = grpc.aio.server(interceptors=[gate], options=_OPTIONS)
        self._health = health.HealthServicer()
        self._upstream = where.private / "grpc.sock"
        self._local, self._signed = Relay(LOCAL, self._upstream), Relay(SIGNED, self._upstream)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [*SERVICES, reflection.SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name], self._server
        )

    @property
    def registry(self) -> grpc.aio.Server:
        """Where the services are added."""
        return self._server

    async def start(self, config: Config) -> None:
        """Opens the listeners, all of them or none.  Raises Broken, OSError."""
        try:
            await self._start(config)
        except BaseException:
            await self._server.stop(None)
            raise

    async def _start(self, config: Config) -> None:
        self._upstream.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{self._upstream}")
        if config.tls.address:
            self._add_tls("tls", config.tls.address, lambda: _tls_files(config), demand_certificate=True)
        if config.signed.address and not config.signed.address.startswith("unix:"):
            self._add_tls("signed", config.signed.address, lambda: _signed_files(config), demand_certificate=False)
        await self._server.start()
        await self._local.start(config.control_socket, config.control.socket_mode, config.control.socket_group)
        if config.signed.address.startswith("unix:"):
            path = Path(config.signed.address.removeprefix("unix:"))
            await self._signed.start(path, config.control.socket_mode, config.control.socket_group)
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def _add_tls(
        self, name: str, address: str, read: Callable[[], grpc.ServerCertificateConfiguration], *, demand_certificate: bool
    ) -> None:
        """The files are read again for each handshake, so a renewed certificate is used at once."""

        good = [read()]

        def fetch() -> grpc.ServerCertificateConfiguration:
            try:
                good[0] = read()
            except Broken as error:
                _log.error("%s; the certificate in use stays", error.detail)
            return good[0]

        credentials = grpc.dynamic_ssl_server_credentials(good[0], fetch, demand_certificate)
        try:
            port = self._server.add_secure_port(address, credentials)
        except RuntimeError:
            port = 0
        if not port:
            raise Broken("LISTEN", f"{name}.address {address} cannot be had", "choose a free address of this host")

    async def stop(self) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(_GRACE)
        await asyncio.gather(self._local.stop(), self._signed.stop())
        self._upstream.unlink(missing_ok=True)


def _tls_files(config: Config) -> grpc.ServerCertificateConfiguration:
    tls = config.tls
    return grpc.ssl_server_certificate_configuration([_pair(tls.key, tls.certificate)], _read(tls.client_ca))


def _signed_files(config: Config) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([_pair(config.signed.key, config.signed.certificate)])


def _pair(key: str, certificate: str) -> tuple[bytes, bytes]:
    return _read(key), _read(certificate)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Broken("TLS", f"{path}: {error.strerror}", "see the tls section of the configuration") from None
