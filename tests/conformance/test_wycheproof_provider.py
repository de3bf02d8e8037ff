"""Wycheproof on the cryptoprocessor itself: signatures are verified with each group's public key."""

from __future__ import annotations

from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.software import SoftwareProvider
from hsmvisord.wire.calls import Mechanism
from support.wycheproof import title, vectors

PSS = (ck.CKM_SHA256, ck.CKG_MGF1_SHA256, 32)
FILES: dict[str, Mechanism] = {
    "ecdsa_secp256r1_sha256_p1363_test": Mechanism(ck.CKM_ECDSA_SHA256),
    "ecdsa_secp384r1_sha384_p1363_test": Mechanism(ck.CKM_ECDSA_SHA384),
    "ed25519_test": Mechanism(ck.CKM_EDDSA),
    "rsa_signature_2048_sha256_test": Mechanism(ck.CKM_SHA256_RSA_PKCS),
    "rsa_pss_2048_sha256_mgf1_32_test": Mechanism(ck.CKM_SHA256_RSA_PKCS_PSS, PSS),
    "mldsa_44_verify_test": Mechanism(ck.CKM_ML_DSA),
}
PROVIDER = SoftwareProvider()


def verifies(group: dict[str, Any], vector: dict[str, Any], mechanism: Mechanism) -> bool:
    if vector.get("ctx"):
        mechanism = Mechanism(mechanism.type, (0, bytes.fromhex(vector["ctx"])))
    try:
        public = PROVIDER.load_public_key(bytes.fromhex(group["publicKeyDer"]))
        public.verifier(mechanism).verify(bytes.fromhex(vector["msg"]), bytes.fromhex(vector["sig"]))
    except CkError:
        return False
    return True


@pytest.mark.parametrize("name", FILES)
def test_signatures(name: str) -> None:
    checked = 0
    for group, vector in vectors(name):
        if vector["result"] != "acceptable":
            assert verifies(group, vector, FILES[name]) == (vector["result"] == "valid"), title(vector)
            checked += 1
    assert checked > 100
