"""Hosts that are to have nothing more, and keys that are to be others: what an operator does when something was lost or stolen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager.ca.interface import Ca, Later, Reason, Refused
from hsmvisor.manager.history.events import Happened, History, Kind
from hsmvisor.manager.renewal.trigger import Trigger
from hsmvisor.manager.store import inventory, lines, locks
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.rows import GenerationRow, HostRow, LineRow, ResourceRow, text_of
from hsmvisor.manager.wanted import membership
from hsmvisor.serving.errors import Unavailable
from sqlalchemy.ext.asyncio import AsyncConnection

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removed:
    resources: int
    revoked: int


class Leaving:
    def __init__(self, database: Database, history: History, authorities: Mapping[str, Ca], clock: Callable[[], float]) -> None:
        self._database, self._history, self._authorities, self._clock = database, history, authorities, clock

    # ---- hosts --------------------------------------------------------------------------------------------------

    async def revoke_host(self, connection: AsyncConnection, host: HostRow, why: str, by: str) -> None:
        """Its certificate counts no more."""
        if host.state == "revoked":
            return
        await locks.members(connection)
        await inventory.change_host(connection, host.id, state="revoked", session="")
        await lines.wake_on_host(connection, host.id, self._clock())
        detail = {"name": host.name, "why": why, "by": by}
        await self._history.add(connection, Happened(Kind.HOST_REVOKED, host_id=host.id, detail=detail))

    async def change_host(self, connection: AsyncConnection, host: HostRow, trusted: bool, owners: Sequence[str]) -> None:
        """An operator says something else of it."""
        if (int(trusted), text_of(owners)) == (host.trusted, host.owners):
            return
        told: dict[str, object] = {"trusted": int(trusted), "owners": text_of(owners)}
        if text_of(owners) != host.owners:  # it tells all again, and what is not taken any more is refused then
            told["session"] = ""
        await locks.members(connection)
        await inventory.change_host(connection, host.id, **told)
        await lines.wake_on_host(connection, host.id, self._clock())

    async def revoke_certificates(self, host: HostRow) -> int:
        """Revokes what the host's modules have for themselves alone; returns how many certificates these were.

        Before the host is forgotten, and not in a transaction: authorities take their time.  Raises Unavailable: then some may be
        revoked, and the same again goes on.
        """
        async with self._database.reading() as connection:
            own = await self._own_lines(connection, host)
            found = await lines.generations_of(connection, [line.id for line in own])
        count = 0
        for generation in found:
            if _counts(generation, self._clock()):
                count += await self._revoke(generation)
        return count

    async def _own_lines(self, connection: AsyncConnection, host: HostRow) -> list[LineRow]:
        on_it = await inventory.resources_on(connection, host.id)
        return [line for resource in on_it for line in await lines.lines_on(connection, resource.id) if line.resource_id]

    async def _revoke(self, generation: GenerationRow) -> bool:
        ca = self._authorities.get(generation.authority)
        if ca is None:
            _log.error("authority %s is not configured: %s is not revoked", generation.authority, generation.serial)
            return False
        leaf = x509.load_pem_x509_certificate(generation.chain.encode()).public_bytes(Encoding.DER)
        try:
            await ca.revoke(leaf, Reason.CESSATION)
        except Refused as error:
            _log.error("%s: certificate %s is not revoked: %s", generation.authority, generation.serial, error)
            return False
        except Later as error:
            why = f"{generation.authority} cannot revoke certificate {generation.serial} now: {error}"
            raise Unavailable("AUTHORITY", why, "the same call again goes on from here") from None
        async with self._database.transaction() as connection:
            told = {"revoked_at": int(self._clock())}
            await lines.change_generation(connection, generation.line_id, generation.number, was=generation.state, **told)
        return True

    async def remove_host(self, connection: AsyncConnection, host: HostRow, compromised: bool, by: str) -> int:
        """Forgets it with its resources.  `compromised`: keys that its modules shared with others get others in their place.

        Returns how many resources there were.
        """
        await locks.members(connection)
        if compromised:
            on_it = await inventory.resources_on(connection, host.id)
            shared = {line.id for r in on_it for line in await lines.lines_on(connection, r.id) if not line.resource_id}
            await self._trigger(connection, sorted(shared), True, f"host {host.name} was removed", by)
        return await membership.forget_host(connection, self._history, host, self._clock())

    # ---- resources ------------------------------------------------------------------------------------------------

    async def rekey(self, connection: AsyncConnection, resource: ResourceRow, compromised: bool, why: str, by: str) -> int:
        """Every key of a resource anew, those too that it shares; returns how many."""
        await locks.members(connection)
        found = await lines.lines_on(connection, resource.id)
        await self._trigger(connection, [line.id for line in found], compromised, why, by)
        for line in found:
            detail = {"what": "rekey", "compromised": compromised, "why": why, "by": by}
            happened = Happened(
                Kind.CHANGED,
                owner=resource.owner,
                request_id=line.request_id,
                material=line.material,
                resource_id=resource.id,
                host_id=resource.host_id,
                detail=detail,
            )
            await self._history.add(connection, happened)
        return len(found)

    async def _trigger(self, connection: AsyncConnection, ids: Sequence[str], compromised: bool, why: str, by: str) -> None:
        """As RequestService's Rotate does it."""
        reason = Reason.KEY_COMPROMISE if compromised else Reason.SUPERSEDED
        asked = Trigger(why, by, urgent=compromised, revoke=compromised, reason=reason, rekey=True)
        now = self._clock()
        await lines.wake(connection, ids, now, triggered_at=now, trigger=asked.text())


def _counts(generation: GenerationRow, now: float) -> bool:
    return bool(generation.chain) and not generation.revoked_at and generation.not_after > now
