"""First contact with a host, and its identity certificate from then on.

A join token holds a one-time secret, which is made again from its id: the database holds none.  A secret that comes twice is
somebody's theft, and told as such.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from cryptography import x509
from hsmvisor.manager import limits
from hsmvisor.manager.ca import requests
from hsmvisor.manager.ca.interface import CaError, Order
from hsmvisor.manager.ca.interface import Refused as NotIssued
from hsmvisor.manager.ca.names import Name
from hsmvisor.manager.history.events import Happened, History, Kind
from hsmvisor.manager.inventory.identities import Identities
from hsmvisor.manager.inventory.pins import Pins
from hsmvisor.manager.store import inventory
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.rows import HostRow, text_of
from hsmvisor.manager.store.tables import join_tokens
from hsmvisor.manager.wanted import membership
from hsmvisor.serving.errors import Exhausted, Exists, Forbidden, Invalid, NotFound, Unavailable
from hsmvisor_rpc.sealed.canonical import Record
from hsmvisor_rpc.sealed.commands import check, fingerprint
from hsmvisor_rpc.sealed.fleet import HOST_URI, JoinStatement, JoinToken, JoinTranscript, join_proof
from hsmvisor_rpc.sealed.refusal import Refusal
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

DEFAULT_LIFETIME = 3600  #: seconds of a token
MAX_OPEN = 1000  #: tokens that are not used
REMEMBERED = 30 * 86400  #: seconds that a used or expired one is known
MOST_TRIED = 5 * MAX_OPEN  #: tokens that a stranger's proof is compared with
NONCE = 32
_HOST_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Joined:
    host: HostRow
    chain: tuple[bytes, ...]
    proof: bytes  #: empty where no secret was used


@dataclass(frozen=True)
class Invited(Record):
    """What a join token is made of."""

    TYPE: ClassVar[str] = "invited"
    id: str
    host: str
    owners: str
    replaces: bool
    expires_at: int


#: Stores the answer to a join.
Keep = Callable[[AsyncConnection, Joined], Awaitable[None]]


class Joining:
    def __init__(
        self,
        database: Database,
        history: History,
        identities: Identities,
        pins: Pins,
        token_key: bytes,
        root: bytes,
        addresses: Sequence[str],
        clock: Callable[[], float],
        join_addresses: Sequence[str] = (),
        believed: Sequence[bytes] = (),
    ) -> None:
        """`token_key`: what one-time secrets are made of; `root`: raw Ed25519, what the hosts' modules obey.

        `addresses`: where hosts come that have joined; `join_addresses`: where they join, if that is elsewhere.
        `believed`: roots of the managers' certificates (DER), where these are not the manager's own.
        """
        self._database, self._history, self._identities = database, history, identities
        self._pins = pins
        self._token_key, self.root, self.addresses, self._clock = token_key, root, tuple(addresses), clock
        self._join_addresses = tuple(join_addresses) or self.addresses
        self.believed = tuple(believed) or (identities.root,)

    # ---- tokens --------------------------------------------------------------------------------------------------

    async def create(
        self, connection: AsyncConnection, host: str, owners: Sequence[str], lifetime: int, replaces: bool, by: str
    ) -> tuple[str, int]:
        """Returns the token's id and when it ends.  Raises Invalid, Exhausted."""
        if host:
            host_name(host)
        check_owners(owners)
        lifetime = lifetime or DEFAULT_LIFETIME
        if lifetime > limits.MAX_JOIN_LIFETIME:
            raise Invalid("LIFETIME", f"a join token lives at most {limits.MAX_JOIN_LIFETIME} s")
        if replaces and not host:
            raise Invalid("HOST", "a token that replaces a host is for that one: name it")
        now = int(self._clock())
        await connection.execute(delete(join_tokens).where(join_tokens.c.expires_at < now - REMEMBERED))
        where = (join_tokens.c.used_at == 0, join_tokens.c.expires_at > now)
        if (await connection.execute(select(func.count()).select_from(join_tokens).where(*where))).scalar_one() >= MAX_OPEN:
            raise Exhausted("TOKENS", f"{MAX_OPEN} join tokens are open already", "they end by themselves; use those there are")
        id = os.urandom(16).hex()
        row = {
            "id": id,
            "host": host,
            "owners": text_of(owners),
            "replaces": int(replaces),
            "created_by": by,
            "expires_at": now + lifetime,
            "used_at": 0,
            "used_by": "",
        }
        await connection.execute(insert(join_tokens).values(row))
        return id, now + lifetime

    async def token(self, id: str) -> str:
        """Returns the text for a host's operator.  Raises NotFound."""
        async with self._database.reading() as connection:
            row = (await connection.execute(select(join_tokens).where(join_tokens.c.id == id))).one_or_none()
        if row is None:
            raise NotFound("TOKEN", "this join token is not known any more", "ask for a new one")
        return JoinToken(self._join_addresses, self.believed, self._secret(row)).text()

    def _secret(self, row: Any) -> bytes:
        """Of what the token is for too, so that who changes that in the database has another token."""
        told = Invited(row.id, row.host, row.owners, bool(row.replaces), row.expires_at)
        return hmac.digest(self._token_key, told.encode(), "sha256")

    # ---- joining -------------------------------------------------------------------------------------------------

    async def admit(self, statement: JoinStatement, signature: bytes, proof: bytes, certified: str | None) -> None:
        """Who calls may be anybody: before a secret is proved, nothing is written, issued or told.  Raises Invalid, Forbidden."""
        self._check(statement, signature)
        if certified is None:
            async with self._database.reading() as connection:
                await self._fitting(connection, statement, proof)
        elif certified != statement.name:
            raise Forbidden("HOST", f"this certificate is for host {certified}", "join under that name")

    async def join(
        self, statement: JoinStatement, signature: bytes, proof: bytes, version: str, certified: str | None, keep: Keep
    ) -> Joined:
        """For whom `admit` has let in.  `certified`: the host's name where its certificate is one that the configuration names, and
        no secret is needed.  `keep` is called in the transaction.

        Raises Invalid, Forbidden, Exists, Unavailable.
        """
        host_id, now = fingerprint(statement.host_key).hex(), int(self._clock())
        token, refused = None, None
        chain: tuple[bytes, ...] = ()
        if certified is None:
            async with self._database.reading() as connection:
                token = await self._fitting(connection, statement, proof)
            refused = _why_not(token, statement, host_id, now)
        if refused is None:
            chain = await self._certificate(host_id, statement.csr)
        async with self._database.transaction() as connection:
            if refused is None and certified is None:
                token = await self._fitting(connection, statement, proof)
                refused = _why_not(token, statement, host_id, now)
            if refused is None:
                before, refused = await self._place(connection, statement, host_id, bool(token and token.replaces))
            if refused is None:
                row = HostRow(
                    id=host_id,
                    name=statement.name,
                    host_key=statement.host_key,
                    pin=self._pins.pin(host_id, statement.name),
                    state="joined",
                    trusted=before.trusted if before else 1,
                    owners=token.owners if token else (before.owners if before else ""),
                    certificate=chain[0],
                    certificate_before=b"",
                    certificate_ends_at=_ends_at(chain[0]),
                    joined_at=now,
                    seen_at=0,
                    version=version,
                    session="",
                    number=0,
                    away=0,
                )
                await inventory.put_host(connection, row)
                if token and not token.used_at:
                    used = update(join_tokens).where(join_tokens.c.id == token.id, join_tokens.c.used_at == 0)
                    if not (await connection.execute(used.values(used_at=now, used_by=host_id))).rowcount:
                        raise Forbidden("JOIN", "this join token was used already", "ask for a new one")
                detail = {"name": row.name, "version": version, "again": before is not None}
                await self._history.add(connection, Happened(Kind.HOST_JOINED, host_id=host_id, detail=detail))
                ours = join_proof(self._secret(token), "manager", statement, self.root) if token else b""
                joined = Joined(row, chain, ours)
                await keep(connection, joined)
            else:
                detail = {"name": statement.name, "why": refused.detail}
                await self._history.add(connection, Happened(Kind.HOST_REFUSED, host_id=host_id, detail=detail))
        if refused is not None:
            raise refused
        return joined

    def _check(self, statement: JoinStatement, signature: bytes) -> None:
        host_name(statement.name)
        if len(statement.host_key) != 32 or len(statement.nonce) != NONCE:
            raise Invalid("JOIN", f"host_key has 32 bytes, nonce {NONCE}")
        if len(statement.csr) > limits.MAX_HOST_CSR:
            raise Invalid("CSR", f"a host's certificate request has at most {limits.MAX_HOST_CSR} bytes")
        try:
            check(signature, statement.encode(), statement.host_key, "join statement")
        except Refusal as error:
            raise Forbidden("HOST_KEY", error.detail, "the host signs with the key that it names") from None

    async def _fitting(self, connection: AsyncConnection, statement: JoinStatement, proof: bytes) -> Any:
        """Returns the token whose secret the host has proved.  Raises Forbidden."""
        query = select(join_tokens).where(join_tokens.c.expires_at > int(self._clock()) - REMEMBERED)
        rows = (await connection.execute(query.order_by(join_tokens.c.expires_at.desc()).limit(MOST_TRIED))).all()
        transcript = JoinTranscript("host", statement.encode(), b"").encode()
        for row in rows:
            if hmac.compare_digest(hmac.digest(self._secret(row), transcript, "sha256"), proof):
                return row
        raise Forbidden("JOIN", "no join token fits this proof", "it is used once, for a limited time: ask for a new one")

    async def _place(
        self, connection: AsyncConnection, statement: JoinStatement, host_id: str, replaces: bool
    ) -> tuple[HostRow | None, Exists | None]:
        """Returns the host that there was under this key."""
        same = await inventory.host(connection, host_id)
        named = await inventory.host_named(connection, statement.name)
        if same is not None and same.name != statement.name:
            return None, Exists("HOST", f"this host has joined as {same.name}", "join under that name, or remove it first")
        if named is None or named.id == host_id:
            return same, None
        if not replaces:
            hint = "a token made with --replace lets a host that was set up anew take its name"
            return None, Exists("HOST", f"another host has joined as {statement.name}", hint)
        await membership.forget_host(connection, self._history, named, self._clock())  # it was set up anew: what it had is no more
        return replace(named, id=host_id), None

    # ---- certificates ----------------------------------------------------------------------------------------------

    async def renew(self, host: HostRow, csr: bytes) -> tuple[bytes, ...]:
        """Returns a new identity certificate; the one before counts until the new one is used.  Raises Invalid, Unavailable."""
        chain = await self._certificate(host.id, csr)
        before = host.certificate if csr_key(csr) != certificate_key(host.certificate) else host.certificate_before
        values = {"certificate": chain[0], "certificate_before": before, "certificate_ends_at": _ends_at(chain[0])}
        async with self._database.transaction() as connection:
            now_there = await inventory.host(connection, host.id)
            if now_there is None or now_there.state != "joined":
                raise NotFound("HOST", "this host was removed or revoked")
            await inventory.change_host(connection, host.id, **values)
        return chain

    async def _certificate(self, host_id: str, csr: bytes) -> tuple[bytes, ...]:
        names = (Name("uri", HOST_URI + host_id),)
        try:
            requests.check(csr, names)
            order = Order(hashlib.sha256(b"host\0" + host_id.encode() + csr).hexdigest(), csr, "host", names)
            return await self._identities.issue(order)
        except NotIssued as error:
            raise Invalid("CSR", str(error)) from None
        except CaError as error:
            raise Unavailable("AUTHORITY", str(error)) from None


