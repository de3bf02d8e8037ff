"""OpenSC's pkcs11-tool: the four tests of its own on both slots; keys of every kind made, brought, wrapped and used in slot 1."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, padding, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric import padding as rsa_padding
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap
from hsmvisord import ck
from support.certificates import Authority, chain_der, new_key, pkcs8, spki
from support.guest import Guest
from support.host import Module
from support.own_slot import CURVES, OURS_ALONE, OwnSlot

pytestmark = pytest.mark.real
MESSAGE = b"a message of the guest"
IV = bytes(range(16))
NO_PARTS = "warning: PKCS11 function C_SignUpdate failed: rv = CKR_FUNCTION_NOT_SUPPORTED (0x54)"


@pytest.fixture(params=["delivered", "own"])
def tested(request: pytest.FixtureRequest, own: OwnSlot) -> tuple[str, ...]:
    """pkcs11-tool's command on a slot with an RSA key and an EC key, logged in."""
    tool = ("pkcs11-tool", "--module", str(own.guest.library.path), "--login")
    if request.param == "own":
        own.generate("rsa:2048", "mail", "01", "--usage-sign", "--usage-decrypt")
        own.generate("EC:prime256v1", "web", "02")
        return (*tool, "--slot", "1", "--pin", "user-1")
    authority = Authority()
    for label, kind in (("mail", "rsa2048"), ("web", "p256")):
        key = new_key(kind)
        own.module.push(label, key, authority.chain(key))
    return (*tool, "--slot", "0", "--pin", "any")


# ---- its own tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("software", [(), ("--allow-sw",)], ids=["hardware", "software"])
def test_its_own_test(own: OwnSlot, tested: tuple[str, ...], software: tuple[str, ...]) -> None:
    """Without --allow-sw it tests no signature: the module's mechanisms are not CKF_HW."""
    ours = own.guest.library.ours
    result = own.guest.run(*tested, "--test", *software, check=False)
    said = result.stdout.decode()
    # p11-kit's client asks for 0 random bytes with no buffer, which its own protocol calls a bad argument
    assert said.rstrip().endswith("No errors" if ours else "1 errors"), said
    assert result.returncode == 0 or not ours
    assert ("ERR" in said) == (not ours) and said.count("ERR") <= 1, said
    assert "all 4 digest functions seem to work" in said
    lines = [line.strip() for line in said.splitlines()]
    if software:
        # CKM_RSA_X_509 works in one part (PKCS#11 3.1, 6.1.8), and with that mechanism it tries C_SignUpdate
        assert [line for line in lines if "warning" in line] == [NO_PARTS]
        assert lines.count("RSA-PKCS: OK") == 3, "signature, verification, decryption"
        assert "SHA256-RSA-PKCS: OK" in lines and "SHA1-RSA-PKCS: OK" in lines
    assert "RSA-X-509: OK" in lines and "RSA-PKCS: OK" in lines
    assert said.count("RSA-PKCS-OAEP: mgf not set, defaulting to MGF1-SHA256\nOK") == 2, "with a label and without"


@pytest.mark.parametrize("curve", ["prime256v1", "secp384r1", "secp521r1", "secp256k1"])
def test_its_own_test_of_curves(own: OwnSlot, curve: str) -> None:
    """It generates a pair, signs, changes CKA_ID, CKA_LABEL and CKA_SUBJECT, and deletes the pair."""
    said = own.as_user("--test-ec", "--session-rw", "--id", "0a", "--key-type", f"EC:{curve}")
    assert said.rstrip().endswith("==> OK"), said
    assert "Key Object" not in own.as_user("--list-objects")


def test_its_own_test_of_threads(own: OwnSlot, tested: tuple[str, ...]) -> None:
    """Five threads initialize the library in either way and ask for information, slots and both tokens, beside the test itself.

    It sleeps for 30 s when it is done and one of them is not.
    """
    orders = ("INGISLT0T1", "ILGISLT1T0", "ILSLT0T1SLGI", "INSLT0SLT1", "ILGISLGISLT0T1")
    threads = [part for order in orders for part in ("--test-threads", order)]
    said = own.guest.run(*tested, "--use-locking", *threads, "--test", "--list-objects", check=False, timeout=60).stdout.decode()
    assert "test_threads all threads have ended with CKR_OK" in said, said
    assert said.count("returning rv = 0") == len(orders)
    returned = {line.rpartition(" returned ")[2] for line in said.splitlines() if " returned " in line}
    assert returned <= {"CKR_OK", "CKR_CRYPTOKI_ALREADY_INITIALIZED"}, returned
    assert "Private Key Object; RSA" in said and "Private Key Object; EC" in said


