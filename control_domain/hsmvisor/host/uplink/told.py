"""What host and manager tell each other, as values: protobuf is wire.py's alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hsmvisor.host.reports import Material


@dataclass(frozen=True)
class GuestTold:
    """A guest with its module.  A module without an identity does not serve now: nothing is told of it."""

    name: str
    kind: str
    owner: str
    attributes: Mapping[str, str]
    module: str = ""  #: empty: it has none
    identity: bytes = b""  #: signed by the host
    sequence: int = 0
    materials: tuple[Material, ...] = ()

    @property
    def bare(self) -> bool:
        return bool(self.module) and not self.identity

    def guest(self) -> GuestTold:
        """The same without what its module holds."""
        return replace(self, identity=b"", sequence=0, materials=())

    def without_usage(self) -> GuestTold:
        """What is told at once when it is different; how much a key is used is told now and then."""
        return replace(self, materials=tuple(map(_unused, self.materials)))


def _unused(material: Material) -> Material:
    rows = tuple(replace(row, operations=0, last_used_at=0.0, connections=0) for row in material.generations)
    return replace(material, generations=rows)


@dataclass(frozen=True)
class Given:
    """A command that the manager has signed; or, where `attest` is not empty, what it asks of a guest's boot (AttestationAsked)."""

    id: str
    module: str
    command: bytes
    attest: bytes = b""


@dataclass(frozen=True)
class Result:
    """What became of it.  `again`: nothing was decided, and the manager gives it again."""

    id: str
    done: bool = False
    reason: str = ""
    detail: str = ""
    public_key: bytes = b""
    csr: bytes = b""
    sequence: int = 0
    material: Material | None = None
    again: bool = False
    attestation: bytes = b""
    tpm_certificates: bytes = b""


@dataclass(frozen=True)
class Told:
    """One exchange, as the host begins it."""

    all: bool = False
    guests: tuple[GuestTold, ...] = ()
    gone: tuple[str, ...] = ()
    results: tuple[Result, ...] = ()

    def __bool__(self) -> bool:
        return self.all or bool(self.guests or self.gone or self.results)


@dataclass(frozen=True)
class Heard:
    """And as the manager answers it."""

    tell_all: bool = False
    commands: tuple[Given, ...] = ()
    heartbeat: int = 0  #: seconds; 0 = not said
    refused: Mapping[str, str] = field(default_factory=dict)  #: guests, and why
