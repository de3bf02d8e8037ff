"""Mozilla's NSS: modutil, certutil, pk12util, cmsutil, and TLS with selfserv and tstclnt; keys of slot 0 and of slot 1."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from support.certificates import Authority, PrivateKey, chain_pem, key_id, new_key, private_pem
from support.guest import free_port, listens, stop, wait_for
from support.nginx import client_context
from support.nss import Nss
from support.own_slot import LABEL, OURS_ALONE, USER, OwnSlot

pytestmark = pytest.mark.real
AUTHORITY = Authority()
KINDS = {
    "rsa": ("-k", "rsa", "-g", "2048"),
    "p256": ("-k", "ec", "-q", "nistp256"),
    "p384": ("-k", "ec", "-q", "nistp384"),
    "p521": ("-k", "ec", "-q", "nistp521"),
}


@pytest.fixture
def nss(own: OwnSlot) -> Nss:
    return Nss(own.guest, {own.module.name: "any", LABEL: USER})


def deliver(own: OwnSlot, kind: str, name: str = "web", subject: str = "localhost") -> PrivateKey:
    """To NSS certificates of one subject are one nickname's: `subject` tells materials apart."""
    key = new_key(kind)
    own.module.push(name, key, AUTHORITY.chain(key, subject))
    return key


def certificate_of(nss: Nss, nickname: str) -> x509.Certificate:
    """`nickname`: the token's label, a colon, the name in the token."""
    return x509.load_pem_x509_certificate(nss.certutil("-L", "-n", nickname, "-a").encode())


def test_modutil_and_certutil_list_both_tokens(own: OwnSlot, nss: Nss) -> None:
    keys = {name: deliver(own, kind, name, name) for name, kind in (("web", "p256"), ("mail", "rsa2048"), ("sign", "ed25519"))}
    listed = own.guest.run("modutil", "-dbdir", nss.database, "-list", "hsmvisor").stdout.decode()
    assert f"Token Name: {own.module.name}" in listed and f"Token Name: {LABEL}" in listed
    assert nss.keys(own.module.name) == {name: key_id(key).hex() for name, key in keys.items()}
    certificates = nss.certutil("-L", "-h", own.module.name)
    for name in keys:
        assert f"{own.module.name}:{name} " in certificates
    assert certificate_of(nss, f"{own.module.name}:web").public_key() == keys["web"].public_key()


@pytest.mark.parametrize("kind", KINDS)
def test_certutil_makes_a_key_and_a_certificate(own: OwnSlot, nss: Nss, kind: str) -> None:
    nss.generate(LABEL, "mine", *KINDS[kind])
    certificate = certificate_of(nss, f"{LABEL}:mine")
    certificate.verify_directly_issued_by(certificate)
    assert nss.keys(LABEL) == {f"{LABEL}:mine": key_id_of(certificate)}
    listed = own.as_user("--list-objects")
    assert listed.count("Private Key Object") == listed.count("Certificate Object") == 1
    nss.certutil("-F", "-n", f"{LABEL}:mine")
    assert "Private Key Object" not in own.as_user("--list-objects") and not nss.certutil("-L", "-h", LABEL).count("mine")