def test_its_own_test_of_fork(own: OwnSlot, tested: tuple[str, ...]) -> None:
    """Parent and child both list the keys: the child initializes the library anew."""
    result = own.guest.run(*tested, "--test-fork", "--list-objects").stdout.decode()
    assert "Calling C_Initialize in forked child process" in result
    assert "CKR_" not in result and "failed" not in result, result
    assert "Private Key Object; RSA" in result


def test_its_own_test_for_mozilla(own: OwnSlot) -> None:
    """A key pair and a certificate as Mozilla's software makes and changes them."""
    key = new_key("rsa2048")
    certificate = own.guest.write("certificate.der", chain_der(Authority().chain(key))[0])
    said = own.as_user("--moz-cert", certificate, "--session-rw", "--id", "0b", "--key-type", "rsa:2048")
    assert "==> OK, successful! Should work with Mozilla" in said


# ---- keys ---------------------------------------------------------------------------------------------------------------

PAIRS = {
    "rsa:2048": (rsa.RSAPublicKey, 2048),
    "rsa:3072": (rsa.RSAPublicKey, 3072),
    "EC:prime256v1": (ec.EllipticCurvePublicKey, 256),
    "EC:secp384r1": (ec.EllipticCurvePublicKey, 384),
    "EC:secp521r1": (ec.EllipticCurvePublicKey, 521),
    "EC:secp256k1": (ec.EllipticCurvePublicKey, 256),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_generates_a_pair_and_signs(own: OwnSlot, kind: str) -> None:
    public, (cls, size) = own.generate(kind, "mine", "0c"), PAIRS[kind]
    assert isinstance(public, cls) and public.key_size == size
    source, target = own.guest.write("in", hashlib.sha256(MESSAGE).digest()), own.guest.directory / "out"
    mechanism = "ECDSA" if isinstance(public, ec.EllipticCurvePublicKey) else "SHA256-RSA-PKCS"
    common = ("--id", "0c", "--mechanism", mechanism, "--input-file", source, "--signature-format", "openssl")
    own.as_user("--sign", *common, "--output-file", target)
    if isinstance(public, ec.EllipticCurvePublicKey):
        public.verify(target.read_bytes(), source.read_bytes(), ec.ECDSA(Prehashed(hashes.SHA256())))
    else:
        public.verify(target.read_bytes(), source.read_bytes(), rsa_padding.PKCS1v15(), hashes.SHA256())
    assert "Signature is valid" in own.as_user("--verify", *common, "--signature-file", target)
    own.as_user("--delete-object", "--type", "privkey", "--id", "0c")
    assert "Private Key" not in own.as_user("--list-objects")


@OURS_ALONE
def test_an_edwards_pair(own: OwnSlot) -> None:
    """OpenSC names the curve in words (CKA_EC_PARAMS as PrintableString); it reads no such public key."""
    said = own.as_user("--keypairgen", "--key-type", "EC:edwards25519", "--label", "sign", "--id", "0d")
    point = next(line.split()[1] for line in said.splitlines() if "EC_POINT:" in line)
    source, target = own.guest.write("in", MESSAGE), own.guest.directory / "out"
    own.as_user("--sign", "--id", "0d", "--mechanism", "EDDSA", "--input-file", source, "--output-file", target)
    public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(point)[2:])
    public.verify(target.read_bytes(), MESSAGE)
    # "curve25519" in 12 bytes that say they are 13: no DER
    refused = own.as_user("--keypairgen", "--key-type", "EC:curve25519", "--id", "0e", check=False)
    assert f"0x{ck.CKR_CURVE_NOT_SUPPORTED:x}" in refused


