"""Private keys in hardware as `cryptography` has private keys: its interfaces are there to be implemented by others.  So all that
the software's keys do around their private operation (mechanisms, parameters, hashing, certificates) serves these too.

Only digests, short blocks and Edwards messages go to the hardware, never a message that is hashed on the way.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Any, NoReturn

from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import NoDigestInfo, Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hsmvisor_rpc.internal import hsm

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.operations import HASH_MECHANISMS, MASKS

#: What is asked of the hardware with one key: operation, mechanism, parameter, data.
Ask = Callable[[str, int, Any, bytes], bytes]

#: DER of DigestInfo before the digest, by hash (RFC 8017, 9.2, note 1; NIST's identifiers for SHA-3).
_DIGEST_INFO = {
    "sha1": "3021300906052b0e03021a05000414",
    "sha224": "302d300d06096086480165030402040500041c",
    "sha256": "3031300d060960864801650304020105000420",
    "sha384": "3041300d060960864801650304020205000430",
    "sha512": "3051300d060960864801650304020305000440",
    "sha3-224": "302d300d06096086480165030402070500041c",
    "sha3-256": "3031300d060960864801650304020805000420",
    "sha3-384": "3041300d060960864801650304020905000430",
    "sha3-512": "3051300d060960864801650304020a05000440",
}
_HASHES = {name.replace("_", "-"): mechanism for mechanism, name in HASH_MECHANISMS.items()}
_MASKS = {name.replace("_", "-"): mask for mask, name in MASKS.items()}


def _in_hardware() -> NoReturn:
    raise CkError(ck.CKR_KEY_UNEXTRACTABLE, "the key is in the hardware")


def _digest(data: bytes, algorithm: Any) -> tuple[str, bytes]:
    """Returns the hash's name and the digest of data, or the data that is one."""
    if isinstance(algorithm, Prehashed):
        return algorithm._algorithm.name, data
    return algorithm.name, hashlib.new(algorithm.name.replace("sha3-", "sha3_"), data).digest()


class _Key:
    """What all have; `ask` keeps the key in the hardware alive (provider.py)."""

    def __init__(self, public: Any, ask: Ask) -> None:
        self._public, self._ask = public, ask

    def public_key(self) -> Any:
        return self._public

    def private_bytes(self, *_: Any) -> NoReturn:
        _in_hardware()

    def private_bytes_raw(self) -> NoReturn:
        _in_hardware()

    def private_numbers(self) -> NoReturn:
        _in_hardware()

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


_PKCS1_OVERHEAD = 11  #: bytes (RFC 8017, 7.2.1)


def rejected(secret: bytes, ciphertext: bytes, most: int) -> bytes:
    """Returns what a ciphertext decrypts to whose padding is wrong: 0 to `most` bytes, the same each time.  Whoever sends
    ciphertexts cannot tell (Bleichenbacher 1998; implicit rejection, draft-irtf-cfrg-rsa-guidance)."""

    def stream(label: bytes, size: int) -> bytes:
        blocks = (hmac.digest(secret, label + n.to_bytes(2, "big") + ciphertext, "sha256") for n in range(-(-size // 32)))
        return b"".join(blocks)[:size]

    return stream(b"message", most)[: int.from_bytes(stream(b"length", 16), "big") % (most + 1)]


class RsaKey(_Key, rsa.RSAPrivateKey):
    rejection: bytes  #: a secret of the key's own, kept beside it in the sealed state

    @property
    def key_size(self) -> int:
        return int(self._public.key_size)

    def sign(self, data: Any, pad: Any, algorithm: Any) -> bytes:
        if isinstance(algorithm, NoDigestInfo):
            return self._ask(hsm.SIGN, ck.CKM_RSA_PKCS, None, data)
        name, digest = _digest(data, algorithm)
        if isinstance(pad, padding.PSS):
            parameter = (_HASHES[name], _MASKS[pad.mgf._algorithm.name], pad._salt_length)
            return self._ask(hsm.SIGN, ck.CKM_RSA_PKCS_PSS, parameter, digest)
        return self._ask(hsm.SIGN, ck.CKM_RSA_PKCS, None, bytes.fromhex(_DIGEST_INFO[name]) + digest)

    def decrypt(self, ciphertext: bytes, pad: Any) -> bytes:
        """Raises ValueError, as `cryptography` does, for OAEP; of PKCS #1 v1.5 each ciphertext decrypts (`rejection`)."""
        if not isinstance(pad, padding.OAEP):
            other = rejected(self.rejection, ciphertext, (self.key_size + 7) // 8 - _PKCS1_OVERHEAD)
            try:
                return self._decrypted(ck.CKM_RSA_PKCS, None, ciphertext)
            except ValueError:
                return other
        mask = pad.mgf._algorithm.name
        parameter = (_HASHES[pad._algorithm.name], _MASKS[mask], ck.CKZ_DATA_SPECIFIED, pad._label or b"")
        return self._decrypted(ck.CKM_RSA_PKCS_OAEP, parameter, ciphertext)

    def _decrypted(self, mechanism: int, parameter: Any, data: bytes) -> bytes:
        try:
            return self._ask(hsm.DECRYPT, mechanism, parameter, data)
        except CkError as error:
            if error.rv in (ck.CKR_DEVICE_ERROR, ck.CKR_MECHANISM_INVALID, ck.CKR_MECHANISM_PARAM_INVALID):
                raise
            raise ValueError("it does not decrypt") from None

    # as libcrypto.RawRsa

    def private(self, data: bytes) -> bytes | None:
        if int.from_bytes(data, "big") >= self._public.public_numbers().n:
            return None
        return self._ask(hsm.SIGN, ck.CKM_RSA_X_509, None, data)

    def oaep(self, data: bytes, hash_name: str, mask_name: str, label: bytes) -> bytes | None:
        hashed, mask = hash_name.replace("_", "-"), mask_name.replace("_", "-")
        try:
            return self._decrypted(ck.CKM_RSA_PKCS_OAEP, (_HASHES[hashed], _MASKS[mask], ck.CKZ_DATA_SPECIFIED, label), data)
        except ValueError:
            return None


class EcKey(_Key, ec.EllipticCurvePrivateKey):
    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public.curve  # type: ignore[no-any-return]

    @property
    def key_size(self) -> int:
        return self.curve.key_size

    def sign(self, data: Any, signature_algorithm: Any) -> bytes:
        _, digest = _digest(data, signature_algorithm.algorithm)
        size = (self.key_size + 7) // 8
        raw = self._ask(hsm.SIGN, ck.CKM_ECDSA, None, digest[:size])
        return encode_dss_signature(int.from_bytes(raw[: len(raw) // 2], "big"), int.from_bytes(raw[len(raw) // 2 :], "big"))

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> bytes:
        point = peer_public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        size = (self.key_size + 7) // 8
        return self._ask(hsm.DERIVE, ck.CKM_ECDH1_DERIVE, (ck.CKD_NULL, b"", point), size.to_bytes(2, "big"))


class Ed25519Key(_Key, ed25519.Ed25519PrivateKey):
    def sign(self, data: Any) -> bytes:
        return self._ask(hsm.SIGN, ck.CKM_EDDSA, None, bytes(data))


class Ed448Key(_Key, ed448.Ed448PrivateKey):
    def sign(self, data: Any) -> bytes:
        return self._ask(hsm.SIGN, ck.CKM_EDDSA, None, data)
