"""RSA keys (PKCS#11 3.1, 6.1; RFC 8017)."""

from __future__ import annotations

from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import NoDigestInfo, Prehashed

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto import libcrypto, wrapping
from hsmvisord.crypto.base import BasePrivateKey, BasePublicKey
from hsmvisord.crypto.interface import KeyKind, Signer, Verifier
from hsmvisord.crypto.operations import (
    HASH_MECHANISMS,
    HASHES,
    MASKS,
    HashedSign,
    HashedVerify,
    ReadyCipher,
    ReadySigner,
    ReadyVerifier,
    at_most,
    no_parameter,
)
from hsmvisord.lanes import lanes
from hsmvisord.wire.calls import Mechanism

MIN_BITS = 2048  #: of a delivered key
OWN_MIN_BITS = 1024  #: of a guest's own: what else it accepts is its matter, and its operator's (Policy.min_rsa_bits)
MAX_BITS = 8192
MAX_EXPONENT_BITS = 64

PKCS1 = padding.PKCS1v15()

#: mechanism -> hash: SHAx_RSA_PKCS, then SHAx_RSA_PKCS_PSS.
HASHED_PKCS1 = {
    ck.CKM_SHA1_RSA_PKCS: "sha1",
    ck.CKM_SHA224_RSA_PKCS: "sha224",
    ck.CKM_SHA256_RSA_PKCS: "sha256",
    ck.CKM_SHA384_RSA_PKCS: "sha384",
    ck.CKM_SHA512_RSA_PKCS: "sha512",
    ck.CKM_SHA3_224_RSA_PKCS: "sha3_224",
    ck.CKM_SHA3_256_RSA_PKCS: "sha3_256",
    ck.CKM_SHA3_384_RSA_PKCS: "sha3_384",
    ck.CKM_SHA3_512_RSA_PKCS: "sha3_512",
}
HASHED_PSS = {
    ck.CKM_SHA1_RSA_PKCS_PSS: "sha1",
    ck.CKM_SHA224_RSA_PKCS_PSS: "sha224",
    ck.CKM_SHA256_RSA_PKCS_PSS: "sha256",
    ck.CKM_SHA384_RSA_PKCS_PSS: "sha384",
    ck.CKM_SHA512_RSA_PKCS_PSS: "sha512",
    ck.CKM_SHA3_224_RSA_PKCS_PSS: "sha3_224",
    ck.CKM_SHA3_256_RSA_PKCS_PSS: "sha3_256",
    ck.CKM_SHA3_384_RSA_PKCS_PSS: "sha3_384",
    ck.CKM_SHA3_512_RSA_PKCS_PSS: "sha3_512",
}


def big_endian(number: int) -> bytes:
    """A big integer without leading zeros, as PKCS#11 has it."""
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def _pss(mechanism: Mechanism, size: int) -> tuple[str, padding.PSS]:
    """Returns the hash and padding of a PSS parameter: (hashAlg, mgf, sLen); `size` = modulus bytes."""
    match mechanism.parameter:
        case (int(alg), int(mgf), int(salt)) if alg in HASH_MECHANISMS and mgf in MASKS:
            name = HASH_MECHANISMS[alg]
        case _:
            raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "CK_RSA_PKCS_PSS_PARAMS: hashAlg, mgf")
    expected = HASHED_PSS.get(mechanism.type, name)
    if name != expected or salt > size - 2 - HASHES[name].digest_size:
        raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "CK_RSA_PKCS_PSS_PARAMS: hashAlg of the mechanism, or sLen")
    return name, padding.PSS(mgf=padding.MGF1(HASHES[MASKS[mgf]]), salt_length=salt)


def _oaep(mechanism: Mechanism) -> tuple[str, str, bytes]:
    """Returns hash, mask's hash and label of an OAEP parameter: (hashAlg, mgf, source, source data)."""
    match mechanism.parameter:
        case (int(alg), int(mgf), int(source), bytes(label)) if alg in HASH_MECHANISMS and mgf in MASKS:
            pass
        case _:
            raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "CK_RSA_PKCS_OAEP_PARAMS: hashAlg, mgf")
    if source not in (0, ck.CKZ_DATA_SPECIFIED) or (source == 0 and label) or len(label) > limits.MAX_LABEL:
        raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "CK_RSA_PKCS_OAEP_PARAMS: source")
    return HASH_MECHANISMS[alg], MASKS[mgf], label


