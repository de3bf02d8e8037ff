"""What the token asks of a cryptoprocessor: parsed keys that make ready-to-run operations.

A key object is parsed once and kept.  `signer`, `verifier`, `decrypter` check mechanism and parameter when the operation is
initialised and cache the result by mechanism, so that the operation itself does nothing but the cryptography.
All of them are safe to use from several threads at once.
Errors are ck.CkError with the code that PKCS#11 names for the case (MECHANISM_INVALID, MECHANISM_PARAM_INVALID,
KEY_TYPE_INCONSISTENT, DATA_LEN_RANGE, DATA_INVALID, ENCRYPTED_DATA_INVALID, ENCRYPTED_DATA_LEN_RANGE, SIGNATURE_INVALID,
SIGNATURE_LEN_RANGE).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hsmvisor_rpc.sealed.names import Name

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.lanes import lanes
from hsmvisord.wire.calls import Mechanism


@dataclass(frozen=True, slots=True)
class KeyKind:
    """Type and size of a key; equal kinds may follow one another in a `follow` material."""

    name: str  #: as people read it: "EC P-256", "RSA 2048", "Ed25519", "ML-DSA-65"
    key_type: int  #: CKK_...
    bits: int  #: modulus bits, curve bits; for ML-DSA 44, 65, 87
    parameters: bytes  #: DER of CKA_EC_PARAMS; empty for RSA and ML-DSA


@dataclass(frozen=True, slots=True)
class Access:
    """Whether a key may ever leave its cryptoprocessor: `readable` in the clear, `wrappable` wrapped by another key.

    The token decides each time anew (token/rules.py); hardware holds a key to what it was made with."""

    readable: bool = False
    wrappable: bool = False


LOCKED_IN = Access()


@dataclass(frozen=True)
class Wanted:
    """What a template says of the key pair that is to be made; 0 and empty where it says nothing."""

    bits: int = 0  #: CKA_MODULUS_BITS
    exponent: int = 0  #: CKA_PUBLIC_EXPONENT
    parameters: bytes = b""  #: CKA_EC_PARAMS
    parameter_set: int = 0  #: CKA_PARAMETER_SET
    domain: Mapping[int, bytes] = field(default_factory=dict)  #: CKA_PRIME, CKA_SUBPRIME, CKA_BASE


#: From the handle of a key that is HKDF's salt to its value.
SaltKey = Callable[[int], bytes]


def no_salt_key(handle: int) -> bytes:
    raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "no key can be the salt here")


class MultiPart(Protocol):
    """One multi-part operation; used by one thread at a time."""

    def update(self, data: bytes) -> None: ...

    def finish(self) -> bytes: ...


class MultiPartVerify(Protocol):
    def update(self, data: bytes) -> None: ...

    def finish(self, signature: bytes) -> None: ...


class Signer(Protocol):
    """A signing operation, ready.  `output_size` is exact for all mechanisms here."""

    @property
    def output_size(self) -> int: ...

    @property
    def sign(self) -> Callable[[bytes], bytes]: ...  #: one shot

    @property
    def begin(self) -> Callable[[], MultiPart] | None: ...  #: None: this mechanism is one-shot only


class Verifier(Protocol):
    @property
    def verify(self) -> Callable[[bytes, bytes], None]: ...  #: data, signature; raises CkError

    @property
    def begin(self) -> Callable[[], MultiPartVerify] | None: ...


class Stream(Protocol):
    """One encryption or decryption in parts; used by one thread at a time.  What it gives is exactly what it said before."""

    def room(self, size: int) -> int: ...  #: bytes that `update` with so many gives

    def update(self, data: bytes) -> bytes: ...

    def last(self) -> int: ...  #: bytes that `finish` gives, at most

    def finish(self) -> bytes: ...


class Cipher(Protocol):
    """An encryption or a decryption, ready.

    `bound`: from the length of the input to the most that comes out; of an encryption it is exact.
    """

    @property
    def bound(self) -> Callable[[int], int]: ...

    @property
    def run(self) -> Callable[[bytes], bytes]: ...  #: one shot

    @property
    def begin(self) -> Callable[[], Stream] | None: ...  #: None: this mechanism is one-shot only


class PublicKey(Protocol):
    @property
    def kind(self) -> KeyKind: ...

    @property
    def spki(self) -> bytes: ...  #: SubjectPublicKeyInfo, DER

    @property
    def key_id(self) -> bytes: ...  #: SHA-1 of the BIT STRING subjectPublicKey (RFC 5280 4.2.1.2 method 1): CKA_ID

    def attributes(self) -> dict[int, Any]:
        """Returns the public components by CKA_ type: MODULUS, MODULUS_BITS, PUBLIC_EXPONENT; EC_PARAMS, EC_POINT (DER
        OCTET STRING);
        PARAMETER_SET and VALUE (ML-DSA); big integers without leading zeros; CK_ULONG as int."""
        ...

    def verifier(self, mechanism: Mechanism) -> Verifier: ...

    def encrypter(self, mechanism: Mechanism) -> Cipher: ...

    def recoverer(self, mechanism: Mechanism) -> Cipher:
        """Returns what makes of a signature the data in it; raises CkError as a verification does."""
        ...

    def encapsulate(self, mechanism: Mechanism) -> tuple[bytes, bytes]:
        """Returns a ciphertext and the secret in it (ML-KEM)."""
        ...


class PrivateKey(Protocol):
    """A private key whose repr and exceptions show nothing."""

    @property
    def kind(self) -> KeyKind: ...

    @property
    def public(self) -> PublicKey: ...

    def attributes(self) -> dict[int, Any]:
        """Returns the components that clients may read on the private key: those of the public key that the standard
        defines there."""
        ...

    def signer(self, mechanism: Mechanism) -> Signer: ...

    def decrypter(self, mechanism: Mechanism) -> Cipher: ...

    def lane_key(self, mechanism: Mechanism) -> lanes.Key | None:
        """Returns the key for lanes, where they can do what `signer` does with that mechanism; the same one each time."""
        ...

    def derive(self, mechanism: Mechanism, length: int = 0, salt_key: SaltKey = no_salt_key) -> bytes:
        """Returns the shared secret of ECDH whole (CKD_NULL), or `length` bytes of the KDF."""
        ...

    def decapsulate(self, mechanism: Mechanism, ciphertext: bytes) -> bytes:
        """Returns the secret in a ciphertext of ML-KEM."""
        ...

    def self_signed(self, common_name: str, not_before: int, not_after: int) -> bytes:
        """Returns a DER certificate of this key signed by itself; times in seconds."""
        ...

    def certificate_request(self, names: Sequence[Name]) -> bytes:
        """Returns a certificate request (PKCS #10, DER) of this key, signed by it; there may be no names."""
        ...

    def pkcs8(self) -> bytes:
        """Returns PrivateKeyInfo (DER).  Raises CkError(KEY_UNEXTRACTABLE) where the cryptoprocessor does not give it."""
        ...

    def stored(self) -> bytes:
        """Returns what the sealed state keeps of it: the key, or where it is."""
        ...


class SecretKey(Protocol):
    """A secret key whose repr and exceptions show nothing."""

    @property
    def kind(self) -> KeyKind: ...

    @property
    def value(self) -> bytes: ...  #: raises CkError(KEY_UNEXTRACTABLE) where the cryptoprocessor does not give it

    def stored(self) -> bytes: ...  #: as that of a private key

    @property
    def check_value(self) -> bytes: ...  #: CKA_CHECK_VALUE

    def signer(self, mechanism: Mechanism) -> Signer: ...

    def verifier(self, mechanism: Mechanism) -> Verifier: ...

    def encrypter(self, mechanism: Mechanism) -> Cipher: ...

    def decrypter(self, mechanism: Mechanism) -> Cipher: ...

    def derive(self, mechanism: Mechanism, length: int = 0, salt_key: SaltKey = no_salt_key) -> bytes:
        """Returns `length` bytes; 0: what the mechanism gives."""
        ...


AnyKey = PublicKey | PrivateKey | SecretKey


class CryptoProvider(Protocol):
    """One cryptoprocessor: software, or an HSM of the host through PKCS#11.  A plug: one contract suite holds all of them
    (tests/unit/test_provider_contract.py)."""

    def offers(self, mechanism: int) -> bool:
        """Says whether its keys can do that (of the mechanisms in mechanisms.py)."""
        ...

    # ---- keys that were there before ----

    def open_private(self, stored: bytes) -> PrivateKey:
        """From what `stored` gave.  Raises CkError."""
        ...

    def open_secret(self, key_type: int, stored: bytes) -> SecretKey: ...

    # ---- keys that come ----

    def load_private_key(self, pkcs8: bytes, access: Access = LOCKED_IN) -> PrivateKey:
        """Raises CkError(KEY_TYPE_INCONSISTENT) for an unsupported type or size, CkError(ATTRIBUTE_VALUE_INVALID) for
        bytes that are no key."""
        ...

    def private_of_parts(self, key_type: int, parts: Mapping[int, Any], access: Access = LOCKED_IN) -> PrivateKey:
        """As parts.private_key."""
        ...

    def load_public_key(self, spki: bytes) -> PublicKey: ...

    def load_secret_key(self, key_type: int, value: bytes, access: Access = LOCKED_IN) -> SecretKey:
        """Raises CkError(KEY_TYPE_INCONSISTENT), CkError(KEY_SIZE_RANGE)."""
        ...

    # ---- keys that are made ----

    def generate_pair(self, mechanism: int, wanted: Wanted, access: Access = LOCKED_IN, wait: float = 0.0) -> PrivateKey:
        """Of a mechanism in generation.PAIRS.  Raises CkError(FUNCTION_REJECTED) when another RSA key is being made, and still is
        after `wait` seconds."""
        ...

    def generate_secret(self, mechanism: int, length: int, access: Access = LOCKED_IN) -> SecretKey:
        """Of a mechanism in generation.SECRETS; `length` in bytes, 0 where the template says nothing."""
        ...

    # ---- keys that wrap keys ----

    def wrap(
        self, wrapper: PublicKey | SecretKey, mechanism: Mechanism, key: PrivateKey | SecretKey
    ) -> tuple[int, Callable[[], bytes]]:
        """Returns the most bytes that come out, and what wraps.  A private key is wrapped as PrivateKeyInfo, a secret one as its
        value."""
        ...

    def unwrap_private(
        self, unwrapper: PrivateKey | SecretKey, mechanism: Mechanism, wrapped: bytes, access: Access
    ) -> PrivateKey: ...

    def unwrap_secret(
        self, unwrapper: PrivateKey | SecretKey, mechanism: Mechanism, wrapped: bytes, key_type: int, length: int, access: Access
    ) -> SecretKey:
        """`length`: bytes that it must have; 0: as many as there are."""
        ...

    # ---- what is not needed any more ----

    def clean(self) -> None:
        """Lets go of keys that nothing refers to.  Raises CkError."""
        ...

    # ---- without keys ----

    def digest(self, mechanism: Mechanism) -> tuple[int, Callable[[], Any]]:
        """Returns the digest's size and a factory of hashlib-like objects (update, digest); raises CkError(MECHANISM_INVALID)."""
        ...

    def random(self, size: int) -> bytes: ...
