"""What a guest's application sees of generations: pinned handles, views, roll-back, renewal, the end of a drain, alias
ids, forks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from cryptography import x509
from support.certificates import DER, Authority, chain_pem, key_id, new_key
from support.guest import Guest
from support.host import Module
from support.nginx import Nginx, client_context, handshake
from support.shell import CkFailure, Shell

pytestmark = pytest.mark.real
AUTHORITY = Authority()


@pytest.fixture
def shell(guest: Guest, module: Module) -> Iterator[Shell]:
    with Shell(guest) as shell:
        yield shell


def test_a_handle_stays_with_its_generation(shell: Shell, module: Module) -> None:
    old, new = new_key("p256"), new_key("p256")
    module.push("web", old, AUTHORITY.chain(old))
    held = shell.private("web")
    module.push("web", new, AUTHORITY.chain(new))
    assert shell.signs_with(held, old)
    shell.tell("open")
    fresh = shell.private("web")
    assert shell.tell("get", fresh, "ID") == key_id(new).hex()
    assert shell.signs_with(fresh, new)
    assert shell.signs_with(held, old)
    assert shell.signs_with(shell.one(**{"class": "PRIVATE_KEY", "id": key_id(old).hex()}), old)


def test_key_and_certificate_change_as_one_within_a_view(shell: Shell, module: Module) -> None:
    old, new = new_key("p256"), new_key("p256")
    module.push("web", old, AUTHORITY.chain(old))
    first = {ident for _, _, ident in shell.find(label="web")}
    module.push("web", new, AUTHORITY.chain(new))
    assert {ident for _, _, ident in shell.find(label="web")} == first == {key_id(old).hex()}
    time.sleep(2.2)  # a search that comes more than 2 s after the last one moves the view on
    assert {ident for _, _, ident in shell.find(label="web")} == {key_id(new).hex()}
    assert len(shell.find(label="web")) == 3


def test_roll_back(shell: Shell, module: Module) -> None:
    old, new = new_key("p256"), new_key("p256")
    first = module.push("web", old, AUTHORITY.chain(old))
    module.push("web", new, AUTHORITY.chain(new))
    shell.tell("open")
    held = shell.private("web")
    assert shell.signs_with(held, new)
    module.host.pusher.roll_back(module.name, "web", first)
    assert "current" in module.states("web").values()
    shell.tell("open")
    assert shell.signs_with(shell.private("web"), old)
    assert shell.signs_with(held, new), "the newer generation drains like any other"


def test_certificate_only_renewal_keeps_the_key(shell: Shell, module: Module) -> None:
    key = new_key("p256")
    before, after = AUTHORITY.chain(key), AUTHORITY.chain(key)
    module.push("web", key, before)
    held = shell.private("web")
    certificate = {"class": "CERTIFICATE", "label": "web"}
    assert shell.tell("get", shell.one(**certificate), "VALUE") == before[0].public_bytes(DER).hex()
    module.push("web", None, after)
    shell.tell("open")
    assert shell.signs_with(held, key)
    again = shell.private("web")
    assert shell.tell("get", again, "ID") == key_id(key).hex()
    assert shell.tell("get", shell.one(**certificate), "VALUE") == after[0].public_bytes(DER).hex()
    exact = shell.one(**{"class": "CERTIFICATE", "value": before[0].public_bytes(DER).hex()})
    assert shell.tell("get", exact, "ID") == key_id(key).hex(), "an exact search finds the retiring certificate too"


def test_destroy_ends_a_drain_at_once(shell: Shell, module: Module) -> None:
    old, new = new_key("p256"), new_key("p256")
    first = module.push("web", old, AUTHORITY.chain(old))
    held = shell.private("web")
    module.push("web", new, AUTHORITY.chain(new))
    assert shell.signs_with(held, old)
    module.destroy_generation("web", first)
    with pytest.raises(CkFailure, match=r"C_Sign.* 0x60$"):
        shell.tell("sign", held)
    shell.tell("open")
    assert shell.signs_with(shell.private("web"), new)
    assert shell.find(id=key_id(old).hex()) == []


def test_retire_with_refuse_ends_a_drain_when_its_time_is_over(shell: Shell, module: Module) -> None:
    old, new = new_key("p256"), new_key("p256")
    first = module.push("web", old, AUTHORITY.chain(old))
    held = shell.private("web")
    module.push("web", new, AUTHORITY.chain(new))
    module.host.pusher.retire(module.name, "web", first, drain_seconds=1, after_drain="refuse")
    time.sleep(2.5)
    with pytest.raises(CkFailure, match=r"C_Sign.* 0x60$"):
        shell.tell("sign", held)
    shell.tell("open")
    assert shell.signs_with(shell.private("web"), new)


def test_an_alias_id_finds_the_current_generation(shell: Shell, module: Module) -> None:
    old, new = new_key("p256"), new_key("p256")
    by_alias = {"class": "PRIVATE_KEY", "id": "01"}
    module.push("web", old, AUTHORITY.chain(old), alias_id=b"\x01")
    held = shell.one(**by_alias)
    assert shell.tell("get", held, "ID") == key_id(old).hex(), "an alias is matched, never returned"
    module.push("web", new, AUTHORITY.chain(new), alias_id=b"\x01")
    shell.tell("open")
    assert shell.signs_with(shell.one(**by_alias), new)
    assert shell.signs_with(held, old)


def test_follow_is_one_handle_for_all_generations(shell: Shell, module: Module) -> None:
    old, new = new_key("p256"), new_key("p256")
    module.push("requests", old, mode="follow", profile="request-signing")
    held = shell.private("requests")
    assert shell.signs_with(held, old)
    module.push("requests", new, mode="follow", profile="request-signing")
    assert shell.signs_with(held, new)
    shell.tell("open")
    assert shell.signs_with(shell.private("requests"), new)


def test_a_child_after_fork_finds_and_signs(shell: Shell, module: Module, guest: Guest) -> None:
    old, new = new_key("p256"), new_key("p256")
    module.push("web", old, AUTHORITY.chain(old))
    assert shell.signs_with(shell.private("web"), old)
    module.push("web", new, AUTHORITY.chain(new))
    parent = shell.process.pid
    assert shell.tell("fork") != parent
    # Our library tells the module whose child this is: it has its parent's view.  p11-kit's cannot.
    seen, other = (old, new) if guest.library.ours else (new, old)
    ((by_class, _, ident),) = shell.find(**{"class": "PRIVATE_KEY"})
    assert ident == key_id(seen).hex()
    assert shell.signs_with(by_class, seen)
    assert shell.signs_with(shell.one(**{"class": "PRIVATE_KEY", "id": key_id(other).hex()}), other)
    time.sleep(2.2)
    ((_, _, ident),) = shell.find(**{"class": "PRIVATE_KEY"})
    assert ident == key_id(new).hex(), "a search after a pause sees the newest"


def test_a_forked_worker_of_nginx_keeps_the_key_of_its_old_certificate(guest: Guest, module: Module) -> None:
    """libp11 searches by class in the child and compares ids for itself; the certificate file is the one before the rotation."""
    old, new = new_key("p256"), new_key("p256")
    chain = AUTHORITY.chain(old)
    module.push("web", old, chain, profile="tls")
    nginx = Nginx(guest, [(guest.write("web.pem", chain_pem(chain)), f"pkcs11:token={module.name};object=web;type=private")])
    context = client_context(AUTHORITY.root_pem)
    try:
        for _ in range(8):
            handshake(nginx.port, context)
        module.push("web", new, AUTHORITY.chain(new), profile="tls")
        time.sleep(2.2)
        workers = {handshake(nginx.port, context)[2] for _ in range(16)}
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        time.sleep(0.5)
        for _ in range(16):
            leaf, _, worker = handshake(nginx.port, context)
            assert worker not in workers
            assert x509.load_der_x509_certificate(leaf).public_key() == old.public_key()
    finally:
        nginx.stop()


def test_no_c_wrap_key_and_no_c_copy_object(shell: Shell, module: Module) -> None:
    """python-pkcs11 will not even ask; these are the bare calls."""
    rsa, curve = new_key("rsa2048"), new_key("p256")
    module.push("rsa", rsa, AUTHORITY.chain(rsa))
    module.push("ec", curve, AUTHORITY.chain(curve))
    public = shell.one(**{"class": "PUBLIC_KEY", "label": "rsa"})
    for label in ("rsa", "ec"):
        private = shell.private(label)
        for mechanism in (0x1, 0x3, 0x9):  # CKM_RSA_PKCS, CKM_RSA_X_509, CKM_RSA_PKCS_OAEP
            for wrapping in (public, shell.private("rsa")):
                with pytest.raises(CkFailure, match=r"C_WrapKey 0x"):
                    shell.tell("wrap", private, wrapping, mechanism)
        with pytest.raises(CkFailure, match=r"C_CopyObject 0x1b"):
            shell.tell("copy", private)