@pytest.mark.parametrize("kind", ["rsa2048", "p256", "p384", "p521"])
def test_writes_keys_and_certificates(own: OwnSlot, kind: str) -> None:
    key, back = new_key(kind), own.guest.directory / "back"
    things = {"privkey": pkcs8(key), "pubkey": spki(key), "cert": chain_der(Authority().chain(key))[0]}
    for what, value in things.items():
        path = own.guest.write(what, value)
        own.as_user("--write-object", path, "--type", what, "--label", "brought", "--id", "0f")
    assert own.as_user("--list-objects").count("label:      brought") == 3
    own.tool("--read-object", "--type", "cert", "--id", "0f", "--output-file", back)
    assert back.read_bytes() == things["cert"]
    if kind in ("rsa2048", "p256"):  # OpenSC 0.23 reads no public key on other curves
        assert own.public("0f") == key.public_key()
    refused = own.as_user("--read-object", "--type", "privkey", "--id", "0f", "--output-file", back, check=False)
    assert "reading private keys not (yet) supported" in refused
    for what in things:
        own.as_user("--delete-object", "--type", what, "--id", "0f")
    assert "brought" not in own.as_user("--list-objects")


def test_changes_a_name(own: OwnSlot) -> None:
    own.generate("EC:prime256v1", "mine", "10")
    own.as_user("--set-id", "1011", "--type", "privkey", "--id", "10", "--session-rw")
    listed = own.as_user("--list-objects", "--type", "privkey")
    assert "ID:         1011" in listed


# ---- secret keys: p11-kit 0.24.1 carries few of their mechanisms --------------------------------------------------------


def secret(own: OwnSlot, kind: str, key_id: str, *more: str, value: bytes = b"") -> bytes:
    """A secret key of `value`, or a new one that may be read; returns what the token reads of it."""
    if value:
        path = own.guest.write("value", value)
        own.as_user("--write-object", path, "--type", "secrkey", "--key-type", kind, "--id", key_id, "--extractable", *more)
    else:
        own.as_user("--keygen", "--key-type", kind, "--id", key_id, "--extractable", *more)
    return read(own, key_id)


def read(own: OwnSlot, key_id: str) -> bytes:
    path: Path = own.guest.directory / f"secret-{key_id}"
    own.as_user("--read-object", "--type", "secrkey", "--id", key_id, "--output-file", path)
    return path.read_bytes()


def test_generates_secret_keys(own: OwnSlot) -> None:
    for number, kind in enumerate(("AES:16", "AES:24", "AES:32", "GENERIC:64")):
        one, other = secret(own, kind, f"20{number:02x}"), secret(own, kind, f"21{number:02x}")
        assert len(one) == len(other) == int(kind.partition(":")[2]) and one != other
    own.as_user("--keygen", "--key-type", "AES:32", "--id", "22", "--sensitive")
    hidden = ("--read-object", "--type", "secrkey", "--id", "22", "--output-file", own.guest.directory / "hidden")
    assert "CKR_ATTRIBUTE_SENSITIVE" in own.as_user(*hidden, check=False)


MODES = {"AES-ECB": None, "AES-CBC": modes.CBC(IV), "AES-CBC-PAD": modes.CBC(IV)}


@OURS_ALONE
@pytest.mark.parametrize("mechanism", MODES)
def test_encrypts_and_decrypts(own: OwnSlot, mechanism: str) -> None:
    key = secret(own, "AES:32", "23")
    data = os.urandom(1000 if mechanism.endswith("PAD") else 4096)
    plain, sealed, again = own.guest.write("plain", data), own.guest.directory / "sealed", own.guest.directory / "again"
    common = ("--mechanism", mechanism, "--id", "23", "--iv", IV.hex())
    own.as_user("--encrypt", *common, "--input-file", plain, "--output-file", sealed)
    padder = padding.PKCS7(128).padder()
    padded = padder.update(data) + padder.finalize() if mechanism.endswith("PAD") else data
    encryptor = Cipher(algorithms.AES(key), MODES[mechanism] or modes.ECB()).encryptor()
    assert sealed.read_bytes() == encryptor.update(padded) + encryptor.finalize()
    own.as_user("--decrypt", *common, "--input-file", sealed, "--output-file", again)
    assert again.read_bytes() == data


