"""GnuTLS on slot 1: p11tool makes, writes, tests, renames and deletes objects; certtool and gnutls-serv use keys that it made."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from support.certificates import Authority, chain_pem, new_key, private_pem, public_pem
from support.guest import free_port, listens, stop, wait_for
from support.nginx import client_context
from support.own_slot import LABEL, OURS_ALONE, SO, USER, OwnSlot

pytestmark = pytest.mark.real
AUTHORITY = Authority()
TOKEN = f"pkcs11:token={LABEL}"
PINS = {"GNUTLS_PIN": USER, "GNUTLS_SO_PIN": SO}
KINDS = {
    "rsa": ("--generate-privkey=rsa", "--bits", "2048"),
    "p256": ("--generate-privkey=ecdsa", "--curve", "secp256r1"),
    "p384": ("--generate-privkey=ecdsa", "--curve", "secp384r1"),
    "p521": ("--generate-privkey=ecdsa", "--curve", "secp521r1"),
}


def p11tool(own: OwnSlot, *arguments: object, check: bool = True) -> str:
    command = ("p11tool", "--batch", "--provider", own.guest.library.path, "--login")
    return own.guest.run(*command, *map(str, arguments), check=check, more=PINS).stdout.decode()


def certtool(own: OwnSlot, *arguments: object) -> None:
    own.guest.run("certtool", "--provider", own.guest.library.path, *map(str, arguments), more=PINS)


def url(name: str, kind: str = "private") -> str:
    return f"{TOKEN};object={name};type={kind}"


def generate(own: OwnSlot, kind: str, name: str = "mine") -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    path = own.guest.directory / f"{name}.pem"
    p11tool(own, *KINDS[kind], "--label", name, "--outfile", path, TOKEN)
    public = serialization.load_pem_public_key(path.read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
    return public


@pytest.mark.parametrize("kind", KINDS)
def test_p11tool_generates_signs_and_deletes(own: OwnSlot, kind: str) -> None:
    public = generate(own, kind)
    listed = p11tool(own, "--list-all", TOKEN)
    assert listed.count("object=mine;type=private") == listed.count("object=mine;type=public") == 1
    assert "CKA_PRIVATE; CKA_NEVER_EXTRACTABLE; CKA_SENSITIVE" in listed
    exported = own.guest.directory / "exported.pem"
    p11tool(own, "--export-pubkey", url("mine"), "--outfile", exported)
    assert serialization.load_pem_public_key(exported.read_bytes()) == public
    assert p11tool(own, "--test-sign", "--hash", "SHA256", url("mine")).count("... ok") == 3
    if kind == "rsa":
        assert p11tool(own, "--test-sign", "--hash", "SHA256", "--sign-params", "RSA-PSS", url("mine")).count("... ok") == 3
    p11tool(own, "--set-label", "renamed", url("mine"))
    p11tool(own, "--set-id", "0102", url("renamed"))
    assert "id=%01%02;object=renamed;type=private" in p11tool(own, "--list-all", TOKEN)
    for what, name in (("private", "renamed"), ("public", "mine")):
        assert "1 objects deleted" in p11tool(own, "--delete", url(name, what))
    assert "No matching objects found" in p11tool(own, "--list-all", TOKEN, check=False)


@OURS_ALONE
def test_edwards_keys(own: OwnSlot) -> None:
    """GnuTLS 3.7 asks C_GenerateKeyPair for CKM_EDDSA, which generates nothing; a key that another program made, or that was
    written, it uses."""
    asked = p11tool(own, "--generate-privkey=ed25519", "--label", "mine", TOKEN, check=False)
    assert "PKCS #11 unsupported feature" in asked
    own.as_user("--keypairgen", "--key-type", "EC:edwards25519", "--label", "made", "--id", "01")
    key = new_key("ed25519")
    p11tool(
        own, "--write", "--load-privkey", own.guest.write("key.pem", private_pem(key)), "--label", "written", "--id", "02", TOKEN
    )
    p11tool(
        own, "--write", "--load-pubkey", own.guest.write("public.pem", public_pem(key)), "--label", "written", "--id", "02", TOKEN
    )
    for name in ("made", "written"):
        assert p11tool(own, "--test-sign", "--hash", "SHA512", url(name)).count("... ok") == 3


@pytest.mark.parametrize("kind", ["rsa2048", "p256", "p384"])
def test_p11tool_writes(own: OwnSlot, kind: str) -> None:
    key = new_key(kind)
    chain = AUTHORITY.chain(key)
    private, certificate = own.guest.write("key.pem", private_pem(key)), own.guest.write("certificate.pem", chain_pem(chain[:1]))
    p11tool(own, "--write", "--load-privkey", private, "--load-certificate", certificate, "--label", "brought", "--id", "03", TOKEN)
    p11tool(
        own, "--write", "--load-pubkey", own.guest.write("public.pem", public_pem(key)), "--label", "brought", "--id", "03", TOKEN
    )
    exported = own.guest.directory / "exported.pem"
    p11tool(own, "--export", url("brought", "cert"), "--outfile", exported)
    assert x509.load_pem_x509_certificate(exported.read_bytes()) == chain[0]
    assert p11tool(own, "--test-sign", "--hash", "SHA256", url("brought")).count("... ok") == 3
    refused = p11tool(own, "--write", "--mark-trusted", "--load-certificate", certificate, "--label", "trusted", TOKEN, check=False)
    assert "PKCS #11 error in attribute" in refused and "security officer" in refused
    as_officer = ("p11tool", "--batch", "--provider", own.guest.library.path, "--so-login", "--write", "--mark-trusted")
    own.guest.run(*as_officer, "--load-certificate", certificate, "--label", "trusted", TOKEN, more=PINS)
    assert "CKA_TRUSTED" in p11tool(own, "--list-all-trusted", TOKEN)


def test_p11tool_writes_secret_keys_and_reads_random_bytes(own: OwnSlot) -> None:
    p11tool(own, "--write", "--secret-key", os.urandom(32).hex(), "--label", "secret", TOKEN)
    assert "object=secret;type=secret-key" in p11tool(own, "--list-all", TOKEN)
    path = own.guest.directory / "random"
    p11tool(own, "--generate-random", "32", "--outfile", path, TOKEN)
    assert len(path.read_bytes()) == 32


def test_p11tool_sets_pins(own: OwnSlot) -> None:
    command = ("p11tool", "--batch", "--provider", own.guest.library.path)
    changed = PINS | {"GNUTLS_PIN": "user-2"}
    own.guest.run(*command, "--so-login", "--initialize-pin", TOKEN, more=changed)
    assert "CKR_PIN_INCORRECT" in own.as_user("--list-objects", check=False)
    own.tool("--login", "--pin", "user-2", "--list-objects")


@pytest.mark.parametrize("kind", ["rsa", "p384"])
def test_certtool_signs_itself_requests_and_issues(own: OwnSlot, kind: str) -> None:
    """A CA whose key is in slot 1 answers a request of another key there."""
    generate(own, kind, "ca")
    wanted = generate(own, "p256")
    template = own.guest.write("template", "cn = authority\nca\ncert_signing_key\nexpiration_days = 9\n")
    key = ("--load-privkey", url("ca"), "--load-pubkey", url("ca", "public"))
    certtool(own, "--generate-self-signed", "--template", template, *key, "--outfile", "ca.pem")
    authority = x509.load_pem_x509_certificate((own.guest.directory / "ca.pem").read_bytes())
    authority.verify_directly_issued_by(authority)
    template = own.guest.write("template", "cn = mine\nexpiration_days = 8\n")
    key = ("--load-privkey", url("mine"), "--load-pubkey", url("mine", "public"))
    certtool(own, "--generate-request", "--template", template, *key, "--outfile", "request.pem")
    ca = ("--load-ca-privkey", url("ca"), "--load-ca-certificate", "ca.pem", "--load-request", "request.pem")
    certtool(own, "--generate-certificate", "--template", template, *ca, "--outfile", "mine.pem")
    issued = x509.load_pem_x509_certificate((own.guest.directory / "mine.pem").read_bytes())
    issued.verify_directly_issued_by(authority)
    assert issued.public_key() == wanted


@pytest.fixture
def served(own: OwnSlot, request: pytest.FixtureRequest) -> Iterator[int]:
    public, port = generate(own, request.param, "web"), free_port()
    chain = chain_pem((AUTHORITY.issue_for(public), AUTHORITY.intermediate))
    command = ("gnutls-serv", "--provider", own.guest.library.path, "--x509keyfile", url("web"), "--x509certfile")
    log = own.guest.directory / "server.log"
    server = own.guest.start(*command, own.guest.write("chain.pem", chain), "--http", "--port", str(port), output=log, more=PINS)
    try:
        wait_for(lambda: server.poll() is not None or listens(port), "gnutls-serv")
        assert server.poll() is None, log.read_text()
        yield port
    finally:
        stop(server)


@pytest.mark.parametrize("served", ["rsa", "p256"], indirect=True)
def test_serves_tls(served: int) -> None:
    for version in ("TLSv1.2", "TLSv1.3"):
        context = client_context(AUTHORITY.root_pem, version)
        with (
            socket.create_connection(("127.0.0.1", served), 5) as sock,
            context.wrap_socket(sock, server_hostname="localhost") as tls,
        ):
            assert tls.version() == version
