"""What the manager and its issuer say to each other: records in frames (hsmvisor_rpc.internal.frames).

A call is a REQUEST (Make, Take or Reseal) and then, under the same id, as many of Targets as it says.  Its answer is a REPLY of
Envelopes for each portion and then Answer; or an ERROR with Trouble, which ends it.  Hello is a call without targets, and answered
by Ready.  Forget is a NOTIFICATION: nobody waits for that call's answer any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from hsmvisor.manager.issuer import limits
from hsmvisor.manager.issuer.keys import BadKey
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record
from hsmvisor_rpc.sealed.envelope import PUBLIC_SIZE

BAD, AWAY, LOCKED = "bad", "away", "locked"  #: the key is; the issuer is; its token is, and is not asked again


@dataclass(frozen=True)
class SealTo(Record):
    """A module that gets the key, and what its envelope is bound to (hsmvisor_rpc.sealed.envelope.EnvelopeContext)."""

    TYPE: ClassVar[str] = "issuer-target"
    host_id: bytes
    module_id: bytes
    recipient: bytes  #: the module's HPKE public key
    material: str
    generation: int
    expires_at: int


@dataclass(frozen=True)
class Hello(Record):
    TYPE: ClassVar[str] = "issuer-hello"


@dataclass(frozen=True)
class Ready(Record):
    TYPE: ClassVar[str] = "issuer-ready"
    recipient: bytes  #: HPKE public key: to it owners seal
    escrow: str  #: "file", "token", or empty: no keys are kept
    trouble: str  #: why none can be kept now
    locked: bool  #: the token is not asked again
    measures: str  #: JSON


@dataclass(frozen=True)
class Make(Record):
    """A new key.  An empty line: it is not kept."""

    TYPE: ClassVar[str] = "issuer-make"
    key_type: str
    names: tuple[str, ...]
    line: str
    generation: int
    portions: int


@dataclass(frozen=True)
class Take(Record):
    """A key of an owner's, sealed to the issuer with hsmvisor_rpc.sealed.fleet.ImportContext."""

    TYPE: ClassVar[str] = "issuer-take"
    request: str
    envelope: bytes
    public_key: bytes
    certificates: tuple[bytes, ...]  #: DER, in any order
    line: str
    generation: int
    portions: int


@dataclass(frozen=True)
class Reseal(Record):
    """A key that was kept, for more modules."""

    TYPE: ClassVar[str] = "issuer-reseal"
    wrapped: bytes
    line: str
    generation: int
    portions: int


@dataclass(frozen=True)
class Targets(Record):
    TYPE: ClassVar[str] = "issuer-targets"
    targets: tuple[bytes, ...]  #: encodings of SealTo


@dataclass(frozen=True)
class Envelopes(Record):
    """In the order of the targets."""

    TYPE: ClassVar[str] = "issuer-envelopes"
    envelopes: tuple[bytes, ...]


@dataclass(frozen=True)
class Answer(Record):
    TYPE: ClassVar[str] = "issuer-answer"
    public_key: bytes  #: SubjectPublicKeyInfo, DER
    csr: bytes  #: PKCS #10, DER
    certificates: tuple[bytes, ...]  #: DER, leaf first: those that came with an imported key
    wrapped: bytes  #: the key as it is kept; empty: it is not


@dataclass(frozen=True)
class Trouble(Record):
    TYPE: ClassVar[str] = "issuer-trouble"
    kind: str  #: BAD, AWAY, LOCKED
    detail: str  #: a sentence for people, without a secret


@dataclass(frozen=True)
class Forget(Record):
    TYPE: ClassVar[str] = "issuer-forget"
    call: int


Call = Make | Take | Reseal
CALLS: dict[str, type[Make] | type[Take] | type[Reseal]] = {kind.TYPE: kind for kind in (Make, Take, Reseal)}


class OverLimit(BadKey):
    """Something is more, or other, than a call may hold; the message says what."""


@dataclass
class Whole:
    """A call with all its targets, or on the way to it."""

    call: Call
    targets: list[bytes] = field(default_factory=list)
    portions: int = 0  #: that have come

    @property
    def complete(self) -> bool:
        return self.portions == self.call.portions

    @property
    def asks_provider(self) -> bool:
        """What is kept is wrapped, or unwrapped, by the escrow's key."""
        return bool(self.call.line)

    def add(self, more: Targets) -> None:
        """Raises MalformedRecord."""
        if self.complete or not 1 <= len(more.targets) <= limits.PORTION:
            raise MalformedRecord("targets in portions that cannot be")
        self.targets += more.targets
        self.portions += 1


def portions(targets: Sequence[SealTo]) -> Iterator[Targets]:
    for start in range(0, len(targets), limits.PORTION):
        yield Targets(tuple(target.encode() for target in targets[start : start + limits.PORTION]))


def count(targets: int) -> int:
    """How many portions so many targets come in."""
    return -(-targets // limits.PORTION)


def check(call: Call) -> None:
    """Raises OverLimit."""
    _most("portions", call.portions, count(limits.MAX_TARGETS))
    _most("generation", call.generation, limits.MAX_NUMBER)
    _most("characters of the line's id", len(call.line), limits.MAX_ID)
    if isinstance(call, Make):
        _most("characters of the key's type", len(call.key_type), limits.MAX_NAME)
        _most("names", len(call.names), limits.MAX_NAMES)
        for name in call.names:
            _most("characters of a name", len(name), limits.MAX_NAME_TEXT)
    if isinstance(call, Take):
        _most("characters of the request's id", len(call.request), limits.MAX_ID)
        _most("bytes of the envelope", len(call.envelope), limits.MAX_ENVELOPE)
        _most("bytes of the public key", len(call.public_key), limits.MAX_SPKI)
        _most("certificates", len(call.certificates), limits.MAX_GIVEN)
        for certificate in call.certificates:
            _most("bytes of a certificate", len(certificate), limits.MAX_CERTIFICATE)
    if isinstance(call, Reseal):
        _most("bytes of the kept key", len(call.wrapped), limits.MAX_WRAPPED)
        if not call.line:
            raise OverLimit("a kept key is of a line")


def check_target(target: SealTo) -> None:
    """Raises OverLimit."""
    for what, value, size in (
        ("host's id", target.host_id, limits.HOST_ID),
        ("module's id", target.module_id, limits.MODULE_ID),
        ("module's recipient key", target.recipient, PUBLIC_SIZE),
    ):
        if len(value) != size:
            raise OverLimit(f"the {what} has {len(value)} bytes instead of {size}")
    if not target.material:
        raise OverLimit("the material has no name")
    _most("characters of the material's name", len(target.material), limits.MAX_NAME)
    _most("generation", target.generation, limits.MAX_NUMBER)
    _most("time", target.expires_at, limits.MAX_NUMBER)


def _most(what: str, value: int, most: int) -> None:
    if not 0 <= value <= most:
        raise OverLimit(f"{what}: {value}, at most {most}")
