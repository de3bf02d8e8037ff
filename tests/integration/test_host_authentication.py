"""Who is calling, shown on real listeners: peer credentials, mutual TLS, signed requests; and the roles they bring."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hsmvisor.client import SigningKey, TlsFiles, connect
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc
from hsmvisor_rpc.v1 import request_signing
from support import other_user
from support.guest import free_port
from support.host_process import HostProcess, new_id, reason, wait_for

C = grpc.StatusCode
SECRET = bytes(range(32))


class Listening(HostProcess):
    """A host with every listener, and the files to reach it by."""

    def __init__(self) -> None:
        super().__init__()
        self.ca, self.strangers = trustme.CA(), trustme.CA()
        files = self.directory
        server = self.ca.issue_cert("localhost")
        server.private_key_pem.write_to_path(files / "host.key")
        for i, blob in enumerate(server.cert_chain_pems):
            blob.write_to_path(files / "host.crt", append=i > 0)
        self.ca.cert_pem.write_to_path(files / "ca.crt")
        self.certificate("manager.test", self.ca)
        self.certificate("nobody.test", self.ca)
        self.certificate("stranger.test", self.strangers)
        (files / "hmac.key").write_text(SECRET.hex())
        (files / "hmac.key").chmod(0o600)
        self.private = Ed25519PrivateKey.generate()
        (files / "robot.pem").write_bytes(self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        public = self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (files / "robot.pub").write_bytes(public)
        self.tls_port, self.signed_port = free_port(), free_port()
        self.configure(self.settings())

    def settings(self, roles: str = '["auditor"]') -> str:
        d = self.directory
        return f"""
            [control]
            socket_mode = 0o666
            [[control.allow]]
            uid = 65534
            roles = ["auditor"]
            [tls]
            address = "127.0.0.1:{self.tls_port}"
            certificate = "{d}/host.crt"
            key = "{d}/host.key"
            client_ca = "{d}/ca.crt"
            [[tls.clients]]
            san = "manager.test"
            roles = ["manager"]
            [signed]
            address = "127.0.0.1:{self.signed_port}"
            certificate = "{d}/host.crt"
            key = "{d}/host.key"
            [[signed.keys]]
            name = "shared"
            kind = "hmac"
            file = "{d}/hmac.key"
            roles = ["operator"]
            [[signed.keys]]
            name = "robot"
            kind = "ed25519"
            file = "{d}/robot.pub"
            roles = {roles}
            [metrics]
            address = "127.0.0.1:0"
        """

    def certificate(self, name: str, ca: trustme.CA) -> None:
        made = ca.issue_cert(name)
        made.private_key_pem.write_to_path(self.directory / f"{name}.key")
        for i, blob in enumerate(made.cert_chain_pems):
            blob.write_to_path(self.directory / f"{name}.crt", append=i > 0)

    def tls(self, name: str) -> grpc.Channel:
        d = self.directory
        files = TlsFiles(d / "ca.crt", d / f"{name}.crt" if name else None, d / f"{name}.key" if name else None, "localhost")
        return connect(f"127.0.0.1:{self.tls_port}", tls=files)

    def signed(self, key: SigningKey | None) -> grpc.Channel:
        return connect(
            f"127.0.0.1:{self.signed_port}", tls=TlsFiles(self.directory / "ca.crt", server_name="localhost"), signing=key
        )


@pytest.fixture(scope="module")
def host() -> Iterator[Listening]:
    with Listening() as host:
        host.directory.chmod(0o755)
        yield host


def about(channel: grpc.Channel) -> pb.Host:
    with channel:
        return rpc.HostServiceStub(channel).GetHost(pb.GetHostRequest(), timeout=5)


def refusal(channel: grpc.Channel) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        about(channel)
    return reason(caught.value)


# ---- peer credentials -----------------------------------------------------------------------------------------------

AS_NOBODY = """
import os, sys, grpc
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
from hsmvisor.client import connect
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb, hsmvisor_pb2_grpc as rpc
channel = connect("unix:" + sys.argv[1])
answer = rpc.HostServiceStub(channel).GetHost(pb.GetHostRequest())
print(answer.caller.split()[0], *answer.roles)
try:
    rpc.ModuleServiceStub(channel).DestroyModule(pb.DestroyModuleRequest(request_id="1", name="x"))
except grpc.RpcError as error:
    print(error.code().name)
try:
    connect("unix:" + sys.argv[2]).unary_unary("/x/y")(b"", timeout=3)
except grpc.RpcError as error:
    print(error.code().name, "Permission denied" in error.details())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
