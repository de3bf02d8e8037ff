"""Who calls, and who may call what: one table for each service.  A method that is not in it can be called by nobody."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hsmvisor.serving.errors import Forbidden, ServiceError, Unauthenticated


@dataclass(frozen=True)
class Caller:
    """Who calls, for the audit log, and what it may be.  `known`: its identity is proved; `local`: by the kernel of this host."""

    name: str
    roles: frozenset[str]
    known: bool = True
    local: bool = False


@dataclass(frozen=True)
class Call:
    """What the transport and gRPC tell of one call.  `body` is None where requests are streamed."""

    method: str
    body: bytes | None
    metadata: Mapping[str, str | bytes]
    peer: str
    auth: Mapping[str, Sequence[bytes]]


class Access(enum.Enum):
    """Access that needs no role."""

    ANYBODY = "anybody"  #: even a caller who is not known: the method proves for itself
    KNOWN = "known"  #: every caller whose identity is proved


@dataclass(frozen=True)
class Table:
    """Each method and the roles that may call it; any one of them is enough."""

    service: str  #: what the service calls itself, to people and in its audit log
    methods: Mapping[str, frozenset[str] | Access]
    changing: frozenset[str]  #: methods that change something: each refusal of one stands in the audit log

    def may(self, method: str, caller: Caller) -> bool:
        access = self.methods.get(method)
        if access is None:
            return False
        if isinstance(access, Access):
            return caller.known or access is Access.ANYBODY
        return caller.known and bool(access & caller.roles)

    def denied(self, method: str, caller: Caller) -> ServiceError:
        """Returns why `caller` may not."""
        if not caller.known:
            return Unauthenticated(
                "CALLER", "who calls is not proved", "use the control socket, a client certificate or a signed request"
            )
        access = self.methods.get(method)
        name = method.rpartition("/")[2]
        if access is None or isinstance(access, Access):
            return Forbidden("METHOD", f"{name} may be called by nobody")
        needed = " or ".join(sorted(access))
        hint = f"give it that role in the {self.service}'s configuration"
        return Forbidden("ROLE", f"{caller.name} may not call {name}: it needs the role {needed}", hint)
