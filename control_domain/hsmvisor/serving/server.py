"""The gRPC server: one server, its listeners (control socket, mutual TLS, signed requests), health and reflection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]
from grpc_reflection.v1alpha import reflection
from hsmvisor.serving import limits
from hsmvisor.serving.errors import Broken
from hsmvisor.serving.gate import Gate
from hsmvisor.serving.relay import LOCAL, SIGNED, Relay

_log = logging.getLogger(__name__)

_OPTIONS = [
    ("grpc.max_send_message_length", limits.MAX_ANSWER),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.max_concurrent_streams", 256),
    ("grpc.so_reuseport", 0),
    # clients that hold a stream open may ask every 30 s whether we are still there
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
]
_GRACE = 2.0  #: seconds for calls that run when the service stops


@dataclass(frozen=True)
class UnixListener:
    """A socket, made with this mode and group ("": ours)."""

    path: Path
    mode: int
    group: str = ""


@dataclass(frozen=True)
class TlsListener:
    """A TCP address and the files of its certificate; `client_ca`: callers show a certificate of one of those (none: none)."""

    name: str  #: its section in the configuration
    address: str
    certificate: str
    key: str
    client_ca: tuple[str, ...] = ()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Key and certificates may stand in one file, which is read once: they fit each other.  Raises Broken."""
        key = _read(self.key)
        certificate = key if self.certificate == self.key else _read(self.certificate)
        believed = b"\n".join(map(_read, self.client_ca)) or None
        return grpc.ssl_server_certificate_configuration([(key, certificate)], believed)


@dataclass(frozen=True)
class Listeners:
    """Where callers come in: known by the kernel, by their certificates, by their signatures."""

    control: UnixListener
    tls: tuple[TlsListener, ...] = ()
    signed: UnixListener | None = None


class Server:
    def __init__(self, gate: Gate, services: Sequence[str], private: Path, largest: int = limits.MAX_MESSAGE) -> None:
        """`services`: full names, for health and reflection; `private`: a directory that nobody else can enter; `largest`: bytes of
        one request."""
        options = [*_OPTIONS, ("grpc.max_receive_message_length", largest)]
        self._server = grpc.aio.server(interceptors=[gate], options=options)
        self._health, self._services = health.HealthServicer(), tuple(services)
        self._upstream = private / "grpc.sock"
        self._local, self._signed = Relay(LOCAL, self._upstream), Relay(SIGNED, self._upstream)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [*self._services, reflection.SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name], self._server
        )

    @property
    def registry(self) -> grpc.aio.Server:
        """Where the services are added."""
        return self._server

    async def start(self, listeners: Listeners) -> None:
        """Opens the listeners, all of them or none.  Raises Broken, OSError."""
        try:
            await self._start(listeners)
        except BaseException:
            await self._server.stop(None)
            raise

    async def _start(self, listeners: Listeners) -> None:
        self._upstream.unlink(missing_ok=True)
        self._server.add_insecure_port(f"unix:{self._upstream}")
        for listener in listeners.tls:
            self._add_tls(listener)
        await self._server.start()
        await _relay(self._local, listeners.control)
        if listeners.signed is not None:
            await _relay(self._signed, listeners.signed)
        for service in ("", *self._services):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def _add_tls(self, listener: TlsListener) -> None:
        """The files are read again for each handshake, so a renewed certificate is used at once."""

        good = [listener.read()]

        def fetch() -> grpc.ServerCertificateConfiguration:
            try:
                good[0] = listener.read()
            except Broken as error:
                _log.error("%s; the certificate in use stays", error.detail)
            return good[0]

        credentials = grpc.dynamic_ssl_server_credentials(good[0], fetch, bool(listener.client_ca))
        try:
            port = self._server.add_secure_port(listener.address, credentials)
        except RuntimeError:
            port = 0
        if not port:
            raise Broken(
                "LISTEN", f"{listener.name}.address {listener.address} cannot be had", "choose a free address of this host"
            )

    async def stop(self) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(_GRACE)
        await asyncio.gather(self._local.stop(), self._signed.stop())
        self._upstream.unlink(missing_ok=True)


async def _relay(relay: Relay, listener: UnixListener) -> None:
    await relay.start(listener.path, listener.mode, listener.group)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Broken("TLS", f"{path}: {error.strerror}", "see the tls section of the configuration") from None