def test_another_local_user_has_the_roles_that_the_configuration_gives(host: Listening) -> None:
    python, sources = other_user.python()
    command = [python, "-c", AS_NOBODY, str(host.socket), str(host.run / "private/grpc.sock")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": sources}, capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines() == ["uid:65534 auditor", "PERMISSION_DENIED", "UNAVAILABLE True"], done.stderr


def test_the_inner_socket_is_for_nobody(host: Listening) -> None:
    assert refusal(connect(f"unix:{host.run}/private/grpc.sock")) == (C.UNAUTHENTICATED, "PEER")
    assert oct((host.run / "private").stat().st_mode & 0o777) == "0o700"


# ---- mutual TLS -----------------------------------------------------------------------------------------------------


def test_a_client_certificate_brings_its_roles(host: Listening) -> None:
    answer = about(host.tls("manager.test"))
    assert list(answer.roles) == ["manager"]
    assert answer.caller.startswith("cert:")


def test_a_certificate_that_no_row_names_has_no_roles(host: Listening) -> None:
    assert list(about(host.tls("nobody.test")).roles) == []
    with host.tls("nobody.test") as channel, pytest.raises(grpc.RpcError) as caught:
        rpc.ModuleServiceStub(channel).ListModules(pb.ListModulesRequest(), timeout=5)
    assert reason(caught.value) == (C.PERMISSION_DENIED, "ROLE")


@pytest.mark.parametrize("name", ["stranger.test", ""])
def test_a_stranger_or_none_does_not_pass_the_handshake(host: Listening, name: str) -> None:
    with host.tls(name) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc.HostServiceStub(channel).GetHost(pb.GetHostRequest(), timeout=5)
    assert caught.value.code() == C.UNAVAILABLE


# ---- signed requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared", "robot"])
def test_a_signed_request_brings_its_keys_roles(host: Listening, name: str) -> None:
    key = SigningKey("shared", SECRET) if name == "shared" else SigningKey.load(host.directory / "robot.pem")
    answer = about(host.signed(key))
    assert (answer.caller, list(answer.roles)) == (f"key:{name}", ["operator"] if name == "shared" else ["auditor"])


def test_streams_can_be_signed_too(host: Listening) -> None:
    with host.signed(SigningKey.load(host.directory / "robot.pem")) as channel:
        assert list(rpc.AuditServiceStub(channel).ExportAudit(pb.ExportAuditRequest(limit=1), timeout=5))


def test_break_glass_is_for_an_operator_on_the_host_itself(host: Listening) -> None:
    asked = pb.BreakGlassRequest(request_id=new_id(), name="glass", new_root=host.root_public, empty_it=True)
    with host.signed(SigningKey("shared", SECRET)) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc.ModuleServiceStub(channel).BreakGlass(asked, metadata=(("hsmvisor-why", "a test"),), timeout=10)
    assert reason(caught.value) == (C.PERMISSION_DENIED, "LOCAL")


def test_an_unsigned_request_is_nobodys(host: Listening) -> None:
    assert refusal(host.signed(None)) == (C.UNAUTHENTICATED, "CALLER")


def test_a_wrong_key_and_an_unknown_one_are_refused_alike(host: Listening) -> None:
    assert refusal(host.signed(SigningKey("shared", bytes(32)))) == (C.UNAUTHENTICATED, "SIGNATURE")
    assert refusal(host.signed(SigningKey("none", SECRET))) == (C.UNAUTHENTICATED, "SIGNATURE")
    assert refusal(host.signed(SigningKey("robot", SECRET))) == (C.UNAUTHENTICATED, "SIGNATURE")


def raw(host: Listening, body: bytes, metadata: list[tuple[str, str]], method: str = "CreateModule") -> bytes:
    with host.signed(None) as channel:
        return channel.unary_unary(f"/hsmvisor.v1.ModuleService/{method}")(body, metadata=metadata, timeout=5)


def test_an_altered_body_method_or_time_is_refused(host: Listening) -> None:
    key, method = SigningKey("shared", SECRET), "/hsmvisor.v1.ModuleService/CreateModule"
    body = pb.CreateModuleRequest(request_id=new_id(), name="signed", root=host.root_public).SerializeToString()
    metadata = key.metadata(method, body)
    later = [(k, str(int(v) + 1) if k == request_signing.TIME else v) for k, v in metadata]
    without_nonce = [row for row in metadata if row[0] != request_signing.NONCE]
    other = body.replace(b"signed", b"signer")
    for wrong in ((other, metadata), (body, later), (body, without_nonce), (body, metadata, "DestroyModule")):
        with pytest.raises(grpc.RpcError) as caught:
            raw(host, *wrong)
        assert reason(caught.value) == (C.UNAUTHENTICATED, "SIGNATURE")
    assert pb.Module.FromString(raw(host, body, metadata)).name == "signed"


def test_a_replay_is_refused_also_after_a_restart() -> None:
    with Listening() as host:
        key = SigningKey("shared", SECRET)
        body = pb.ListModulesRequest().SerializeToString()
        metadata = key.metadata("/hsmvisor.v1.ModuleService/ListModules", body)
        raw(host, body, metadata, "ListModules")
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as caught:
                raw(host, body, metadata, "ListModules")
            assert reason(caught.value) == (C.UNAUTHENTICATED, "REQUEST_REPLAY")
            host.restart()
        lines = [json.loads(line) for line in host.audit_lines()]
        assert [v["reason"] for v in lines if v["kind"] == "call.refused"] == ["REQUEST_REPLAY"] * 2


@pytest.mark.parametrize("shift", [-3600, 3600])
def test_a_late_or_early_request_is_refused(host: Listening, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsmvisor.client.signing.time", SimpleNamespace(time=lambda: time.time() + shift))
    assert refusal(host.signed(SigningKey("shared", SECRET))) == (C.UNAUTHENTICATED, "REQUEST_TIME")


# ---- the rest -------------------------------------------------------------------------------------------------------


def test_roles_and_keys_are_read_again_on_sighup(host: Listening) -> None:
    robot = SigningKey.load(host.directory / "robot.pem")
    assert list(about(host.signed(robot)).roles) == ["auditor"]
    host.configure(host.settings('["manager", "operator"]'))
    assert host.process is not None
    host.process.send_signal(1)
    wait_for(lambda: list(about(host.signed(robot)).roles) == ["manager", "operator"])
    host.config.write_text("nonsense")
    host.process.send_signal(1)
    wait_for(lambda: "the old configuration stays" in host.log.read_text())
    host.configure(host.settings('["manager", "operator"]'))
    assert list(about(host.signed(robot)).roles) == ["manager", "operator"]


def test_a_renewed_server_certificate_is_used_at_once(host: Listening) -> None:
    other = trustme.CA()
    made = other.issue_cert("localhost")
    old = (host.directory / "host.key").read_bytes(), (host.directory / "host.crt").read_bytes()
    made.private_key_pem.write_to_path(host.directory / "host.key")
    made.cert_chain_pems[0].write_to_path(host.directory / "host.crt")
    other.cert_pem.write_to_path(host.directory / "ca2.crt")
    key = SigningKey("shared", SECRET)
    files = TlsFiles(host.directory / "ca2.crt", server_name="localhost")
    assert about(connect(f"127.0.0.1:{host.signed_port}", tls=files, signing=key)).caller == "key:shared"
    (host.directory / "host.key").write_bytes(old[0])
    (host.directory / "host.crt").write_bytes(old[1])


def test_files_that_cannot_be_used_are_named(host: Listening) -> None:
    d = host.directory
    good = TlsFiles(d / "ca.crt", d / "manager.test.crt", d / "manager.test.key", "localhost")
    connect("localhost:1", tls=good).close()
    for files, says in (
        (replace(good, key=d / "nobody.test.key"), "not the key of the certificate"),
        (replace(good, key=d / "ca.crt"), "not an unencrypted private key"),
        (replace(good, ca=d / "manager.test.key"), "not a certificate"),
        (replace(good, key=None), "come together"),
    ):
        with pytest.raises(ValueError, match=says):
            connect("localhost:1", tls=files)


@pytest.mark.parametrize(
    ("address", "options"),
    [("host", {}), ("host:1", {}), ("host:x", {}), ("unix:/x", {"tls": TlsFiles(Path("/x"))}), ("", {})],
)
def test_addresses_that_cannot_be(address: str, options: dict[str, TlsFiles]) -> None:
    with pytest.raises(ValueError):
        connect(address, **options)  # type: ignore[arg-type]


def test_signing_keys_show_nothing_and_are_checked(tmp_path: Path) -> None:
    assert SECRET.hex() not in repr(SigningKey("a", SECRET)) and "bytes" not in repr(SigningKey("a", SECRET))
    with pytest.raises(ValueError, match="at least 32"):
        SigningKey("a", b"short")
    (tmp_path / "bad.key").write_text("not hex")
    with pytest.raises(ValueError, match="hexadecimal"):
        SigningKey.load(tmp_path / "bad.key")
