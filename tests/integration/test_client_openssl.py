"""OpenSSL with libengine-pkcs11 (libp11): certificate requests, CMS, a TLS server; and curl with a client certificate."""

from __future__ import annotations

import socket
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from support.certificates import Authority, PrivateKey, chain_pem, new_key, private_pem
from support.guest import Guest, free_port, listens, stop, wait_for
from support.host import Module

pytestmark = pytest.mark.real
KINDS = {"ec": "p256", "rsa": "rsa2048"}


@dataclass
class Site:
    """A material and what the outside knows of it."""

    key: PrivateKey
    chain: Path  #: leaf and intermediate
    intermediate: Path
    root: Path
    uri: str


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest, guest: Guest, module: Module) -> Site:
    key, authority = new_key(KINDS[request.param]), Authority()
    chain = authority.chain(key)
    module.push("web", key, chain, profile="tls")
    uri = f"pkcs11:token={module.name};object=web;type=private"
    files = {"chain": chain_pem(chain), "intermediate": chain_pem(chain[1:]), "root": authority.root_pem}
    return Site(key, *(guest.write(f"{name}.pem", content) for name, content in files.items()), uri)


def openssl(guest: Guest, *arguments: str | Path, stdin: bytes = b"") -> bytes:
    return guest.run("openssl", *arguments, stdin=stdin, more=guest.with_engine).stdout


def test_requests_a_certificate(guest: Guest, site: Site) -> None:
    openssl(
        guest, "req", "-new", "-engine", "pkcs11", "-keyform", "engine", "-key", site.uri, "-subj", "/CN=web", "-out", "request.pem"
    )
    request = x509.load_pem_x509_csr((guest.directory / "request.pem").read_bytes())
    assert request.is_signature_valid
    assert request.public_key() == site.key.public_key()


def test_signs_cms(guest: Guest, site: Site) -> None:
    message = guest.write("message", b"hello\n")
    engine = ("-engine", "pkcs11", "-keyform", "engine", "-inkey", site.uri)
    openssl(guest, "cms", "-sign", *engine, "-signer", site.chain, "-certfile", site.intermediate, "-in", message, "-out", "signed")
    assert (
        b"Verification successful"
        in guest.run("openssl", "cms", "-verify", "-in", "signed", "-CAfile", site.root, "-purpose", "any").stdout
    )


def test_decrypts_cms(guest: Guest, module: Module) -> None:
    key, authority = new_key("rsa2048"), Authority()
    chain = authority.chain(key)
    module.push("mail", key, chain, profile="decrypt")
    certificate = guest.write("chain.pem", chain_pem(chain))
    guest.run("openssl", "cms", "-encrypt", "-aes256", "-out", "sealed", certificate, stdin=b"for the guest alone")
    engine = ("-engine", "pkcs11", "-keyform", "engine", "-inkey", f"pkcs11:token={module.name};object=mail;type=private")
    assert b"for the guest alone" in openssl(guest, "cms", "-decrypt", *engine, "-recip", certificate, "-in", "sealed")


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_serves_tls(guest: Guest, site: Site, version: str) -> None:
    port = free_port()
    server = guest.start(
        "openssl",
        "s_server",
        "-engine",
        "pkcs11",
        "-keyform",
        "engine",
        "-key",
        site.uri,
        "-cert",
        site.chain,
        "-cert_chain",
        site.chain,
        "-accept",
        f"127.0.0.1:{port}",
        "-www",
        output=guest.directory / "server.log",
        more=guest.with_engine,
    )
    try:
        wait_for(lambda: listens(port), "s_server")
        context = ssl.create_default_context(cafile=str(site.root))
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
        for _ in range(3):
            with (
                socket.create_connection(("127.0.0.1", port), 5) as sock,
                context.wrap_socket(sock, server_hostname="localhost") as tls,
            ):
                assert tls.version() == version
                assert x509.load_der_x509_certificate(tls.getpeercert(True) or b"").public_key() == site.key.public_key()
    finally:
        stop(server)


class _ClientCheckingServer:
    """A TLS server that demands a client certificate and notes whose came."""

    def __init__(self, authority: Authority, directory: Path) -> None:
        key = new_key("p256")
        (directory / "server.pem").write_bytes(private_pem(key) + chain_pem(authority.chain(key)))
        (directory / "ca.pem").write_bytes(authority.root_pem)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(directory / "ca.pem"))
        context.load_cert_chain(directory / "server.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.peers: list[bytes] = []
        self._context = context
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        with sock, self._context.wrap_socket(sock, server_side=True) as tls:
            self.peers.append(tls.getpeercert(True) or b"")
            tls.recv(4096)
            tls.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nwelcom")

    def close(self) -> None:
        self._listener.close()
        self._thread.join(5)


def test_curl_shows_a_client_certificate(guest: Guest, site: Site, tmp_path: Path) -> None:
    """Debian's curl (OpenSSL) takes the key by the engine, the certificate from a file."""
    authority = Authority()
    chain = authority.chain(site.key, "client")
    server = _ClientCheckingServer(authority, tmp_path)
    try:
        answer = guest.run(
            "curl",
            "--silent",
            "--show-error",
            "--max-time",
            "10",
            "--cacert",
            tmp_path / "ca.pem",
            "--cert",
            guest.write("client.pem", chain_pem(chain)),
            "--engine",
            "pkcs11",
            "--key-type",
            "ENG",
            "--key",
            site.uri,
            f"https://localhost:{server.port}/",
            more=guest.with_engine,
        )
        assert answer.stdout == b"welcom"
    finally:
        server.close()
    assert x509.load_der_x509_certificate(server.peers[0]) == chain[0]
