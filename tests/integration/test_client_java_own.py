"""Java's keytool and SunPKCS11 on slot 1: keys, certificates and requests; every service of the provider; a TLS server."""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import pkcs12
from support.certificates import Authority, chain_pem, new_key
from support.guest import stop, wait_for
from support.nginx import client_context
from support.own_slot import OURS_ALONE, USER, OwnSlot

pytestmark = [pytest.mark.real, OURS_ALONE]
SOURCES = Path(__file__).parent / "java"
#: What a Java program has to say that reads shared secrets, and keys that it brought: the token hides them otherwise.
ATTRIBUTES = """\
attributes(*, CKO_SECRET_KEY, CKK_GENERIC_SECRET) = { CKA_SENSITIVE = false CKA_EXTRACTABLE = true }
attributes(import, CKO_SECRET_KEY, CKK_AES) = { CKA_SENSITIVE = false CKA_EXTRACTABLE = true }
"""


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("classes")
    subprocess.run(["javac", "-d", str(directory), SOURCES / "OwnKeys.java", SOURCES / "ServeTls.java"], check=True, timeout=60)
    return directory


@dataclass(frozen=True)
class Java:
    own: OwnSlot
    config: Path

    def keytool(self, *arguments: str | Path, check: bool = True) -> str:
        store = ("-keystore", "NONE", "-storetype", "PKCS11", "-storepass", USER)
        return self._keytool(*arguments, *store, check=check)

    def _keytool(self, *arguments: str | Path, check: bool = True) -> str:
        provider = ("-addprovider", "SunPKCS11", "-providerarg", self.config)
        return self.own.guest.run("keytool", *arguments, *provider, check=check).stdout.decode()

    def imports(self, source: Path, password: str) -> str:
        store = ("-destkeystore", "NONE", "-deststoretype", "PKCS11", "-deststorepass", USER)
        return self._keytool("-importkeystore", "-srckeystore", source, "-srcstorepass", password, *store, "-noprompt")


@pytest.fixture
def java(own: OwnSlot) -> Java:
    config = f"name = hsmvisor\nlibrary = {own.guest.library.path}\nslotListIndex = 1\n{ATTRIBUTES}"
    return Java(own, own.guest.write("pkcs11.cfg", config))


KINDS = {
    "rsa": ("-keyalg", "RSA", "-keysize", "2048"),
    "p256": ("-keyalg", "EC", "-groupname", "secp256r1"),
}


def certificate_of(java: Java, label: str) -> x509.Certificate:
    path = java.own.guest.directory / "certificate.der"
    java.own.tool("--read-object", "--type", "cert", "--label", label, "--output-file", path)
    return x509.load_der_x509_certificate(path.read_bytes())


@pytest.mark.parametrize("kind", KINDS)
def test_keytool(java: Java, kind: str) -> None:
    java.keytool("-genkeypair", "-alias", "mine", *KINDS[kind], "-dname", "CN=mine")
    certificate = certificate_of(java, "mine")
    certificate.verify_directly_issued_by(certificate)
    java.keytool("-certreq", "-alias", "mine", "-file", "request.pem")
    request = x509.load_pem_x509_csr((java.own.guest.directory / "request.pem").read_bytes())
    assert request.is_signature_valid and request.public_key() == certificate.public_key()
    authority, public = Authority(), request.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
    answer = chain_pem((authority.issue_for(public, "mine"), authority.intermediate, authority.root))
    java.keytool("-importcert", "-alias", "mine", "-file", java.own.guest.write("answer.pem", answer), "-noprompt")
    listed = java.keytool("-list", "-v")
    assert "Entry type: PrivateKeyEntry" in listed and "Certificate chain length: 3" in listed
    java.keytool("-delete", "-alias", "mine")
    assert "Private Key" not in java.own.as_user("--list-objects")


def test_keytool_makes_a_secret_key(java: Java) -> None:
    java.keytool("-genseckey", "-alias", "secret", "-keyalg", "AES", "-keysize", "256")
    assert "secret, SecretKeyEntry" in java.keytool("-list")
    assert "Secret Key Object; AES length 32" in java.own.as_user("--list-objects")


