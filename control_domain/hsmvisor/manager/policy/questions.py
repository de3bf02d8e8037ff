"""What policy is asked: who does what with which material on which resource."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from hsmvisor.manager.ca.names import Name
from hsmvisor.manager.policy.measured import either


class Act(enum.StrEnum):
    REQUEST = "request"
    DISTRIBUTE = "distribute"  #: a material comes to a resource; also when nobody asks at that moment
    RENEW = "renew"
    IMPORT = "import"
    ROTATE = "rotate"
    REVOKE = "revoke"
    CANCEL = "cancel"


class Kind(enum.StrEnum):
    VM = "VM"
    SERVER = "server"
    DATABASE = "database"
    VOLUME = "volume"


class Source(enum.StrEnum):
    """Where a key comes from."""

    MODULE = "module"  #: made inside the module that uses it
    ISSUER = "issuer"  #: made by the manager's issuer, for several modules
    IMPORTED = "imported"


@dataclass(frozen=True)
class Owner:
    name: str
    groups: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Resource:
    id: str
    name: str
    kind: Kind
    owner: str
    host: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    host_trusted: bool = True


@dataclass(frozen=True)
class Asked:
    """The material, as it was requested."""

    material: str
    source: Source
    key_type: str
    authority: str = ""
    profile: str = ""
    usage: str = "tls"
    names: tuple[Name, ...] = ()
    lifetime: int = 0
    automatic: bool = False
    measured: frozenset[str] = frozenset()  #: as what the resource's boot was measured just now


@dataclass(frozen=True)
class Question:
    act: Act
    who: Owner
    resource: Resource
    asked: Asked


@dataclass(frozen=True)
class Rule:
    """A rule that decided: its @id, and what its @reason says."""

    id: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}" if self.reason else self.id


@dataclass(frozen=True)
class Decision:
    allowed: bool
    rules: tuple[Rule, ...]  #: those that decided; none: no rule permits it
    version: int  #: of the policies
    measured: tuple[str, ...] = ()  #: it is allowed where the resource's boot is measured as one of these, and else denied;
    together: bool = False  #: as all of them, rather

    @property
    def why(self) -> str:
        """One line for people."""
        if not self.rules:
            return "no rule permits it"
        why = ("permitted by " if self.allowed else "forbidden by ") + "; ".join(map(str, self.rules))
        return f"{why}, {self.condition}" if self.measured else why

    @property
    def condition(self) -> str:
        """What it depends on, empty: on nothing."""
        return f"where the guest's boot is measured as {either(self.measured, self.together)}" if self.measured else ""


def permits(decisions: Iterable[Decision]) -> dict[str, object]:
    """Returns what the history tells of those that are permitted; nothing where none is."""
    found = [decision for decision in decisions if decision.allowed]
    if not found:
        return {}
    why = "; ".join(sorted({decision.why for decision in found}))
    return {"policy": why, "policy_version": max(decision.version for decision in found)}


def domains(name: Name) -> frozenset[str]:
    """Returns the domains that a name is in, with itself: of dns:web.example.net, web.example.net, example.net and net.

    An address is in itself alone, a URI in its host's domains, an e-mail address in its host's.  A wildcard is in the domain
    under its star.
    """
    match name.kind:
        case "dns":
            host = name.value.removeprefix("*.")
        case "email":
            host = name.value.rpartition("@")[2]
        case "uri":
            host = _host(name.value)
        case _:
            return frozenset({name.value})
    labels = host.split(".")
    return frozenset(".".join(labels[n:]) for n in range(len(labels))) if host else frozenset()


def _host(uri: str) -> str:
    """The host of a URI; empty where it has none, and of an address: that has no domains."""
    host = (urlsplit(uri).hostname or "").lower()
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host
    return ""


def within(names: Iterable[Name]) -> frozenset[str]:
    """Returns the domains that all names are in."""
    sets = [domains(name) for name in names]
    return frozenset.intersection(*sets) if sets else frozenset()


def touches(names: Iterable[Name]) -> frozenset[str]:
    """Returns the domains that any name is in."""
    return frozenset().union(*map(domains, names))


def wildcards(names: Iterable[Name]) -> frozenset[str]:
    """Returns the domains under stars: *.example.net stands for bank.example.net too, and is not in it."""
    return frozenset(name.value.removeprefix("*.") for name in names if name.value.startswith("*."))
