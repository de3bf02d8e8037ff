"""Signed commands: what changes a module's material, and how it is proved who asked.

A fleet root (Ed25519) certifies signers; a signer signs the exact bytes of each command.  A module knows its
root only.  Signature: Ed25519 (RFC 8032) over the encoding of the signed record, whose TYPE separates domains.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import ClassVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hsmvisor_rpc.sealed import limits
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record
from hsmvisor_rpc.sealed.refusal import Reason, Refusal


class Action(enum.StrEnum):
    """What a command does to one generation of one material (or to the module's root)."""

    STAGE = "stage"  #: deliver a generation; body: Stage
    GENERATE = "generate"  #: the module makes a key, as a staged generation, and a request for its certificate; body: Generate
    CERTIFY = "certify"  #: certificates for a staged generation that has none; body: Certify
    ACTIVATE = "activate"  #: a staged generation becomes current, the current one retires
    ROLL_BACK = "roll-back"  #: a retiring generation becomes current again
    RETIRE = "retire"  #: the current generation leaves service, or a drain is set anew; body: Retire
    DESTROY = "destroy"  #: a staged or retiring generation is destroyed at once
    MOVE_TPM = "move-tpm"  #: the guest's machine goes to another host, or comes from one; body: MoveTpm
    CHANGE_ROOT = "change-root"  #: the module obeys another root; body: ChangeRoot, signed by the old root


@dataclass(frozen=True)
class Command(Record):
    """One step, addressed to one module of one host.  Times are seconds since 1970 (UTC)."""

    TYPE: ClassVar[str] = "command"
    action: str
    host_id: bytes  #: 32 bytes, SHA-256 of the host's identity key
    module_id: bytes  #: 16 bytes
    sequence: int  #: greater than that of every command before
    issued_at: int
    expires_at: int
    material: str  #: empty for move-tpm and change-root
    generation: int  #: 0 for these
    body: bytes  #: encoding of the action's own record, or empty


@dataclass(frozen=True)
class Stage(Record):
    """Body of `stage`: one generation.  An empty envelope renews the certificate of the newest key alone."""

    TYPE: ClassVar[str] = "stage"
    public_key: bytes  #: SubjectPublicKeyInfo (DER) of the private key
    certificates: tuple[bytes, ...]  #: DER, leaf first; empty for a bare key
    envelope: bytes  #: HPKE envelope of KeyMaterial, or empty
    mode: str  #: "pin" or "follow"
    profile: str  #: usage profile: tls, ssh, request-signing, decrypt, card, any
    alias_id: bytes  #: matched in searches for CKA_ID, never returned; or empty
    drain_seconds: int  #: how long it serves after it retires; 0 = until its certificate expires (24 h without one)
    after_drain: str  #: "extend" or "refuse"
    on_expiry: str  #: "keep" or "refuse"
    self_signed: bool  #: show a bare key with a self-signed certificate


#: What a module can be told to make; one whose keys live in hardware makes what that has.
KEY_TYPES = (
    "P-256", "P-384", "P-521", "RSA-2048", "RSA-3072", "RSA-4096", "Ed25519", "Ed448", "ML-DSA-44", "ML-DSA-65", "ML-DSA-87",
)  # fmt: skip


@dataclass(frozen=True)
class Generate(Record):
    """Body of `generate`: a key that never exists outside of its module.  The other fields are as those of `Stage`."""

    TYPE: ClassVar[str] = "generate"
    key_type: str  #: one of KEY_TYPES
    names: tuple[str, ...]  #: that the certificate is asked for, as names.py writes them (dns:..., ip:..., uri:..., email:...)
    mode: str
    profile: str
    alias_id: bytes
    drain_seconds: int
    after_drain: str
    on_expiry: str
    self_signed: bool


@dataclass(frozen=True)
class Certify(Record):
    """Body of `certify`."""

    TYPE: ClassVar[str] = "certify"
    certificates: tuple[bytes, ...]  #: DER, leaf first


@dataclass(frozen=True)
class Retire(Record):
    """Body of `retire`: how the drain goes on."""

    TYPE: ClassVar[str] = "retire"
    drain_seconds: int  #: from now; 0 = as the generation was staged with
    after_drain: str  #: "extend" or "refuse"


@dataclass(frozen=True)
class Destroy(Record):
    """Body of `destroy`; an empty one says that nothing is wrong with the key."""

    TYPE: ClassVar[str] = "destroy"
    compromised: bool  #: the host also replaces the process that held the key


MOVE_IDENT, MOVE_KEY = 16, 32  #: bytes


@dataclass(frozen=True)
class MoveTpm(Record):
    """Body of `move-tpm`: state of the module's TPM goes to, or comes from, the module that was told the same at its other end."""

    TYPE: ClassVar[str] = "move-tpm"
    leaves: bool  #: or it comes
    ident: bytes  #: MOVE_IDENT random bytes, the same at both ends
    envelope: bytes  #: HPKE envelope of a key of MOVE_KEY bytes, the same at both ends; empty: what was to move stays


@dataclass(frozen=True)
class ChangeRoot(Record):
    """Body of `change-root`."""

    TYPE: ClassVar[str] = "change-root"
    new_root: bytes  #: raw Ed25519 public key, 32 bytes


@dataclass(frozen=True)
class SignerCertificate(Record):
    """The root's word that a signer may command modules, for a time."""

    TYPE: ClassVar[str] = "signer-certificate"
    name: str
    public_key: bytes  #: raw Ed25519, 32 bytes
    not_before: int
    not_after: int


@dataclass(frozen=True)
class Signed(Record):
    """Exact bytes with the signature over them."""

    TYPE: ClassVar[str] = "signed"
    payload: bytes
    signature: bytes


@dataclass(frozen=True)
class SignedCommand(Record):
    """What travels: a command's exact bytes, the signer's certificate (a Signed) or nothing for the root itself."""

    TYPE: ClassVar[str] = "signed-command"
    payload: bytes
    certificate: bytes
    signature: bytes


def raw_public(key: Ed25519PublicKey) -> bytes:
    """Returns the 32 bytes of an Ed25519 public key."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def fingerprint(public: bytes) -> bytes:
    """Returns SHA-256 of a raw public key; a host's is its host_id."""
    return hashlib.sha256(public).digest()


def sign(record: Record, key: Ed25519PrivateKey) -> Signed:
    payload = record.encode()
    return Signed(payload, key.sign(payload))


def check(signature: bytes, payload: bytes, public: bytes, what: str) -> None:
    """Raises Refusal(ALTERED) unless `signature` is `public`'s over `payload`."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, payload)
    except (InvalidSignature, ValueError):
        raise Refusal(Reason.ALTERED, f"the signature of the {what} does not fit its bytes") from None


@dataclass(frozen=True)
class Signer:
    """A key that signs commands, with the certificate that its root gave it (None: the root itself)."""

    key: Ed25519PrivateKey
    certificate: bytes = b""

    def __repr__(self) -> str:
        return "Signer()"

    def sign(self, command: Command) -> bytes:
        """Returns the encoding of the SignedCommand."""
        payload = command.encode()
        return SignedCommand(payload, self.certificate, self.key.sign(payload)).encode()


def certify(root: Ed25519PrivateKey, certificate: SignerCertificate) -> bytes:
    """Returns the encoding of the Signed certificate."""
    return sign(certificate, root).encode()


def verify_command(data: bytes, root: bytes, now: int) -> tuple[Command, str]:
    """Returns the command and its signer's name; raises Refusal.

    `root` is the module's raw root key; `now` in seconds.  Address and sequence are the caller's to check,
    with `check_address` and its own state.
    """
    if len(data) > limits.MAX_SIGNED:
        raise Refusal(Reason.TOO_LARGE, f"a signed command has at most {limits.MAX_SIGNED} bytes, this has {len(data)}")
    try:
        message = SignedCommand.decode(data)
        if message.certificate:
            name, public = _verify_signer(message.certificate, root, now)
        else:
            name, public = "root", root
        try:
            check(message.signature, message.payload, public, "command")
        except Refusal:
            if message.certificate:
                raise
            raise Refusal(Reason.UNKNOWN_MANAGER, "not signed by this module's root, nor by a signer it certified") from None
        command = Command.decode(message.payload)
    except MalformedRecord as error:
        raise Refusal(Reason.MALFORMED, str(error)) from None
    if command.action == Action.CHANGE_ROOT and message.certificate:
        raise Refusal(Reason.UNKNOWN_MANAGER, "only the root itself may name its successor")
    if command.expires_at <= now:
        raise Refusal(Reason.EXPIRED, f"the command expired {now - command.expires_at} s ago")
    if command.issued_at > now + limits.MAX_CLOCK_SKEW:
        raise Refusal(Reason.NOT_YET_VALID, f"the command was issued {command.issued_at - now} s in the future: check the clocks")
    if command.expires_at - command.issued_at > limits.MAX_COMMAND_LIFETIME:
        raise Refusal(Reason.MALFORMED, f"a command lives at most {limits.MAX_COMMAND_LIFETIME} s")
    return command, name


def _verify_signer(data: bytes, root: bytes, now: int) -> tuple[str, bytes]:
    outer = Signed.decode(data)
    try:
        check(outer.signature, outer.payload, root, "signer's certificate")
    except Refusal:
        raise Refusal(Reason.UNKNOWN_MANAGER, "the signer is not certified by this module's root") from None
    certificate = SignerCertificate.decode(outer.payload)
    if now < certificate.not_before - limits.MAX_CLOCK_SKEW:
        raise Refusal(Reason.NOT_YET_VALID, f"the certificate of signer {certificate.name!r} is not valid yet")
    if now >= certificate.not_after:
        raise Refusal(Reason.EXPIRED, f"the certificate of signer {certificate.name!r} has expired: have the root renew it")
    return certificate.name, certificate.public_key


def check_address(command: Command, host_id: bytes, module_id: bytes) -> None:
    """Raises Refusal unless the command is for this module of this host."""
    if command.host_id != host_id:
        raise Refusal(Reason.WRONG_HOST, "the command is addressed to another host")
    if command.module_id != module_id:
        raise Refusal(Reason.WRONG_MODULE, "the command is addressed to another module")
