"""A caller of a manager: as which owner it asks, or which host it is; and the one rule of whose things it may touch.

Operators may see and change what is anybody's, auditors may see it, owners what is their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from hsmvisor.manager import limits
from hsmvisor.manager.roles import Role
from hsmvisor.manager.store.rows import HostRow
from hsmvisor.serving import gate
from hsmvisor.serving.access import Caller
from hsmvisor.serving.errors import Forbidden, Invalid, NotFound


@dataclass(frozen=True)
class FleetCaller(Caller):
    owner: str = ""  #: empty: it is none
    groups: frozenset[str] = frozenset()
    host: HostRow | None = None
    join_as: str = ""  #: the host's name with which its certificate may join without a token
    token: str = ""  #: id of the access token that it showed
    token_ends_at: int = 0

    @property
    def scope(self) -> str:
        """Whose request ids are its own: nobody is answered with what another one was."""
        return f"host:{self.host.id}" if self.host else f"owner:{self.owner}"


def caller() -> FleetCaller:
    """Returns who calls the method that runs."""
    return cast(FleetCaller, gate.caller())


def the_host() -> HostRow:
    """Returns the host that calls.  Raises Forbidden."""
    host = caller().host
    if host is None:
        raise Forbidden("HOST", "this is for hosts that have joined")
    return host


def may_see(who: FleetCaller, owner: str) -> bool:
    return bool(who.roles & {Role.OPERATOR, Role.AUDITOR}) or _is_own(who, owner)


def may_change(who: FleetCaller, owner: str) -> bool:
    return Role.OPERATOR in who.roles or _is_own(who, owner)


def _is_own(who: FleetCaller, owner: str) -> bool:
    return Role.OWNER in who.roles and bool(who.owner) and who.owner == owner


def sees_only(who: FleetCaller, untrusted_owner: str = "") -> str:
    """Returns the owner whose things a list shows, empty: everybody's.  `untrusted_owner`: who was asked for.  Raises Forbidden."""
    if may_see(who, untrusted_owner):
        return untrusted_owner
    if untrusted_owner:
        raise Forbidden("OWNER", f"{who.name} does not see what is another owner's", "ask without an owner for your own")
    return who.owner


def demand_seen(who: FleetCaller, owner: str, missing: NotFound) -> None:
    """What a caller may not see is not there for it.  Raises `missing`."""
    if not may_see(who, owner):
        raise missing


def demand_owner(who: FleetCaller, owner: str, missing: NotFound) -> None:
    """For a change of what is this owner's.  Raises Forbidden; `missing` where the caller may not even see it."""
    demand_seen(who, owner, missing)
    if not may_change(who, owner):
        raise Forbidden("OWNER", f"{who.name} may not change what is {owner}'s", "its owner may, and an operator")


def for_whom(who: FleetCaller, untrusted_owner: str) -> str:
    """Returns the owner that something is asked for: oneself, or whom an operator names.  Raises Invalid, Forbidden."""
    owner = untrusted_owner or (who.owner if Role.OWNER in who.roles or Role.OPERATOR in who.roles else "")
    if not owner:
        raise Invalid("OWNER", "for whom? owner is missing", "name the owner")
    if len(owner) > limits.MAX_OWNER or not owner.isprintable():
        raise Invalid("OWNER", f"an owner's name has 1 to {limits.MAX_OWNER} printable characters")
    if not may_change(who, owner):
        raise Forbidden("OWNER", f"{who.name} may not ask for {owner}", "leave the owner out: it is yourself")
    return owner
