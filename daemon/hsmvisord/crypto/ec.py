"""EC keys on the NIST curves and secp256k1 (PKCS#11 3.1, 6.3): ECDSA as r ‖ s, ECDH."""

from __future__ import annotations

import functools
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import derivation
from hsmvisord.crypto.base import BasePrivateKey, BasePublicKey
from hsmvisord.crypto.interface import KeyKind, SaltKey, Signer, Verifier, no_salt_key
from hsmvisord.crypto.operations import HASHES, HashedSign, HashedVerify, ReadySigner, ReadyVerifier, no_parameter
from hsmvisord.lanes import lanes
from hsmvisord.wire.calls import Mechanism

#: curve name of cryptography -> name, bits of the order, DER of the named curve's OID.
CURVES = {
    "secp256r1": ("EC P-256", 256, bytes.fromhex("06082a8648ce3d030107")),
    "secp384r1": ("EC P-384", 384, bytes.fromhex("06052b81040022")),
    "secp521r1": ("EC P-521", 521, bytes.fromhex("06052b81040023")),
    "secp256k1": ("EC secp256k1", 256, bytes.fromhex("06052b8104000a")),
    "secp192r1": ("EC P-192", 192, bytes.fromhex("06082a8648ce3d030101")),  # legacy
}
#: Curve name of cryptography -> curve.
NAMED: dict[str, ec.EllipticCurve] = {
    c.name: c for c in (ec.SECP192R1(), ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1())
}

HASHED = {
    ck.CKM_ECDSA_SHA1: "sha1",
    ck.CKM_ECDSA_SHA224: "sha224",
    ck.CKM_ECDSA_SHA256: "sha256",
    ck.CKM_ECDSA_SHA384: "sha384",
    ck.CKM_ECDSA_SHA512: "sha512",
    ck.CKM_ECDSA_SHA3_224: "sha3_224",
    ck.CKM_ECDSA_SHA3_256: "sha3_256",
    ck.CKM_ECDSA_SHA3_384: "sha3_384",
    ck.CKM_ECDSA_SHA3_512: "sha3_512",
}

#: CKM_ECDSA by the length of its data: cryptography signs a digest whose length belongs to a hash.
_BY_LENGTH = {
    size: ec.ECDSA(Prehashed(algorithm))
    for size, algorithm in (
        (20, hashes.SHA1()), (28, hashes.SHA224()), (32, hashes.SHA256()), (48, hashes.SHA384()), (64, hashes.SHA512())
    )
}  # fmt: skip
MAX_DATA = 64  #: bytes of CKM_ECDSA data that count


def octet_string(content: bytes) -> bytes:
    """Returns the DER OCTET STRING of fewer than 256 bytes, as CKA_EC_POINT has it."""
    return (b"\x04" if len(content) < 128 else b"\x04\x81") + bytes((len(content),)) + content


def to_raw(der: bytes, size: int) -> bytes:
    """Returns r ‖ s, each of `size` bytes, of an ECDSA-Sig-Value (RFC 3279 2.2.3)."""
    start = 2 if der[1] < 0x80 else 3
    middle = start + 2 + der[start + 1]
    return der[start + 2 : middle][-size:].rjust(size, b"\0") + der[middle + 2 :][-size:].rjust(size, b"\0")


def fitted(data: bytes, size: int) -> bytes:
    """Returns a digest of a hash's length with the same ECDSA value: truncated to the leftmost bits of the order, or with zeros
    before it (FIPS 186-5, 6.4.1); zeros behind what is as long as the order are truncated again.  `size`: bytes of the order."""
    if len(data) in _BY_LENGTH and len(data) <= size:
        return data
    if not data:
        raise CkError(ck.CKR_DATA_LEN_RANGE, "no data")
    if len(data) > size:
        data = data[:size]
    if len(data) > MAX_DATA:
        raise CkError(ck.CKR_DATA_LEN_RANGE, f"at most {MAX_DATA} bytes")
    length = next(length for length in _BY_LENGTH if length >= len(data))
    return data.rjust(min(length, size), b"\0").ljust(length, b"\0")


#: Bytes by which each half of a signature that is verified may be short: "may have a shorter length but must be composed as
#: specified before" (6.3.1).  Java leaves out zeros that both halves begin with; five such are one signature in 2**66 or rarer,
#: and Wycheproof has the short ones that are made by intent refused.
ZEROS_LEFT_OUT = 4


