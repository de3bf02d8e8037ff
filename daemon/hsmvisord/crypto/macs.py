"""HMAC (PKCS#11 3.1, 6.18-6.25; FIPS 198-1), AES-CMAC (6.16; NIST SP 800-38B) and AES-GMAC (6.13.4; SP 800-38D).

The `_GENERAL` mechanisms take the length of the MAC in bytes as their parameter.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any, Protocol

from cryptography.hazmat.primitives.ciphers import algorithms
from cryptography.hazmat.primitives.cmac import CMAC

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.ciphers import USUAL_IVS, gcm_context, gcm_parameter
from hsmvisord.crypto.gcm import Gcm
from hsmvisord.crypto.operations import ReadySigner, ReadyVerifier, no_parameter
from hsmvisord.crypto.streams import Kept
from hsmvisord.wire.calls import Mechanism

#: Mechanism -> hash (hashlib's name), whether its parameter is the MAC's length.
HMACS: dict[int, tuple[str, bool]] = {
    ck.CKM_SHA_1_HMAC: ("sha1", False),
    ck.CKM_SHA_1_HMAC_GENERAL: ("sha1", True),
    ck.CKM_SHA224_HMAC: ("sha224", False),
    ck.CKM_SHA224_HMAC_GENERAL: ("sha224", True),
    ck.CKM_SHA256_HMAC: ("sha256", False),
    ck.CKM_SHA256_HMAC_GENERAL: ("sha256", True),
    ck.CKM_SHA384_HMAC: ("sha384", False),
    ck.CKM_SHA384_HMAC_GENERAL: ("sha384", True),
    ck.CKM_SHA512_HMAC: ("sha512", False),
    ck.CKM_SHA512_HMAC_GENERAL: ("sha512", True),
    ck.CKM_SHA512_224_HMAC: ("sha512_224", False),
    ck.CKM_SHA512_224_HMAC_GENERAL: ("sha512_224", True),
    ck.CKM_SHA512_256_HMAC: ("sha512_256", False),
    ck.CKM_SHA512_256_HMAC_GENERAL: ("sha512_256", True),
    ck.CKM_SHA3_224_HMAC: ("sha3_224", False),
    ck.CKM_SHA3_224_HMAC_GENERAL: ("sha3_224", True),
    ck.CKM_SHA3_256_HMAC: ("sha3_256", False),
    ck.CKM_SHA3_256_HMAC_GENERAL: ("sha3_256", True),
    ck.CKM_SHA3_384_HMAC: ("sha3_384", False),
    ck.CKM_SHA3_384_HMAC_GENERAL: ("sha3_384", True),
    ck.CKM_SHA3_512_HMAC: ("sha3_512", False),
    ck.CKM_SHA3_512_HMAC_GENERAL: ("sha3_512", True),
}
AES_MACS = (ck.CKM_AES_CMAC, ck.CKM_AES_CMAC_GENERAL, ck.CKM_AES_GMAC)
SHORTEST = 4  #: bytes of a MAC whose length the caller chooses (SP 800-107, 5.3.3: 32 bits)


class Context(Protocol):
    def update(self, data: bytes) -> None: ...


class Mac:
    """How one MAC is begun and ended.  `begin` makes a context, `end` gives the whole MAC of it."""

    __slots__ = ("_begin", "_end", "_size")

    def __init__(self, begin: Callable[[], Any], end: Callable[[Any], bytes], size: int) -> None:
        self._begin, self._end, self._size = begin, end, size

    def signer(self) -> ReadySigner:
        return ReadySigner(self._size, self._sign, lambda: _Signing(self._begin(), self.cut))

    def verifier(self) -> ReadyVerifier:
        return ReadyVerifier(self._verify, lambda: _Verifying(self._begin(), self.compare))

    def cut(self, context: Any) -> bytes:
        return self._end(context)[: self._size]

    def compare(self, context: Any, signature: bytes) -> None:
        if len(signature) != self._size:
            raise CkError(ck.CKR_SIGNATURE_LEN_RANGE, f"the MAC has {self._size} bytes")
        if not hmac.compare_digest(self.cut(context), signature):
            raise CkError(ck.CKR_SIGNATURE_INVALID)

    def _sign(self, data: bytes) -> bytes:
        context = self._begin()
        context.update(data)
        return self.cut(context)

    def _verify(self, data: bytes, signature: bytes) -> None:
        context = self._begin()
        context.update(data)
        self.compare(context, signature)


class _Signing:
    __slots__ = ("_context", "_cut")

    def __init__(self, context: Any, cut: Callable[[Any], bytes]) -> None:
        self._context, self._cut = context, cut

    def update(self, data: bytes) -> None:
        self._context.update(data)

    def finish(self) -> bytes:
        return self._cut(self._context)


class _Verifying:
    __slots__ = ("_compare", "_context")

    def __init__(self, context: Any, compare: Callable[[Any, bytes], None]) -> None:
        self._context, self._compare = context, compare

    def update(self, data: bytes) -> None:
        self._context.update(data)

    def finish(self, signature: bytes) -> None:
        self._compare(self._context, signature)


def size_of(mechanism: Mechanism, whole: int, chosen: bool) -> int:
    """Returns the MAC's length in bytes."""
    if not chosen:
        no_parameter(mechanism.parameter)
        return whole
    value = mechanism.parameter
    if not isinstance(value, tuple) or len(value) != 1 or not isinstance(value[0], int) or not SHORTEST <= value[0] <= whole:
        raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, f"the parameter is the MAC's length, {SHORTEST} to {whole} bytes")
    return value[0]


def hash_mac(key: bytes, mechanism: Mechanism) -> Mac:
    name, chosen = HMACS[mechanism.type]
    keyed = hmac.new(key, None, name)
    return Mac(keyed.copy, lambda context: bytes(context.digest()), size_of(mechanism, keyed.digest_size, chosen))


def aes_mac(algorithm: algorithms.AES, mechanism: Mechanism) -> Mac:
    if mechanism.type == ck.CKM_AES_GMAC:
        iv, more, tag = gcm_parameter(mechanism)
        if more:
            raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "GMAC's additional data is the message")
        if len(iv) not in USUAL_IVS:
            gcm = Gcm(algorithm, iv)
            return Mac(Kept, lambda context: gcm.tag(b"", context.whole()), tag)
        return Mac(lambda: _Gmac(algorithm, iv), lambda context: bytes(context.digest()), tag)
    keyed = CMAC(algorithm)
    return Mac(
        keyed.copy, lambda context: bytes(context.finalize()), size_of(mechanism, 16, mechanism.type == ck.CKM_AES_CMAC_GENERAL)
    )


class _Gmac:
    """GCM of nothing but additional data."""

    __slots__ = ("_context",)

    def __init__(self, algorithm: algorithms.AES, iv: bytes) -> None:
        self._context = gcm_context(algorithm, iv, b"", None)

    def update(self, data: bytes) -> None:
        self._context.authenticate_additional_data(data)

    def digest(self) -> bytes:
        self._context.finalize()
        return bytes(self._context.tag)
