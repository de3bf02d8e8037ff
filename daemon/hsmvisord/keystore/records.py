"""What a module keeps, as canonical records; each is sealed on its own (vault.py).

    meta                     counters, root, recipient key, PIN, and the manifest of all other records but objects
    key/<handle>             a private key
    request/<handle>         the certificate request of a private key that was made here
    certificate/<handle>     a certificate
    material/<name>          a material with its generations
    guest                    slot 1, once its guest has initialized it
    object/<handle>          a token object of slot 1
    page/<number>            the versions of the objects on one page (pages.py)

Times are seconds since 1970, 0 = never.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hsmvisor_rpc.sealed.canonical import Record


@dataclass(frozen=True)
class MetaRecord(Record):
    TYPE: ClassVar[str] = "state-meta"
    version: int  #: of the whole state; one more at each commit
    module_id: bytes
    host_id: bytes
    root: bytes  #: raw Ed25519 key that commands must come from
    recipient: bytes = field(repr=False)  #: private HPKE key
    created_at: int
    sequence: int  #: of the last command carried out
    next_handle: int
    next_activation: int
    token_present: bool
    pin_salt: bytes = field(repr=False)  #: empty: no PIN
    pin_verifier: bytes = field(repr=False)
    pin_failures: int
    pin_failed_at: int
    manifest_names: tuple[str, ...]
    manifest_versions: tuple[int, ...]


@dataclass(frozen=True)
class KeyRecord(Record):
    TYPE: ClassVar[str] = "state-key"
    handle: int  #: of the private key object
    public_handle: int
    material: str
    pkcs8: bytes = field(repr=False)  #: or what else the cryptoprocessor keeps of it


@dataclass(frozen=True)
class RequestRecord(Record):
    """Where there is one, the key was made here: delivered keys are told from those by it."""

    TYPE: ClassVar[str] = "state-request"
    key: int  #: handle of its private key object
    der: bytes


@dataclass(frozen=True)
class CertificateRecord(Record):
    TYPE: ClassVar[str] = "state-certificate"
    handle: int
    authority: bool  #: an intermediate, shared by all materials
    der: bytes


@dataclass(frozen=True)
class GenerationRecord(Record):
    TYPE: ClassVar[str] = "state-generation"
    number: int
    state: str
    key: int  #: handle of its private key object, 0 once destroyed
    leaf: int  #: handle of its certificate, 0 = bare
    intermediates: tuple[int, ...]
    public_key: bytes
    certificate_only: bool
    staged_at: int
    activated_at: int
    retired_at: int
    drain_ends_at: int
    drain_seconds: int
    after_drain: str
    on_expiry: str
    last_used_at: int
    operations: int


@dataclass(frozen=True)
class MaterialRecord(Record):
    TYPE: ClassVar[str] = "state-material"
    name: str
    mode: str
    profile: str
    alias_id: bytes
    follow_handle: int
    since: int
    generations: tuple[bytes, ...]  #: encoded GenerationRecords, oldest first
    activations: tuple[int, ...]  #: pairs: activation number, generation (0 = none)


@dataclass(frozen=True)
class GuestRecord(Record):
    """Slot 1: label, and of each role its PIN as that of slot 0 in `MetaRecord`."""

    TYPE: ClassVar[str] = "state-guest"
    label: bytes
    so_salt: bytes = field(repr=False)
    so_verifier: bytes = field(repr=False)
    so_failures: int
    so_failed_at: int
    user_salt: bytes = field(repr=False)  #: empty: no PIN yet
    user_verifier: bytes = field(repr=False)
    user_failures: int
    user_failed_at: int


@dataclass(frozen=True)
class ObjectRecord(Record):
    """`key`: PKCS #8 or the value (or what else the cryptoprocessor keeps), SubjectPublicKeyInfo; empty for other objects.
    Attributes as in values.py."""

    TYPE: ClassVar[str] = "state-object"
    handle: int
    kinds: tuple[int, ...]
    values: tuple[bytes, ...] = field(repr=False)
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class PageRecord(Record):
    """The part of the manifest that names the objects of one page: a change of one object writes no other page's."""

    TYPE: ClassVar[str] = "state-page"
    handles: tuple[int, ...]
    versions: tuple[int, ...]
