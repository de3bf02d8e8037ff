"""Commands of a TPM 2.0 that its module gives it, and what comes back (TCG, TPM Library, part 1, 18; part 2; part 3).  Sans-IO.

Only what manages a TPM is here: what a guest says passes as it is.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

HEAD = struct.Struct(">HII")  #: tag, size of all, code of a command or of a response
NO_SESSIONS, SESSIONS = 0x8001, 0x8002  #: TPM_ST
OWNER, LOCKOUT, ENDORSEMENT, PLATFORM, NULL = 0x40000001, 0x4000000A, 0x4000000B, 0x4000000C, 0x40000007  #: TPM_RH
PASSWORD = 0x40000009  #: TPM_RS_PW
SHA1, SHA256, SHA384, SHA512 = 0x0004, 0x000B, 0x000C, 0x000D  #: TPM_ALG
NULL_ALGORITHM, AES, CFB, RSA, ECC, KEYED_HASH, ECDSA = 0x0010, 0x0006, 0x0043, 0x0001, 0x0023, 0x0008, 0x0018
CLEAR, STATE = 0, 1  #: TPM_SU
TRANSIENT, LOADED_SESSION, SAVED_SESSION = 0x80000000, 0x02000000, 0x03000000  #: first handles of each kind
PERSISTENT = 0x81  #: TPM_HT, the first byte of such handles
POLICY_SESSION = 1  #: TPM_SE
HANDLES = 1  #: TPM_CAP
CURVES: dict[str, int] = {"secp256r1": 3, "secp384r1": 4, "secp521r1": 5}  #: TPM_ECC_CURVE
PCRS = 24  #: of a bank (PC Client Platform TPM Profile, 4.6)


class Code(IntEnum):
    """TPM_CC."""

    EVICT_CONTROL = 0x120
    NV_UNDEFINE_SPACE = 0x122
    HIERARCHY_CONTROL = 0x121
    CHANGE_EPS = 0x124
    CHANGE_PPS = 0x125
    CLEAR = 0x126
    CLEAR_CONTROL = 0x127
    HIERARCHY_CHANGE_AUTH = 0x129
    NV_DEFINE_SPACE = 0x12A
    PCR_ALLOCATE = 0x12B
    SET_PRIMARY_POLICY = 0x12E
    CREATE_PRIMARY = 0x131
    NV_WRITE = 0x137
    NV_WRITE_LOCK = 0x138
    DICTIONARY_ATTACK_PARAMETERS = 0x13A
    STARTUP = 0x144
    SHUTDOWN = 0x145
    NV_READ = 0x14E
    POLICY_SECRET = 0x151
    CREATE = 0x153
    IMPORT = 0x156
    LOAD = 0x157
    QUOTE = 0x158
    SIGN = 0x15D
    UNSEAL = 0x15E
    CONTEXT_LOAD = 0x161
    CONTEXT_SAVE = 0x162
    FLUSH_CONTEXT = 0x165
    NV_READ_PUBLIC = 0x169
    POLICY_LOCALITY = 0x16F
    READ_PUBLIC = 0x173
    START_AUTH_SESSION = 0x176
    GET_CAPABILITY = 0x17A
    PCR_READ = 0x17E


class Attributes(IntFlag):
    """TPMA_OBJECT."""

    FIXED_TPM = 1 << 1
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    USER_WITH_AUTH = 1 << 6
    ADMIN_WITH_POLICY = 1 << 7
    NO_DA = 1 << 10
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18


class NvAttributes(IntFlag):
    """TPMA_NV."""

    PPWRITE = 1 << 0
    WRITELOCKED = 1 << 11
    WRITEDEFINE = 1 << 13
    PPREAD = 1 << 16
    OWNERREAD = 1 << 17
    AUTHREAD = 1 << 18
    NO_DA = 1 << 25
    WRITTEN = 1 << 29
    PLATFORMCREATE = 1 << 30


class Tpm2Error(Exception):
    """The TPM refused a command; `code` is its TPM_RC."""

    def __init__(self, command: Code, code: int) -> None:
        super().__init__(f"TPM2_{command.name}: {code:#x}")
        self.code = code


class BadResponse(Exception):
    """What no TPM answers."""


@dataclass(frozen=True)
class Authorization:
    """By a password, or by a policy session whose policy is fulfilled (part 1, 19.4)."""

    session: int = PASSWORD
    password: bytes = field(default=b"", repr=False)

    def encode(self) -> bytes:
        return struct.pack(">I", self.session) + sized(b"") + b"\0" + sized(self.password)


EMPTY_PASSWORD = Authorization()


def sized(data: bytes) -> bytes:
    """A TPM2B."""
    return struct.pack(">H", len(data)) + data


def number(value: int) -> bytes:
    """A TPM_SU or another number of two bytes."""
    return struct.pack(">H", value)


def selection(pcrs: Iterable[int]) -> bytes:
    """TPML_PCR_SELECTION: these of the bank for SHA-256."""
    return struct.pack(">IHB", 1, SHA256, PCRS // 8) + sum(1 << one for one in pcrs).to_bytes(PCRS // 8, "little")


def banks(wanted: set[int]) -> bytes:
    """TPML_PCR_SELECTION: all PCRs of these hashes, none of the others."""
    known = (SHA1, SHA256, SHA384, SHA512)
    rows = [struct.pack(">HB3s", one, 3, b"\xff" * 3 if one in wanted else bytes(3)) for one in known]
    return struct.pack(">I", len(rows)) + b"".join(rows)


def command(
    code: Code, handles: tuple[int, ...] = (), parameters: bytes = b"", authorization: Authorization | None = None
) -> bytes:
    """Its authorization, if it has one, is that of its first handle."""
    body = b"".join(struct.pack(">I", handle) for handle in handles)
    if authorization is not None:
        area = authorization.encode()
        body += struct.pack(">I", len(area)) + area
    body += parameters
    return HEAD.pack(SESSIONS if authorization else NO_SESSIONS, HEAD.size + len(body), code) + body


class Parts:
    """Takes a structure apart, from front to back.  Raises BadResponse where it ends early."""

    def __init__(self, data: bytes, what: str, at: int = 0) -> None:
        self._data, self._what, self._at = data, what, at

    def number(self, size: int = 4) -> int:
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        return self.take(self.number(2))

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise BadResponse(f"{self._what}: it ends early")
        self._at += count
        return part


class Response(Parts):
    """Raises Tpm2Error for one that is no success, BadResponse for one that cannot be."""

    def __init__(self, code: Code, data: bytes) -> None:
        what = f"TPM2_{code.name}"
        if len(data) < HEAD.size or HEAD.unpack_from(data)[1] != len(data):
            raise BadResponse(f"{what}: {len(data)} bytes")
        tag, _, result = HEAD.unpack_from(data)
        if result:
            raise Tpm2Error(code, result)
        super().__init__(data, what, HEAD.size)
        self._sessions = tag == SESSIONS

    def parameters(self) -> None:
        """What comes next is behind the handles."""
        if self._sessions:
            self.number()


# ---- objects ------------------------------------------------------------------------------------------------------------


def template(kind: int, attributes: Attributes, parameters: bytes, unique: bytes, policy: bytes = b"") -> bytes:
    """TPMT_PUBLIC (part 2, 12.2.4)."""
    return struct.pack(">HHI", kind, SHA256, attributes) + sized(policy) + parameters + unique


def parent_template(unique: bytes) -> bytes:
    """TPMT_PUBLIC of a storage key (part 1, 27.6): whoever has `unique` and the seed can make it again, and nobody else."""
    attributes = Attributes.FIXED_TPM | Attributes.FIXED_PARENT | Attributes.SENSITIVE_DATA_ORIGIN
    attributes |= Attributes.USER_WITH_AUTH | Attributes.NO_DA | Attributes.RESTRICTED | Attributes.DECRYPT
    symmetric = struct.pack(">HHH", AES, 128, CFB)
    parameters = symmetric + struct.pack(">HHH", NULL_ALGORITHM, CURVES["secp256r1"], NULL_ALGORITHM)
    return template(ECC, attributes, parameters, sized(unique) + sized(b""))


def sealed_template() -> bytes:
    """TPMT_PUBLIC of data that a TPM is to seal (part 1, 29)."""
    attributes = Attributes.FIXED_TPM | Attributes.FIXED_PARENT | Attributes.USER_WITH_AUTH | Attributes.NO_DA
    return template(KEYED_HASH, attributes, struct.pack(">H", NULL_ALGORITHM), sized(b""))


def public_area(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey, attributes: Attributes, policy: bytes = b"") -> bytes:
    """TPMT_PUBLIC of a key that was made elsewhere; its schemes are those that each use names.  Raises KeyError for a curve that
    TPMs do not have, ValueError for an RSA key whose exponent they do not have (a prime of 17 to 32 bits: part 2, 12.2.3.5)."""
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        if not 1 << 16 < numbers.e < 1 << 32:
            raise ValueError("an RSA key whose public exponent TPMs do not have: they have 65537")
        parameters = struct.pack(">HHHI", NULL_ALGORITHM, NULL_ALGORITHM, key.key_size, 0 if numbers.e == 65537 else numbers.e)
        return template(RSA, attributes, parameters, sized(numbers.n.to_bytes(key.key_size // 8, "big")), policy)
    point, size = key.public_numbers(), (key.curve.key_size + 7) // 8
    parameters = struct.pack(">HHHH", NULL_ALGORITHM, NULL_ALGORITHM, CURVES[key.curve.name], NULL_ALGORITHM)
    unique = sized(point.x.to_bytes(size, "big")) + sized(point.y.to_bytes(size, "big"))
    return template(ECC, attributes, parameters, unique, policy)


def sensitive_area(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    """TPM2B_SENSITIVE without an authorization (part 2, 12.3.2.4): of an RSA key one prime.  Raises ValueError where its primes are
    not of one size."""
    if isinstance(key, rsa.RSAPrivateKey):
        numbers = key.private_numbers()
        if not numbers.p.bit_length() == numbers.q.bit_length() == key.key_size // 2:
            raise ValueError("an RSA key whose primes are not of one size, which TPMs do not have")
        kind, secret = RSA, numbers.p.to_bytes(key.key_size // 16, "big")
    else:
        kind, secret = ECC, key.private_numbers().private_value.to_bytes((key.curve.key_size + 7) // 8, "big")
    return sized(struct.pack(">H", kind) + sized(b"") + sized(b"") + sized(secret))


def subject_public_key_info(public: bytes) -> bytes:
    """DER, of a TPMT_PUBLIC.  Raises BadResponse for what is no key of RSA or of a curve of CURVES."""
    parts = Parts(public, "TPMT_PUBLIC")
    kind = parts.number(2)
    parts.take(6)
    parts.sized()
    if parts.number(2) != NULL_ALGORITHM:  # symmetric: bits and mode
        parts.take(4)
    if parts.number(2) != NULL_ALGORITHM:  # scheme: its hash
        parts.take(2)
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
    try:
        if kind == RSA:
            parts.take(2)
            exponent = parts.number() or 65537
            key = rsa.RSAPublicNumbers(exponent, int.from_bytes(parts.sized(), "big")).public_key()
        else:
            if kind != ECC:
                raise KeyError(kind)
            curve = {CURVES[one.name]: one for one in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1())}[parts.number(2)]
            if parts.number(2) != NULL_ALGORITHM:  # key derivation: its hash
                parts.take(2)
            x, y = (int.from_bytes(parts.sized(), "big") for _ in "xy")
            key = ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    except (KeyError, ValueError):
        raise BadResponse("TPMT_PUBLIC: no key of a kind that is known") from None
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def ecdsa_signature(signature: bytes) -> bytes:
    """ECDSA-Sig-Value, DER (RFC 3279, 2.2.3), of a TPMT_SIGNATURE by ECDSA.  Raises BadResponse."""
    parts = Parts(signature, "TPMT_SIGNATURE")
    if parts.number(2) != ECDSA:
        raise BadResponse("TPMT_SIGNATURE: not by ECDSA")
    parts.take(2)
    r, s = (int.from_bytes(parts.sized(), "big") for _ in "rs")
    return encode_dss_signature(r, s)


def name_of(public: bytes) -> bytes:
    """An object's Name (part 1, 16)."""
    return struct.pack(">H", SHA256) + hashlib.sha256(public).digest()


def locality_policy(locality: int) -> bytes:
    """The digest of TPM2_PolicyLocality alone (part 3, 23.8)."""
    return hashlib.sha256(bytes(32) + struct.pack(">IB", Code.POLICY_LOCALITY, locality)).digest()


def secret_policy(entity: int) -> bytes:
    """The digest of TPM2_PolicySecret alone, with a hierarchy's authorization (part 3, 23.4)."""
    return hashlib.sha256(hashlib.sha256(bytes(32) + struct.pack(">II", Code.POLICY_SECRET, entity)).digest()).digest()
