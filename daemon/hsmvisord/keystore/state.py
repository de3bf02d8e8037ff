"""The keys, certificates and materials of a module: immutable values.  A change makes a new State (changes.py)."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from hsmvisor_rpc.sealed.commands import Action

from hsmvisord.crypto.interface import PrivateKey
from hsmvisord.keystore.pages import Objects

PIN = "pin"
FOLLOW = "follow"
EXTEND = "extend"
REFUSE = "refuse"
KEEP = "keep"
MODES = (PIN, FOLLOW)
AFTER_DRAIN = (EXTEND, REFUSE)
ON_EXPIRY = (KEEP, REFUSE)
PROFILES = ("tls", "ssh", "request-signing", "decrypt", "card", "any")


class GenerationState(enum.StrEnum):
    STAGED = "staged"
    CURRENT = "current"
    RETIRING = "retiring"
    DESTROYED = "destroyed"


class Step(enum.StrEnum):
    """What happens to a generation: the commands' actions, and two things that no command says."""

    ACTIVATE = Action.ACTIVATE
    ROLL_BACK = Action.ROLL_BACK
    RETIRE = Action.RETIRE
    DESTROY = Action.DESTROY
    CERTIFY = Action.CERTIFY
    SUPERSEDE = "supersede"  #: another generation was activated
    END_DRAIN = "end-drain"


#: state, step -> state.  What is missing here is refused with WRONG_STATE.
TRANSITIONS: dict[tuple[GenerationState, Step], GenerationState] = {
    (GenerationState.STAGED, Step.CERTIFY): GenerationState.STAGED,
    (GenerationState.STAGED, Step.ACTIVATE): GenerationState.CURRENT,
    (GenerationState.STAGED, Step.DESTROY): GenerationState.DESTROYED,
    (GenerationState.CURRENT, Step.SUPERSEDE): GenerationState.RETIRING,
    (GenerationState.CURRENT, Step.RETIRE): GenerationState.RETIRING,
    (GenerationState.RETIRING, Step.RETIRE): GenerationState.RETIRING,
    (GenerationState.RETIRING, Step.ROLL_BACK): GenerationState.CURRENT,
    (GenerationState.RETIRING, Step.DESTROY): GenerationState.DESTROYED,
    (GenerationState.RETIRING, Step.END_DRAIN): GenerationState.DESTROYED,
}


@dataclass(frozen=True)
class Request:
    """The request for a certificate (PKCS #10) that came with a key that was made here."""

    key: int  #: handle
    der: bytes = field(repr=False)


@dataclass(frozen=True)
class Key:
    """A private key of one material; generations that renew the certificate alone share it."""

    handle: int  #: of its private key object (a following material shows its follow_handle instead)
    public_handle: int
    material: str
    private: PrivateKey = field(repr=False)
    request: Request | None = None  #: None: it was delivered


@dataclass(frozen=True)
class Certificate:
    handle: int
    authority: bool  #: an intermediate, shared by all materials
    der: bytes = field(repr=False)


@dataclass(frozen=True)
class Generation:
    number: int
    state: GenerationState
    key: int  #: handle; 0 once destroyed
    leaf: int  #: handle; 0 = bare
    intermediates: tuple[int, ...]
    public_key: bytes = field(repr=False)
    certificate_only: bool
    staged_at: int
    activated_at: int
    retired_at: int
    drain_ends_at: int
    drain_seconds: int
    after_drain: str
    on_expiry: str
    last_used_at: int = 0
    operations: int = 0

    @property
    def live(self) -> bool:
        """Whether clients may meet it."""
        return self.state in (GenerationState.CURRENT, GenerationState.RETIRING)


@dataclass(frozen=True)
class Activation:
    """From `number` on, views see `generation` of the material (0 = none)."""

    number: int
    generation: int


@dataclass(frozen=True)
class Material:
    name: str
    mode: str
    profile: str
    alias_id: bytes
    follow_handle: int  #: the one private key handle of a following material, else 0
    since: int  #: its first activation, 0 = none yet
    generations: tuple[Generation, ...]  #: oldest first
    activations: tuple[Activation, ...]  #: rising

    def generation(self, number: int) -> Generation | None:
        return next((g for g in self.generations if g.number == number), None)

    @property
    def current(self) -> Generation | None:
        return next((g for g in self.generations if g.state is GenerationState.CURRENT), None)

    @property
    def newest(self) -> int:
        """The highest generation number so far."""
        return max((g.number for g in self.generations), default=0)

    def seen_at(self, watermark: int) -> Generation | None:
        """Returns the generation that a view with `watermark` shows: that of its latest activation, or the current one when
        that is gone."""
        if not self.since or watermark < self.since:
            return None
        number = next((a.generation for a in reversed(self.activations) if a.number <= watermark), None)
        if number == 0:
            return None
        generation = self.generation(number) if number else None
        return generation if generation is not None and generation.live else self.current


@dataclass(frozen=True)
class Pin:
    """The operator's PIN for slot 0, as a verifier; and how often a wrong one came."""

    salt: bytes = field(default=b"", repr=False)
    verifier: bytes = field(default=b"", repr=False)
    failures: int = 0
    failed_at: int = 0

    def __bool__(self) -> bool:
        return bool(self.salt)


@dataclass(frozen=True)
class GuestToken:
    """Slot 1 as its guest has initialized it: who may log in to it."""

    label: bytes = b""
    so: Pin = Pin()
    user: Pin = Pin()

    def __bool__(self) -> bool:
        """Whether it is initialized."""
        return bool(self.so)


@dataclass(frozen=True)
class State:
    version: int
    module_id: bytes
    host_id: bytes
    root: bytes
    created_at: int
    sequence: int
    next_handle: int
    next_activation: int
    token_present: bool
    pin: Pin
    keys: Mapping[int, Key]
    certificates: Mapping[int, Certificate]
    materials: Mapping[str, Material]
    guest: GuestToken = GuestToken()
    objects: Objects = field(default_factory=Objects)  #: token objects of slot 1

    @property
    def watermark(self) -> int:
        """The number of the newest activation."""
        return self.next_activation - 1