class EcPublicKey(BasePublicKey):
    def __init__(self, key: ec.EllipticCurvePublicKey) -> None:
        name, bits, oid = CURVES[key.curve.name]
        super().__init__(key, KeyKind(name, ck.CKK_EC, bits, oid))
        self._key = key
        self.size = (bits + 7) // 8

    @functools.cached_property
    def _point(self) -> bytes:
        return octet_string(self._key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint))

    def attributes(self) -> dict[int, Any]:
        return {ck.CKA_EC_PARAMS: self.kind.parameters, ck.CKA_EC_POINT: self._point}

    def make_verifier(self, mechanism: Mechanism) -> Verifier:
        no_parameter(mechanism.parameter)
        if mechanism.type == ck.CKM_ECDSA:
            return ReadyVerifier(self._verify_digest)
        name = HASHED.get(mechanism.type)
        if name is None:
            raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and an EC key")
        algorithm = ec.ECDSA(HASHES[name])
        return ReadyVerifier(
            lambda data, signature: self._verify(data, signature, algorithm), lambda: HashedVerify(name, self._verify_digest)
        )

    def _verify_digest(self, digest: bytes, signature: bytes) -> None:
        data = fitted(digest, self.size)
        self._verify(data, signature, _BY_LENGTH[len(data)])

    def _verify(self, data: bytes, signature: bytes, algorithm: ec.ECDSA) -> None:
        half, odd = divmod(len(signature), 2)
        if odd or not self.size - ZEROS_LEFT_OUT <= half <= self.size:
            raise CkError(ck.CKR_SIGNATURE_LEN_RANGE)
        r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
        try:
            self._key.verify(encode_dss_signature(r, s), data, algorithm)
        except (InvalidSignature, ValueError):
            raise CkError(ck.CKR_SIGNATURE_INVALID) from None


class EcPrivateKey(BasePrivateKey):
    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        if key.curve.name not in CURVES:
            raise CkError(ck.CKR_CURVE_NOT_SUPPORTED, f"curve {key.curve.name}: use P-256, P-384, P-521 or secp256k1")
        super().__init__(key, EcPublicKey(key.public_key()))
        self._key = key
        self.size = (CURVES[key.curve.name][1] + 7) // 8
        if key.curve.name == "secp256r1":
            self.lane = (ck.CKM_ECDSA, lanes.ECDSA)

    def make_signer(self, mechanism: Mechanism) -> Signer:
        no_parameter(mechanism.parameter)
        key, size = self._key, self.size
        if mechanism.type == ck.CKM_ECDSA:
            return ReadySigner(2 * size, self._digest_signer())
        name = HASHED.get(mechanism.type)
        if name is None:
            raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and an EC key")
        algorithm = ec.ECDSA(HASHES[name])
        return ReadySigner(
            2 * size, lambda data: to_raw(key.sign(data, algorithm), size), lambda: HashedSign(name, self._digest_signer())
        )

    def _digest_signer(self) -> Any:
        sign, size, by_length = self._key.sign, self.size, _BY_LENGTH

        def sign_digest(data: bytes) -> bytes:
            data = fitted(data, size)
            return to_raw(sign(data, by_length[len(data)]), size)

        return sign_digest

    def lane_sizes(self) -> range:
        return range(1, MAX_DATA + 1)

    def derive(self, mechanism: Mechanism, length: int = 0, salt_key: SaltKey = no_salt_key) -> bytes:
        """CKM_ECDH1_DERIVE (6.3.17); all curves here have the cofactor 1."""
        if mechanism.type not in (ck.CKM_ECDH1_DERIVE, ck.CKM_ECDH1_COFACTOR_DERIVE):
            return super().derive(mechanism, length)
        return derivation.of_agreement(mechanism, length, self._agree)

    def _agree(self, point: bytes) -> bytes:
        """The peer's point raw or as OCTET STRING."""
        width = 1 + 2 * self.size
        if len(point) == len(octet_string(bytes(width))) and point[0] == 4 and point == octet_string(point[-width:]):
            point = point[-width:]
        try:
            peer = ec.EllipticCurvePublicKey.from_encoded_point(self._key.curve, point)
            return self._key.exchange(ec.ECDH(), peer)
        except ValueError:
            raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "the peer's point is not on the curve") from None
