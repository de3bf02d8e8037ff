"""What programs on libp11 (OpenSSL's engine; nginx holds keys and forks) meet of generations, through both libraries."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
from cryptography import x509
from support.certificates import DER, Authority, chain_pem, key_id, new_key, public_pem
from support.guest import Guest, wait_for
from support.host import Module
from support.nginx import Nginx, client_context, handshake

pytestmark = pytest.mark.real
AUTHORITY = Authority()
CONTEXT = client_context(AUTHORITY.root_pem)
Chain = tuple[x509.Certificate, ...]
Serve = Callable[[Chain], Nginx]


def uri(module: Module, what: str = "object=web") -> str:
    return f"pkcs11:token={module.name};{what};type=private"


@pytest.fixture
def serve(guest: Guest, module: Module) -> Iterator[Serve]:
    """Starts nginx with the module's key, and with this chain in its file."""
    with contextlib.ExitStack() as stack:

        def start(chain: Chain) -> Nginx:
            nginx = Nginx(guest, [(guest.write("web.pem", chain_pem(chain)), uri(module))], workers=2)
            stack.callback(nginx.stop)
            return nginx

        yield start


def serves(nginx: Nginx, chain: Chain, times: int = 6) -> bool:
    """A handshake succeeds only with the key of the certificate that was shown."""
    return all(handshake(nginx.port, CONTEXT)[0] == chain[0].public_bytes(DER) for _ in range(times))


def replace_file(nginx: Nginx, guest: Guest, chain: Chain) -> None:
    """What hsmvisor-guest does: once views have moved the file, then a reload; returns when new workers serve."""
    time.sleep(2.2)
    guest.write("web.pem", chain_pem(chain))
    nginx.reload()

    def new_workers() -> bool:
        try:
            return serves(nginx, chain)
        except OSError:  # one from before whose key is gone
            return False

    wait_for(new_workers, "workers with the new certificate")


def requested_by(guest: Guest, module: Module, what: str = "object=web") -> object:
    """A new process finds the key and signs with it; returns the public key that it signed for, None where it found none."""
    command = ("openssl", "req", "-new", "-engine", "pkcs11", "-keyform", "engine", "-key", uri(module, what), "-subj", "/CN=web")
    result = guest.run(*command, "-out", "request.pem", check=False, more=guest.with_engine)
    if result.returncode:
        assert b"private key was not found" in result.stdout, result.stdout.decode()
        return None
    request = x509.load_pem_x509_csr((guest.directory / "request.pem").read_bytes())
    assert request.is_signature_valid
    return request.public_key()


def test_roll_back(guest: Guest, module: Module, serve: Serve) -> None:
    old, new = new_key("p256"), new_key("p256")
    old_chain, new_chain = AUTHORITY.chain(old), AUTHORITY.chain(new)
    first = module.push("web", old, old_chain, profile="tls")
    module.push("web", new, new_chain, profile="tls")
    nginx = serve(new_chain)
    assert serves(nginx, new_chain)
    module.host.pusher.roll_back(module.name, "web", first)
    assert serves(nginx, new_chain), "who holds the newer key goes on with it"
    assert requested_by(guest, module) == old.public_key()
    replace_file(nginx, guest, old_chain)
    assert serves(nginx, old_chain)


def test_certificate_only_renewal(guest: Guest, module: Module, serve: Serve) -> None:
    key = new_key("rsa2048")
    before, after = AUTHORITY.chain(key), AUTHORITY.chain(key)
    module.push("web", key, before, profile="tls")
    nginx = serve(before)
    module.push("web", None, after, profile="tls")
    assert serves(nginx, before)
    assert requested_by(guest, module) == key.public_key()
    replace_file(nginx, guest, after)
    assert serves(nginx, after)


def test_the_emergency_end_of_a_drain(guest: Guest, module: Module, serve: Serve) -> None:
    old, new = new_key("p256"), new_key("p256")
    old_chain, new_chain = AUTHORITY.chain(old), AUTHORITY.chain(new)
    first = module.push("web", old, old_chain, profile="tls")
    nginx = serve(old_chain)
    module.push("web", new, new_chain, profile="tls")
    assert serves(nginx, old_chain)
    module.destroy_generation("web", first)
    for _ in range(6):
        with pytest.raises(OSError):  # the key is gone; nothing signs for its certificate
            handshake(nginx.port, CONTEXT)
    assert requested_by(guest, module) == new.public_key()
    replace_file(nginx, guest, new_chain)
    assert serves(nginx, new_chain)


def test_ids_and_alias_ids(guest: Guest, module: Module) -> None:
    """libp11 0.4.12 reads each key's id and compares for itself, so it knows no alias; a client that searches by id does."""
    old, new = new_key("p256"), new_key("p256")
    module.push("web", old, AUTHORITY.chain(old), alias_id=b"\x01")
    alias = ("pkcs11-tool", "--module", guest.library.path, "--sign", "--mechanism", "ECDSA", "--id", "01")
    digest = guest.write("digest", b"d" * 32)
    for key in (old, new):
        if key is new:
            module.push("web", new, AUTHORITY.chain(new), alias_id=b"\x01")
        percent = "".join(f"%{byte:02X}" for byte in key_id(key))
        assert requested_by(guest, module, f"id={percent}") == key.public_key()
        assert requested_by(guest, module, "id=%01") is None
        guest.run(*alias, "--signature-format", "openssl", "--input-file", digest, "--output-file", "signature")
        public = guest.write("public.pem", public_pem(key))
        verify = ("openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-in", digest, "-sigfile", "signature")
        assert b"Verified Successfully" in guest.run(*verify).stdout
