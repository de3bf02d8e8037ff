"""The vectors of RFC 8032, section 7 (EdDSA: pure, with a context, prehashed), on the cryptoprocessor and through our library."""

from __future__ import annotations

import collections
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed448, ed25519
from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.base import BasePrivateKey
from hsmvisord.crypto.edwards import EdwardsPrivateKey
from hsmvisord.wire.calls import Mechanism
from support.guest import REPOSITORY, Guest, library
from support.host import Host
from support.own_keys import SO, USER

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "vectors/rfc8032.json").read_text())
SECTIONS = {"7.1 Ed25519": 5, "7.2 Ed25519ctx": 4, "7.3 Ed25519ph": 1, "7.4 Ed448": 9, "7.5 Ed448ph": 2}
PROGRAM = REPOSITORY / "tests/integration/programs/eddsa_vectors.py"
PARTS = 7  #: bytes


def key_of(vector: dict[str, Any]) -> BasePrivateKey:
    secret = bytes.fromhex(vector["secret"])
    if len(secret) == 32:
        return EdwardsPrivateKey(ed25519.Ed25519PrivateKey.from_private_bytes(secret))
    return EdwardsPrivateKey(ed448.Ed448PrivateKey.from_private_bytes(secret))


def mechanism_of(vector: dict[str, Any], context: bytes | None = None) -> Mechanism:
    context = bytes.fromhex(vector["context"]) if context is None else context
    if not vector["prehash"] and not context:
        return Mechanism(ck.CKM_EDDSA)
    return Mechanism(ck.CKM_EDDSA, (int(vector["prehash"]), context))


def verifies(vector: dict[str, Any], message: bytes, signature: bytes, mechanism: Mechanism) -> bool:
    verifier = key_of(vector).public.verifier(mechanism)
    answers = []
    for whole in (True, False):
        try:
            if whole:
                verifier.verify(message, signature)
            else:
                assert verifier.begin is not None
                parts = verifier.begin()
                for at in range(0, len(message), PARTS):
                    parts.update(message[at : at + PARTS])
                parts.finish(signature)
            answers.append(True)
        except CkError as error:
            assert error.rv == ck.CKR_SIGNATURE_INVALID, error
            answers.append(False)
    assert answers[0] == answers[1]
    return answers[0]


def test_all_vectors_are_there() -> None:
    assert collections.Counter(vector["section"] for vector in VECTORS) == SECTIONS


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['section']}-{len(vector['message']) // 2}")
def test_a_vector(vector: dict[str, Any]) -> None:
    message, signature = bytes.fromhex(vector["message"]), bytes.fromhex(vector["signature"])
    key, mechanism = key_of(vector), mechanism_of(vector)
    signer = key.signer(mechanism)
    assert signer.sign(message) == signature and signer.output_size == len(signature)
    assert signer.begin is not None
    parts = signer.begin()
    for at in range(0, len(message), PARTS):
        parts.update(message[at : at + PARTS])
    assert parts.finish() == signature
    assert verifies(vector, message, signature, mechanism)
    assert not verifies(vector, message + b"\0", signature, mechanism)
    other = Mechanism(ck.CKM_EDDSA, (1 - int(vector["prehash"]), b"another"))
    for wrong in (mechanism_of(vector, context=b"wrong"), other):
        assert not verifies(vector, message, signature, wrong)


@pytest.mark.parametrize("section", SECTIONS)
def test_no_bit_of_a_signature_may_change(section: str) -> None:
    vector = next(vector for vector in VECTORS if vector["section"] == section)
    message, signature = bytes.fromhex(vector["message"]), bytes.fromhex(vector["signature"])
    verifier = key_of(vector).public.verifier(mechanism_of(vector))
    for bit in random.Random(section).sample(range(8 * len(signature)), 100):
        changed = bytearray(signature)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CkError) as caught:
            verifier.verify(message, bytes(changed))
        assert caught.value.rv == ck.CKR_SIGNATURE_INVALID
    for length in (len(signature) - 1, len(signature) + 1, 0):
        with pytest.raises(CkError) as caught:
            verifier.verify(message, signature.ljust(length, b"\0")[:length])
        assert caught.value.rv == ck.CKR_SIGNATURE_LEN_RANGE


@pytest.mark.parametrize("section", SECTIONS)
def test_another_number_for_the_same_scalar_is_refused(section: str) -> None:
    """S + L: 0 <= S < L (RFC 8032, 5.1.7 and 5.2.7)."""
    vector = next(vector for vector in VECTORS if vector["section"] == section)
    signature = bytes.fromhex(vector["signature"])
    half = len(signature) // 2
    order = 2**252 + 27742317777372353535851937790883648493
    if half == 57:
        order = 2**446 - 13818066809895115352007386748515426880336692474882178609894547503885
    scalar = int.from_bytes(signature[half:], "little")
    malleable = signature[:half] + (scalar + order).to_bytes(half, "little")
    assert not verifies(vector, bytes.fromhex(vector["message"]), malleable, mechanism_of(vector))


def test_through_the_library(shared_host: Host, tmp_path: Path) -> None:
    """The guest takes in each private key, signs in one part and in parts, and verifies what is right and what is not."""
    module = shared_host.create("rfc8032", guest_token=True)
    try:
        guest = Guest(library("ours"), module.address, tmp_path)
        tool = ("pkcs11-tool", "--module", guest.library.path, "--slot", "1", "--so-pin", SO.decode())
        guest.run(*tool, "--init-token", "--label", "own")
        guest.run(*tool, "--login", "--login-type", "so", "--init-pin", "--new-pin", USER.decode())
        said = guest.run(
            sys.executable, PROGRAM, guest.library.path, USER.decode(), stdin=json.dumps(VECTORS).encode(), timeout=100
        )
        answers = json.loads(said.stdout)
    finally:
        module.destroy()
    right = {
        "one part": "",
        "in parts": "",
        "verified": True,
        "mutated": [False] * 8,
        "wrong context": False,
        "wrong scheme": False,
    }
    expected = [right | {"one part": vector["signature"], "in parts": vector["signature"]} for vector in VECTORS]
    assert answers["vectors"] == expected
    refused = "MechanismParamInvalid"
    assert answers["contexts"] == {"255": True, "256": refused, "255 ph": True, "256 ph": refused}