class RsaPublicKey(BasePublicKey):
    def __init__(self, key: rsa.RSAPublicKey) -> None:
        bits = key.key_size
        super().__init__(key, KeyKind(f"RSA {bits}", ck.CKK_RSA, bits, b""))
        self._key = key
        self.size = (bits + 7) // 8

    def attributes(self) -> dict[int, Any]:
        numbers = self._key.public_numbers()
        return {
            ck.CKA_MODULUS: big_endian(numbers.n),
            ck.CKA_MODULUS_BITS: self._key.key_size,
            ck.CKA_PUBLIC_EXPONENT: big_endian(numbers.e),
        }

    def make_verifier(self, mechanism: Mechanism) -> Verifier:
        kind = mechanism.type
        if kind == ck.CKM_RSA_PKCS:
            no_parameter(mechanism.parameter)
            return ReadyVerifier(self._checked(PKCS1, NoDigestInfo()))
        if kind == ck.CKM_RSA_X_509:
            no_parameter(mechanism.parameter)
            return ReadyVerifier(self._verify_raw)
        if kind in HASHED_PKCS1:
            no_parameter(mechanism.parameter)
            return self._hashed(HASHED_PKCS1[kind], PKCS1)
        if kind in HASHED_PSS:
            name, pad = _pss(mechanism, self.size)
            return self._hashed(name, pad)
        if kind == ck.CKM_RSA_PKCS_PSS:
            name, pad = _pss(mechanism, self.size)
            return ReadyVerifier(self._checked(pad, Prehashed(HASHES[name]), HASHES[name].digest_size))
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(kind)} and an RSA key")

    def _hashed(self, name: str, pad: padding.AsymmetricPadding) -> Verifier:
        prehashed = self._checked(pad, Prehashed(HASHES[name]))
        return ReadyVerifier(self._checked(pad, HASHES[name]), lambda: HashedVerify(name, prehashed))

    def _checked(self, pad: padding.AsymmetricPadding, algorithm: Any, length: int | None = None) -> Any:
        def verify(data: bytes, signature: bytes) -> None:
            if len(signature) != self.size:
                raise CkError(ck.CKR_SIGNATURE_LEN_RANGE)
            if length is not None and len(data) != length:
                raise CkError(ck.CKR_DATA_LEN_RANGE)
            try:
                self._key.verify(signature, data, pad, algorithm)
            except (InvalidSignature, ValueError):
                raise CkError(ck.CKR_SIGNATURE_INVALID) from None

        return verify

    def _verify_raw(self, data: bytes, signature: bytes) -> None:
        if len(signature) != self.size:
            raise CkError(ck.CKR_SIGNATURE_LEN_RANGE)
        if len(data) > self.size:
            raise CkError(ck.CKR_DATA_LEN_RANGE)
        if self._power(signature) != int.from_bytes(data, "big"):
            raise CkError(ck.CKR_SIGNATURE_INVALID)

    def recoverer(self, mechanism: Mechanism) -> ReadyCipher:
        kind = mechanism.type
        no_parameter(mechanism.parameter)
        if kind == ck.CKM_RSA_PKCS:
            return ReadyCipher(at_most(self.size - 11), self._recover)
        if kind == ck.CKM_RSA_X_509:
            return ReadyCipher(at_most(self.size), self._recover_raw)
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(kind)} and an RSA key")

    def _recover(self, signature: bytes) -> bytes:
        if len(signature) != self.size:
            raise CkError(ck.CKR_SIGNATURE_LEN_RANGE)
        try:
            return self._key.recover_data_from_signature(signature, PKCS1, None)
        except InvalidSignature:
            raise CkError(ck.CKR_SIGNATURE_INVALID) from None

    def _recover_raw(self, signature: bytes) -> bytes:
        if len(signature) != self.size:
            raise CkError(ck.CKR_SIGNATURE_LEN_RANGE)
        if int.from_bytes(signature, "big") >= self._key.public_numbers().n:
            raise CkError(ck.CKR_SIGNATURE_INVALID)
        return self._power(signature).to_bytes(self.size, "big")

    def _power(self, data: bytes) -> int:
        """The public operation; its input and output are public."""
        numbers = self._key.public_numbers()
        return pow(int.from_bytes(data, "big"), numbers.e, numbers.n)

    def make_encrypter(self, mechanism: Mechanism) -> ReadyCipher:
        kind = mechanism.type
        if kind == ck.CKM_RSA_PKCS:
            no_parameter(mechanism.parameter)
            return ReadyCipher(at_most(self.size), self._encrypt(PKCS1))
        if kind == ck.CKM_RSA_PKCS_OAEP:
            name, mask, label = _oaep(mechanism)
            if name.startswith("sha3") or mask.startswith("sha3"):
                raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "the module encrypts with SHA-1 and SHA-2; it decrypts SHA-3 too")
            pad = padding.OAEP(padding.MGF1(HASHES[mask]), HASHES[name], label or None)
            return ReadyCipher(at_most(self.size), self._encrypt(pad))
        if kind == ck.CKM_RSA_X_509:
            no_parameter(mechanism.parameter)
            return ReadyCipher(at_most(self.size), self._encrypt_raw)
        if kind == ck.CKM_RSA_AES_KEY_WRAP:
            return wrapping.wrapper(mechanism, self.size, self.make_encrypter)
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(kind)} and an RSA key")

    def _encrypt(self, pad: padding.AsymmetricPadding) -> Any:
        def encrypt(data: bytes) -> bytes:
            try:
                return self._key.encrypt(data, pad)
            except ValueError:
                raise CkError(ck.CKR_DATA_LEN_RANGE) from None

        return encrypt

    def _encrypt_raw(self, data: bytes) -> bytes:
        if len(data) > self.size:
            raise CkError(ck.CKR_DATA_LEN_RANGE)
        if int.from_bytes(data, "big") >= self._key.public_numbers().n:
            raise CkError(ck.CKR_DATA_INVALID)
        return self._power(data).to_bytes(self.size, "big")


