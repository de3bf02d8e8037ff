"""OpenSC's pkcs11-tool: lists, signs, verifies, decrypts and runs its own test."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from support.certificates import Authority, PrivateKey, chain_der, key_id, new_key, pkcs8, public_pem
from support.guest import Guest
from support.host import Module

pytestmark = pytest.mark.real
MESSAGE = b"a message of the guest"


@pytest.fixture(scope="module")
def keys() -> dict[str, PrivateKey]:
    return {"web": new_key("p256"), "mail": new_key("rsa2048"), "sign": new_key("ed25519")}


@pytest.fixture
def furnished(module: Module, keys: dict[str, PrivateKey]) -> Module:
    authority = Authority()
    for name, key in keys.items():
        module.push(name, key, authority.chain(key))
    return module


def tool(guest: Guest, *arguments: object) -> str:
    return guest.run("pkcs11-tool", "--module", guest.library.path, *map(str, arguments)).stdout.decode()


def test_lists_slots_mechanisms_and_objects(guest: Guest, furnished: Module, keys: dict[str, PrivateKey]) -> None:
    slots = tool(guest, "--list-slots")
    assert f"token label        : {furnished.name}" in slots
    assert "readonly" in slots
    mechanisms = tool(guest, "--list-mechanisms")
    assert "RSA-PKCS-PSS, keySize={2048,8192}, sign, verify" in mechanisms
    # p11-kit 0.24.1 hides what its protocol cannot carry: hash-and-sign with ECDSA but SHA-1, EdDSA
    assert ("ECDSA-SHA256" in mechanisms) == guest.library.ours
    assert ("EDDSA" in mechanisms) == guest.library.ours
    objects = tool(guest, "--list-objects")
    for name, key in keys.items():
        assert objects.count(f"label:      {name}\n") == 3, objects
        assert objects.count(f"ID:         {key_id(key).hex()}") == 3, objects
    assert objects.count("Private Key Object") == 3
    assert "Access:     sensitive" in objects
    assert "extractable" not in objects.replace("never extractable", "")


def test_reads_the_certificate_and_the_public_key_that_were_delivered(guest: Guest, module: Module) -> None:
    key = new_key("p256")  # OpenSC 0.23 reads no public key on P-384, not from SoftHSM2 either
    chain = Authority().chain(key)
    module.push("web", key, chain)
    path = guest.directory / "out"
    tool(guest, "--read-object", "--type", "cert", "--label", "web", "--output-file", path)
    assert path.read_bytes() == chain_der(chain)[0]
    tool(guest, "--read-object", "--type", "pubkey", "--label", "web", "--output-file", path)
    assert serialization.load_der_public_key(path.read_bytes()) == key.public_key()


MECHANISMS = {
    "ECDSA": ("web", ()),
    "ECDSA-SHA256": ("web", ()),
    "RSA-PKCS": ("mail", ()),
    "SHA256-RSA-PKCS": ("mail", ()),
    "RSA-PKCS-PSS": ("mail", ("--hash-algorithm", "SHA256", "--mgf", "MGF1-SHA256")),
    "SHA256-RSA-PKCS-PSS": ("mail", ("--mgf", "MGF1-SHA256")),
    "EDDSA": ("sign", ()),
}
#: p11-kit 0.24.1 carries none of these
ONLY_OURS = {"ECDSA-SHA256", "SHA256-RSA-PKCS-PSS", "EDDSA"}


def check(key: PrivateKey, mechanism: str, signature: bytes) -> None:
    """Fails unless `signature` is the key's over MESSAGE."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        key.public_key().verify(signature, MESSAGE, ec.ECDSA(hashes.SHA256()))
    elif isinstance(key, rsa.RSAPrivateKey) and "PSS" in mechanism:
        key.public_key().verify(signature, MESSAGE, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
    elif isinstance(key, rsa.RSAPrivateKey) and mechanism == "RSA-PKCS":
        digest = hashlib.sha256(MESSAGE).digest()
        assert key.public_key().recover_data_from_signature(signature, padding.PKCS1v15(), None) == digest
    elif isinstance(key, rsa.RSAPrivateKey):
        key.public_key().verify(signature, MESSAGE, padding.PKCS1v15(), hashes.SHA256())
    else:
        assert isinstance(key, ed25519.Ed25519PrivateKey)
        key.public_key().verify(signature, MESSAGE)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_signs_and_verifies(guest: Guest, furnished: Module, keys: dict[str, PrivateKey], mechanism: str) -> None:
    label, more = MECHANISMS[mechanism]
    key = keys[label]
    data = hashlib.sha256(MESSAGE).digest() if mechanism in ("ECDSA", "RSA-PKCS", "RSA-PKCS-PSS") else MESSAGE
    source, target = guest.write("in", data), guest.directory / "signature"
    common = ("--mechanism", mechanism, "--id", key_id(key).hex(), *more, "--input-file", source)
    if label == "web":
        common += ("--signature-format", "openssl")
    if mechanism in ONLY_OURS and not guest.library.ours:
        command = ("pkcs11-tool", "--module", guest.library.path, "--sign", *common, "--output-file", target)
        refused = guest.run(*map(str, command), check=False)
        assert refused.returncode != 0
        assert b"CKR_MECHANISM_INVALID" in refused.stdout or b"not supported" in refused.stdout, refused.stdout
        return
    tool(guest, "--sign", *common, "--output-file", target)
    check(key, mechanism, target.read_bytes())
    assert "valid" in tool(guest, "--verify", *common, "--signature-file", target)


def test_openssl_verifies_what_it_signs(guest: Guest, furnished: Module, keys: dict[str, PrivateKey]) -> None:
    message, signature, public = (
        guest.write("m", MESSAGE),
        guest.directory / "s",
        guest.write("public.pem", public_pem(keys["mail"])),
    )
    tool(
        guest,
        "--sign",
        "--mechanism",
        "SHA512-RSA-PKCS",
        "--label",
        "mail",
        "--id",
        key_id(keys["mail"]).hex(),
        "-i",
        message,
        "-o",
        signature,
    )
    assert b"Verified OK" in guest.run("openssl", "dgst", "-sha512", "-verify", public, "-signature", signature, message).stdout


@pytest.mark.parametrize("mechanism", ["RSA-PKCS", "RSA-PKCS-OAEP"])
def test_decrypts(guest: Guest, furnished: Module, keys: dict[str, PrivateKey], mechanism: str) -> None:
    key = keys["mail"]
    assert isinstance(key, rsa.RSAPrivateKey)
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    source = guest.write("in", key.public_key().encrypt(MESSAGE, oaep if "OAEP" in mechanism else padding.PKCS1v15()))
    more = ("--hash-algorithm", "SHA256", "--mgf", "MGF1-SHA256") if "OAEP" in mechanism else ()
    target = guest.directory / "plain"
    tool(
        guest,
        "--decrypt",
        "--mechanism",
        mechanism,
        "--id",
        key_id(key).hex(),
        *more,
        "--input-file",
        source,
        "--output-file",
        target,
    )
    assert target.read_bytes() == MESSAGE


def test_its_own_test_finds_nothing(guest: Guest, furnished: Module) -> None:
    result = guest.run(
        "pkcs11-tool", "--module", guest.library.path, "--login", "--pin", "any", "--test", check=False
    ).stdout.decode()
    assert "RSA-X-509: OK" in result
    assert "all 4 digest functions seem to work" in result
    # p11-kit's client asks for 0 random bytes with no buffer, which its own protocol calls a bad argument
    expected = "No errors" if guest.library.ours else "1 errors"
    assert result.rstrip().endswith(expected), result
    assert guest.library.ours or "C_GenerateRandom(buf1,0) failed" in result


def test_writes_nothing(guest: Guest, furnished: Module) -> None:
    source = guest.write("key.der", pkcs8(new_key("rsa2048")))
    for arguments in (
        ("--write-object", source, "--type", "privkey", "--label", "mine"),
        ("--keypairgen", "--key-type", "EC:prime256v1", "--label", "mine"),
        ("--delete-object", "--type", "privkey", "--label", "mail"),
    ):
        result = guest.run("pkcs11-tool", "--module", guest.library.path, *map(str, arguments), check=False)
        assert result.returncode != 0, result.stdout
    assert "mine" not in tool(guest, "--list-objects")
    assert tool(guest, "--list-objects").count("label:      mail\n") == 3
