"""Whose things a caller may see and change: operators all, auditors may see all, owners what is their own."""

from __future__ import annotations

from hsmvisor.manager import limits
from hsmvisor.manager.access.callers import FleetCaller
from hsmvisor.manager.roles import Role
from hsmvisor.serving.errors import Forbidden, Invalid


def may_see(who: FleetCaller, owner: str) -> bool:
    """An empty owner is everybody."""
    return bool(who.roles & {Role.OPERATOR, Role.AUDITOR}) or _is_own(who, owner)


def may_change(who: FleetCaller, owner: str) -> bool:
    return Role.OPERATOR in who.roles or _is_own(who, owner)


def is_bound(who: FleetCaller) -> bool:
    """Whether policy says what the caller may do with what there is: an operator keeps the policies."""
    return Role.OPERATOR not in who.roles


def _is_own(who: FleetCaller, owner: str) -> bool:
    return Role.OWNER in who.roles and bool(who.owner) and who.owner == owner


def demand_owner(who: FleetCaller, owner: str) -> None:
    """For a change of what is this owner's.  What the caller may not even see is not found: that is asked before."""
    if not may_change(who, owner):
        raise Forbidden(
            "OWNER", f"{who.name} may not ask for {owner}, or change what is {owner}'s", "its owner may, and an operator"
        )


def sees_only(who: FleetCaller, untrusted_owner: str = "") -> str:
    """Returns the owner whose things a list shows, empty: everybody's.  `untrusted_owner`: who was asked for.  Raises Forbidden."""
    if may_see(who, untrusted_owner):
        return untrusted_owner
    if untrusted_owner:
        raise Forbidden("OWNER", f"{who.name} does not see what is another owner's", "ask without an owner for your own")
    return who.owner


def for_whom(who: FleetCaller, untrusted_owner: str) -> str:
    """Returns the owner that something is asked for: oneself, or whom an operator names.  Raises Invalid, Forbidden."""
    owner = untrusted_owner or who.owner
    if not owner:
        raise Invalid("OWNER", "say for whom: owner is empty, and you are nobody's", "give an owner")
    if len(owner) > limits.MAX_OWNER or not owner.isprintable():
        raise Invalid("OWNER", f"an owner's name has at most {limits.MAX_OWNER} printable characters")
    demand_owner(who, owner)
    return owner
