"""Commands of a TPM 2.0 that its module gives it, and what comes back (TCG, TPM Library, part 1, 18; part 2; part 3).  Sans-IO.

Only what manages a TPM is here: what a guest says passes as it is.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from cryptography.hazmat.primitives.asymmetric import ec, rsa

HEAD = struct.Struct(">HII")  #: tag, size of all, code of a command or of a response
NO_SESSIONS, SESSIONS = 0x8001, 0x8002  #: TPM_ST
OWNER, PLATFORM, NULL = 0x40000001, 0x4000000C, 0x40000007  #: TPM_RH
PASSWORD = 0x40000009  #: TPM_RS_PW
SHA1, SHA256, SHA384, SHA512 = 0x0004, 0x000B, 0x000C, 0x000D  #: TPM_ALG
NULL_ALGORITHM, AES, CFB, RSA, ECC, KEYED_HASH = 0x0010, 0x0006, 0x0043, 0x0001, 0x0023, 0x0008
CLEAR, STATE = 0, 1  #: TPM_SU
TRANSIENT, LOADED_SESSION = 0x80000000, 0x02000000  #: first handles of each kind
POLICY_SESSION = 1  #: TPM_SE
HANDLES = 1  #: TPM_CAP
CURVES: dict[str, int] = {"secp256r1": 3, "secp384r1": 4, "secp521r1": 5}  #: TPM_ECC_CURVE


class Code(IntEnum):
    """TPM_CC."""

    EVICT_CONTROL = 0x120
    HIERARCHY_CHANGE_AUTH = 0x129
    PCR_ALLOCATE = 0x12B
    SET_PRIMARY_POLICY = 0x12E
    CREATE_PRIMARY = 0x131
    STARTUP = 0x144
    SHUTDOWN = 0x145
    CREATE = 0x153
    IMPORT = 0x156
    LOAD = 0x157
    SIGN = 0x15D
    UNSEAL = 0x15E
    CONTEXT_LOAD = 0x161
    CONTEXT_SAVE = 0x162
    FLUSH_CONTEXT = 0x165
    POLICY_LOCALITY = 0x16F
    READ_PUBLIC = 0x173
    START_AUTH_SESSION = 0x176
    GET_CAPABILITY = 0x17A


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
    password: bytes = b""

    def encode(self) -> bytes:
        return struct.pack(">I", self.session) + sized(b"") + b"\0" + sized(self.password)


EMPTY_PASSWORD = Authorization()


def sized(data: bytes) -> bytes:
    """A TPM2B."""
    return struct.pack(">H", len(data)) + data


def number(value: int) -> bytes:
    """A TPM_SU or another number of two bytes."""
    return struct.pack(">H", value)


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


class Response:
    """Takes one apart.  Raises Tpm2Error for one that is no success, BadResponse for one that cannot be."""

    def __init__(self, code: Code, data: bytes) -> None:
        if len(data) < HEAD.size or HEAD.unpack_from(data)[1] != len(data):
            raise BadResponse(f"TPM2_{code.name}: {len(data)} bytes")
        tag, _, result = HEAD.unpack_from(data)
        if result:
            raise Tpm2Error(code, result)
        self._code, self._data, self._at, self._sessions = code, data, HEAD.size, tag == SESSIONS

    def number(self, size: int = 4) -> int:
        return int.from_bytes(self._take(size), "big")

    def parameters(self) -> None:
        """What comes next is behind the handles."""
        if self._sessions:
            self.number()

    def sized(self) -> bytes:
        return self._take(self.number(2))

    def rest(self) -> bytes:
        return self._take(len(self._data) - self._at)

    def _take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise BadResponse(f"TPM2_{self._code.name}: it ends early")
        self._at += count
        return part


# ---- objects ------------------------------------------------------------------------------------------------------------


def template(kind: int, attributes: Attributes, parameters: bytes, unique: bytes) -> bytes:
    """TPMT_PUBLIC without a policy (part 2, 12.2.4)."""
    return struct.pack(">HHI", kind, SHA256, attributes) + sized(b"") + parameters + unique


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


def public_area(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey, attributes: Attributes) -> bytes:
    """TPMT_PUBLIC of a key that was made elsewhere; its schemes are those that each use names.  Raises KeyError for a curve that
    TPMs do not have."""
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        parameters = struct.pack(">HHHI", NULL_ALGORITHM, NULL_ALGORITHM, key.key_size, 0 if numbers.e == 65537 else numbers.e)
        return template(RSA, attributes, parameters, sized(numbers.n.to_bytes(key.key_size // 8, "big")))
    point, size = key.public_numbers(), (key.curve.key_size + 7) // 8
    parameters = struct.pack(">HHHH", NULL_ALGORITHM, NULL_ALGORITHM, CURVES[key.curve.name], NULL_ALGORITHM)
    return template(ECC, attributes, parameters, sized(point.x.to_bytes(size, "big")) + sized(point.y.to_bytes(size, "big")))


def sensitive_area(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    """TPM2B_SENSITIVE without an authorization (part 2, 12.3.2.4): of an RSA key one prime."""
    if isinstance(key, rsa.RSAPrivateKey):
        kind, secret = RSA, key.private_numbers().p.to_bytes(key.key_size // 16, "big")
    else:
        kind, secret = ECC, key.private_numbers().private_value.to_bytes((key.curve.key_size + 7) // 8, "big")
    return sized(struct.pack(">H", kind) + sized(b"") + sized(b"") + sized(secret))


def name_of(public: bytes) -> bytes:
    """An object's Name (part 1, 16)."""
    return struct.pack(">H", SHA256) + hashlib.sha256(public).digest()


def locality_policy(locality: int) -> bytes:
    """The digest of TPM2_PolicyLocality alone (part 3, 23.8)."""
    return hashlib.sha256(bytes(32) + struct.pack(">IB", Code.POLICY_LOCALITY, locality)).digest()
