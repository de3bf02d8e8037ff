"""Rows as values: one dataclass a table, its fields the columns (tables.py says what they mean)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Any, Self

from hsmvisor.manager import limits


class _Row:
    @classmethod
    def of(cls, row: Any) -> Self:
        """From a result's row that has all columns of the table, and maybe more."""
        values = row._mapping
        return cls(**{name: values[name] for name in _names(cls)})  # type: ignore[arg-type]

    @classmethod
    def all(cls, rows: Iterable[Any]) -> list[Self]:
        return [cls.of(row) for row in rows]


@cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


def lines_of(text: str) -> tuple[str, ...]:
    return tuple(text.split("\n")) if text else ()


def text_of(items: Iterable[str]) -> str:
    return "\n".join(items)


@dataclass(frozen=True)
class HostRow(_Row):
    id: str
    name: str
    host_key: bytes
    pin: bytes = field(repr=False)
    state: str
    trusted: int
    owners: str
    certificate: bytes = field(repr=False)
    certificate_before: bytes = field(repr=False)
    certificate_ends_at: int
    joined_at: int
    seen_at: int
    version: str
    session: str
    number: int
    away: int

    def is_silent(self, now: float) -> bool:
        return self.seen_at + limits.AWAY < now

    def is_there(self, now: float) -> bool:
        """Whether it can be given commands."""
        return self.state == "joined" and not self.is_silent(now)


@dataclass(frozen=True)
class ResourceRow(_Row):
    id: str
    host_id: str
    name: str
    kind: str
    owner: str
    attributes: str
    present: int
    first_seen_at: int
    changed_at: int
    module: str
    module_id: str
    recipient: bytes = field(repr=False)
    identity: bytes = field(repr=False)
    obeys: int
    sequence: int

    @cached_property
    def tags(self) -> Mapping[str, str]:
        return dict(json.loads(self.attributes))

    @property
    def host(self) -> str:
        """The host's name."""
        return self.id.partition("/")[0]

    @property
    def reachable(self) -> bool:
        """Whether a command may be addressed to its module."""
        return bool(self.present and self.module_id and self.obeys)


@dataclass(frozen=True)
class RequestRow(_Row):
    id: str
    owner: str
    groups: str
    material: str
    spec: str
    state: str
    kept: int
    created_at: int
    changed_at: int


@dataclass(frozen=True)
class LineRow(_Row):
    id: str
    request_id: str
    resource_id: str
    material: str
    look_at: float
    lease_by: str
    lease_until: float
    stage: str
    why: str
    newest: int
    serving: int
    failures: int
    failed_at: float
    not_before: float
    triggered_at: float
    trigger: str
    changed_at: float


@dataclass(frozen=True)
class GenerationRow(_Row):
    line_id: str
    number: int
    state: str
    key_of: int
    public_key: bytes = field(default=b"", repr=False)
    csr: bytes = field(default=b"", repr=False)
    names: str = ""
    authority: str = ""
    kept: str = field(default="", repr=False)
    chain: str = field(default="", repr=False)
    serial: str = ""
    not_before: int = 0
    not_after: int = 0
    drawn: float = 0.0
    window: str = ""
    ask_at: float = 0.0
    created_at: float = 0.0
    activated_at: float = 0.0
    revoked_at: int = 0
    revoke: str = ""
    revoke_at: float = 0.0
    signatures: int = 0
    urgent: int = 0
    released: int = 0
    checked: int = 0
    told: int = 0
    why: str = ""


@dataclass(frozen=True)
class DeliveryRow(_Row):
    line_id: str
    resource_id: str
    staged: int
    active: int
    held: str
    state: str
    why: str
    changed_at: int
    failures: int = 0
    failed_at: float = 0.0
    permitted: str = ""

    @property
    def generations(self) -> Mapping[int, str]:
        """Those that the module has and has not destroyed, by number: staged, current, retiring."""
        return held_of(self.held)

    @property
    def has_nothing(self) -> bool:
        """It was denied before anything was sent: what has the same name there is somebody else's."""
        return self.state == "denied" and not self.held


@dataclass(frozen=True)
class CommandRow(_Row):
    id: str
    host_id: str
    resource_id: str
    module: str
    line_id: str
    generation: int
    action: str
    sequence: int
    signed: bytes = field(repr=False)
    created_at: float
    expires_at: int
    give_until: float = 0.0


@dataclass(frozen=True)
class MeasurementRow(_Row):
    id: str
    resource_id: str
    module_id: str
    nonce: bytes
    pcrs: str
    asked_at: float
    told_at: float = 0.0
    found: str = ""
    why: str = ""
    attestation: bytes = field(default=b"", repr=False)
    certificates: bytes = field(default=b"", repr=False)

    @property
    def asked(self) -> frozenset[int]:
        return frozenset(map(int, self.pcrs.split()))

    @property
    def values(self) -> Mapping[int, bytes]:
        told: dict[str, str] = json.loads(self.found) if self.found else {}
        return {int(number): bytes.fromhex(value) for number, value in told.items()}


@dataclass(frozen=True)
class TokenRow(_Row):
    id: str
    hash: bytes = field(repr=False)
    owner: str
    groups: str
    roles: str
    created_at: int
    created_by: str
    expires_at: int
    revoked_at: int


@dataclass(frozen=True)
class PolicyRow(_Row):
    version: int
    text: str
    uploaded_at: int
    uploaded_by: str
    comment: str


UNMEASURED = "unmeasured"  #: the state of a delivery, and the stage of a line, that waits for a guest's boot to be another one


def held_of(text: str) -> dict[int, str]:
    return {int(number): state for number, _, state in (item.partition(":") for item in text.split())}


def held_text(generations: Mapping[int, str] | Sequence[tuple[int, str]]) -> str:
    return " ".join(f"{number}:{state}" for number, state in sorted(dict(generations).items()))
