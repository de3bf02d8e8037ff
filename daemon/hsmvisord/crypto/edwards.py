"""Ed25519 and Ed448 (PKCS#11 3.1, 6.3.15; RFC 8032) and ML-DSA (PKCS#11 3.2; FIPS 204): sign a message whole.

C_SignUpdate is served by keeping the message, up to a limit: neither algorithm can hash as data comes, but for the prehashed
schemes of EdDSA (eddsa.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed448, ed25519, mldsa

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto import eddsa
from hsmvisord.crypto.base import BasePrivateKey, BasePublicKey
from hsmvisord.crypto.ec import octet_string
from hsmvisord.crypto.eddsa import HashedSign, HashedVerify, Scheme, SchemeKey
from hsmvisord.crypto.interface import KeyKind, Signer, Verifier
from hsmvisord.crypto.operations import ReadySigner, ReadyVerifier
from hsmvisord.crypto.streams import Kept
from hsmvisord.lanes import lanes
from hsmvisord.wire.calls import Mechanism


class KeptSign(Kept):
    def __init__(self, sign: Callable[[bytes], bytes]) -> None:
        super().__init__()
        self._sign = sign

    def finish(self) -> bytes:
        return self._sign(self.whole())


class KeptVerify(Kept):
    def __init__(self, verify: Callable[[bytes, bytes], None]) -> None:
        super().__init__()
        self._verify = verify

    def finish(self, signature: bytes) -> None:
        self._verify(self.whole(), signature)


def _whole_signer(size: int, sign: Callable[[bytes], bytes]) -> Signer:
    return ReadySigner(size, sign, lambda: KeptSign(sign))


def _verifying(size: int, check: Callable[[bytes, bytes], None]) -> Callable[[bytes, bytes], None]:
    def verify(data: bytes, signature: bytes) -> None:
        if len(signature) != size:
            raise CkError(ck.CKR_SIGNATURE_LEN_RANGE)
        try:
            check(signature, data)
        except (InvalidSignature, ValueError):
            raise CkError(ck.CKR_SIGNATURE_INVALID) from None

    return verify


def _whole_verifier(size: int, check: Callable[[bytes, bytes], None]) -> Verifier:
    verify = _verifying(size, check)
    return ReadyVerifier(verify, lambda: KeptVerify(verify))


# ---- Edwards curves -------------------------------------------------------------------------------------------------

EDWARDS = {
    ed25519.Ed25519PublicKey: (KeyKind("Ed25519", ck.CKK_EC_EDWARDS, 255, bytes.fromhex("06032b6570")), 64),
    ed448.Ed448PublicKey: (KeyKind("Ed448", ck.CKK_EC_EDWARDS, 448, bytes.fromhex("06032b6571")), 114),
}


def _scheme(mechanism: Mechanism) -> Scheme | None:
    if mechanism.type != ck.CKM_EDDSA:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and an Edwards key")
    return eddsa.scheme(mechanism)


class EdwardsPublicKey(BasePublicKey):
    def __init__(self, key: ed25519.Ed25519PublicKey | ed448.Ed448PublicKey) -> None:
        kind, self.size = next(row for cls, row in EDWARDS.items() if isinstance(key, cls))
        super().__init__(key, kind)
        self._key = key

    def attributes(self) -> dict[int, Any]:
        return {ck.CKA_EC_PARAMS: self.kind.parameters, ck.CKA_EC_POINT: octet_string(self._point())}

    def _point(self) -> bytes:
        return self._key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)

    def make_verifier(self, mechanism: Mechanism) -> Verifier:
        scheme = _scheme(mechanism)
        if scheme is None:
            return _whole_verifier(self.size, self._key.verify)
        point = eddsa.public_key(self._point())
        if point is None:
            raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, "the public key is no point of its curve")
        key = SchemeKey(point, scheme)
        if not key.prehashes:
            return _whole_verifier(self.size, key.check)
        verify = _verifying(self.size, key.check)
        return ReadyVerifier(verify, lambda: HashedVerify(key, verify))


class EdwardsPrivateKey(BasePrivateKey):
    certificate_hash = None

    def __init__(self, key: ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey) -> None:
        public = EdwardsPublicKey(key.public_key())
        super().__init__(key, public)
        self._key, self.size = key, public.size
        self._for_schemes: Any = None  #: the same key for eddsa.py, once it was asked for
        if self.kind.bits == 255:
            self.lane = (ck.CKM_EDDSA, lanes.ED25519)

    def make_signer(self, mechanism: Mechanism) -> Signer:
        scheme = _scheme(mechanism)
        if scheme is None:
            return _whole_signer(self.size, self._key.sign)
        if self._for_schemes is None:
            self._for_schemes = eddsa.private_key(self._key.private_bytes_raw())
        key = SchemeKey(self._for_schemes, scheme)
        if not key.prehashes:
            return _whole_signer(self.size, key.sign)
        return ReadySigner(self.size, key.sign, lambda: HashedSign(key))


# ---- ML-DSA ---------------------------------------------------------------------------------------------------------

#: class of cryptography -> kind, CKP_ of its parameter set, bytes of a signature (FIPS 204, table 2).
ML_DSA: dict[Any, tuple[KeyKind, int, int]] = {
    mldsa.MLDSA44PublicKey: (KeyKind("ML-DSA-44", ck.CKK_ML_DSA, 44, b""), ck.CKP_ML_DSA_44, 2420),
    mldsa.MLDSA65PublicKey: (KeyKind("ML-DSA-65", ck.CKK_ML_DSA, 65, b""), ck.CKP_ML_DSA_65, 3309),
    mldsa.MLDSA87PublicKey: (KeyKind("ML-DSA-87", ck.CKK_ML_DSA, 87, b""), ck.CKP_ML_DSA_87, 4627),
}


def _context(mechanism: Mechanism) -> bytes | None:
    if mechanism.type != ck.CKM_ML_DSA:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and an ML-DSA key")
    match mechanism.parameter:
        case None | b"":
            return None
        case (ck.CKH_HEDGE_PREFERRED | ck.CKH_HEDGE_REQUIRED, bytes(context)) if len(context) <= limits.MAX_CONTEXT:
            return context or None
    raise CkError(
        ck.CKR_MECHANISM_PARAM_INVALID, f"CK_SIGN_ADDITIONAL_CONTEXT: hedged, a context of at most {limits.MAX_CONTEXT} bytes"
    )


class MlDsaPublicKey(BasePublicKey):
    def __init__(self, key: Any) -> None:
        kind, self._set, self.size = next(row for cls, row in ML_DSA.items() if isinstance(key, cls))
        super().__init__(key, kind)
        self._key = key

    def attributes(self) -> dict[int, Any]:
        return {ck.CKA_PARAMETER_SET: self._set, ck.CKA_VALUE: self._key.public_bytes_raw()}

    def make_verifier(self, mechanism: Mechanism) -> Verifier:
        context, key = _context(mechanism), self._key
        return _whole_verifier(self.size, lambda signature, data: key.verify(signature, data, context))


class MlDsaPrivateKey(BasePrivateKey):
    certificate_hash = None

    def __init__(self, key: Any) -> None:
        public = MlDsaPublicKey(key.public_key())
        super().__init__(key, public)
        self._key, self.size = key, public.size

    def attributes(self) -> dict[int, Any]:
        return {ck.CKA_PARAMETER_SET: self.public.attributes()[ck.CKA_PARAMETER_SET]}

    def make_signer(self, mechanism: Mechanism) -> Signer:
        context, key = _context(mechanism), self._key
        return _whole_signer(self.size, lambda data: key.sign(data, context))
