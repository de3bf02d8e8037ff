"""EdDSA with a context, and of a message's hash (PKCS#11 3.1, 6.3.15 and 6.3.17; RFC 8032): Ed25519ctx, Ed25519ph, Ed448 with a
context, Ed448ph.

By PyCryptodome, for `cryptography` has neither: its arithmetic with secrets takes the same time for all of them, its signing and
verifying release the interpreter's lock in C.  What is prehashed is hashed here, as data comes: a caller gives the message.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from Crypto.Hash import SHA512, SHAKE256
from Crypto.PublicKey.ECC import EccKey
from Crypto.Signature import eddsa

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.wire.calls import Mechanism

#: Curve -> what makes the prehash (RFC 8032, 5.1 and 5.2: PH).
_HASHES: dict[str, Any] = {"Ed25519": SHA512, "Ed448": SHAKE256}
_SEEDS = {"Ed25519": 32, "Ed448": 57}


@dataclass(frozen=True, slots=True)
class Scheme:
    prehash: bool
    context: bytes  #: up to limits.MAX_CONTEXT bytes


def scheme(mechanism: Mechanism) -> Scheme | None:
    """Returns what CK_EDDSA_PARAMS (phFlag, context) asks for; None: pure EdDSA without a context.

    A parameter with neither flag nor context is that too: the context of Ed25519ctx is not empty (RFC 8032, 5.1).
    """
    match mechanism.parameter:
        case None | b"" | (0, b""):
            return None
        case (0 | 1 as prehash, bytes(context)) if len(context) <= limits.MAX_CONTEXT:
            return Scheme(bool(prehash), context)
    raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, f"CK_EDDSA_PARAMS: phFlag, a context of at most {limits.MAX_CONTEXT} bytes")


@functools.cache
def preload() -> None:
    """Signs once with each curve, so that forked workers share what that loads and need no file later."""
    for curve, size in _SEEDS.items():
        SchemeKey(private_key(bytes(size)), Scheme(True, curve.encode())).sign(b"")


def private_key(seed: bytes) -> EccKey:
    """`seed`: the private key of RFC 8032, 32 bytes for Ed25519, 57 for Ed448."""
    return eddsa.import_private_key(seed)


def public_key(point: bytes) -> EccKey | None:
    """Returns None for bytes that are no point of the curve: such a key verifies nothing."""
    try:
        return eddsa.import_public_key(point)
    except ValueError:
        return None


class SchemeKey:
    """A key with one scheme.  Safe to use from several threads at once."""

    def __init__(self, key: EccKey, scheme: Scheme) -> None:
        self._eddsa = eddsa.new(key, "rfc8032", scheme.context)
        self._hash = _HASHES[key.curve] if scheme.prehash else None

    @property
    def prehashes(self) -> bool:
        return self._hash is not None

    def hashing(self) -> Any:
        """Returns a new hash of a message, for `sign` and `check` in its place."""
        assert self._hash is not None
        return self._hash.new()

    def _message(self, data: Any) -> Any:
        return self._hash.new(data) if self._hash is not None and isinstance(data, bytes) else data

    def sign(self, data: Any) -> bytes:
        return self._eddsa.sign(self._message(data))

    def check(self, signature: bytes, data: Any) -> None:
        """Raises ValueError."""
        self._eddsa.verify(self._message(data), signature)


class HashedParts:
    """A message in parts, of which the hash is signed."""

    __slots__ = ("_hash", "_key")

    def __init__(self, key: SchemeKey) -> None:
        self._hash, self._key = key.hashing(), key

    def update(self, data: bytes) -> None:
        self._hash.update(data)


class HashedSign(HashedParts):
    __slots__ = ()

    def finish(self) -> bytes:
        return self._key.sign(self._hash)


class HashedVerify(HashedParts):
    __slots__ = ("_verify",)

    def __init__(self, key: SchemeKey, verify: Any) -> None:
        """`verify`: from hash and signature, as the verifier's own."""
        super().__init__(key)
        self._verify = verify

    def finish(self, signature: bytes) -> None:
        self._verify(self._hash, signature)
