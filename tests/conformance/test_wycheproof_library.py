"""Wycheproof's private-key operations through our library, on a real module: RSA decryption, OAEP, ECDH."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.guest import REPOSITORY, Guest, library
from support.host import Module
from support.wycheproof import title, vectors

PROGRAM = REPOSITORY / "tests/integration/programs/private_vectors.py"


@pytest.fixture
def ours(module: Module, tmp_path: Path) -> Guest:
    return Guest(library("ours"), module.address, tmp_path)


def ask(guest: Guest, questions: list[list[str]]) -> list[str | None]:
    lines = "".join(json.dumps(question) + "\n" for question in questions).encode()
    said = guest.run(sys.executable, PROGRAM, guest.library.path, stdin=lines, timeout=100).stdout.decode()
    return [json.loads(line) for line in said.splitlines()]


def push_pkcs8(module: Module, name: str, pkcs8: str, pushed: dict[str, str]) -> str:
    """Delivers each key once; returns its label."""
    if pkcs8 not in pushed:
        key: Any = serialization.load_der_private_key(bytes.fromhex(pkcs8), None)
        pushed[pkcs8] = f"{name}-{len(pushed)}"
        module.push(pushed[pkcs8], key, profile="decrypt")
    return pushed[pkcs8]


def test_rsa_oaep(ours: Guest, module: Module) -> None:
    pushed: dict[str, str] = {}
    cases = list(vectors("rsa_oaep_2048_sha1_mgf1sha1_test"))
    questions = [[push_pkcs8(module, "oaep", g["privateKeyPkcs8"], pushed), "oaep", v["ct"], v["label"]] for g, v in cases]
    for (_, vector), answer in zip(cases, ask(ours, questions), strict=True):
        assert answer == (vector["msg"] if vector["result"] == "valid" else None), title(vector)


def test_rsa_pkcs1(ours: Guest, module: Module) -> None:
    """An invalid ciphertext may answer an error, or other plaintext (implicit rejection), never the vector's message."""
    pushed: dict[str, str] = {}
    cases = list(vectors("rsa_pkcs1_2048_test"))
    questions = [[push_pkcs8(module, "pkcs1", g["privateKeyPkcs8"], pushed), "pkcs1", v["ct"]] for g, v in cases]
    for (_, vector), answer in zip(cases, ask(ours, questions), strict=True):
        if vector["result"] == "valid":
            assert answer == vector["msg"], title(vector)
        else:
            assert answer is None or answer != vector["msg"] or not vector["msg"], title(vector)


def test_ecdh(ours: Guest, module: Module) -> None:
    pushed: dict[str, str] = {}
    cases, questions = [], []
    for _, vector in vectors("ecdh_secp256r1_ecpoint_test"):
        private = ec.derive_private_key(int(vector["private"], 16), ec.SECP256R1())
        encoding, form = serialization.Encoding.DER, serialization.PrivateFormat.PKCS8
        pkcs8 = private.private_bytes(encoding, form, serialization.NoEncryption()).hex()
        cases.append(vector)
        questions.append([push_pkcs8(module, "ecdh", pkcs8, pushed), "ecdh", vector["public"]])
    assert len(cases) > 300
    for vector, answer in zip(cases, ask(ours, questions), strict=True):
        if vector["result"] == "valid":
            assert answer == vector["shared"], title(vector)
        elif vector["result"] == "invalid":
            assert answer is None, title(vector)
        else:  # acceptable: a compressed point, an unusual encoding
            assert answer in (None, vector["shared"]), title(vector)
