"""A management plane that a test plays: HostLink on TLS with an authority of its own, told what to give and what to refuse."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from hsmvisor_rpc.sealed.commands import check, fingerprint, raw_public
from hsmvisor_rpc.sealed.fleet import HOST_URI, JoinStatement, JoinToken, join_proof
from hsmvisor_rpc.v1 import manager_pb2 as pb
from hsmvisor_rpc.v1 import manager_pb2_grpc as rpc
from support.certificates import DER, PEM, private_pem
from support.host_process import wait_for

_OPTIONS = [("grpc.so_reuseport", 0), ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000)]


class Ca:
    """Signs managers and hosts."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.root = self._sign(self.key.public_key(), [], 3600.0, ca=True)

    def issue(self, public: Any, names: list[x509.GeneralName], lifetime: float = 3600.0) -> x509.Certificate:
        return self._sign(public, names, lifetime, ca=False)

    def _sign(self, public: Any, names: list[x509.GeneralName], lifetime: float, *, ca: bool) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fleet of a test")])
        builder = (
            x509.CertificateBuilder()
            .subject_name(issuer if ca else x509.Name([]))
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(seconds=lifetime))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        return builder.sign(self.key, hashes.SHA256())

    def pair(self, name: x509.GeneralName) -> tuple[bytes, bytes]:
        """Returns key and certificate in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        return private_pem(key), self.issue(key.public_key(), [name]).public_bytes(PEM)


class FakeManager(rpc.HostLinkServicer):
    """What it heard is in `guests`, `results` and `exchanges`; what it is to give in `pending`."""

    def __init__(self) -> None:
        self.ca, self.root = Ca(), Ed25519PrivateKey.generate()
        self.root_public = raw_public(self.root.public_key())
        self.secret = os.urandom(32)
        self.lifetime = 3600.0  #: of identity certificates
        self.knows_secret = True  #: proves it
        self.used_by: bytes = b""
        self.host_key = b""
        self.joins: list[pb.JoinRequest] = []
        self.renewals: list[bytes] = []
        self.guests: dict[str, pb.GuestReport] = {}
        self.seen: dict[str, float] = {}  #: when a guest was told last
        self.results: dict[str, list[pb.CommandResult]] = {}
        self.exchanges: list[pb.ExchangeRequest] = []
        self.pending: list[pb.HostCommand] = []
        self.keep_giving = False  #: also what it has a result of
        self.tell_all = False
        self.refuse: dict[str, str] = {}
        self.on_exchange: Callable[[pb.ExchangeRequest], None] = lambda request: None
        self.serials: list[int] = []  #: of the certificates of those who called, as they changed
        self.one_certificate = False  #: one that was replaced by a newer one counts no more
        self._session = ""
        self._news = threading.Condition()
        self._key, self._certificate = self.ca.pair(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        self.port = self.join_port = 0

    # ---- life -----------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """At the same ports again, when it was stopped."""
        self._server = grpc.server(ThreadPoolExecutor(16), options=_OPTIONS)
        rpc.add_HostLinkServicer_to_server(self, self._server)
        pair, root = [(self._key, self._certificate)], self.ca.root.public_bytes(PEM)
        mutual = grpc.ssl_server_credentials(pair, root, require_client_auth=True)
        self.port = self._server.add_secure_port(f"127.0.0.1:{self.port}", mutual)
        self.join_port = self._server.add_secure_port(f"127.0.0.1:{self.join_port}", grpc.ssl_server_credentials(pair))
        self._server.start()
        return self

    def stop(self) -> None:
        self._server.stop(None).wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def settings(self) -> str:
        """For a host's configuration."""
        return f"[manager]\nports = [{self.port}, {self.join_port}]\n"

    def token(self, secret: bytes | None = None) -> str:
        der = self.ca.root.public_bytes(DER)
        return JoinToken((f"127.0.0.1:{self.join_port}",), (der,), self.secret if secret is None else secret).text()

    # ---- HostLink ---------------------------------------------------------------------------------------------------

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinResponse:
        statement = JoinStatement(request.name, request.host_key, request.csr, request.nonce)
        check(request.signature, statement.encode(), request.host_key, "statement")
        self.joins.append(request)
        certified = bool(context.auth_context().get("x509_pem_cert"))
        if not certified and request.proof != join_proof(self.secret, "host", statement):
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no join token fits this proof")
        if not certified and self.used_by not in (b"", request.request_id.encode()):
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "this join token was used already")
        self.used_by, self.host_key = request.request_id.encode(), request.host_key
        secret = self.secret if self.knows_secret else b"guessed"
        return pb.JoinResponse(
            certificates=[self._issue(request.csr)],
            authorities=[self.ca.root.public_bytes(DER)],
            root=self.root_public,
            proof=b"" if certified else join_proof(secret, "manager", statement, self.root_public),
            host=fingerprint(request.host_key).hex(),
            addresses=[f"127.0.0.1:{self.port}"],
        )

    def RenewIdentity(self, request: pb.RenewIdentityRequest, context: grpc.ServicerContext) -> pb.RenewIdentityResponse:
        self._enter(context)
        self.renewals.append(request.csr)
        return pb.RenewIdentityResponse(certificates=[self._issue(request.csr)])

    def Exchange(self, request: pb.ExchangeRequest, context: grpc.ServicerContext) -> pb.ExchangeResponse:
        self._enter(context)
        self.on_exchange(request)
        context.add_callback(self._wake)
        with self._news:
            self.exchanges.append(request)
            tell_all, self.tell_all = self.tell_all or (self._session != request.session and not request.all), False
            if request.all:
                self._session = request.session
                self.guests.clear()
            if not tell_all:
                self._take(request)
            end = time.monotonic() + request.wait_seconds
            while not self.pending and not tell_all and context.is_active() and time.monotonic() < end:
                self._news.wait(end - time.monotonic())
                tell_all, self.tell_all = self.tell_all, False
            refused = [pb.RefusedGuest(name=g.name, reason=self.refuse[g.name]) for g in request.guests if g.name in self.refuse]
            return pb.ExchangeResponse(tell_all=tell_all, commands=self.pending, heartbeat_seconds=20, refused=refused)

    def _take(self, request: pb.ExchangeRequest) -> None:
        for guest in request.guests:
            self.guests[guest.name], self.seen[guest.name] = guest, time.monotonic()
        for name in request.gone:
            self.guests.pop(name, None)
        for result in request.results:
            self.results.setdefault(result.id, []).append(result)
            if not result.again and not self.keep_giving:
                self.pending = [command for command in self.pending if command.id != result.id]
        self._news.notify_all()

    def _enter(self, context: grpc.ServicerContext) -> None:
        serial = x509.load_pem_x509_certificate(context.auth_context()["x509_pem_cert"][0]).serial_number
        if self.serials[-1:] != [serial]:
            if self.one_certificate and serial in self.serials:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "this certificate was replaced")
            self.serials.append(serial)

    def _issue(self, csr: bytes) -> bytes:
        asked = x509.load_der_x509_csr(csr)
        assert asked.is_signature_valid
        names = list(asked.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        assert all(str(name.value).startswith(HOST_URI) for name in names)
        return self.ca.issue(asked.public_key(), names, self.lifetime).public_bytes(DER)

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    # ---- what a test does -------------------------------------------------------------------------------------------

    def give(self, *commands: pb.HostCommand) -> None:
        with self._news:
            self.pending += commands
            self._news.notify_all()

    def ask_for_all(self) -> None:
        with self._news:
            self.tell_all = True
            self._news.notify_all()

    def heard(self, name: str, holds: Callable[[pb.GuestReport], bool] = lambda report: True, within: float = 10) -> pb.GuestReport:
        """Returns the report of a guest once it is as wanted."""

        def look() -> pb.GuestReport | None:
            report = self.guests.get(name)
            return report if report is not None and holds(report) else None

        found: pb.GuestReport = wait_for(look, within, f"the report of {name}")
        return found

    def result(self, id: str, number: int = 0, within: float = 10) -> pb.CommandResult:
        """Returns what was told of a command, for the `number`-th time."""
        wait_for(lambda: len(self.results.get(id, ())) > number, within, f"result {number} of {id}")
        return self.results[id][number]

    def write_token(self, path: Path) -> Path:
        path.write_text(self.token())
        return path
