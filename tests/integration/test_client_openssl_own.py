"""OpenSSL with libengine-pkcs11 (libp11) and keys of slot 1: requests, signatures, CMS, padding modes, agreement, a TLS server."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from support.certificates import Authority, chain_pem, new_key, public_pem
from support.guest import free_port, listens, stop, wait_for
from support.nginx import client_context
from support.own_slot import OURS_ALONE, OwnSlot

pytestmark = pytest.mark.real
AUTHORITY = Authority()
KINDS = {"p256": "EC:prime256v1", "p384": "EC:secp384r1", "rsa": "rsa:2048"}
MESSAGE = b"a message of the guest"
ENGINE = ("-engine", "pkcs11", "-keyform", "engine")
Public = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


def openssl(own: OwnSlot, *arguments: str | Path, stdin: bytes = b"", check: bool = True) -> bytes:
    return own.guest.run("openssl", *arguments, stdin=stdin, more=own.guest.with_engine, check=check).stdout


def generate(own: OwnSlot, kind: str, label: str = "mine") -> Public:
    return own.generate(KINDS[kind], label, "01")


def site(own: OwnSlot, public: Public) -> Path:
    """A certificate chain for a key that only the token has."""
    return own.guest.write("chain.pem", chain_pem((AUTHORITY.issue_for(public), AUTHORITY.intermediate)))


@pytest.mark.parametrize("kind", KINDS)
def test_requests_and_signs(own: OwnSlot, kind: str) -> None:
    public, key = generate(own, kind), own.uri("mine", pin=True)
    openssl(own, "req", "-new", *ENGINE, "-key", key, "-subj", "/CN=mine", "-out", "request.pem")
    request = x509.load_pem_x509_csr((own.guest.directory / "request.pem").read_bytes())
    assert request.is_signature_valid and request.public_key() == public
    openssl(own, "req", "-new", "-x509", *ENGINE, "-key", key, "-subj", "/CN=mine", "-out", "own.pem")
    certificate = x509.load_pem_x509_certificate((own.guest.directory / "own.pem").read_bytes())
    certificate.verify_directly_issued_by(certificate)
    message, signature = own.guest.write("message", MESSAGE), own.guest.directory / "signature"
    for name, algorithm in (("-sha256", hashes.SHA256()), ("-sha384", hashes.SHA384()), ("-sha512", hashes.SHA512())):
        openssl(own, "dgst", *ENGINE, name, "-sign", key, "-out", signature, message)
        if isinstance(public, rsa.RSAPublicKey):
            public.verify(signature.read_bytes(), MESSAGE, padding.PKCS1v15(), algorithm)
        else:
            public.verify(signature.read_bytes(), MESSAGE, ec.ECDSA(algorithm))


@pytest.mark.parametrize("kind", ["p256", "rsa"])
def test_signs_and_decrypts_cms(own: OwnSlot, kind: str) -> None:
    chain, key = site(own, generate(own, kind)), own.uri("mine", pin=True)
    message, root = own.guest.write("message", MESSAGE), own.guest.write("root.pem", AUTHORITY.root_pem)
    signer = ("-signer", chain, "-certfile", own.guest.write("intermediate.pem", chain_pem((AUTHORITY.intermediate,))))
    openssl(own, "cms", "-sign", *ENGINE, "-inkey", key, *signer, "-in", message, "-out", "signed")
    verified = openssl(own, "cms", "-verify", "-in", "signed", "-CAfile", root, "-purpose", "any")
    assert b"Verification successful" in verified and MESSAGE in verified
    if kind == "p256" and not own.guest.library.ours:
        return  # p11-kit 0.24.1 carries no ECDH
    own.guest.run("openssl", "cms", "-encrypt", "-aes256", "-out", "sealed", chain, stdin=b"for the guest alone")
    assert b"for the guest alone" in openssl(own, "cms", "-decrypt", *ENGINE, "-inkey", key, "-recip", chain, "-in", "sealed")


def test_paddings_of_rsa(own: OwnSlot) -> None:
    public, key = generate(own, "rsa"), ("-inkey", own.uri("mine", pin=True))
    assert isinstance(public, rsa.RSAPublicKey)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(MESSAGE)
    hashed, out = own.guest.write("digest", digest.finalize()), own.guest.directory / "out"
    pss = ("-pkeyopt", "rsa_padding_mode:pss", "-pkeyopt", "digest:sha256", "-pkeyopt", "rsa_pss_saltlen:32")
    openssl(own, "pkeyutl", "-sign", *ENGINE, *key, *pss, "-in", hashed, "-out", out)
    public.verify(out.read_bytes(), MESSAGE, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
    sealed = own.guest.write("sealed", public.encrypt(MESSAGE, padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)))
    openssl(own, "pkeyutl", "-decrypt", *ENGINE, *key, "-pkeyopt", "rsa_padding_mode:oaep", "-in", sealed, "-out", out)
    assert out.read_bytes() == MESSAGE
    sealed.write_bytes(public.encrypt(MESSAGE, padding.PKCS1v15()))
    openssl(own, "pkeyutl", "-decrypt", *ENGINE, *key, "-in", sealed, "-out", out)
    assert out.read_bytes() == MESSAGE


@OURS_ALONE
def test_agrees(own: OwnSlot) -> None:
    public, peer = generate(own, "p256"), new_key("p256")
    assert isinstance(public, ec.EllipticCurvePublicKey) and isinstance(peer, ec.EllipticCurvePrivateKey)
    theirs, out = own.guest.write("peer.pem", public_pem(peer)), own.guest.directory / "out"
    openssl(own, "pkeyutl", "-derive", *ENGINE, "-inkey", own.uri("mine", pin=True), "-peerkey", theirs, "-out", out)
    assert out.read_bytes() == peer.exchange(ec.ECDH(), public)


@OURS_ALONE
def test_an_edwards_key_hides_its_token_from_libp11(own: OwnSlot) -> None:
    """libp11 0.4.12 ends its search at the first private key of a type that it does not know, and finds none at all."""
    generate(own, "p256")
    sign = ("dgst", *ENGINE, "-sha256", "-sign", own.uri("mine", pin=True), "-out", own.guest.directory / "out", __file__)
    openssl(own, *sign)
    own.as_user("--keypairgen", "--key-type", "EC:edwards25519", "--label", "sign", "--id", "02")
    assert b"Unable to enumerate private keys" in openssl(own, *sign, check=False)
    own.as_user("--delete-object", "--type", "privkey", "--id", "02")
    openssl(own, *sign)


@pytest.fixture
def served(own: OwnSlot, request: pytest.FixtureRequest) -> Iterator[int]:
    chain, port = site(own, generate(own, request.param)), free_port()
    log, where = own.guest.directory / "server.log", ("-accept", f"127.0.0.1:{port}", "-www")
    command = ("openssl", "s_server", *ENGINE, "-key", own.uri("mine", pin=True), "-cert", chain, "-cert_chain", chain, *where)
    server = own.guest.start(*command, output=log, more=own.guest.with_engine)
    try:
        wait_for(lambda: server.poll() is not None or listens(port), "s_server")
        assert server.poll() is None, log.read_text()
        yield port
    finally:
        stop(server)


@pytest.mark.parametrize("served", ["p256", "rsa"], indirect=True)
def test_serves_tls(served: int) -> None:
    for version in ("TLSv1.2", "TLSv1.3"):
        context = client_context(AUTHORITY.root_pem, version)
        with (
            socket.create_connection(("127.0.0.1", served), 5) as sock,
            context.wrap_socket(sock, server_hostname="localhost") as tls,
        ):
            assert tls.version() == version
