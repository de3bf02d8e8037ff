"""Identities: a host's word about its modules, and the first contact with a host.

A host enrols with a one-time secret: both ends prove that they know it with HMAC-SHA256 over a transcript, and the
manager then pins the host's identity key.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import ClassVar

from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record
from hsmvisor_rpc.sealed.commands import Signed, check, fingerprint
from hsmvisor_rpc.sealed.refusal import Reason, Refusal


@dataclass(frozen=True)
class ModuleIdentity(Record):
    """A module as its host certifies it; travels as a Signed."""

    TYPE: ClassVar[str] = "module-identity"
    host_id: bytes  #: 32 bytes
    module_id: bytes  #: 16 bytes
    name: str
    recipient: bytes  #: HPKE public key, envelope.PUBLIC_SIZE bytes
    root: bytes  #: SHA-256 of the root key that the module obeys
    created_at: int


def verify_identity(data: bytes, host_key: bytes) -> ModuleIdentity:
    """Returns the identity that `host_key` (raw Ed25519, pinned at enrolment) signed; raises Refusal."""
    try:
        outer = Signed.decode(data)
        try:
            check(outer.signature, outer.payload, host_key, "module identity")
        except Refusal:
            raise Refusal(Reason.WRONG_HOST, "the module's identity is not signed by the pinned host key") from None
        identity = ModuleIdentity.decode(outer.payload)
    except MalformedRecord as error:
        raise Refusal(Reason.MALFORMED, str(error)) from None
    if identity.host_id != fingerprint(host_key):
        raise Refusal(Reason.WRONG_HOST, "the module's identity names another host")
    return identity


@dataclass(frozen=True)
class EnrolTranscript(Record):
    """What both ends' proofs cover."""

    TYPE: ClassVar[str] = "enrol"
    role: str  #: "manager" or "host": whose proof it is
    nonce: bytes  #: 32 random bytes of the manager
    host_key: bytes  #: raw Ed25519; empty in the manager's proof


def enrol_proof(secret: bytes, role: str, nonce: bytes, host_key: bytes = b"") -> bytes:
    """Returns HMAC-SHA256 of the transcript under the one-time secret."""
    return hmac.new(secret, EnrolTranscript(role, nonce, host_key).encode(), hashlib.sha256).digest()
