"""Signatures of RFC 6979 (A.2.1-A.2.3), verified with keys that are made of the private values there: DSA and P-192."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import parts
from hsmvisord.crypto.interface import PrivateKey, Verifier
from hsmvisord.wire.calls import Mechanism

GROUPS = json.loads((Path(__file__).parent / "vectors/rfc6979.json").read_text())
P192 = bytes.fromhex("06082a8648ce3d030101")
PLAIN = {ck.CKK_DSA: Mechanism(ck.CKM_DSA), ck.CKK_EC: Mechanism(ck.CKM_ECDSA)}


def key_of(group: dict[str, Any]) -> PrivateKey:
    value = {ck.CKA_VALUE: bytes.fromhex(group["x"])}
    if group["name"].startswith("EC"):
        return parts.private_key(ck.CKK_EC, value | {ck.CKA_EC_PARAMS: P192})
    kinds = {"p": ck.CKA_PRIME, "q": ck.CKA_SUBPRIME, "g": ck.CKA_BASE}
    return parts.private_key(ck.CKK_DSA, value | {kind: bytes.fromhex(group[name]) for name, kind in kinds.items()})


def verifies(verifier: Verifier, data: bytes, signature: bytes) -> bool:
    try:
        verifier.verify(data, signature)
    except CkError as error:
        assert error.rv == ck.CKR_SIGNATURE_INVALID
        return False
    return True


def verifies_in_parts(verifier: Verifier, data: bytes, signature: bytes) -> bool:
    assert verifier.begin is not None
    operation = verifier.begin()
    for byte in data:
        operation.update(bytes((byte,)))
    try:
        operation.finish(signature)
    except CkError as error:
        assert error.rv == ck.CKR_SIGNATURE_INVALID
        return False
    return True


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group["name"])
def test_signatures(group: dict[str, Any]) -> None:
    key = key_of(group)
    assert key.kind.name == group["name"] and len(group["signatures"]) == 10
    for vector in group["signatures"]:
        mechanism, message = Mechanism(getattr(ck, f"CKM_{vector['mechanism']}")), vector["message"].encode()
        signature = bytes.fromhex(vector["signature"])
        digest = hashlib.new(vector["mechanism"].split("_")[1].lower(), message).digest()
        verifier, plain = key.public.verifier(mechanism), key.public.verifier(PLAIN[key.kind.key_type])
        assert verifies(verifier, message, signature), vector
        assert verifies_in_parts(verifier, message, signature) and verifies(plain, digest, signature)
        for at in (0, len(signature) // 2, len(signature) - 1):
            wrong = signature[:at] + bytes((signature[at] ^ 1,)) + signature[at + 1 :]
            assert not verifies(verifier, message, wrong) and not verifies(plain, digest, wrong)
            assert not verifies_in_parts(verifier, message, wrong)
        assert not verifies(verifier, message + b"!", signature)
        mine = key.signer(mechanism).sign(message)
        assert mine != signature, "with a number of its own"
        assert verifies(verifier, message, mine)
