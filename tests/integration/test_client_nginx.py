"""nginx serves TLS 1.2 and 1.3 from 4 forked workers with an EC and an RSA key in the module."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from support.certificates import Authority, chain_pem, new_key
from support.guest import Guest, wait_for
from support.host import Module
from support.nginx import Nginx, client_context, handshake
from support.own_slot import OwnSlot

pytestmark = pytest.mark.real
AUTHORITY = Authority()


@pytest.fixture
def nginx(guest: Guest, module: Module) -> Iterator[Nginx]:
    certificates = []
    for name, kind in (("web-ec", "p256"), ("web-rsa", "rsa2048")):
        key = new_key(kind)
        chain = AUTHORITY.chain(key)
        module.push(name, key, chain, profile="tls")
        certificates.append(
            (guest.write(f"{name}.pem", chain_pem(chain)), f"pkcs11:token={module.name};object={name};type=private")
        )
    nginx = Nginx(guest, certificates)
    yield nginx
    nginx.stop()


def test_all_workers_serve_both_keys_and_versions(nginx: Nginx) -> None:
    contexts = {
        ("TLSv1.2", ec.EllipticCurvePublicKey): client_context(AUTHORITY.root_pem, "TLSv1.2", "ECDHE-ECDSA-AES128-GCM-SHA256"),
        ("TLSv1.2", rsa.RSAPublicKey): client_context(AUTHORITY.root_pem, "TLSv1.2", "ECDHE-RSA-AES128-GCM-SHA256"),
        ("TLSv1.3", ec.EllipticCurvePublicKey): client_context(AUTHORITY.root_pem, "TLSv1.3"),
    }
    workers = set()
    for _ in range(25):
        for (version, kind), context in contexts.items():
            leaf, spoken, worker = handshake(nginx.port, context)
            assert spoken == version
            assert isinstance(x509.load_der_x509_certificate(leaf).public_key(), kind)
            workers.add(worker)
    assert len(workers) >= 2, "one worker did all the work"


def test_a_worker_that_was_killed_is_replaced_and_serves(nginx: Nginx) -> None:
    """The new worker is forked from the master long after it loaded the library."""
    context = client_context(AUTHORITY.root_pem)
    victim = handshake(nginx.port, context)[2]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: nginx.log.read_text().count("start worker process ") == 5, "a new worker")
    for _ in range(20):
        assert handshake(nginx.port, context)[2] != victim


def test_reload_forks_new_workers(nginx: Nginx) -> None:
    context = client_context(AUTHORITY.root_pem)
    before = {handshake(nginx.port, context)[2] for _ in range(8)}
    nginx.reload()
    wait_for(lambda: handshake(nginx.port, context)[2] not in before, "a new worker")
    for _ in range(20):
        handshake(nginx.port, context)


def test_serves_with_a_key_of_the_guests_own(own: OwnSlot) -> None:
    """The PIN stands in the URI: each of the forked workers logs in with it."""
    chain = chain_pem((AUTHORITY.issue_for(own.generate("EC:prime256v1", "web", "01")), AUTHORITY.intermediate))
    nginx = Nginx(own.guest, [(own.guest.write("web.pem", chain), own.uri("web", pin=True))])
    try:
        workers = set()
        for version in ("TLSv1.2", "TLSv1.3") * 15:
            _, spoken, worker = handshake(nginx.port, client_context(AUTHORITY.root_pem, version))
            assert spoken == version
            workers.add(worker)
        assert len(workers) >= 2, "one worker did all the work"
    finally:
        nginx.stop()
