"""Keys that modules make themselves, on a real host: request, certificate, clients; kills; where such a key is not."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from hsmvisor.authority import Bundle, Staging
from hsmvisor.authority.csr import CertificateRequest
from hsmvisor.cli.context import FAILURE, NOT_FOUND, REFUSED
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import Authority, PrivateKey, chain_pem, new_key
from support.command import Command
from support.guest import Guest
from support.guest import library as library_named
from support.host import SETTINGS, Host, Module
from support.host_hsm import HostHsm
from support.host_process import new_id, reason
from support.leaks import Needles
from support.nginx import Nginx, client_context, handshake
from support.processes import titled
from support.shell import Shell
from support.unsealing import private_keys

pytestmark = pytest.mark.real
AUTHORITY = Authority()
NAMES = ("dns:localhost", "ip:127.0.0.1")
_numbers = itertools.count(1)


@dataclass
class Place:
    host: Host
    hsm: HostHsm


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    hsm = HostHsm(tmp_path_factory.mktemp("rack") / "hsm")
    with Host(SETTINGS + hsm.settings()) as host:
        yield Place(host, hsm)


@pytest.fixture(params=["software", "rack"])
def module(place: Place, request: pytest.FixtureRequest) -> Iterator[Module]:
    """Of each kind: a module with its keys in its worker, and one with them in an HSM."""
    module = place.host.create(f"made-{next(_numbers)}", cryptoprocessor="" if request.param == "software" else request.param)
    yield module
    module.destroy()


def generate(module: Module, key_type: str = "P-256", material: str = "web", **staging: Any) -> tuple[int, bytes]:
    """Returns the generation and the request."""
    pusher = module.host.pusher
    generation = pusher.next_generation(module.name, material)
    wanted = Staging(**({"profile": "any"} | staging))
    return generation, pusher.generate(module.name, material, key_type, NAMES, wanted, generation).csr


def issued(csr: bytes) -> bytes:
    """What an authority makes of a request: a chain in PEM."""
    public: Any = x509.load_der_x509_csr(csr).public_key()
    return chain_pem((AUTHORITY.issue_for(public), AUTHORITY.intermediate))


def certify(module: Module, generation: int, csr: bytes, material: str = "web") -> None:
    module.host.pusher.certify(module.name, material, generation, Bundle.make(None, issued(csr)))
    module.activate(material, generation)


def signs(client: Shell, csr: bytes, label: str = "web") -> bool:
    """Says that an application's signature is that of the request's key."""
    public = x509.load_der_x509_csr(csr).public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    raw = bytes.fromhex(client.tell("sign", client.private(label)))
    half = len(raw) // 2
    signature = encode_dss_signature(int.from_bytes(raw[:half]), int.from_bytes(raw[half:]))
    public.verify(signature, b"message", ec.ECDSA(SHA256()))
    return True


@pytest.fixture
def guest(module: Module, tmp_path: Path) -> Guest:
    return Guest(library_named("ours"), module.address, tmp_path)


# ---- the way of a key ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_type", ["P-256", "RSA-2048", "Ed25519"])
def test_a_request_comes_out_and_a_certificate_goes_in(module: Module, key_type: str) -> None:
    generation, csr = generate(module, key_type)
    command = ["openssl", "req", "-inform", "DER", "-verify", "-noout"]
    said = subprocess.run(command, input=csr, capture_output=True, check=True)
    assert b"verify OK" in said.stdout + said.stderr
    request = CertificateRequest.read(csr)
    assert (request.key_type, request.names) == (key_type, NAMES)
    (shown,) = module.material("web").generations
    assert (shown.state, shown.public_key, shown.csr, list(shown.certificates)) == ("staged", request.public_key, csr, [])
    with pytest.raises(grpc.RpcError) as caught:
        foreign = chain_pem(AUTHORITY.chain(new_key("p256")))
        module.host.pusher.certify(module.name, "web", generation, Bundle.make(None, foreign))
    assert reason(caught.value)[1] == "KEY_MISMATCH"
    certify(module, generation, csr)
    assert module.states("web") == {generation: "current"}


def test_an_application_signs_with_it_and_sees_that_it_was_made_there(place: Place, module: Module, guest: Guest) -> None:
    generation, csr = generate(module)
    with Shell(guest) as client:
        client.tell("open")
        assert client.find() == [], "staged: nobody sees it"
        certify(module, generation, csr)
        client.tell("open")
        handle = client.private("web")
        assert signs(client, csr)
        said = {name: client.tell("get", handle, name) for name in ("LOCAL", "SENSITIVE", "EXTRACTABLE", "NEVER_EXTRACTABLE")}
        assert said == {"LOCAL": "01", "SENSITIVE": "01", "EXTRACTABLE": "00", "NEVER_EXTRACTABLE": "01"}
        leaf = client.tell("get", client.one(**{"class": "CERTIFICATE", "label": "web"}), "VALUE")
        assert bytes.fromhex(leaf) == module.material("web").generations[0].certificates[0]
    if module.status().settings.cryptoprocessor:
        (there,) = place.hsm.keys(module.status().module_id)
        told = (there["sensitive"], there["extractable"], there["never_extractable"], there["local"])
        assert told == (True, False, True, True), "the hardware made it, and nothing of it was outside"


def test_nginx_serves_with_it(module: Module, guest: Guest) -> None:
    generation, csr = generate(module, profile="tls")
    certify(module, generation, csr)
    chain = guest.write("web.pem", issued(csr))
    nginx = Nginx(guest, [(chain, f"pkcs11:token={module.name};object=web;type=private")])
    try:
        for version in ("TLSv1.2", "TLSv1.3"):
            leaf, spoken, _ = handshake(nginx.port, client_context(AUTHORITY.root_pem, version))
            assert spoken == version
            shown = x509.load_der_x509_certificate(leaf).public_key()
            assert shown == x509.load_der_x509_csr(csr).public_key()
    finally:
        nginx.stop()


def test_a_renewal_is_a_certificate_for_the_same_key(module: Module) -> None:
    generation, csr = generate(module)
    certify(module, generation, csr)
    pusher = module.host.pusher
    pusher.push(module.name, "web", Bundle.make(None, issued(csr)), Staging(profile="any"))
    second = module.material("web").generations[-1]
    assert (second.state, second.certificate_only, second.csr) == ("current", True, csr)


# ---- once, and for good -------------------------------------------------------------------------------------------------


def test_the_same_call_again_has_the_same_request(module: Module, guest: Guest) -> None:
    """Also of a worker and of a service that was killed meanwhile; and the key is still that of the request."""
    host, kept = module.host, list[pb.ExecuteRequest]()
    execute = host.pusher._materials.Execute
    host.pusher._materials.Execute = lambda r, **more: (kept.append(r), execute(r, **more))[1]  # type: ignore
    generation, csr = generate(module)
    host.pusher._materials.Execute = execute  # type: ignore[method-assign]
    (asked,) = kept
    assert host.process.material.Execute(asked, timeout=10).csr == csr
    pid = module.pid
    os.kill(pid, signal.SIGKILL)
    module.serving(not_pid=pid)
    assert host.process.material.Execute(asked, timeout=10).csr == csr
    host.stop(signal.SIGKILL)
    host.start()
    module.serving()
    answer = host.process.material.Execute(asked, timeout=10)
    assert (answer.csr, answer.action, answer.generation) == (csr, "generate", generation)
    with pytest.raises(grpc.RpcError) as caught:
        host.process.material.Execute(
            pb.ExecuteRequest(request_id=new_id(), module=module.name, signed_command=asked.signed_command), timeout=10
        )
    assert reason(caught.value)[1] == "REPLAY"
    certify(module, generation, csr)
    with Shell(guest) as client:
        assert signs(client, csr)


def test_the_audit_log_says_which_request_came_out(module: Module) -> None:
    generation, csr = generate(module)
    lines = [json.loads(line) for line in module.host.process.audit_lines()]
    told = [line for line in lines if line.get("action") == "generate" and line.get("module") == module.name]
    assert [(line["generation"], line["csr"]) for line in told] == [(generation, hashlib.sha256(csr).hexdigest())]


# ---- where it is not ----------------------------------------------------------------------------------------------------


def unsealed(host: Host, module: Module) -> PrivateKey:
    """Returns the one private key of a module's state, as root of the host could read it with the master key."""
    (key,) = private_keys(host.process.state, module.status().module_id)
    return key


@pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory needs root")
@pytest.mark.parametrize("key_type", ["P-256", "RSA-2048", "Ed25519"])
def test_it_is_in_its_worker_alone(key_type: str) -> None:
    with Host() as host:
        module, other = host.create("owner"), host.create("other")
        generation, csr = generate(module, key_type)
        certify(module, generation, csr)
        key = unsealed(host, module)
        assert key.public_key() == x509.load_der_x509_csr(csr).public_key()
        needles = Needles([key])
        searched = {"supervisor": host.pid(), "other": other.pid}
        searched |= {title: titled(host.pid(), f"hsmvisord: {title}") for title in ("launcher", "key provider")}
        assert {title: needles.in_process(pid) for title, pid in searched.items()} == {title: set() for title in searched}
        assert needles.in_process(module.pid), "the search does not find it where it must be"
        assert needles.in_files(host.process.state, host.process.run, host.authority.directory) == {}
        assert needles.found_in(host.process.log.read_bytes()) == set()


# ---- the command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hsmvisor(place: Place) -> Command:
    return Command(f"unix:{place.host.process.socket}", place.host.authority.directory)


def test_the_commands(hsmvisor: Command, module: Module, tmp_path: Path) -> None:
    words = ("material", "generate", module.name, "tls", "--key-type", "P-256", "--dns", "WWW.example.net", "--ip", "192.0.2.7")
    pem = hsmvisor(*words).encode()
    assert f"hsmvisor material certify {module.name} tls 1 --cert-file FILE --activate" in hsmvisor.errors
    request = x509.load_pem_x509_csr(pem)
    assert request.subject.rfc4514_string() == "CN=www.example.net"
    out = tmp_path / "web.csr"
    assert "waits for its certificate already" in hsmvisor(*words, "--out", out)
    assert out.read_bytes() == pem, "the same again makes no key"
    told = hsmvisor.json(*words)
    assert (told["csr"].encode(), told["generation"], told["already"]) == (pem, 1, True)
    assert told["names"] == ["dns:www.example.net", "ip:192.0.2.7"]
    assert hsmvisor.json(*words, "--again")["generation"] == 2
    assert hsmvisor.json(*words, "--uri", "spiffe://fleet/1")["generation"] == 3, "other names, another key"

    chain = tmp_path / "chain.pem"
    chain.write_bytes(issued(request.public_bytes(serialization.Encoding.DER)))
    put = ("material", "certify", module.name, "tls", "1", "--cert-file", chain)
    hsmvisor("material", "certify", module.name, "tls", "2", "--cert-file", chain, code=REFUSED)
    assert "KEY_MISMATCH" in hsmvisor.errors
    assert "has its certificate and is staged" in hsmvisor(*put)
    assert "is staged already" in hsmvisor(*put)
    assert "is current" in hsmvisor(*put, "--activate")
    assert "is current already" in hsmvisor(*put, "--activate")
    chain.write_bytes(issued(request.public_bytes(serialization.Encoding.DER)))
    hsmvisor(*put, code=REFUSED)
    assert "WRONG_STATE" in hsmvisor.errors
    assert "is current" in hsmvisor("material", "push", module.name, "tls", "--cert", chain), "the renewal"
    hsmvisor("material", "generate", module.name, "tls", "--dns", "no name", code=REFUSED)
    assert "is no host name" in hsmvisor.errors
    hsmvisor("material", "certify", module.name, "tls", "9", "--cert-file", chain, code=NOT_FOUND)


