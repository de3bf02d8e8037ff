"""DSA (PKCS#11 3.1, 6.2; FIPS 186-4): signatures as r ‖ s."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.base import BasePrivateKey, BasePublicKey
from hsmvisord.crypto.ec import fitted, to_raw
from hsmvisord.crypto.interface import KeyKind, Signer, Verifier
from hsmvisord.crypto.operations import HASHES, HashedSign, HashedVerify, ReadySigner, ReadyVerifier, no_parameter
from hsmvisord.crypto.rsa import big_endian
from hsmvisord.wire.calls import Mechanism

#: Bits of the prime -> of the subprime (FIPS 186-4, 4.2).
SIZES = {1024: (160,), 2048: (224, 256), 3072: (256,)}

HASHED = {
    ck.CKM_DSA_SHA1: "sha1",
    ck.CKM_DSA_SHA224: "sha224",
    ck.CKM_DSA_SHA256: "sha256",
    ck.CKM_DSA_SHA384: "sha384",
    ck.CKM_DSA_SHA512: "sha512",
}
_BY_LENGTH = {
    size: Prehashed(algorithm)
    for size, algorithm in (
        (20, hashes.SHA1()), (28, hashes.SHA224()), (32, hashes.SHA256()), (48, hashes.SHA384()), (64, hashes.SHA512())
    )
}  # fmt: skip
_ROUNDS = 40  #: of the test that a subprime is one


# ---- domain parameters --------------------------------------------------------------------------------------------------


def _is_prime(n: int) -> bool:
    """Miller and Rabin's test with bases that nobody knows before."""
    if n < 5 or not n & 1:
        return False
    twos = (n - 1 & 1 - n).bit_length() - 1
    for _ in range(_ROUNDS):
        x = pow(2 + secrets.randbelow(n - 3), n - 1 >> twos, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def parameters(parts: Mapping[int, bytes]) -> dsa.DSAParameterNumbers:
    """Raises CkError(DOMAIN_PARAMS_INVALID) unless the base generates a group of the subprime's order (FIPS 186-4, 4.1)."""
    p, q, g = (int.from_bytes(parts[kind]) for kind in (ck.CKA_PRIME, ck.CKA_SUBPRIME, ck.CKA_BASE))
    if q.bit_length() not in SIZES.get(p.bit_length(), ()):
        raise CkError(ck.CKR_DOMAIN_PARAMS_INVALID, "a prime of 1024, 2048 or 3072 bits and its subprime")
    if not p & 1 or (p - 1) % q or not 1 < g < p or not _is_prime(q) or pow(g, q, p) != 1:
        raise CkError(ck.CKR_DOMAIN_PARAMS_INVALID, "the base does not generate the subprime's group")
    return dsa.DSAParameterNumbers(p, q, g)


def parts_of(numbers: dsa.DSAParameterNumbers) -> dict[int, bytes]:
    return {ck.CKA_PRIME: big_endian(numbers.p), ck.CKA_SUBPRIME: big_endian(numbers.q), ck.CKA_BASE: big_endian(numbers.g)}


def generate_parameters(bits: int) -> dict[int, bytes]:
    """Raises CkError(KEY_SIZE_RANGE).  It takes seconds."""
    if bits not in SIZES:
        raise CkError(ck.CKR_KEY_SIZE_RANGE, f"a DSA prime has {', '.join(map(str, SIZES))} bits")
    return parts_of(dsa.generate_parameters(bits).parameter_numbers())


# ---- keys ---------------------------------------------------------------------------------------------------------------


def _kind(numbers: dsa.DSAParameterNumbers) -> KeyKind:
    bits = numbers.p.bit_length()
    if numbers.q.bit_length() not in SIZES.get(bits, ()):
        raise CkError(ck.CKR_KEY_SIZE_RANGE, f"a DSA key of {bits} bits")
    return KeyKind(f"DSA {bits}", ck.CKK_DSA, bits, b"")


def _hash_name(mechanism: Mechanism) -> str | None:
    """Returns the hash, None of CKM_DSA."""
    no_parameter(mechanism.parameter)
    if mechanism.type != ck.CKM_DSA and mechanism.type not in HASHED:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and a DSA key")
    return HASHED.get(mechanism.type)


class DsaPublicKey(BasePublicKey):
    def __init__(self, key: dsa.DSAPublicKey) -> None:
        numbers = key.public_numbers()
        super().__init__(key, _kind(numbers.parameter_numbers))
        self._key = key
        self.parameters = parts_of(numbers.parameter_numbers)
        self._value = big_endian(numbers.y)
        self.size = (numbers.parameter_numbers.q.bit_length() + 7) // 8

    def attributes(self) -> dict[int, Any]:
        return {**self.parameters, ck.CKA_VALUE: self._value}

    def make_verifier(self, mechanism: Mechanism) -> Verifier:
        name = _hash_name(mechanism)
        if name is None:
            return ReadyVerifier(self._verify_digest)
        algorithm = HASHES[name]
        return ReadyVerifier(
            lambda data, signature: self._verify(data, signature, algorithm), lambda: HashedVerify(name, self._verify_digest)
        )

    def _verify_digest(self, digest: bytes, signature: bytes) -> None:
        data = fitted(digest, self.size)
        self._verify(data, signature, _BY_LENGTH[len(data)])

    def _verify(self, data: bytes, signature: bytes, algorithm: Prehashed | hashes.HashAlgorithm) -> None:
        if len(signature) != 2 * self.size:
            raise CkError(ck.CKR_SIGNATURE_LEN_RANGE)
        r, s = int.from_bytes(signature[: self.size]), int.from_bytes(signature[self.size :])
        try:
            self._key.verify(encode_dss_signature(r, s), data, algorithm)
        except (InvalidSignature, ValueError):
            raise CkError(ck.CKR_SIGNATURE_INVALID) from None


class DsaPrivateKey(BasePrivateKey):
    def __init__(self, key: dsa.DSAPrivateKey) -> None:
        public = DsaPublicKey(key.public_key())
        super().__init__(key, public)
        self._key, self.size, self._parameters = key, public.size, public.parameters

    def attributes(self) -> dict[int, Any]:
        return dict(self._parameters)

    def make_signer(self, mechanism: Mechanism) -> Signer:
        name = _hash_name(mechanism)
        if name is None:
            return ReadySigner(2 * self.size, self._sign_digest)
        key, size, algorithm = self._key, self.size, HASHES[name]
        return ReadySigner(
            2 * size, lambda data: to_raw(key.sign(data, algorithm), size), lambda: HashedSign(name, self._sign_digest)
        )

    def _sign_digest(self, data: bytes) -> bytes:
        data = fitted(data, self.size)
        return to_raw(self._key.sign(data, _BY_LENGTH[len(data)]), self.size)


def generate(domain: Mapping[int, bytes]) -> DsaPrivateKey:
    return DsaPrivateKey(parameters(domain).parameters().generate_private_key())


def public_key(parts: Mapping[int, bytes]) -> DsaPublicKey:
    numbers, y = parameters(parts), int.from_bytes(parts[ck.CKA_VALUE])
    if not 1 < y < numbers.p or pow(y, numbers.q, numbers.p) != 1:
        raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, "CKA_VALUE is not in the group")
    return DsaPublicKey(dsa.DSAPublicNumbers(y, numbers).public_key())


def private_key(parts: Mapping[int, bytes]) -> DsaPrivateKey:
    """The public value is computed; whoever gives a key knows it, so the time that this takes tells nobody anything new."""
    numbers, x = parameters(parts), int.from_bytes(parts[ck.CKA_VALUE])
    if not 0 < x < numbers.q:
        raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, "the parts are of no key")
    public = dsa.DSAPublicNumbers(pow(numbers.g, x, numbers.p), numbers)
    return DsaPrivateKey(dsa.DSAPrivateNumbers(x, public).private_key())


def secret_parts(key: dsa.DSAPrivateKey) -> dict[int, bytes]:
    return {ck.CKA_VALUE: big_endian(key.private_numbers().x)}
