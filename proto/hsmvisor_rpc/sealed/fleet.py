"""A fleet's own records: a host's first contact with its manager, keys on their way to the manager's issuer, and what a manager
asks of a guest's boot.

A host joins with a token, a text that an operator carries: where the manager is, whom to believe as manager, and a one-time
secret.  Both ends prove that they know the secret (HMAC-SHA256), and the host that it has the key that the manager pins.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass, field
from typing import ClassVar, Self

from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record

PREFIX = "hsmvisor-join:"
MAX_TOKEN = 16 * 1024  #: characters
NONCE_SIZE = 32  #: bytes
PCRS = range(24)  #: of a TPM's bank (PC Client Platform TPM Profile, 4.6.2)
HOST_URI = "hsmvisor://host/"  #: a host's certificate is for this and the host's id in hexadecimal


@dataclass(frozen=True)
class JoinToken(Record):
    """Its repr shows no secret."""

    TYPE: ClassVar[str] = "join-token"
    addresses: tuple[str, ...]  #: of managers, host:port
    authorities: tuple[bytes, ...]  #: DER: roots of the managers' certificates
    secret: bytes = field(repr=False)

    def text(self) -> str:
        return PREFIX + base64.urlsafe_b64encode(self.encode()).decode()

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Raises MalformedRecord."""
        stripped = "".join(text.split())
        if not stripped.startswith(PREFIX) or len(stripped) > MAX_TOKEN:
            raise MalformedRecord(f"a join token begins with {PREFIX} and has at most {MAX_TOKEN} characters")
        try:
            return cls.decode(base64.b64decode(stripped.removeprefix(PREFIX), altchars=b"-_", validate=True))
        except binascii.Error:
            raise MalformedRecord("the join token is cut off, or a character of it is wrong") from None


@dataclass(frozen=True)
class JoinStatement(Record):
    """What a host signs with its identity key when it joins; travels beside the signature."""

    TYPE: ClassVar[str] = "join"
    name: str
    host_key: bytes  #: raw Ed25519
    csr: bytes  #: DER
    nonce: bytes  #: 32 random bytes of the host


@dataclass(frozen=True)
class JoinTranscript(Record):
    """What both ends' proofs cover."""

    TYPE: ClassVar[str] = "join-proof"
    role: str  #: "host" or "manager": whose proof it is
    statement: bytes  #: encoding of the JoinStatement
    root: bytes  #: raw Ed25519: what the host's modules will obey; empty in the host's proof


def join_proof(secret: bytes, role: str, statement: JoinStatement, root: bytes = b"") -> bytes:
    """Returns HMAC-SHA256 of the transcript under the one-time secret."""
    return hmac.new(secret, JoinTranscript(role, statement.encode(), root).encode(), hashlib.sha256).digest()


@dataclass(frozen=True)
class IssuerStatement(Record):
    """The root's word for the issuer's recipient key: to it alone owners seal the keys that they import."""

    TYPE: ClassVar[str] = "issuer"
    recipient: bytes  #: HPKE public key, envelope.PUBLIC_SIZE bytes


@dataclass(frozen=True)
class ImportContext(Record):
    """What the envelope of an imported key is bound to; its encoding is HPKE's `info`."""

    TYPE: ClassVar[str] = "import-context"
    request: str  #: id of the request
    public_key: bytes  #: SubjectPublicKeyInfo, DER
    recipient: bytes  #: SHA-256 of the issuer's public key


@dataclass(frozen=True)
class AttestationAsked(Record):
    """A manager asks a host what PCRs a module's TPM has.  Nobody signs it: it changes nothing, and tells whoever may ask."""

    TYPE: ClassVar[str] = "attestation-asked"
    nonce: bytes  #: random; stands in what the TPM signs
    pcrs: tuple[int, ...]  #: ascending, of the SHA-256 bank

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises MalformedRecord."""
        asked = cls.decode(data)
        if len(asked.nonce) != NONCE_SIZE:
            raise MalformedRecord(f"{cls.TYPE}: a nonce has {NONCE_SIZE} bytes")
        if not asked.pcrs or asked.pcrs != tuple(sorted(set(asked.pcrs) & set(PCRS))):
            raise MalformedRecord(f"{cls.TYPE}: PCRs are {PCRS.start} to {PCRS.stop - 1}, each once, ascending")
        return asked