HASHES = {"SHA-1": "sha1", "SHA224": "sha224", "SHA256": "sha256", "SHA384": "sha384", "SHA512": "sha512", "SHA3-256": "sha3_256"}


@OURS_ALONE
def test_hashes(own: OwnSlot) -> None:
    data = os.urandom(50_000)
    source, target = own.guest.write("in", data), own.guest.directory / "out"
    for mechanism, name in HASHES.items():
        own.tool("--hash", "--mechanism", mechanism, "--input-file", source, "--output-file", target)
        assert target.read_bytes() == hashlib.new(name, data).digest(), mechanism


def test_authenticates(own: OwnSlot) -> None:
    key = secret(own, "GENERIC:32", "24", "--usage-sign")
    source, target = own.guest.write("in", MESSAGE), own.guest.directory / "out"
    for mechanism, name in (("SHA-1-HMAC", "sha1"), ("SHA256-HMAC", "sha256"), ("SHA512-HMAC", "sha512")):
        common = ("--mechanism", mechanism, "--id", "24", "--input-file", source)
        own.as_user("--sign", *common, "--output-file", target)
        assert target.read_bytes() == hmac.digest(key, MESSAGE, name)
        assert "Signature is valid" in own.as_user("--verify", *common, "--signature-file", target)


@OURS_ALONE
@pytest.mark.parametrize("mechanism", ["AES-KEY-WRAP", "AES-CBC-PAD", "RSA-PKCS"])
def test_wraps_and_unwraps(own: OwnSlot, mechanism: str) -> None:
    value, wrapped = secret(own, "AES:32", "26"), own.guest.directory / "wrapped"
    if mechanism == "RSA-PKCS":
        own.generate("rsa:2048", "wrap", "27", "--usage-wrap")
    else:
        wrapping = secret(own, "AES:16", "27", "--usage-wrap")
    common = ("--mechanism", mechanism, "--id", "27", "--iv", IV.hex())
    own.as_user("--wrap", *common, "--application-id", "26", "--output-file", wrapped)
    if mechanism == "AES-KEY-WRAP":
        assert aes_key_unwrap(wrapping, wrapped.read_bytes()) == value
    back = ("--application-id", "28", "--application-label", "back", "--key-type", "AES:", "--extractable")
    own.as_user("--unwrap", *common, *back, "--input-file", wrapped)
    assert read(own, "28") == value
    own.as_user("--keygen", "--key-type", "AES:32", "--id", "29", "--sensitive")
    refused = own.as_user("--wrap", *common, "--application-id", "29", "--output-file", wrapped, check=False)
    assert "CKR_KEY_UNEXTRACTABLE" in refused


@OURS_ALONE
@pytest.mark.parametrize("curve", ["prime256v1", "secp384r1", "secp521r1"])
def test_derives(own: OwnSlot, curve: str) -> None:
    """ECDH with a peer's public key; p11-kit 0.24.1 carries no ECDH."""
    public, peer = own.generate(f"EC:{curve}", "mine", "2a", "--usage-derive"), ec.generate_private_key(CURVES[curve])
    assert isinstance(public, ec.EllipticCurvePublicKey)
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    theirs = own.guest.write("peer.der", peer.public_key().public_bytes(encoding, form))
    target, size = own.guest.directory / "secret", (peer.key_size + 7) // 8
    common = ("--id", "2a", "--input-file", theirs, "--output-file", target, "--key-type", f"GENERIC:{size}")
    own.as_user("--derive", "--mechanism", "ECDH1-DERIVE", *common)
    assert target.read_bytes() == peer.exchange(ec.ECDH(), public)


def test_nothing_of_this_on_slot_0(guest: Guest, module: Module) -> None:
    for order in (("--keygen", "--key-type", "AES:16"), ("--test-ec", "--session-rw", "--id", "01", "--key-type", "EC:prime256v1")):
        command = ("pkcs11-tool", "--module", str(guest.library.path), "--slot", "0", "--login", "--pin", "any", *order)
        said = guest.run(*command, check=False)
        assert said.returncode != 0 and b"not supported" in said.stdout, said.stdout