def test_a_redelivery_says_that_such_a_key_is_lost(tmp_path: Path) -> None:
    with Host() as host:
        hsmvisor = Command(f"unix:{host.process.socket}", host.authority.directory)
        hsmvisor("module", "create", "web-1")
        backup = tmp_path / "backup"

        def made(name: str) -> Path:
            told = hsmvisor.json("material", "generate", "web-1", name, "--dns", "www.example.net")
            chain = tmp_path / f"{name}.pem"
            chain.write_bytes(issued(x509.load_pem_x509_csr(told["csr"].encode()).public_bytes(serialization.Encoding.DER)))
            put = ("--cert-file", chain, "--activate")
            hsmvisor("material", "certify", "web-1", name, str(told["generation"]), *put)
            return chain

        hsmvisor("material", "generate", "web-1", "tls", "--dns", "www.example.net", "--out", tmp_path / "csr")
        hsmvisor("backup", "--out", backup)
        chain, other = made("tls"), made("other")
        hsmvisor("material", "push", "web-1", "other", "--cert", other, "--again")
        host.stop(signal.SIGTERM)
        hsmvisor("restore", backup, "--config", host.process.config, "--force")
        host.start()
        done = hsmvisor("material", "redeliver", "web-1", code=FAILURE)
        words = " ".join(done.split())
        assert "its key was made in the module and was nowhere else, so it is lost" in words
        assert "hsmvisor material generate web-1 other" in words
        assert "the module still has the key that it made, in generation 1" in words
        hsmvisor("material", "push", "web-1", "tls", "--cert", chain)
        assert "missing" in hsmvisor("material", "redeliver", "web-1", code=FAILURE), "the other one still is"
        made("other")
        assert "has all" in hsmvisor("material", "redeliver", "web-1")