def key_id_of(certificate: x509.Certificate) -> str:
    """NSS's CKA_ID: SHA-1 of the modulus or of the point."""
    digest, public = hashes.Hash(hashes.SHA1()), certificate.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        digest.update(public.public_numbers().n.to_bytes(public.key_size // 8))
    else:
        assert isinstance(public, ec.EllipticCurvePublicKey)
        digest.update(public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint))
    return digest.finalize().hex()


@OURS_ALONE
def test_certutil_requests_and_issues(own: OwnSlot, nss: Nss) -> None:
    """A CA whose key is in slot 1 answers a request that was signed with another key of slot 1, and one of slot 0's."""
    nss.generate(LABEL, "ca", *KINDS["p384"], trust="CTu,CTu,CTu", more=("--keyUsage", "certSigning"))
    nss.generate(LABEL, "mine", *KINDS["p256"])
    deliver(own, "rsa2048")
    for number, (token, name) in enumerate(((LABEL, f"{LABEL}:mine"), (own.module.name, f"{own.module.name}:web"))):
        # -k takes a nickname too, but then certutil 3.87 wants NSS's own CKA_ID, of an RSA key SHA-1 of the modulus
        key = nss.keys(token)[name.removeprefix(f"{own.module.name}:")]
        nss.certutil("-R", "-h", token, "-k", key, "-s", "CN=asked", "-a", "-o", own.guest.directory / "request")
        request = x509.load_pem_x509_csr((own.guest.directory / "request").read_bytes())
        assert request.is_signature_valid and request.public_key() == certificate_of(nss, name).public_key()
        arguments = ("-i", own.guest.directory / "request", "-o", own.guest.directory / "answer", "-m", number + 7, "-a")
        nss.certutil("-C", "-c", f"{LABEL}:ca", *arguments)
        answer = x509.load_pem_x509_certificate((own.guest.directory / "answer").read_bytes())
        answer.verify_directly_issued_by(certificate_of(nss, f"{LABEL}:ca"))
        assert answer.public_key() == request.public_key()


ENCRYPTIONS: dict[str, serialization.KeySerializationEncryption] = {
    "aes": serialization.BestAvailableEncryption(b"transport"),
    "3des": serialization.PrivateFormat.PKCS12.encryption_builder()
    .key_cert_algorithm(pkcs12.PBES.PBESv1SHA1And3KeyTripleDESCBC)
    .hmac_hash(hashes.SHA1())
    .build(b"transport"),
}


@OURS_ALONE
@pytest.mark.parametrize("encryption", ENCRYPTIONS)
@pytest.mark.parametrize("kind", ["rsa2048", "p256", "p521"])
def test_pk12util_imports(own: OwnSlot, nss: Nss, kind: str, encryption: str) -> None:
    """NSS derives the file's AES key, makes it a session object with CKA_UNWRAP, and unwraps by CKM_AES_CBC_PAD.  A key under 3DES
    it opens by itself and makes with C_CreateObject, for slot 1 refuses the DES3 key."""
    key = new_key(kind)
    assert isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
    chain = AUTHORITY.chain(key)
    packed = pkcs12.serialize_key_and_certificates(b"brought", key, chain[0], None, ENCRYPTIONS[encryption])
    pins = own.guest.directory / "pins"
    source = ("-i", own.guest.write("brought.p12", packed), "-W", "transport")
    assert "IMPORT SUCCESSFUL" in nss.tool("pk12util", *source, "-h", LABEL, "-k", pins)
    assert certificate_of(nss, f"{LABEL}:brought") == chain[0]
    assert list(nss.keys(LABEL)) == ["brought"]
    assert "Secret Key" not in own.as_user("--list-objects"), "the file's key was for the session"
    refused = nss.tool("pk12util", "-o", "out.p12", "-n", f"{LABEL}:brought", "-k", pins, "-W", "transport", check=False)
    assert "SEC_ERROR_PKCS12_UNABLE_TO_EXPORT_KEY" in refused, "it is sensitive"
    nss.certutil("-R", "-h", LABEL, "-k", f"{LABEL}:brought", "-s", "CN=asked", "-a", "-o", "request")
    request = x509.load_pem_x509_csr((own.guest.directory / "request").read_bytes())
    assert request.is_signature_valid and request.public_key() == key.public_key()


# ---- TLS ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(own: OwnSlot, nss: Nss, request: pytest.FixtureRequest) -> Iterator[tuple[int, x509.Certificate]]:
    """selfserv's port and certificate."""
    slot, kind = request.param
    if slot == 0:
        deliver(own, "rsa2048" if kind == "rsa" else kind)
        name = f"{own.module.name}:web"
    else:
        nss.generate(LABEL, "web", *KINDS[kind], subject="CN=localhost", more=("-8", "localhost"))
        name = f"{LABEL}:web"
    port, log = free_port(), own.guest.directory / "selfserv.log"
    names = ("-n", name) if kind == "rsa" else ("-n", name, "-e", name)
    command = ("selfserv", "-d", nss.database, *names, "-p", str(port), "-f", own.guest.directory / "pins", "-V", "tls1.2:tls1.3")
    server = own.guest.start(*command, output=log)
    try:
        wait_for(lambda: server.poll() is not None or listens(port), "selfserv")
        assert server.poll() is None, log.read_text()
        yield port, certificate_of(nss, name)
    finally:
        stop(server)


@pytest.mark.parametrize("served", [(0, "p256"), (0, "rsa"), (1, "p256"), (1, "rsa")], indirect=True, ids=str)
def test_selfserv_serves_tls(served: tuple[int, x509.Certificate]) -> None:
    port, certificate = served
    for version in ("TLSv1.2", "TLSv1.3"):
        context = client_context(chain_pem((certificate, AUTHORITY.intermediate)), version)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        with (
            socket.create_connection(("127.0.0.1", port), 5) as sock,
            context.wrap_socket(sock, server_hostname="localhost") as tls,
        ):
            assert tls.version() == version
            assert x509.load_der_x509_certificate(tls.getpeercert(True) or b"") == certificate


def answer_one(listener: socket.socket, context: ssl.SSLContext, seen: list[bytes]) -> None:
    with context.wrap_socket(listener.accept()[0], server_side=True) as tls:
        seen.append(tls.getpeercert(True) or b"")


@OURS_ALONE
@pytest.mark.parametrize("version", ["tls1.2", "tls1.3"])
@pytest.mark.parametrize("slot", [0, 1])
def test_tstclnt_shows_its_certificate(own: OwnSlot, nss: Nss, slot: int, version: str) -> None:
    if slot == 0:
        name, trusted = f"{own.module.name}:web", AUTHORITY.root_pem
        deliver(own, "p256")
    else:
        nss.generate(LABEL, "web", *KINDS["p256"])
        name = f"{LABEL}:web"
        trusted = certificate_of(nss, name).public_bytes(serialization.Encoding.PEM)
    key = new_key("p256")
    files = (own.guest.write("chain.pem", chain_pem(AUTHORITY.chain(key))), own.guest.write("key.pem", private_pem(key)))
    nss.trust("root", own.guest.write("root.pem", AUTHORITY.root_pem), "C,,")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=trusted.decode())
    context.load_cert_chain(*files)
    context.verify_mode = ssl.CERT_REQUIRED
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_one, args=(listener, context, seen))
        thread.start()
        where = ("-h", "127.0.0.1", "-p", listener.getsockname()[1], "-a", "localhost", "-V", f"{version}:{version}")
        nss.tool("tstclnt", *where, "-n", name, "-W", own.guest.directory / "pins", "-Q")
        thread.join()
    assert x509.load_der_x509_certificate(seen[0]) == certificate_of(nss, name)


