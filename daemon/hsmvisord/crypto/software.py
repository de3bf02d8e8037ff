"""The cryptoprocessor in software: the `cryptography` package, and libcrypto for raw RSA."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dh, dsa, ec, ed448, ed25519, mldsa, mlkem, rsa, x448, x25519

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import digests, eddsa, generation, libcrypto
from hsmvisord.crypto.dh import DhPrivateKey, DhPublicKey
from hsmvisord.crypto.dsa import DsaPrivateKey, DsaPublicKey
from hsmvisord.crypto.ec import CURVES, EcPrivateKey, EcPublicKey
from hsmvisord.crypto.edwards import EdwardsPrivateKey, EdwardsPublicKey, MlDsaPrivateKey, MlDsaPublicKey
from hsmvisord.crypto.interface import LOCKED_IN, Access, PrivateKey, PublicKey, Wanted
from hsmvisord.crypto.interface import SecretKey as AnySecretKey
from hsmvisord.crypto.mlkem import MlKemPrivateKey, MlKemPublicKey
from hsmvisord.crypto.montgomery import MontgomeryPrivateKey, MontgomeryPublicKey
from hsmvisord.crypto.parts import private_key
from hsmvisord.crypto.rsa import RsaPrivateKey, RsaPublicKey
from hsmvisord.crypto.secret import SecretKey
from hsmvisord.wire.calls import Mechanism

_ML_DSA_PRIVATE = (mldsa.MLDSA44PrivateKey, mldsa.MLDSA65PrivateKey, mldsa.MLDSA87PrivateKey)
_ML_DSA_PUBLIC = (mldsa.MLDSA44PublicKey, mldsa.MLDSA65PublicKey, mldsa.MLDSA87PublicKey)
_ML_KEM_PRIVATE = (mlkem.MLKEM768PrivateKey, mlkem.MLKEM1024PrivateKey)
_ML_KEM_PUBLIC = (mlkem.MLKEM768PublicKey, mlkem.MLKEM1024PublicKey)
SUPPORTED = "RSA, EC P-256/384/521 and secp256k1, Ed25519, Ed448, X25519, X448, ML-DSA-44/65/87, ML-KEM-768/1024"


class SoftwareProvider:
    def __init__(self) -> None:
        libcrypto.preload()
        eddsa.preload()

    def offers(self, mechanism: int) -> bool:
        return True

    def open_private(self, stored: bytes) -> PrivateKey:
        return self.load_private_key(stored)

    def open_secret(self, key_type: int, stored: bytes) -> AnySecretKey:
        return SecretKey(key_type, stored)

    def load_private_key(self, pkcs8: bytes, access: Access = LOCKED_IN) -> PrivateKey:
        try:
            key = serialization.load_der_private_key(pkcs8, None)
        except (UnsupportedAlgorithm, TypeError):  # TypeError: the key is encrypted
            raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"supported are {SUPPORTED}, not encrypted") from None
        except ValueError:
            raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, "not a PKCS #8 private key") from None
        if isinstance(key, rsa.RSAPrivateKey):
            return RsaPrivateKey(key)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return EcPrivateKey(key)
        if isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey):
            return EdwardsPrivateKey(key)
        if isinstance(key, _ML_DSA_PRIVATE):
            return MlDsaPrivateKey(key)
        if isinstance(key, x25519.X25519PrivateKey | x448.X448PrivateKey):
            return MontgomeryPrivateKey(key)
        if isinstance(key, _ML_KEM_PRIVATE):
            return MlKemPrivateKey(key)
        if isinstance(key, dsa.DSAPrivateKey):
            return DsaPrivateKey(key)
        if isinstance(key, dh.DHPrivateKey):
            return DhPrivateKey(key)
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"supported are {SUPPORTED}")

    def private_of_parts(self, key_type: int, parts: Mapping[int, Any], access: Access = LOCKED_IN) -> PrivateKey:
        return private_key(key_type, parts)

    def load_public_key(self, spki: bytes) -> PublicKey:
        try:
            key = serialization.load_der_public_key(spki)
        except (UnsupportedAlgorithm, ValueError):
            raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, "not a SubjectPublicKeyInfo that can be used") from None
        if isinstance(key, rsa.RSAPublicKey):
            return RsaPublicKey(key)
        if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in CURVES:
            return EcPublicKey(key)
        if isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
            return EdwardsPublicKey(key)
        if isinstance(key, _ML_DSA_PUBLIC):
            return MlDsaPublicKey(key)
        if isinstance(key, x25519.X25519PublicKey | x448.X448PublicKey):
            return MontgomeryPublicKey(key)
        if isinstance(key, _ML_KEM_PUBLIC):
            return MlKemPublicKey(key)
        if isinstance(key, dsa.DSAPublicKey):
            return DsaPublicKey(key)
        if isinstance(key, dh.DHPublicKey):
            return DhPublicKey(key)
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"supported are {SUPPORTED}")

    def load_secret_key(self, key_type: int, value: bytes, access: Access = LOCKED_IN) -> AnySecretKey:
        return SecretKey(key_type, value)

    def generate_pair(self, mechanism: int, wanted: Wanted, access: Access = LOCKED_IN, wait: float = 0.0) -> PrivateKey:
        return generation.key_pair(mechanism, wanted, wait)

    def generate_secret(self, mechanism: int, length: int, access: Access = LOCKED_IN) -> AnySecretKey:
        return generation.secret(mechanism, length)

    def wrap(
        self, wrapper: PublicKey | AnySecretKey, mechanism: Mechanism, key: PrivateKey | AnySecretKey
    ) -> tuple[int, Callable[[], bytes]]:
        data = key.value if isinstance(key, SecretKey) else key.pkcs8()  # type: ignore[union-attr]
        cipher = wrapper.encrypter(mechanism)
        return cipher.bound(len(data)), lambda: cipher.run(data)

    def unwrap_private(
        self, unwrapper: PrivateKey | AnySecretKey, mechanism: Mechanism, wrapped: bytes, access: Access
    ) -> PrivateKey:
        return self.load_private_key(unwrapper.decrypter(mechanism).run(wrapped), access)

    def unwrap_secret(
        self, unwrapper: PrivateKey | AnySecretKey, mechanism: Mechanism, wrapped: bytes, key_type: int, length: int, access: Access
    ) -> AnySecretKey:
        value = unwrapper.decrypter(mechanism).run(wrapped)  # whole: a part of a key is another key, and a weaker one
        if length not in (0, len(value)):
            raise CkError(ck.CKR_KEY_SIZE_RANGE, f"what was unwrapped has {len(value)} bytes")
        return SecretKey(key_type, value)

    def clean(self) -> None:
        return

    def digest(self, mechanism: Mechanism) -> tuple[int, Callable[[], Any]]:
        return digests.digest(mechanism)

    def random(self, size: int) -> bytes:
        return os.urandom(size)