class RsaPrivateKey(BasePrivateKey):
    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        public = key.public_key()
        if not OWN_MIN_BITS <= key.key_size <= MAX_BITS:
            raise CkError(ck.CKR_KEY_SIZE_RANGE, f"an RSA key has {OWN_MIN_BITS} to {MAX_BITS} bits, this has {key.key_size}")
        if public.public_numbers().e.bit_length() > MAX_EXPONENT_BITS:
            raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"an RSA key's public exponent has at most {MAX_EXPONENT_BITS} bits")
        super().__init__(key, RsaPublicKey(public))
        self._key = key
        self.size = (key.key_size + 7) // 8
        self._raw: libcrypto.RawRsa | None = None
        if key.key_size == MIN_BITS:
            self.lane = (ck.CKM_RSA_PKCS, lanes.RSA)

    def attributes(self) -> dict[int, Any]:
        attributes = self.public.attributes()
        return {k: attributes[k] for k in (ck.CKA_MODULUS, ck.CKA_PUBLIC_EXPONENT)}

    def make_signer(self, mechanism: Mechanism) -> Signer:
        kind = mechanism.type
        if kind == ck.CKM_RSA_PKCS:
            no_parameter(mechanism.parameter)
            return ReadySigner(self.size, self._sign_any)
        if kind == ck.CKM_RSA_X_509:
            no_parameter(mechanism.parameter)
            return ReadySigner(self.size, self._sign_raw)
        if kind in HASHED_PKCS1:
            no_parameter(mechanism.parameter)
            return self._hashed(HASHED_PKCS1[kind], PKCS1)
        if kind in HASHED_PSS:
            name, pad = _pss(mechanism, self.size)
            return self._hashed(name, pad)
        if kind == ck.CKM_RSA_PKCS_PSS:
            name, pad = _pss(mechanism, self.size)
            return ReadySigner(self.size, self._sign_prehashed(pad, Prehashed(HASHES[name]), HASHES[name].digest_size))
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(kind)} and an RSA key")

    def _hashed(self, name: str, pad: padding.AsymmetricPadding) -> Signer:
        key, algorithm, prehashed = self._key, HASHES[name], Prehashed(HASHES[name])
        return ReadySigner(
            self.size,
            lambda data: key.sign(data, pad, algorithm),
            lambda: HashedSign(name, lambda digest: key.sign(digest, pad, prehashed)),
        )

    def _sign_prehashed(self, pad: padding.AsymmetricPadding, algorithm: Prehashed, length: int) -> Any:
        key = self._key

        def sign(data: bytes) -> bytes:
            if len(data) != length:
                raise CkError(ck.CKR_DATA_LEN_RANGE, f"the data is a digest of {length} bytes")
            return key.sign(data, pad, algorithm)

        return sign

    def lane_sizes(self) -> range:
        return range(1, self.size - 10)

    def _sign_any(self, data: bytes) -> bytes:
        """CKM_RSA_PKCS: the caller's own DigestInfo, or any data (6.1.6)."""
        if len(data) > self.size - 11:
            raise CkError(ck.CKR_DATA_LEN_RANGE, f"at most {self.size - 11} bytes")
        return self._key.sign(data, PKCS1, _NO_DIGEST_INFO)

    def _raw_key(self) -> libcrypto.RawRsa:
        if self._raw is None:
            self._raw = libcrypto.RawRsa(self._key)
        return self._raw

    def _sign_raw(self, data: bytes) -> bytes:
        if len(data) > self.size:
            raise CkError(ck.CKR_DATA_LEN_RANGE, f"at most {self.size} bytes")
        return self._private_raw(data, ck.CKR_DATA_INVALID)

    def _private_raw(self, data: bytes, invalid: int) -> bytes:
        result = self._raw_key().private(data.rjust(self.size, b"\0"))
        if result is None:
            raise CkError(invalid, "the number is not below the modulus")
        return result

    def make_decrypter(self, mechanism: Mechanism) -> ReadyCipher:
        kind = mechanism.type
        if kind == ck.CKM_RSA_PKCS:
            no_parameter(mechanism.parameter)
            return ReadyCipher(at_most(self.size - 11), self._decrypt(PKCS1))
        if kind == ck.CKM_RSA_PKCS_OAEP:
            name, mask, label = _oaep(mechanism)
            bound = max(0, self.size - 2 - 2 * HASHES[name].digest_size)
            if name.startswith("sha3") or mask.startswith("sha3"):  # `cryptography` has no OAEP with SHA-3
                return ReadyCipher(at_most(bound), self._decrypt_oaep(name, mask, label))
            pad = padding.OAEP(padding.MGF1(HASHES[mask]), HASHES[name], label or None)
            return ReadyCipher(at_most(bound), self._decrypt(pad))
        if kind == ck.CKM_RSA_X_509:
            no_parameter(mechanism.parameter)
            return ReadyCipher(at_most(self.size), self._decrypt_raw)
        if kind == ck.CKM_RSA_AES_KEY_WRAP:
            return wrapping.unwrapper(mechanism, self.size, self.make_decrypter)
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(kind)} and an RSA key")

    def _decrypt(self, pad: padding.AsymmetricPadding) -> Any:
        key, size = self._key, self.size

        def decrypt(data: bytes) -> bytes:
            if len(data) != size:
                raise CkError(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, f"a ciphertext has {size} bytes")
            try:
                return key.decrypt(data, pad)
            except ValueError:
                raise CkError(ck.CKR_ENCRYPTED_DATA_INVALID) from None

        return decrypt

    def _decrypt_oaep(self, name: str, mask: str, label: bytes) -> Any:
        def decrypt(data: bytes) -> bytes:
            if len(data) != self.size:
                raise CkError(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, f"a ciphertext has {self.size} bytes")
            plain = self._raw_key().oaep(data, name, mask, label)
            if plain is None:
                raise CkError(ck.CKR_ENCRYPTED_DATA_INVALID)
            return plain

        return decrypt

    def _decrypt_raw(self, data: bytes) -> bytes:
        if len(data) != self.size:
            raise CkError(ck.CKR_ENCRYPTED_DATA_LEN_RANGE, f"a ciphertext has {self.size} bytes")
        return self._private_raw(data, ck.CKR_ENCRYPTED_DATA_INVALID)


_NO_DIGEST_INFO = NoDigestInfo()
