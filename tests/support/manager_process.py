"""A manager of a test's own: a real process with its directories under one temporary one; channels of every kind, joining hosts."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hsmvisor.client import TlsFiles, connect
from hsmvisor_rpc.sealed.commands import fingerprint, raw_public
from hsmvisor_rpc.sealed.fleet import HOST_URI, JoinStatement, JoinToken, join_proof
from hsmvisor_rpc.v1 import manager_pb2 as pb
from hsmvisor_rpc.v1 import manager_pb2_grpc as rpc
from support.guest import free_port
from support.host_process import SOURCES, new_id, wait_for


class Bearer(grpc.AuthMetadataPlugin):  # type: ignore[misc]
    """Shows an access token with each call."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, context: Any, callback: Any) -> None:
        callback((("authorization", f"Bearer {self._token}"),), None)


class Stubs:
    """All services over one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.link = rpc.HostLinkStub(channel)
        self.fleet = rpc.FleetServiceStub(channel)
        self.requests = rpc.RequestServiceStub(channel)
        self.policies = rpc.PolicyServiceStub(channel)
        self.authorities = rpc.AuthorityServiceStub(channel)
        self.history = rpc.HistoryServiceStub(channel)

    def who(self) -> pb.WhoAmIResponse:
        return self.fleet.WhoAmI(pb.WhoAmIRequest(), timeout=10)


class ManagerProcess:
    """`settings` is more TOML; `url` of its database, empty: SQLite in its state directory.

    Owners with certificates of `ca`: ann.test (owner ann, group web), operator.test, auditor.test; nobody.test is not configured.
    """

    def __init__(self, settings: str = "", url: str = "", name: str = "one", fleet: Path | None = None) -> None:
        """`fleet`: another manager's STATE/fleet, which is copied."""
        self.directory = Path(tempfile.mkdtemp(prefix="hsmf."))
        self.state, self.run = self.directory / "state", self.directory / "run"
        self.socket, self.config, self.log = self.run / "control.sock", self.directory / "manager.toml", self.directory / "log"
        self.tls_port, self.join_port = free_port(), free_port()
        self.name, self.url, self.settings = name, url, settings
        self.ca = trustme.CA()
        self.ca.cert_pem.write_to_path(self.directory / "owners.pem")
        if fleet is not None:
            shutil.copytree(fleet, self.state / "fleet")
        self.configure()
        self.process: subprocess.Popen[bytes] | None = None
        self._channels: list[grpc.Channel] = []

    def configure(self, more: str = "") -> None:
        database = f'[database]\nurl = "{self.url}"\n' if self.url else ""
        self.config.write_text(
            f"""
            name = "{self.name}"
            state_directory = "{self.state}"
            runtime_directory = "{self.run}"
            {database}
            [tls]
            address = "127.0.0.1:{self.tls_port}"
            names = ["localhost"]
            client_ca = "{self.directory}/owners.pem"
            [join]
            address = "127.0.0.1:{self.join_port}"
            [[clients]]
            san = "ann.test"
            owner = "ann"
            groups = ["web"]
            [[clients]]
            san = "operator.test"
            owner = "otto"
            roles = ["operator"]
            [[clients]]
            san = "auditor.test"
            owner = "audrey"
            roles = ["auditor"]
            [[join_certificates]]
            san = "rack.test"
            host = "rack"
            {self.settings}
            {more}
            """
        )

    # ---- life -------------------------------------------------------------------------------------------------------

    def launch(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "hsmvisor.manager.main", "--config", str(self.config)]
        with open(self.log, "ab") as log:
            environment = os.environ | {"PYTHONPATH": SOURCES}
            return subprocess.Popen(command, env=environment, stderr=log, stdout=log, stdin=subprocess.DEVNULL)

    def start(self) -> Self:
        """Returns when the control API answers."""
        self.process = self.launch()
        wait_for(lambda: self.process.poll() is not None or self._answers(), 30, "the start of the manager")
        assert self.process.poll() is None, self.log.read_text()
        self.local = self.stubs()
        return self

    def refuses_to_start(self, code: int = 1) -> str:
        """Returns what it says."""
        before = len(self.log.read_text()) if self.log.exists() else 0
        assert self.launch().wait(30) == code, self.log.read_text()
        return self.log.read_text()[before:]

    def _answers(self) -> bool:
        if not self.socket.exists():
            return False
        with connect(f"unix:{self.socket}") as channel:
            try:
                Stubs(channel).who()
            except grpc.RpcError:
                return False
        return True

    def stop(self, number: int = signal.SIGTERM) -> int:
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def restart(self, number: int = signal.SIGTERM) -> Self:
        self.stop(number)
        return self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
        shutil.rmtree(self.directory)

    # ---- channels ---------------------------------------------------------------------------------------------------

    def stubs(self) -> Stubs:
        """As a local caller: this process."""
        return self._kept(connect(f"unix:{self.socket}"))

    def _kept(self, channel: grpc.Channel) -> Stubs:
        self._channels.append(channel)
        return Stubs(channel)

    @property
    def authorities(self) -> Path:
        return self.state / "authorities.pem"

    def certified(self, name: str, ca: trustme.CA | None = None) -> Stubs:
        """With a certificate for this name, of the owners' authority or another one."""
        made = (ca or self.ca).issue_cert(name)
        chain = b"".join(part.bytes() for part in made.cert_chain_pems)
        return self.shown(chain, made.private_key_pem.bytes())

    def shown(self, chain: bytes, key: bytes) -> Stubs:
        credentials = grpc.ssl_channel_credentials(self.authorities.read_bytes(), key, chain)
        return self._kept(
            grpc.secure_channel(f"127.0.0.1:{self.tls_port}", credentials, [("grpc.ssl_target_name_override", "localhost")])
        )

    def stranger(self) -> Stubs:
        """Without any certificate, where hosts join."""
        return self._kept(connect(f"127.0.0.1:{self.join_port}", tls=TlsFiles(self.authorities, server_name="localhost")))

    def bearing(self, token: str) -> Stubs:
        """With an access token, where hosts join."""
        tls = grpc.ssl_channel_credentials(self.authorities.read_bytes())
        both = grpc.composite_channel_credentials(tls, grpc.metadata_call_credentials(Bearer(token)))
        return self._kept(
            grpc.secure_channel(f"127.0.0.1:{self.join_port}", both, [("grpc.ssl_target_name_override", "localhost")])
        )

    # ---- what tests often do ----------------------------------------------------------------------------------------

    def join_token(self, host: str = "", request_id: str = "", **more: Any) -> str:
        request = pb.CreateJoinTokenRequest(request_id=request_id or new_id(), host=host, **more)
        return self.local.fleet.CreateJoinToken(request, timeout=10).token

    def token(self, owner: str, *roles: str, **more: Any) -> str:
        request = pb.CreateTokenRequest(request_id=new_id(), owner=owner, roles=roles, **more)
        return self.local.fleet.CreateToken(request, timeout=10).token

    def join(self, name: str) -> JoiningHost:
        host = JoiningHost(name)
        host.join(self)
        return host

    def audit(self) -> str:
        return (self.state / "audit.log").read_text()