def _why_not(token: Any, statement: JoinStatement, host_id: str, now: int) -> Forbidden | Exists | None:
    """Says why a token does not let this host in, although it has proved the secret."""
    if token.used_at and token.used_by != host_id:
        why = "this join token was used already, by another host: if that was not yours, revoke that host"
        return Forbidden("JOIN_TWICE", why, "ask for a new token")
    if token.used_at:
        return Forbidden("JOIN_TWICE", "this join token was used already, by this host", "ask for a new token")
    if token.expires_at <= now:
        return Forbidden("JOIN", "this join token has expired", "ask for a new one")
    if token.host and token.host != statement.name:
        return Forbidden("HOST", f"this join token is for host {token.host}", "join under that name")
    return None


def host_name(untrusted_name: str) -> str:
    """Raises Invalid."""
    if not _HOST_NAME.fullmatch(untrusted_name):
        raise Invalid("HOST", f"a host's name has 1-{limits.MAX_NAME} of a-z 0-9 . _ - and begins with a letter or digit")
    return untrusted_name


def check_owners(owners: Sequence[str]) -> None:
    if len(owners) > limits.MAX_GROUPS:
        raise Invalid("OWNERS", f"at most {limits.MAX_GROUPS} owners")
    for owner in owners:
        if not 1 <= len(owner) <= limits.MAX_OWNER or not owner.isprintable():
            raise Invalid("OWNER", f"an owner's name has 1 to {limits.MAX_OWNER} printable characters")


def _ends_at(der: bytes) -> int:
    return int(x509.load_der_x509_certificate(der).not_valid_after_utc.timestamp())


def certificate_key(der: bytes) -> bytes:
    return requests.spki(x509.load_der_x509_certificate(der).public_key())


def csr_key(der: bytes) -> bytes:
    return requests.spki(x509.load_der_x509_csr(der).public_key())
