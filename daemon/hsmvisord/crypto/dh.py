"""Diffie-Hellman over primes (PKCS#11 3.1, 6.4; PKCS #3)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dh
from cryptography.utils import CryptographyDeprecationWarning

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import der
from hsmvisord.crypto.base import BasePrivateKey, BasePublicKey, key_identifier
from hsmvisord.crypto.interface import KeyKind, SaltKey, no_salt_key
from hsmvisord.crypto.rsa import big_endian
from hsmvisord.wire.calls import Mechanism

LEAST, MOST = 1024, 4096  #: bits of a prime
_MADE = 1024  #: bits of a prime that is made here: a second, in the mean
#: Bits -> X of RFC 7919's groups (appendix A): primes of these sizes are not made, for it takes minutes, and approved are those
#: groups alone (SP 800-56A rev. 3, 5.5.1.1).
_RFC_7919 = {2048: 560316, 3072: 2625351, 4096: 5736041}
GENERATED = (_MADE, *_RFC_7919)
_GENERATOR = 2
_OID = bytes.fromhex("06092a864886f70d010301")  #: 1.2.840.113549.1.3.1, dhKeyAgreement

# The operator has said that legacy is wanted.
warnings.filterwarnings("ignore", "Diffie-Hellman over finite fields", CryptographyDeprecationWarning)


# ---- domain parameters --------------------------------------------------------------------------------------------------


def _euler(bits: int) -> int:
    """Returns the integer below 2^bits * e."""
    extra = 64
    total = term = 1 << bits + extra
    n = 0
    while term:
        n += 1
        term //= n
        total += term
    return total >> extra


@functools.cache
def _group(bits: int) -> int:
    """Returns the prime of a group of RFC 7919, by its formula."""
    return (1 << bits) - (1 << bits - 64) + (_euler(bits - 130) + _RFC_7919[bits] << 64) - 1


def generate_parameters(bits: int) -> dict[int, bytes]:
    """Raises CkError(KEY_SIZE_RANGE).  A prime of 1024 bits is a new safe one; larger ones are those of RFC 7919."""
    if bits in _RFC_7919:
        prime = _group(bits)
    elif bits == _MADE:
        prime = dh.generate_parameters(_GENERATOR, bits).parameter_numbers().p
    else:
        raise CkError(ck.CKR_KEY_SIZE_RANGE, f"a new prime has {', '.join(map(str, GENERATED))} bits")
    return {ck.CKA_PRIME: big_endian(prime), ck.CKA_BASE: bytes((_GENERATOR,))}


def parameters(parts: Mapping[int, bytes]) -> dh.DHParameterNumbers:
    """Raises CkError(DOMAIN_PARAMS_INVALID).  Whether the prime is one is the guest's matter: it is for its own keys."""
    p, g = int.from_bytes(parts[ck.CKA_PRIME]), int.from_bytes(parts[ck.CKA_BASE])
    if not LEAST <= p.bit_length() <= MOST or not p & 1 or not 1 < g < p - 1:
        raise CkError(ck.CKR_DOMAIN_PARAMS_INVALID, f"a prime of {LEAST} to {MOST} bits, and a base below it")
    return dh.DHParameterNumbers(p, g)


# ---- keys ---------------------------------------------------------------------------------------------------------------


def _algorithm(numbers: dh.DHParameterNumbers) -> bytes:
    return der.sequence(_OID, der.sequence(der.integer(numbers.p), der.integer(numbers.g)))


def _pkcs8(numbers: dh.DHParameterNumbers, x: int) -> bytes:
    return der.sequence(der.integer(0), _algorithm(numbers), der.element(der.OCTET_STRING, der.integer(x)))


class DhPublicKey(BasePublicKey):
    def __init__(self, key: dh.DHPublicKey) -> None:
        numbers = key.public_numbers()
        bits = numbers.parameter_numbers.p.bit_length()
        if not LEAST <= bits <= MOST:
            raise CkError(ck.CKR_KEY_SIZE_RANGE, f"a Diffie-Hellman key of {bits} bits")
        super().__init__(key, KeyKind(f"DH {bits}", ck.CKK_DH, bits, b""))
        self.numbers = numbers.parameter_numbers
        self.parameters = {ck.CKA_PRIME: big_endian(self.numbers.p), ck.CKA_BASE: big_endian(self.numbers.g)}
        self._value = big_endian(numbers.y)
        # As PKCS #3 has it: of a group that it knows, libcrypto writes what ANSI X9.42 has, which others do not agree with.
        self.spki = der.sequence(_algorithm(self.numbers), der.element(der.BIT_STRING, b"\0" + der.integer(numbers.y)))
        self.key_id = key_identifier(self.spki)

    def attributes(self) -> dict[int, Any]:
        return {**self.parameters, ck.CKA_VALUE: self._value}


class DhPrivateKey(BasePrivateKey):
    def __init__(self, key: dh.DHPrivateKey) -> None:
        public = DhPublicKey(key.public_key())
        super().__init__(key, public)
        self._key, self._numbers, self._parameters = key, public.numbers, public.parameters

    def attributes(self) -> dict[int, Any]:
        return {**self._parameters, ck.CKA_VALUE_BITS: self._key.private_numbers().x.bit_length()}

    def pkcs8(self) -> bytes:
        return _pkcs8(self._numbers, self._key.private_numbers().x)

    def derive(self, mechanism: Mechanism, length: int = 0, salt_key: SaltKey = no_salt_key) -> bytes:
        """CKM_DH_PKCS_DERIVE: the shared secret, as long as the prime; its parameter is the peer's public value."""
        if mechanism.type != ck.CKM_DH_PKCS_DERIVE:
            return super().derive(mechanism, length)
        value = mechanism.parameter
        if not isinstance(value, bytes) or not value or len(value) > MOST // 8 + 1:
            raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "the parameter is the peer's public value")
        try:
            return self._key.exchange(_public(int.from_bytes(value), self._numbers))
        except ValueError:
            raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "the peer's public value cannot be used") from None


def _public(y: int, numbers: dh.DHParameterNumbers) -> dh.DHPublicKey:
    """Raises ValueError for a value whose secrets everybody knows (SP 800-56A rev. 3, 5.6.2.3.1)."""
    if not 1 < y < numbers.p - 1:
        raise ValueError("a public value that is none")
    return dh.DHPublicNumbers(y, numbers).public_key()


def generate(domain: Mapping[int, bytes]) -> DhPrivateKey:
    try:
        return DhPrivateKey(parameters(domain).parameters().generate_private_key())
    except ValueError:
        raise CkError(ck.CKR_DOMAIN_PARAMS_INVALID) from None


def public_key(parts: Mapping[int, bytes]) -> DhPublicKey:
    return DhPublicKey(_public(int.from_bytes(parts[ck.CKA_VALUE]), parameters(parts)))


def private_key(parts: Mapping[int, bytes]) -> DhPrivateKey:
    """By way of PKCS #8: so libcrypto computes the public value."""
    numbers, x = parameters(parts), int.from_bytes(parts[ck.CKA_VALUE])
    if not 1 < x < numbers.p - 1:
        raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, "the parts are of no key")
    key = serialization.load_der_private_key(_pkcs8(numbers, x), None)
    assert isinstance(key, dh.DHPrivateKey)
    return DhPrivateKey(key)


def secret_parts(key: dh.DHPrivateKey) -> dict[int, bytes]:
    return {ck.CKA_VALUE: big_endian(key.private_numbers().x)}