@dataclass
class JoiningHost:
    """A host, as far as its manager knows it: keys, and a certificate once it has joined."""

    name: str

    def __post_init__(self) -> None:
        self.identity = Ed25519PrivateKey.generate()
        self.public = raw_public(self.identity.public_key())
        self.id = fingerprint(self.public).hex()
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.chain: tuple[bytes, ...] = ()

    def csr(self) -> bytes:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(HOST_URI + self.id)])
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.DER)

    def request(self, token: str = "") -> pb.JoinRequest:
        statement = JoinStatement(self.name, self.public, self.csr(), os.urandom(32))
        proof = join_proof(JoinToken.parse(token).secret, "host", statement) if token else b""
        signature = self.identity.sign(statement.encode())
        return pb.JoinRequest(
            request_id=new_id(),
            name=self.name,
            host_key=self.public,
            csr=statement.csr,
            nonce=statement.nonce,
            proof=proof,
            signature=signature,
            version="test",
        )

    def join(self, manager: ManagerProcess) -> pb.JoinResponse:
        return self.joined(manager.stranger().link.Join(self.request(manager.join_token(self.name)), timeout=10))

    def joined(self, answer: pb.JoinResponse) -> pb.JoinResponse:
        self.chain = tuple(answer.certificates)
        return answer

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def stubs(self, manager: ManagerProcess) -> Stubs:
        pem = b"".join(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in self.chain)
        return manager.shown(pem, self.key_pem)

    def renew(self, manager: ManagerProcess) -> None:
        """A new key, and a certificate for it."""
        stubs, self.key = self.stubs(manager), ec.generate_private_key(ec.SECP256R1())
        request = pb.RenewIdentityRequest(request_id=new_id(), csr=self.csr())
        self.chain = tuple(stubs.link.RenewIdentity(request, timeout=10).certificates)


_numbers = itertools.count(1)


def exchange(stubs: Stubs, session: str = "s", *, all: bool = True, guests: Sequence[pb.GuestReport] = ()) -> pb.ExchangeResponse:
    request = pb.ExchangeRequest(session=session, number=next(_numbers), all=all, guests=guests, version="test")
    return stubs.link.Exchange(request, timeout=15)


def guest(name: str, owner: str = "ann", **attributes: str) -> pb.GuestReport:
    return pb.GuestReport(name=name, kind="VM", owner=owner, attributes=attributes)
