"""Access tokens, with which owners' programs and the console call: shown once, bearing an owner, its groups and roles.

A token is made of the fleet's token key and its id, so a repeated call is answered again although nothing but a hash is stored.
One that was made with another token ends no later than that, and is revoked with it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from hsmvisor.manager import limits
from hsmvisor.manager.access.callers import FleetCaller
from hsmvisor.manager.history.events import Happened, History, Kind
from hsmvisor.manager.roles import GIVEN, Role
from hsmvisor.manager.store import tokens
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.rows import TokenRow, text_of
from hsmvisor.serving.errors import Exhausted, Forbidden, Invalid, NotFound, Unauthenticated
from hsmvisor_rpc.sealed.canonical import Record
from sqlalchemy.ext.asyncio import AsyncConnection

PREFIX = "hsmvisor-token:"
DEFAULT_LIFETIME = 90 * 86400  #: seconds
MAX_OPEN = 10_000  #: tokens that count
REMEMBERED = 30 * 86400  #: seconds that one is listed after its end
_FORM = re.compile(r"hsmvisor-token:([0-9a-f]{32})\.[A-Za-z0-9_-]{43}")


@dataclass(frozen=True)
class Rights(Record):
    """What a token is made of."""

    TYPE: ClassVar[str] = "access-token"
    id: str
    owner: str
    groups: str
    roles: str
    created_at: int
    expires_at: int


class Tokens:
    """Its repr shows nothing."""

    def __init__(self, database: Database, history: History, key: bytes, clock: Callable[[], float]) -> None:
        """`key`: what tokens are made of, the same in all managers of the fleet."""
        self._database, self._history, self._key, self._clock = database, history, key, clock

    def __repr__(self) -> str:
        return "Tokens()"

    def _text(self, row: TokenRow) -> str:
        """Makes the token (again): of its rights too, so that who changes them in the database has another token."""
        rights = Rights(row.id, row.owner, row.groups, row.roles, row.created_at, row.expires_at)
        secret = hmac.digest(self._key, rights.encode(), "sha256")
        return f"{PREFIX}{row.id}.{base64.urlsafe_b64encode(secret).decode().rstrip('=')}"

    async def text(self, id: str) -> str:
        """Returns the token for whoever asked for it, also when asked again.  Raises NotFound."""
        row = await self._row(id)
        if row is None:
            raise not_found(id)
        return self._text(row)

    async def create(
        self,
        connection: AsyncConnection,
        who: FleetCaller,
        owner: str,
        groups: Sequence[str],
        roles: Iterable[str],
        lifetime: int,
    ) -> tuple[str, int]:
        """Returns the token's id and when it ends.  `owner`: checked (owners.for_whom).  Raises Invalid, Forbidden, Exhausted."""
        given = _roles(roles, who)
        _check_groups(groups, who)
        lifetime = lifetime or DEFAULT_LIFETIME
        if lifetime > limits.MAX_TOKEN_LIFETIME:
            raise Invalid("LIFETIME", f"a token lives at most {limits.MAX_TOKEN_LIFETIME} s")
        now = int(self._clock())
        await tokens.forget(connection, now - REMEMBERED)
        if await tokens.count_open(connection, now) >= MAX_OPEN:
            raise Exhausted("TOKENS", f"there are {MAX_OPEN} tokens that count", "revoke those that nobody uses")
        id = os.urandom(16).hex()
        ends = min(now + lifetime, who.token_ends_at or now + lifetime)
        row = TokenRow(
            id=id,
            hash=b"",
            owner=owner,
            groups=text_of(sorted(set(groups))),
            roles=text_of(sorted(given)),
            created_at=now,
            created_by=who.name[: limits.MAX_BY],
            expires_at=ends,
            revoked_at=0,
        )
        await tokens.add(connection, replace(row, hash=_hash(self._text(row))))
        detail = {"id": id, "roles": sorted(given), "by": who.name}
        await self._history.add(connection, Happened(Kind.TOKEN_CREATED, owner=owner, detail=detail))
        return id, ends

    async def find(self, untrusted_text: str) -> TokenRow:
        """Returns the token that counts; one query.  Raises Unauthenticated."""
        match = _FORM.fullmatch(untrusted_text)
        row = await self._row(match[1]) if match is not None else None
        return self._counting(row, untrusted_text)

    async def again(self, id: str) -> TokenRow:
        """Returns the token that was found before, as it is now, if it counts; one query.  Raises Unauthenticated."""
        row = await self._row(id)
        return self._counting(row, self._text(row) if row is not None else "")

    async def _row(self, id: str) -> TokenRow | None:
        async with self._database.reading() as connection:
            return await tokens.token(connection, id)

    def _counting(self, row: TokenRow | None, text: str) -> TokenRow:
        """Raises Unauthenticated."""
        # one answer for one that is not known and one that is wrong: who asks learns no ids
        known = row is not None and hmac.compare_digest(_hash(text), row.hash)
        if row is None or not known or not hmac.compare_digest(self._text(row), text):
            hint = "is it whole?  hsmvisor fleet token create makes a new one"
            raise Unauthenticated("TOKEN", "this access token is not known", hint)
        if row.revoked_at:
            raise Unauthenticated("TOKEN_REVOKED", "this access token was revoked", "ask for a new one")
        if row.expires_at <= self._clock():
            raise Unauthenticated("TOKEN_EXPIRED", "this access token has expired", "ask for a new one")
        return row

    async def revoke(self, connection: AsyncConnection, row: TokenRow, by: str) -> list[str]:
        """With those that were made with it.  Returns the ids of all."""
        now, done, left = int(self._clock()), [], [row]
        while left:
            one = left.pop()
            if not one.revoked_at:
                await tokens.revoke(connection, one.id, now)
                detail = {"id": one.id, "by": by}
                await self._history.add(connection, Happened(Kind.TOKEN_REVOKED, owner=one.owner, detail=detail))
                done.append(one.id)
            left += await tokens.made_by(connection, caller_name(one.id))
        return done


def caller_name(id: str) -> str:
    """How one who shows this token is called."""
    return f"token:{id}"


def not_found(id: str) -> NotFound:
    return NotFound("TOKEN", f"there is no access token {id[:40]!r}", "hsmvisor fleet token list shows those there are")


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _roles(untrusted_roles: Iterable[str], who: FleetCaller) -> frozenset[Role]:
    asked = list(untrusted_roles)
    if wrong := [role for role in asked if role not in GIVEN]:
        raise Invalid("ROLES", f"a token's roles are out of {', '.join(sorted(GIVEN))}, not {wrong[0][:40]!r}")
    given = frozenset(map(Role, asked)) or frozenset({Role.OWNER})
    may_give = who.roles | ({Role.OWNER} if Role.OPERATOR in who.roles else set())
    if missing := given - may_give:
        raise Forbidden("ROLES", f"{who.name} has not itself the role {min(missing)}", "nobody gives more than it has")
    return given


def _check_groups(groups: Sequence[str], who: FleetCaller) -> None:
    if len(groups) > limits.MAX_GROUPS:
        raise Invalid("GROUPS", f"at most {limits.MAX_GROUPS} groups")
    for group in groups:
        if not 1 <= len(group) <= limits.MAX_OWNER or not group.isprintable():
            raise Invalid("GROUPS", f"a group's name has 1 to {limits.MAX_OWNER} printable characters")
    if Role.OPERATOR not in who.roles and (more := set(groups) - who.groups):
        raise Forbidden("GROUPS", f"{who.name} is not in group {min(more)}", "nobody gives more than it has")
