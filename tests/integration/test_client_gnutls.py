"""GnuTLS: p11tool lists and tests keys, certtool makes a request, gnutls-serv serves TLS."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import pytest
from cryptography import x509
from support.certificates import Authority, PrivateKey, chain_pem, key_id, new_key
from support.guest import Guest, free_port, listens, stop, wait_for
from support.host import Module
from support.nginx import client_context

pytestmark = pytest.mark.real
AUTHORITY = Authority()
KINDS = ["p256", "rsa2048", "ed25519"]


def pushed(module: Module, kind: str) -> tuple[PrivateKey, tuple[x509.Certificate, ...], str]:
    key = new_key(kind)
    chain = AUTHORITY.chain(key)
    module.push("web", key, chain)
    return key, chain, f"pkcs11:token={module.name};object=web;type="


@pytest.mark.parametrize("kind", KINDS)
def test_p11tool_lists_and_exports(guest: Guest, module: Module, kind: str) -> None:
    key, chain, uri = pushed(module, kind)
    listed = guest.run("p11tool", "--provider", guest.library.path, "--list-all", f"pkcs11:token={module.name}").stdout.decode()
    percent = "".join(f"%{byte:02X}" for byte in key_id(key))
    for thing in ("private", "public", "cert"):
        assert f"id={percent};object=web;type={thing}" in listed, listed
    assert "CKA_NEVER_EXTRACTABLE; CKA_SENSITIVE" in listed or "CKA_SENSITIVE" in listed
    exported = guest.run("p11tool", "--provider", guest.library.path, "--export", f"{uri}cert").stdout
    assert x509.load_pem_x509_certificate(exported[exported.index(b"-----BEGIN") :]) == chain[0]


@pytest.mark.parametrize("kind", KINDS)
def test_p11tool_signs(guest: Guest, module: Module, kind: str) -> None:
    uri = pushed(module, kind)[2]
    digest = "SHA512" if kind == "ed25519" else "SHA256"
    command = ("p11tool", "--provider", guest.library.path, "--test-sign", "--hash", digest, f"{uri}private")
    said = guest.run(*command, check=False).stdout.decode()
    if kind == "ed25519" and not guest.library.ours:
        assert "PKCS #11 unsupported feature" in said, said  # p11-kit carries no EdDSA
    else:
        assert said.count("... ok") == 3, said


def test_certtool_requests_a_certificate(guest: Guest, module: Module) -> None:
    key, _, uri = pushed(module, "p256")
    template = guest.write("template", "cn = web\n")
    request = (
        "certtool",
        "--provider",
        guest.library.path,
        "--generate-request",
        "--template",
        template,
        "--load-privkey",
        f"{uri}private",
    )
    said = guest.run(*request, "--load-pubkey", f"{uri}public", "--outfile", "request.pem").stdout
    csr = x509.load_pem_x509_csr((guest.directory / "request.pem").read_bytes())
    assert csr.is_signature_valid, said
    assert csr.public_key() == key.public_key()


@pytest.fixture
def served(guest: Guest, module: Module, request: pytest.FixtureRequest) -> Iterator[tuple[int, PrivateKey]]:
    kind, certificate_from_token = request.param
    key, chain, uri = pushed(module, kind)
    port = free_port()
    certificate = f"{uri}cert" if certificate_from_token else guest.write("chain.pem", chain_pem(chain))
    server = guest.start(
        *("gnutls-serv", "--provider", guest.library.path, "--x509keyfile", f"{uri}private", "--x509certfile", certificate),
        *("--http", "--port", str(port)),
        output=guest.directory / "server.log",
    )
    try:
        wait_for(lambda: server.poll() is not None or listens(port), "gnutls-serv")
        assert server.poll() is None, (guest.directory / "server.log").read_text()
        yield port, key
    finally:
        stop(server)


@pytest.mark.parametrize(
    "served", [("p256", False), ("rsa2048", False), ("p256", True)], indirect=True, ids=["ec", "rsa", "all-in-token"]
)
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_serves_tls(served: tuple[int, PrivateKey], version: str) -> None:
    port, key = served
    # GnuTLS 3.7 takes a chain from a token only when its CAs are CKA_TRUSTED, which a module never says: the leaf comes alone
    context = client_context(chain_pem((AUTHORITY.intermediate,)), version)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    with socket.create_connection(("127.0.0.1", port), 5) as sock, context.wrap_socket(sock, server_hostname="localhost") as tls:
        assert tls.version() == version
        assert x509.load_der_x509_certificate(tls.getpeercert(True) or b"").public_key() == key.public_key()
