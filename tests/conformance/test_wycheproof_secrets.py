"""Wycheproof on the cryptoprocessor's secret keys: every vector, with what it says."""

from __future__ import annotations

from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.secret import SecretKey
from hsmvisord.wire.calls import Mechanism
from support.wycheproof import title, vectors


def _bytes(vector: dict[str, Any], name: str) -> bytes:
    return bytes.fromhex(vector[name])


def _both(key: SecretKey, mechanism: Mechanism, plain: bytes, sealed: bytes) -> bool:
    """Says whether the ciphertext opens, to the plaintext; then the plaintext is sealed to it too."""
    try:
        opened = key.decrypter(mechanism).run(sealed)
    except CkError:
        return False
    return opened == plain and key.encrypter(mechanism).run(plain) == sealed


def gcm(group: dict[str, Any], vector: dict[str, Any]) -> bool:
    iv = _bytes(vector, "iv")
    mechanism = Mechanism(ck.CKM_AES_GCM, (iv, 8 * len(iv), _bytes(vector, "aad"), group["tagSize"]))
    sealed = _bytes(vector, "ct") + _bytes(vector, "tag")
    return _both(SecretKey(ck.CKK_AES, _bytes(vector, "key")), mechanism, _bytes(vector, "msg"), sealed)


def cbc(group: dict[str, Any], vector: dict[str, Any]) -> bool:
    mechanism = Mechanism(ck.CKM_AES_CBC_PAD, _bytes(vector, "iv"))
    return _both(SecretKey(ck.CKK_AES, _bytes(vector, "key")), mechanism, _bytes(vector, "msg"), _bytes(vector, "ct"))


def wrap(group: dict[str, Any], vector: dict[str, Any]) -> bool:
    key = SecretKey(ck.CKK_AES, _bytes(vector, "key"))
    return _both(key, Mechanism(ck.CKM_AES_KEY_WRAP), _bytes(vector, "msg"), _bytes(vector, "ct"))


def hmac(group: dict[str, Any], vector: dict[str, Any]) -> bool:
    key = SecretKey(ck.CKK_GENERIC_SECRET, _bytes(vector, "key"))
    mechanism = Mechanism(ck.CKM_SHA256_HMAC_GENERAL, (group["tagSize"] // 8,))
    message, tag = _bytes(vector, "msg"), _bytes(vector, "tag")
    try:
        key.verifier(mechanism).verify(message, tag)
    except CkError:
        return False
    return key.signer(mechanism).sign(message) == tag


FILES = {
    "aes_gcm_test": (gcm, 316),
    "aes_cbc_pkcs5_test": (cbc, 216),
    "aes_wrap_test": (wrap, 162),
    "hmac_sha256_test": (hmac, 174),
}


@pytest.mark.parametrize("name", FILES)
def test_secret_keys(name: str) -> None:
    holds, count = FILES[name]
    checked = 0
    for group, vector in vectors(name):
        if vector["result"] != "acceptable":  # keys of 8 bytes to wrap: RFC 3394 has no such
            assert holds(group, vector) == (vector["result"] == "valid"), title(vector)
            checked += 1
    assert checked == count
