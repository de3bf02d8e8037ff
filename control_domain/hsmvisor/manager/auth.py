"""Who is calling a manager, and what it may be: peer credentials, a client certificate, or an access token.

What a caller brings is asked of the database in one query at most, which waits for nobody.  An access token counts more than how
it came.
"""

from __future__ import annotations

import functools
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager.access.callers import FleetCaller, caller, host_of
from hsmvisor.manager.access.tokens import Tokens, caller_name
from hsmvisor.manager.config import Config
from hsmvisor.manager.inventory.identities import Identities
from hsmvisor.manager.roles import GIVEN, Role
from hsmvisor.manager.store import inventory
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.rows import TokenRow, lines_of
from hsmvisor.serving import peers
from hsmvisor.serving.access import Call
from hsmvisor.serving.errors import Unauthenticated
from hsmvisor.serving.relay import Credentials

__all__ = ["AUTHORIZATION", "Authenticator", "FleetCaller", "caller", "host_of"]

AUTHORIZATION = "authorization"
_BEARER = "bearer "
_REMEMBERED = 4096  #: certificates that need not be parsed again


@dataclass(frozen=True)
class _Shown:
    """A certificate, as far as it matters here."""

    der: bytes
    names: peers.Shown
    ends_at: float
    ours: bool  #: of the manager's own authority: a host's or a manager's, and never an owner's
    host: str  #: the id of the host that our authority made it for


class Authenticator:
    def __init__(
        self, config: Config, identities: Identities, database: Database, tokens: Tokens, clock: Callable[[], float]
    ) -> None:
        self._config, self._database, self._tokens, self._clock = config, database, tokens, clock
        self._shown = functools.lru_cache(_REMEMBERED)(lambda pem: _shown(pem, identities))

    async def identify(self, call: Call) -> FleetCaller:
        """Returns the caller; one whose identity is not proved has no roles.  Raises Unauthenticated for a wrong proof."""
        if AUTHORIZATION in call.metadata:
            return await self._bearing(call.metadata[AUTHORIZATION])
        proof = peers.proof_of(call)
        if isinstance(proof, Credentials):
            return self._local(proof)
        if proof is not None:
            return await self._certified(proof)
        return FleetCaller(f"unknown:{call.peer}", frozenset(), known=False)

    # ---- access tokens ------------------------------------------------------------------------------------------

    async def _bearing(self, untrusted: str | bytes) -> FleetCaller:
        text = untrusted if isinstance(untrusted, str) else ""
        if not text.lower().startswith(_BEARER):
            raise Unauthenticated("TOKEN", "authorization is: Bearer hsmvisor-token:...")
        return _bearer(await self._tokens.find(text[len(_BEARER) :].strip()))

    async def again(self, token: str) -> FleetCaller:
        """Returns who showed the token with this id before, as it may now; one query.  Raises Unauthenticated."""
        return _bearer(await self._tokens.again(token))

    # ---- local callers ------------------------------------------------------------------------------------------

    def _local(self, credentials: Credentials) -> FleetCaller:
        name, owner = f"uid:{credentials.uid} pid:{credentials.pid}", _user(credentials.uid)
        if credentials.uid in (0, os.geteuid()):
            return FleetCaller(name, GIVEN, local=True, owner=owner)
        roles: set[Role] = set()
        groups: set[str] = set()
        owners: list[str] = []
        mine = peers.groups_of(credentials)
        for allow in self._config.control.allow:
            if peers.is_meant(allow, credentials, mine):
                roles.update(allow.roles)
                groups.update(allow.groups)
                owners += [allow.owner] if allow.owner else []
        return FleetCaller(name, frozenset(roles), local=True, owner=(owners or [owner])[0], groups=frozenset(groups))

    # ---- certificates -------------------------------------------------------------------------------------------

    async def _certified(self, pem: bytes) -> FleetCaller:
        shown = self._shown(pem)
        if shown.ends_at <= self._clock():  # TLS looked when the connection was made, and that may be long ago
            raise Unauthenticated("CERTIFICATE", "the client certificate has expired", "connect again with a new one")
        if shown.host:
            return await self._host(shown)
        name = str(shown.names)
        if shown.ours:
            return FleetCaller(name, frozenset())
        return self._owner(name, shown)

    async def _host(self, shown: _Shown) -> FleetCaller:
        async with self._database.reading() as connection:
            row = await inventory.host(connection, shown.host)
        if row is None or row.state != "joined":
            why = "this host was removed" if row is None else "this host was revoked"
            raise Unauthenticated("HOST", why, "it may join again, with a new join token")
        if shown.der not in (row.certificate, row.certificate_before):
            raise Unauthenticated("HOST", f"this certificate of host {row.name} was replaced by a newer one", "use that one")
        if shown.der == row.certificate and row.certificate_before:  # the new one has arrived
            async with self._database.transaction() as connection:
                await inventory.forget_certificate_before(connection, row.id, row.certificate)
            row = replace(row, certificate_before=b"")
        return FleetCaller(f"host:{row.name}", frozenset({Role.HOST}), host=row)

    def _owner(self, name: str, shown: _Shown) -> FleetCaller:
        """The first entry that fits says who it is; it may join as a host besides."""
        join_as = next((row.host for row in self._config.join_certificates if shown.names.fits(row)), None)
        for row in self._config.clients:
            if shown.names.fits(row):
                return FleetCaller(name, frozenset(row.roles), owner=row.owner, groups=frozenset(row.groups), may_join_as=join_as)
        return FleetCaller(name, frozenset(), may_join_as=join_as)


def _bearer(row: TokenRow) -> FleetCaller:
    roles = frozenset(Role(role) for role in lines_of(row.roles) if role in GIVEN)
    groups = frozenset(lines_of(row.groups))
    name = caller_name(row.id)
    return FleetCaller(name, roles, owner=row.owner, groups=groups, token=row.id, token_ends_at=row.expires_at)


def _shown(pem: bytes, identities: Identities) -> _Shown:
    """Raises Unauthenticated."""
    names = peers.shown(pem)
    return _Shown(
        der=names.certificate.public_bytes(Encoding.DER),
        names=names,
        ends_at=names.certificate.not_valid_after_utc.timestamp(),
        ours=identities.signed(names.certificate),
        host=identities.host_of(names.certificate),
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid-{uid}"
