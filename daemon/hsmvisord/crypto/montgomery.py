"""X25519 and X448 (PKCS#11 3.1, 6.7; RFC 7748): agreement alone."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import x448, x25519

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import derivation
from hsmvisord.crypto.base import BasePrivateKey, BasePublicKey
from hsmvisord.crypto.ec import octet_string
from hsmvisord.crypto.interface import KeyKind, SaltKey, no_salt_key
from hsmvisord.wire.calls import Mechanism

#: class of cryptography -> kind, bytes of a public key.
MONTGOMERY: dict[Any, tuple[KeyKind, int]] = {
    x25519.X25519PublicKey: (KeyKind("X25519", ck.CKK_EC_MONTGOMERY, 255, bytes.fromhex("06032b656e")), 32),
    x448.X448PublicKey: (KeyKind("X448", ck.CKK_EC_MONTGOMERY, 448, bytes.fromhex("06032b656f")), 56),
}


class MontgomeryPublicKey(BasePublicKey):
    def __init__(self, key: x25519.X25519PublicKey | x448.X448PublicKey) -> None:
        kind, self.size = next(row for cls, row in MONTGOMERY.items() if isinstance(key, cls))
        super().__init__(key, kind)
        self._key = key

    def attributes(self) -> dict[int, Any]:
        point = self._key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return {ck.CKA_EC_PARAMS: self.kind.parameters, ck.CKA_EC_POINT: octet_string(point)}


class MontgomeryPrivateKey(BasePrivateKey):
    def __init__(self, key: Any) -> None:
        public = MontgomeryPublicKey(key.public_key())
        super().__init__(key, public)
        self._key, self.size = key, public.size

    def derive(self, mechanism: Mechanism, length: int = 0, salt_key: SaltKey = no_salt_key) -> bytes:
        if mechanism.type != ck.CKM_ECDH1_DERIVE:
            return super().derive(mechanism, length)
        return derivation.of_agreement(mechanism, length, self._agree)

    def _agree(self, point: bytes) -> bytes:
        """The peer's point raw or as OCTET STRING; one of small order is refused (RFC 7748, 6.1)."""
        if len(point) == len(octet_string(bytes(self.size))) and point == octet_string(point[-self.size :]):
            point = point[-self.size :]
        try:
            if self.size == 32:
                return bytes(self._key.exchange(x25519.X25519PublicKey.from_public_bytes(point)))
            return bytes(self._key.exchange(x448.X448PublicKey.from_public_bytes(point)))
        except ValueError:
            raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "not a point that a secret can be agreed with") from None
