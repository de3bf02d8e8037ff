"""ML-KEM-768 and ML-KEM-1024 (PKCS#11 3.2, 6.68; FIPS 203)."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric import mlkem

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.base import BasePrivateKey, BasePublicKey
from hsmvisord.crypto.interface import KeyKind
from hsmvisord.crypto.operations import no_parameter
from hsmvisord.wire.calls import Mechanism

#: class of cryptography -> kind, CKP_ of its parameter set, bytes of a ciphertext (FIPS 203, table 3).
ML_KEM: dict[Any, tuple[KeyKind, int, int]] = {
    mlkem.MLKEM768PublicKey: (KeyKind("ML-KEM-768", ck.CKK_ML_KEM, 768, b""), ck.CKP_ML_KEM_768, 1088),
    mlkem.MLKEM1024PublicKey: (KeyKind("ML-KEM-1024", ck.CKK_ML_KEM, 1024, b""), ck.CKP_ML_KEM_1024, 1568),
}
SECRET = 32  #: bytes of a shared secret


def _check(mechanism: Mechanism) -> None:
    if mechanism.type != ck.CKM_ML_KEM:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and an ML-KEM key")
    no_parameter(mechanism.parameter)


class MlKemPublicKey(BasePublicKey):
    def __init__(self, key: Any) -> None:
        kind, self._set, self.size = next(row for cls, row in ML_KEM.items() if isinstance(key, cls))
        super().__init__(key, kind)
        self._key = key

    def attributes(self) -> dict[int, Any]:
        return {ck.CKA_PARAMETER_SET: self._set, ck.CKA_VALUE: self._key.public_bytes_raw()}

    def encapsulate(self, mechanism: Mechanism) -> tuple[bytes, bytes]:
        _check(mechanism)
        secret, ciphertext = self._key.encapsulate()
        return ciphertext, secret


class MlKemPrivateKey(BasePrivateKey):
    def __init__(self, key: Any) -> None:
        public = MlKemPublicKey(key.public_key())
        super().__init__(key, public)
        self._key, self.size = key, public.size

    def attributes(self) -> dict[int, Any]:
        return {ck.CKA_PARAMETER_SET: self.public.attributes()[ck.CKA_PARAMETER_SET]}

    def decapsulate(self, mechanism: Mechanism, ciphertext: bytes) -> bytes:
        """An altered ciphertext gives another secret (implicit rejection); only a wrong length is an error."""
        _check(mechanism)
        if len(ciphertext) != self.size:
            raise CkError(ck.CKR_WRAPPED_KEY_LEN_RANGE, f"a ciphertext has {self.size} bytes")
        return bytes(self._key.decapsulate(ciphertext))