def test_keytool_imports_a_key_store(java: Java) -> None:
    key, guest = new_key("p256"), java.own.guest
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    chain = Authority().chain(key)
    encryption = serialization.BestAvailableEncryption(b"transport")
    packed = pkcs12.serialize_key_and_certificates(b"brought", key, chain[0], chain[1:], encryption)
    assert "1 entries successfully imported" in java.imports(guest.write("brought.p12", packed), "transport")
    assert "Certificate chain length: 2" in java.keytool("-list", "-v", "-alias", "brought")
    digest, signature = guest.write("digest", b"d" * 32), guest.directory / "signature"
    key_id = next(line.split()[1] for line in java.own.as_user("--list-objects").splitlines() if " ID: " in line)
    mechanism = ("--mechanism", "ECDSA", "--signature-format", "openssl")
    java.own.as_user("--sign", *mechanism, "--id", key_id, "--input-file", digest, "--output-file", signature)
    key.public_key().verify(signature.read_bytes(), b"d" * 32, ec.ECDSA(Prehashed(hashes.SHA256())))


def test_every_service(java: Java, classes: Path) -> None:
    """Ciphers, MACs, digests, random bytes, agreements, signatures, key wrapping and secret entries."""
    lines = java.own.guest.run("java", "-cp", classes, "OwnKeys", java.config, USER, timeout=60).stdout.decode().splitlines()
    assert [line for line in lines if not line.endswith(" same")] == []
    assert len(lines) == 72
    assert {line.rpartition(" ")[0] for line in lines} >= {
        "AES/GCM/NoPadding 256",
        "AES/CBC/PKCS5Padding 128",
        "HmacSHA256",
        "ECDH secp384r1",
        "secp521r1 SHA512withECDSA",
        "RSA RSASSA-PSS SHA-256",
        "RSA wraps AES",
        "secret entry",
    }


def test_two_secret_keys_of_one_label(java: Java, classes: Path) -> None:
    """SunPKCS11 opens no such key store (P11KeyStore.mapLabels)."""
    for key_id in ("01", "02"):
        java.own.as_user("--keygen", "--key-type", "AES:16", "--label", "twice", "--id", key_id)
    said = java.own.guest.run("java", "-cp", classes, "OwnKeys", java.config, USER, check=False).stdout.decode()
    assert "found multiple secret keys sharing same CKA_LABEL [twice]" in said


@pytest.fixture
def served(java: Java, classes: Path, request: pytest.FixtureRequest) -> Iterator[tuple[int, bytes]]:
    """The port of a server whose key keytool made in slot 1, and its certificate."""
    names = ("-dname", "CN=localhost", "-ext", "san=dns:localhost", "-ext", "bc:c")
    java.keytool("-genkeypair", "-alias", "server", *KINDS[request.param], *names)
    certificate = certificate_of(java, "server").public_bytes(serialization.Encoding.PEM)
    output = java.own.guest.directory / "server.log"
    server = java.own.guest.start("java", "-cp", classes, "ServeTls", java.config, USER, output=output)
    try:
        wait_for(lambda: server.poll() is not None or output.read_text().endswith("\n"), "the port")
        yield int(output.read_text().split()[0]), certificate
    finally:
        stop(server)


@pytest.mark.parametrize("served", ["rsa", "p256"], indirect=True)
def test_serves_tls(served: tuple[int, bytes]) -> None:
    port, certificate = served
    for version in ("TLSv1.2", "TLSv1.3"):
        context = client_context(certificate, version)
        with (
            socket.create_connection(("127.0.0.1", port), 5) as sock,
            context.wrap_socket(sock, server_hostname="localhost") as tls,
        ):
            assert tls.version() == version
            assert tls.getpeercert(True) == ssl.PEM_cert_to_DER_cert(certificate.decode())
            assert tls.recv(100).startswith(b"TLS_")
