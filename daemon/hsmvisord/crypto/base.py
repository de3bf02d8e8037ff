"""What all software keys share: identity, cached ready operations, and refusals of what their type cannot do."""

from __future__ import annotations

import datetime
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID
from hsmvisor_rpc.sealed import names as certificate_names
from hsmvisor_rpc.sealed.names import Name

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import Cipher, KeyKind, SaltKey, Signer, Verifier, no_salt_key
from hsmvisord.crypto.operations import Cache
from hsmvisord.lanes import lanes
from hsmvisord.wire.calls import Mechanism


def _bit_string(spki: bytes) -> bytes:
    """Returns the content of subjectPublicKey: SEQUENCE { SEQUENCE algorithm, BIT STRING } (RFC 5280 4.1)."""

    def element(offset: int) -> tuple[int, int]:
        length, start = spki[offset + 1], offset + 2
        if length & 0x80:
            count = length & 0x7F
            length, start = int.from_bytes(spki[start : start + count], "big"), start + count
        return start, start + length

    inside, _ = element(0)
    _, after_algorithm = element(inside)
    start, end = element(after_algorithm)
    return spki[start + 1 : end]


def key_identifier(spki: bytes) -> bytes:
    """Returns the SHA-1 of the BIT STRING subjectPublicKey (RFC 5280 4.2.1.2, method 1), whatever its algorithm."""
    return hashlib.sha1(_bit_string(spki)).digest()


class BasePublicKey:
    def __init__(self, key: Any, kind: KeyKind) -> None:
        self.kind = kind
        self.spki: bytes = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        self._verifiers = Cache()

    @functools.cached_property
    def key_id(self) -> bytes:
        return key_identifier(self.spki)

    def attributes(self) -> dict[int, Any]:
        raise NotImplementedError

    def verifier(self, mechanism: Mechanism) -> Verifier:
        ready: Verifier | None = self._verifiers.get(mechanism)
        return ready or self._verifiers.keep(mechanism, self.make_verifier(mechanism))

    def encrypter(self, mechanism: Mechanism) -> Cipher:
        return self.make_encrypter(mechanism)

    def recoverer(self, mechanism: Mechanism) -> Cipher:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and a key of type {self.kind.name}")

    def make_verifier(self, mechanism: Mechanism) -> Verifier:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and a key of type {self.kind.name}")

    def encapsulate(self, mechanism: Mechanism) -> tuple[bytes, bytes]:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and a key of type {self.kind.name}")

    def make_encrypter(self, mechanism: Mechanism) -> Cipher:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and a key of type {self.kind.name}")


class BasePrivateKey:
    """Its repr shows its kind alone."""

    def __init__(self, key: Any, public: BasePublicKey) -> None:
        self._any_key = key
        self.kind = public.kind
        self.public = public
        self._signers = Cache()
        self._decrypters = Cache()
        self._lane_key: lanes.Key | None = None

    def __repr__(self) -> str:
        return f"<private key, {self.kind.name}>"

    def attributes(self) -> dict[int, Any]:
        return self.public.attributes()

    def signer(self, mechanism: Mechanism) -> Signer:
        ready: Signer | None = self._signers.get(mechanism)
        return ready or self._signers.keep(mechanism, self.make_signer(mechanism))

    def decrypter(self, mechanism: Mechanism) -> Cipher:
        ready: Cipher | None = self._decrypters.get(mechanism)
        return ready or self._decrypters.keep(mechanism, self.make_decrypter(mechanism))

    def make_signer(self, mechanism: Mechanism) -> Signer:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and a key of type {self.kind.name}")

    def make_decrypter(self, mechanism: Mechanism) -> Cipher:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and a key of type {self.kind.name}")

    #: What lanes can do with this key: mechanism, kind.  None where Debian's libcrypto is slower than `cryptography`: measured,
    #: RSA-3072 1.8 ms and 0.7, P-384 770 us and 200.
    lane: tuple[int, int] | None = None

    def lane_key(self, mechanism: Mechanism) -> lanes.Key | None:
        if self.lane is None or mechanism.type != self.lane[0] or mechanism.parameter is not None:
            return None
        if self._lane_key is None:
            size = self.signer(mechanism).output_size
            self._lane_key = lanes.Key(bytearray(self.pkcs8()), self.lane[1], size, self.lane_sizes())
        return self._lane_key

    def lane_sizes(self) -> range:
        """Returns the lengths of data that a lane signs."""
        return range(1, lanes.MAX_DATA + 1)

    def derive(self, mechanism: Mechanism, length: int = 0, salt_key: SaltKey = no_salt_key) -> bytes:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and a key of type {self.kind.name}")

    def decapsulate(self, mechanism: Mechanism, ciphertext: bytes) -> bytes:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and a key of type {self.kind.name}")

    def pkcs8(self) -> bytes:
        encoding, form = serialization.Encoding.DER, serialization.PrivateFormat.PKCS8
        return bytes(self._any_key.private_bytes(encoding, form, serialization.NoEncryption()))

    def stored(self) -> bytes:
        return self.pkcs8()

    #: The hash that a certificate of this key is signed with; None where the algorithm has its own.
    certificate_hash: hashes.HashAlgorithm | None = hashes.SHA256()

    def self_signed(self, common_name: str, not_before: int, not_after: int) -> bytes:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
        utc = datetime.UTC
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._any_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.datetime.fromtimestamp(not_before, utc))
            .not_valid_after(datetime.datetime.fromtimestamp(not_after, utc))
        )
        certificate = builder.sign(self._any_key, self.certificate_hash)  # type: ignore[arg-type]
        return certificate.public_bytes(serialization.Encoding.DER)

    def certificate_request(self, names: Sequence[Name]) -> bytes:
        request = certificate_names.request(names).sign(self._any_key, self.certificate_hash)  # type: ignore[arg-type]
        return request.public_bytes(serialization.Encoding.DER)
