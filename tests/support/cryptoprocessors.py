"""What tests ask of any cryptoprocessor: keys, and what each signs."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import Access, CryptoProvider, PrivateKey, Wanted
from hsmvisord.crypto.software import SoftwareProvider
from hsmvisord.wire.calls import Mechanism

SOFTWARE = SoftwareProvider()
OPEN = Access(readable=True, wrappable=True)
CURVES = {256: "06082a8648ce3d030107", 384: "06052b81040022", 521: "06052b81040023"}
ED25519 = "06032b6570"
DATA = b"a message that is signed"
PSS = (ck.CKM_SHA256, ck.CKG_MGF1_SHA256, 32)
OAEP = (ck.CKM_SHA_1, ck.CKG_MGF1_SHA1, ck.CKZ_DATA_SPECIFIED, b"")

KEYS: dict[str, tuple[int, Wanted]] = {
    "RSA": (ck.CKM_RSA_PKCS_KEY_PAIR_GEN, Wanted(bits=2048)),
    "Ed25519": (ck.CKM_EC_EDWARDS_KEY_PAIR_GEN, Wanted(parameters=bytes.fromhex(ED25519))),
    **{f"P-{n}": (ck.CKM_EC_KEY_PAIR_GEN, Wanted(parameters=bytes.fromhex(oid))) for n, oid in CURVES.items()},
}
ECDSA: list[tuple[int, Any, bytes]] = [
    (ck.CKM_ECDSA, None, bytes(range(32))),
    (ck.CKM_ECDSA_SHA256, None, DATA),
    (ck.CKM_ECDSA_SHA3_384, None, DATA),
]
SIGNING: dict[str, list[tuple[int, Any, bytes]]] = {
    "RSA": [
        (ck.CKM_RSA_PKCS, None, b"up to 245 bytes"),
        (ck.CKM_SHA1_RSA_PKCS, None, DATA),
        (ck.CKM_SHA256_RSA_PKCS, None, DATA),
        (ck.CKM_SHA512_RSA_PKCS, None, DATA),
        (ck.CKM_SHA3_256_RSA_PKCS, None, DATA),
        (ck.CKM_RSA_PKCS_PSS, PSS, bytes(32)),
        (ck.CKM_SHA256_RSA_PKCS_PSS, PSS, DATA),
        (ck.CKM_RSA_X_509, None, bytes(1) + b"\1" * 255),
    ],
    "Ed25519": [(ck.CKM_EDDSA, None, DATA)],
    **{f"P-{n}": ECDSA for n in CURVES},
}


def refused(rv: int, function: Any, *arguments: Any) -> None:
    with pytest.raises(CkError) as caught:
        function(*arguments)
    assert ck.rv_name(caught.value.rv) == ck.rv_name(rv), caught.value


def pkcs8(key: Any) -> bytes:
    return bytes(key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))


NEW: dict[str, Any] = {
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
}


def signs(provider: CryptoProvider, key: PrivateKey, name: str) -> None:
    """Every mechanism of its type, in one part and in several; the software verifies."""
    public = SOFTWARE.load_public_key(key.public.spki)
    for number, parameter, data in SIGNING[name]:
        mechanism = Mechanism(number, parameter)
        assert provider.offers(number), ck.mechanism_name(number)
        signer, verifier = key.signer(mechanism), public.verifier(mechanism)
        signature = signer.sign(data)
        assert len(signature) == signer.output_size
        verifier.verify(data, signature)
        refused(ck.CKR_SIGNATURE_INVALID, verifier.verify, data[:-1] + b"!", signature)
        if signer.begin is not None:
            parts = signer.begin()
            parts.update(data[:5])
            parts.update(data[5:])
            verifier.verify(data, parts.finish())
