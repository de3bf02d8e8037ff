"""What workers tell of themselves, from JSON of an untrusted sender: every value is checked, bounded, or left out.

It informs; nothing is decided from it.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hsmvisor.host import limits
from hsmvisor.host.measures import Measure
from hsmvisor.serving.text import clean

_MAX_NUMBER = 2**63 - 1

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Generation:
    number: int
    state: str
    id: bytes
    public_key: bytes
    certificates: tuple[bytes, ...]
    staged_at: float  #: times in seconds since 1970; 0 = none
    activated_at: float
    retired_at: float
    drain_ends_at: float
    after_drain: str
    not_after: float
    last_used_at: float
    operations: int
    connections: int
    certificate_only: bool
    on_expiry: str
    drain_seconds: int
    csr: bytes = b""  #: of a key that the module made


@dataclass(frozen=True)
class Material:
    name: str
    mode: str
    profile: str
    key_type: str
    alias_id: bytes
    generations: tuple[Generation, ...]


@dataclass(frozen=True)
class Status:
    sequence: int = 0
    pin_set: bool = False
    token_present: bool = True
    connections: int = 0
    sessions: int = 0
    measures: tuple[Measure, ...] = ()
    materials: tuple[Material, ...] = ()


@dataclass(frozen=True)
class Operation:
    operation: str
    mechanism: str
    count: int
    errors: int
    seconds: float
    bounds: tuple[float, ...]
    counts: tuple[int, ...]  #: one more than bounds; not cumulative


@dataclass(frozen=True)
class Statistics:
    operations: tuple[Operation, ...] = ()
    connections: int = 0
    sessions: int = 0
    connections_total: int = 0
    connections_refused: int = 0
    uptime_seconds: float = 0.0
    resident_bytes: int = 0


def parse(untrusted_text: str) -> Json:
    """Returns the JSON object, or an empty one."""
    try:
        value = json.loads(untrusted_text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def status(untrusted_text: str) -> Status:
    value = parse(untrusted_text)
    return Status(
        sequence=_int(value, "sequence"),
        pin_set=value.get("pin_set") is True,
        token_present=value.get("token_present") is not False,
        connections=_int(value, "connections"),
        sessions=_int(value, "sessions"),
        measures=measures(value),
        materials=tuple(material(v) for v in _objects(value, "materials")),
    )


def measures(value: Json) -> tuple[Measure, ...]:
    rows = _objects(value, "measures")
    return tuple(Measure(_text(v, "name"), v.get("applied") is True, _text(v, "detail")) for v in rows)


def material(value: Json) -> Material:
    return Material(
        name=_text(value, "name"),
        mode=_text(value, "mode"),
        profile=_text(value, "profile"),
        key_type=_text(value, "key_type"),
        alias_id=_hex(value, "alias_id"),
        generations=tuple(_generation(v) for v in _objects(value, "generations")),
    )


def _generation(value: Json) -> Generation:
    certificates = value.get("certificates")
    return Generation(
        number=_int(value, "number", 2**32 - 1),
        state=_text(value, "state"),
        id=_hex(value, "id"),
        public_key=_base64(value.get("public_key")),
        certificates=tuple(map(_base64, certificates[:16])) if isinstance(certificates, list) else (),
        staged_at=_float(value, "staged_at"),
        activated_at=_float(value, "activated_at"),
        retired_at=_float(value, "retired_at"),
        drain_ends_at=_float(value, "drain_ends_at"),
        after_drain=_text(value, "after_drain"),
        not_after=_float(value, "not_after"),
        last_used_at=_float(value, "last_used_at"),
        operations=_int(value, "operations"),
        connections=_int(value, "connections", 2**32 - 1),
        certificate_only=value.get("certificate_only") is True,
        on_expiry=_text(value, "on_expiry"),
        drain_seconds=_int(value, "drain_seconds"),
        csr=_base64(value.get("csr")),
    )


def csr(material: Material, generation: int) -> bytes:
    """Returns the certificate request of a generation's key, empty where that was delivered."""
    return next((g.csr for g in material.generations if g.number == generation), b"")


def keys(value: Json, name: str) -> tuple[bytes, ...]:
    """Returns public keys, of which a list of texts in Base64 says."""
    found = value.get(name)
    return tuple(map(_base64, found[:4])) if isinstance(found, list) else ()


def statistics(untrusted_text: str) -> Statistics:
    value = parse(untrusted_text)
    return Statistics(
        operations=tuple(_operation(v) for v in _objects(value, "operations")),
        connections=_int(value, "connections", 2**32 - 1),
        sessions=_int(value, "sessions", 2**32 - 1),
        connections_total=_int(value, "connections_total"),
        connections_refused=_int(value, "connections_refused"),
        uptime_seconds=_float(value, "uptime_seconds"),
        resident_bytes=_int(value, "resident_bytes"),
    )


def _operation(value: Json) -> Operation:
    bounds, counts = value.get("bounds"), value.get("counts")
    sound = (
        isinstance(bounds, list)
        and isinstance(counts, list)
        and len(counts) == len(bounds) + 1 <= 64
        and all(isinstance(b, int | float) and 0 < b < 1e6 for b in bounds)
        and bounds == sorted(bounds)
        and all(type(c) is int and 0 <= c <= _MAX_NUMBER for c in counts)
    )
    return Operation(
        operation=_text(value, "operation"),
        mechanism=_text(value, "mechanism"),
        count=_int(value, "count"),
        errors=_int(value, "errors"),
        seconds=_float(value, "seconds"),
        bounds=tuple(map(float, bounds)) if sound and isinstance(bounds, list) else (),
        counts=tuple(counts) if sound and isinstance(counts, list) else (),
    )


def plain(untrusted_text: str) -> dict[str, Any]:
    """Returns the short scalar members of a JSON object, for events and the audit log."""
    value = parse(untrusted_text)
    rows = list(value.items())[:16]
    return {clean(key[:32]): _scalar(v) for key, v in rows if isinstance(v, str | int | float | bool)}


def _scalar(value: str | int | float | bool) -> str | int | float | bool:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, bool) or abs(value) <= _MAX_NUMBER:  # also leaves out NaN
        return value
    return 0


def _objects(value: Json, key: str) -> list[Json]:
    rows = value.get(key)
    return [row for row in rows[: limits.MAX_REPORT_ROWS] if isinstance(row, dict)] if isinstance(rows, list) else []


def _text(value: Json, key: str) -> str:
    text = value.get(key)
    return clean(text) if isinstance(text, str) else ""


def _int(value: Json, key: str, most: int = _MAX_NUMBER) -> int:
    number = value.get(key)
    return min(max(number, 0), most) if type(number) is int else 0


def _float(value: Json, key: str) -> float:
    number = value.get(key)
    return float(number) if isinstance(number, int | float) and 0 <= number < 253402300800 else 0.0  # before the year 10000


def _hex(value: Json, key: str) -> bytes:
    try:
        return bytes.fromhex(_text(value, key))
    except ValueError:
        return b""


def _base64(untrusted_value: Any) -> bytes:
    try:
        return base64.b64decode(untrusted_value, validate=True) if isinstance(untrusted_value, str) else b""
    except (binascii.Error, ValueError):
        return b""
