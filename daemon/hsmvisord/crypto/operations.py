"""Ready operations as plain values, and the hash-then-sign multi-part that RSA and ECDSA share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import MultiPart, MultiPartVerify, Stream


@dataclass(frozen=True, slots=True)
class ReadySigner:
    output_size: int
    sign: Callable[[bytes], bytes]
    begin: Callable[[], MultiPart] | None = None


@dataclass(frozen=True, slots=True)
class ReadyVerifier:
    verify: Callable[[bytes, bytes], None]
    begin: Callable[[], MultiPartVerify] | None = None


@dataclass(frozen=True, slots=True)
class ReadyCipher:
    """An encryption or a decryption."""

    bound: Callable[[int], int]
    run: Callable[[bytes], bytes]
    begin: Callable[[], Stream] | None = None


def at_most(size: int) -> Callable[[int], int]:
    """Returns the bound of an operation whose output does not depend on the length of its input."""
    return lambda length: size


class HashedSign:
    """Multi-part: hashes as data comes, signs the digest."""

    __slots__ = ("_hash", "_sign")

    def __init__(self, name: str, sign: Callable[[bytes], bytes]) -> None:
        self._hash, self._sign = hashlib.new(name), sign

    def update(self, data: bytes) -> None:
        self._hash.update(data)

    def finish(self) -> bytes:
        return self._sign(self._hash.digest())


class HashedVerify:
    __slots__ = ("_hash", "_verify")

    def __init__(self, name: str, verify: Callable[[bytes, bytes], None]) -> None:
        self._hash, self._verify = hashlib.new(name), verify

    def update(self, data: bytes) -> None:
        self._hash.update(data)

    def finish(self, signature: bytes) -> None:
        self._verify(self._hash.digest(), signature)


class Cache(dict[Any, Any]):
    """Ready operations of one key by mechanism, bounded."""

    def keep(self, key: Any, value: Any) -> Any:
        if len(self) >= limits.MAX_CACHED:
            self.clear()
        self[key] = value
        return value


def no_parameter(parameter: object) -> None:
    if parameter not in (None, b"", ()):
        raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "this mechanism takes no parameter")


#: Hashes by the name that hashlib knows, with cryptography's object.
HASHES: dict[str, hashes.HashAlgorithm] = {
    "sha1": hashes.SHA1(),
    "sha224": hashes.SHA224(),
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
    "sha3_224": hashes.SHA3_224(),
    "sha3_256": hashes.SHA3_256(),
    "sha3_384": hashes.SHA3_384(),
    "sha3_512": hashes.SHA3_512(),
}

#: The hash mechanisms that stand in parameters (hashAlg of PSS and OAEP), and the mask generation functions.
HASH_MECHANISMS: dict[int, str] = {
    ck.CKM_SHA_1: "sha1",
    ck.CKM_SHA224: "sha224",
    ck.CKM_SHA256: "sha256",
    ck.CKM_SHA384: "sha384",
    ck.CKM_SHA512: "sha512",
    ck.CKM_SHA3_224: "sha3_224",
    ck.CKM_SHA3_256: "sha3_256",
    ck.CKM_SHA3_384: "sha3_384",
    ck.CKM_SHA3_512: "sha3_512",
}
MASKS: dict[int, str] = {
    ck.CKG_MGF1_SHA1: "sha1",
    ck.CKG_MGF1_SHA224: "sha224",
    ck.CKG_MGF1_SHA256: "sha256",
    ck.CKG_MGF1_SHA384: "sha384",
    ck.CKG_MGF1_SHA512: "sha512",
    ck.CKG_MGF1_SHA3_224: "sha3_224",
    ck.CKG_MGF1_SHA3_256: "sha3_256",
    ck.CKG_MGF1_SHA3_384: "sha3_384",
    ck.CKG_MGF1_SHA3_512: "sha3_512",
}
