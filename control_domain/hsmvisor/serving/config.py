"""Configurations: one TOML file a service, every value with a default, each section a frozen dataclass.

The loader walks the dataclasses' fields, so an unknown key or a wrong type is named precisely.  A list's items may be of several
dataclasses, told apart by their field `kind`.  What every service has stands here too.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hsmvisor.serving.errors import BadConfig

C = TypeVar("C")
Demand = Callable[[bool, str], None]  #: what has to hold, and what is said where it does not
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]*")


@dataclass(frozen=True)
class Audit:
    file: str = ""  #: default STATE/audit.log
    rotate_bytes: int = 64 * 1024 * 1024
    checkpoint_lines: int = 1000
    checkpoint_seconds: float = 300.0


@dataclass(frozen=True)
class Log:
    format: str = "plain"
    level: str = "info"


class LocalRow(Protocol):
    """Local callers, by exactly one of user, uid, group, gid; those that are not used are empty and -1."""

    @property
    def user(self) -> str: ...
    @property
    def uid(self) -> int: ...
    @property
    def group(self) -> str: ...
    @property
    def gid(self) -> int: ...


class CertificateRow(Protocol):
    """A client certificate, by exactly one of subject (RFC 4514) and SAN; the other one is empty."""

    @property
    def subject(self) -> str: ...
    @property
    def san(self) -> str: ...


# ---- the rules that go beyond a type ------------------------------------------------------------------------------------


def check_local(rows: Sequence[LocalRow], where: str, demand: Demand) -> None:
    for i, row in enumerate(rows):
        named = [bool(row.user), row.uid >= 0, bool(row.group), row.gid >= 0]
        demand(named.count(True) == 1, f"{where}[{i}] names exactly one of user, uid, group, gid")


def check_certificates(rows: Sequence[CertificateRow], where: str, demand: Demand) -> None:
    for i, row in enumerate(rows):
        demand(bool(row.subject) != bool(row.san), f"{where}[{i}] names exactly one of subject and san")


def check_absolute(paths: Sequence[str], where: str, demand: Demand) -> None:
    for i, path in enumerate(paths):
        demand(Path(path).is_absolute(), f"{where}[{i}] is an absolute path")


def check_records(audit: Audit, log: Log, demand: Demand) -> None:
    demand(audit.rotate_bytes >= 65536, "audit.rotate_bytes is at least 65536")
    demand(audit.checkpoint_lines >= 1, "audit.checkpoint_lines is at least 1")
    demand(audit.checkpoint_seconds > 0, "audit.checkpoint_seconds is greater than 0")
    demand(log.format in ("plain", "json"), "log.format is plain or json")
    demand(log.level in ("debug", "info", "warning", "error"), "log.level is debug, info, warning or error")


def once(names: Sequence[str], where: str, demand: Demand) -> None:
    for name in sorted(set(names)):
        demand(names.count(name) == 1, f"{where}: each name stands once, {name!r} does not")


def check_environment(settings: Sequence[str], where: str, demand: Demand) -> None:
    for i, setting in enumerate(settings):
        demand(_VARIABLE.fullmatch(setting) is not None, f"{where}.environment[{i}] is NAME=VALUE")


# ---- reading ------------------------------------------------------------------------------------------------------------


def load(path: Path | None, usual: Path, parse: Callable[[str, str], C]) -> C:
    """Returns what `parse` makes of the file's text and name; None: of the `usual` one if there is one, else of none.

    Raises BadConfig.
    """
    if path is None and not usual.exists():
        return parse("", str(usual))
    path = path or usual
    return parse(_read(path), str(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadConfig(str(path), f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadConfig(str(path), "is not UTF-8 text") from None


def parse(cls: type[C], text: str, origin: str) -> C:
    """Returns the `cls` that `text` is; what goes beyond types is not checked.  Raises BadConfig."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadConfig(origin, str(error)) from None
    found: C = _section(cls, values, origin, "")
    return found


def demanding(origin: str) -> Demand:
    """Returns what raises BadConfig where something does not hold."""

    def demand(holds: bool, what: str) -> None:
        if not holds:
            raise BadConfig(origin, what)

    return demand


def differing(one: C, other: C) -> list[str]:
    """Returns the names of the sections in which two configurations differ."""
    names = (field.name for field in dataclasses.fields(typing.cast(Any, one)))
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def others_read(path: str) -> bool:
    """Says whether others than its owner may read a file that is there."""
    try:
        return bool(Path(path).stat().st_mode & 0o077)
    except OSError:  # said when it is to be read
        return False


def _section(cls: type[Any], untrusted_values: dict[str, Any], origin: str, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(untrusted_values) - set(fields)):
        raise BadConfig(origin, f"unknown key {prefix}{unknown[0]}; known here: {', '.join(sorted(fields))}")
    for name, row in fields.items():
        if row.default is dataclasses.MISSING and row.default_factory is dataclasses.MISSING and name not in untrusted_values:
            raise BadConfig(origin, f"{prefix}{name} is missing")
    return cls(**{name: _value(hints[name], value, origin, prefix + name) for name, value in untrusted_values.items()})


def _value(hint: Any, untrusted_value: Any, origin: str, key: str) -> Any:
    if isinstance(hint, types.UnionType):
        hint = _variant(typing.get_args(hint), untrusted_value, origin, key)
    if dataclasses.is_dataclass(hint):
        if not isinstance(untrusted_value, dict):
            raise BadConfig(origin, f"{key} is a section: [{key}]")
        return _section(typing.cast(type[Any], hint), untrusted_value, origin, key + ".")
    if isinstance(hint, types.GenericAlias):
        item = typing.get_args(hint)[0]
        if not isinstance(untrusted_value, list):
            raise BadConfig(origin, f"{key} is a list")
        return tuple(_value(item, v, origin, f"{key}[{i}]") for i, v in enumerate(untrusted_value))
    if issubclass(hint, enum.StrEnum):
        if untrusted_value not in list(hint):
            raise BadConfig(origin, f"{key} is one of {', '.join(hint)}, not {untrusted_value!r}")
        return hint(untrusted_value)
    if hint is float and type(untrusted_value) is int:
        return float(untrusted_value)
    if type(untrusted_value) is not hint:
        raise BadConfig(origin, f"{key} is of type {hint.__name__}, not {type(untrusted_value).__name__}")
    return untrusted_value


def _variant(classes: tuple[Any, ...], untrusted_value: Any, origin: str, key: str) -> Any:
    """Returns the dataclass whose `kind` the value names; the first one where it names none."""
    kinds = {next(f.default for f in dataclasses.fields(cls) if f.name == "kind"): cls for cls in classes}
    named = untrusted_value.get("kind", next(iter(kinds))) if isinstance(untrusted_value, dict) else next(iter(kinds))
    if not isinstance(named, str) or named not in kinds:
        raise BadConfig(origin, f"{key}.kind is one of {', '.join(map(str, kinds))}, not {named!r}")
    return kinds[named]