# ---- mail ---------------------------------------------------------------------------------------------------------------


@OURS_ALONE
@pytest.mark.parametrize("kind", ["rsa", "p256"])
def test_cmsutil_signs_and_decrypts(own: OwnSlot, nss: Nss, kind: str) -> None:
    usage = ("--keyUsage", "digitalSignature,keyEncipherment,certSigning", "-7", "me@example.org")
    nss.generate(LABEL, "mail", *KINDS[kind], subject="CN=me,E=me@example.org", trust="CTPu,CTPu,CTPu", more=usage)
    guest, pins = own.guest, own.guest.directory / "pins"
    message, signed, sealed = guest.write("message", b"a mail"), guest.directory / "signed", guest.directory / "sealed"
    nss.tool("cmsutil", "-S", "-f", pins, "-N", f"{LABEL}:mail", "-i", message, "-o", signed, "-H", "SHA256", "-G")
    pem = guest.write("own.pem", certificate_of(nss, f"{LABEL}:mail").public_bytes(serialization.Encoding.PEM))
    verify = ("cms", "-verify", "-inform", "DER", "-in", signed, "-CAfile", pem, "-purpose", "any")
    assert b"Verification successful" in guest.run("openssl", *verify).stdout
    if kind == "rsa":
        opened(nss, pem, sealed)


def opened(nss: Nss, certificate: Path, sealed: Path) -> None:
    """Fails unless cmsutil opens what OpenSSL sealed for a certificate."""
    seal = ("cms", "-encrypt", "-aes256", "-outform", "DER", "-out", sealed, certificate)
    nss.guest.run("openssl", *seal, stdin=b"for the guest alone")
    assert "for the guest alone" in nss.tool("cmsutil", "-D", "-f", nss.guest.directory / "pins", "-i", sealed)


@OURS_ALONE
def test_cmsutil_decrypts_with_a_delivered_key(own: OwnSlot, nss: Nss) -> None:
    key = new_key("rsa2048")
    chain = AUTHORITY.chain(key)
    own.module.push("mail", key, chain, profile="decrypt")
    opened(nss, own.guest.write("mail.pem", chain_pem(chain[:1])), own.guest.directory / "sealed")
