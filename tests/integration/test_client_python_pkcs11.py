"""python-pkcs11: finds, signs, decrypts, derives; and every way to read, copy, wrap or change a delivered key is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from support.certificates import Authority, new_key
from support.guest import Guest
from support.host import Module

pytestmark = pytest.mark.real
PROGRAMS = Path(__file__).parent / "programs"
MESSAGE = b"a message of the guest"


def dss(signature: bytes) -> bytes:
    half = len(signature) // 2
    return encode_dss_signature(int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big"))


def test_uses_keys(guest: Guest, module: Module) -> None:
    keys = {"ec": new_key("p256"), "rsa": new_key("rsa2048"), "ed": new_key("ed25519")}
    for name, key in keys.items():
        module.push(name, key)
    curve, rsa_key, edwards = keys["ec"], keys["rsa"], keys["ed"]
    assert isinstance(curve, ec.EllipticCurvePrivateKey) and isinstance(rsa_key, rsa.RSAPrivateKey)
    assert isinstance(edwards, ed25519.Ed25519PrivateKey)
    sealed = rsa_key.public_key().encrypt(MESSAGE, padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None))
    peer = ec.generate_private_key(ec.SECP256R1())
    point = peer.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    answer = guest.run(sys.executable, PROGRAMS / "use_keys.py", guest.library.path, sealed.hex(), point.hex())
    results = json.loads(answer.stdout)
    curve.public_key().verify(dss(bytes.fromhex(results["ECDSA"])), MESSAGE, ec.ECDSA(hashes.SHA256()))
    for name in ("SHA256_RSA_PKCS", "SHA256_RSA_PKCS in parts"):
        rsa_key.public_key().verify(bytes.fromhex(results[name]), MESSAGE, padding.PKCS1v15(), hashes.SHA256())
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    rsa_key.public_key().verify(bytes.fromhex(results["RSA_PKCS_PSS"]), MESSAGE, pss, hashes.SHA256())
    assert bytes.fromhex(results["OAEP"]) == MESSAGE
    assert serialization.load_der_public_key(bytes.fromhex(results["public EC"])) == curve.public_key()
    if guest.library.ours:
        curve.public_key().verify(dss(bytes.fromhex(results["ECDSA_SHA256"])), MESSAGE, ec.ECDSA(hashes.SHA256()))
        edwards.public_key().verify(bytes.fromhex(results["EDDSA"]), MESSAGE)
        assert bytes.fromhex(results["ECDH"]) == peer.exchange(ec.ECDH(), curve.public_key())
    else:  # p11-kit 0.24.1 refuses them by itself
        assert {results[name] for name in ("ECDSA_SHA256", "EDDSA", "ECDH")} == {"MechanismInvalid"}


def test_no_way_to_a_delivered_key(guest: Guest, module: Module) -> None:
    authority = Authority()
    for name, kind in (("ec", "p256"), ("rsa", "rsa2048")):
        key = new_key(kind)
        module.push(name, key, authority.chain(key))
    answers = json.loads(guest.run(sys.executable, PROGRAMS / "attack_objects.py", guest.library.path).stdout)
    assert not {attempt: said for attempt, said in answers.items() if said.startswith("gave")}
    secret = {said for attempt, said in answers.items() if " read " in attempt}
    assert secret <= {"AttributeSensitive", "AttributeTypeInvalid"}
    changes = {said for attempt, said in answers.items() if " change" in attempt}
    assert changes <= {"ActionProhibited", "AttributeReadOnly", "TokenWriteProtected"}, changes
    assert len(answers) > 60
