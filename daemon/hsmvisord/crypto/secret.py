"""Secret keys in software: AES, ChaCha20 and generic secrets (PKCS#11 3.1, 6.8, 6.13, 6.30), and triple DES."""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto import cbcmac, ciphers, derivation, des, encrypted_data, macs
from hsmvisord.crypto.interface import KeyKind, SaltKey, Signer, Verifier, no_salt_key
from hsmvisord.crypto.operations import Cache, ReadyCipher
from hsmvisord.wire.calls import Mechanism

AES_SIZES = (16, 24, 32)
LEAST_CHECKED = 8  #: bytes of a key that has a check value
_SIZES = {ck.CKK_AES: AES_SIZES, ck.CKK_CHACHA20: (32,)} | {key_type: (size,) for key_type, size in des.SIZES.items()}
_NAMES = {
    ck.CKK_AES: "AES",
    ck.CKK_CHACHA20: "ChaCha20",
    ck.CKK_GENERIC_SECRET: "secret",
    ck.CKK_DES2: "DES2",
    ck.CKK_DES3: "DES3",
    **{key_type: f"HMAC {name}" for key_type, name in ck.HMAC_KEY_TYPES.items()},
}


def as_key(key_type: int, value: bytes) -> bytes:
    """Returns a value that was made or derived as a key of the type has it: with DES's parity."""
    return des.with_parity(value) if key_type in des.SIZES else value


def fit(value: bytes, key_type: int, length: int, first: bool = False) -> bytes:
    """Returns the bytes of a key that was derived or decapsulated: the last `length` of them (6.3.17, 6.4.8), or the
    first (of encrypted data: 6.27.2); where nobody said how many (0), all that there are, or as much as such a key takes.  Raises
    CkError(KEY_SIZE_RANGE)."""
    if not length and key_type == ck.CKK_AES:
        length = max((size for size in AES_SIZES if size <= len(value)), default=len(value))
    elif not length:
        length = min(32, len(value)) if key_type == ck.CKK_CHACHA20 else len(value)
    if not 0 < length <= len(value):
        raise CkError(ck.CKR_KEY_SIZE_RANGE, f"there are {len(value)} bytes for the key")
    return value[:length] if first else value[-length:]


def kind_of(key_type: int, size: int) -> KeyKind:
    """`size` in bytes.  Raises CkError: KEY_TYPE_INCONSISTENT for a type, KEY_SIZE_RANGE for a size that is not supported."""
    if key_type not in _NAMES:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, "supported: AES, ChaCha20, triple DES, generic secrets, those of HMAC")
    if size not in _SIZES.get(key_type, range(1, limits.MAX_SECRET + 1)):
        raise CkError(ck.CKR_KEY_SIZE_RANGE, f"{_NAMES[key_type]}: {size} bytes")
    return KeyKind(f"{_NAMES[key_type]} {8 * size}", key_type, 8 * size, b"")


class SecretKey:
    """Its repr shows its kind alone."""

    def __init__(self, key_type: int, value: bytes) -> None:
        """Raises as `kind_of`, and ATTRIBUTE_VALUE_INVALID for a DES key without its parity."""
        self.kind = kind_of(key_type, len(value))
        self.value = value
        self._aes = algorithms.AES(value) if key_type == ck.CKK_AES else None
        self._des = des.algorithm(value) if key_type in des.SIZES else None
        self._macs: Cache = Cache()

    @staticmethod
    def check_size(key_type: int, size: int) -> None:
        """Raises as `kind_of`."""
        kind_of(key_type, size)

    def __repr__(self) -> str:
        return f"<secret key, {self.kind.name}>"

    def stored(self) -> bytes:
        return self.value

    @property
    def check_value(self) -> bytes:
        """CKA_CHECK_VALUE (PKCS#11 3.1, 4.10.2): of a block cipher the first bytes of a block of zeros, else of the SHA-1.

        A key so short that its check value would tell it has none.
        """
        if len(self.value) < LEAST_CHECKED:
            return b""
        if self._aes is not None:
            return Cipher(self._aes, modes.ECB()).encryptor().update(bytes(16))[:3]
        if self._des is not None:
            return Cipher(self._des, modes.ECB()).encryptor().update(bytes(des.BLOCK))[:3]
        return hashlib.sha1(self.value).digest()[:3]

    def signer(self, mechanism: Mechanism) -> Signer:
        return self._mac(mechanism).signer()

    def verifier(self, mechanism: Mechanism) -> Verifier:
        return self._mac(mechanism).verifier()

    def encrypter(self, mechanism: Mechanism) -> ReadyCipher:
        return self._cipher(mechanism, encrypting=True)

    def decrypter(self, mechanism: Mechanism) -> ReadyCipher:
        return self._cipher(mechanism, encrypting=False)

    def derive(self, mechanism: Mechanism, length: int = 0, salt_key: SaltKey = no_salt_key) -> bytes:
        if mechanism.type in (ck.CKM_HKDF_DERIVE, ck.CKM_HKDF_DATA):
            return derivation.hkdf(mechanism, self.value, length, salt_key)
        if mechanism.type == ck.CKM_SP800_108_COUNTER_KDF:
            return derivation.sp800_108_counter(mechanism, self, length)
        if mechanism.type in encrypted_data.AES and self._aes is not None:
            return encrypted_data.derive(self._aes, mechanism, length)
        raise self._inconsistent(mechanism)

    def _mac(self, mechanism: Mechanism) -> macs.Mac:
        ready: macs.Mac | None = self._macs.get(mechanism)
        return ready or self._macs.keep(mechanism, self._make_mac(mechanism))

    def _make_mac(self, mechanism: Mechanism) -> macs.Mac:
        if mechanism.type in macs.HMACS and self._hashes(macs.HMACS[mechanism.type][0]):
            return macs.hash_mac(self.value, mechanism)
        if mechanism.type in macs.AES_MACS and self._aes is not None:
            return macs.aes_mac(self._aes, mechanism)
        if mechanism.type in cbcmac.MACS and self._aes is not None:
            return cbcmac.mac(self._aes, mechanism)
        raise self._inconsistent(mechanism)

    def _hashes(self, name: str) -> bool:
        """A generic secret serves every hash, a key of one hash that one."""
        return self.kind.key_type == ck.CKK_GENERIC_SECRET or ck.HMAC_KEY_TYPES.get(self.kind.key_type) == name

    def _cipher(self, mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
        if mechanism.type == ck.CKM_CHACHA20_POLY1305 and self.kind.key_type == ck.CKK_CHACHA20:
            return ciphers.chacha20_poly1305(self.value, mechanism, encrypting)
        if mechanism.type in ciphers.AES and self._aes is not None:
            return ciphers.AES[mechanism.type](self._aes, mechanism, encrypting)
        if mechanism.type in des.CIPHERS and self._des is not None:
            return des.CIPHERS[mechanism.type](self._des, mechanism, encrypting)
        raise self._inconsistent(mechanism)

    def _inconsistent(self, mechanism: Mechanism) -> CkError:
        return CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and a key of type {self.kind.name}")
