"""A guest's boot as people ask for it: its host is asked, and waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection

from hsmvisor.manager import limits
from hsmvisor.manager.engine import measuring
from hsmvisor.manager.engine.hub import Hub
from hsmvisor.manager.engine.obtaining import why_not_reachable
from hsmvisor.manager.inventory.pins import Pins
from hsmvisor.manager.policy.measured import PCRS
from hsmvisor.manager.store import inventory, measurements
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.rows import MeasurementRow, ResourceRow
from hsmvisor.serving.errors import Exhausted, Invalid, Unavailable, WrongState
from hsmvisor.serving.text import clean

USUAL = range(8)  #: PCRs: firmware, its settings, boot loader, Secure Boot
WITHIN = 30.0  #: seconds that a host is waited for
_LOOK_EVERY = 0.1  #: seconds: another manager may be the one that its host tells


class MeasureNow:
    def __init__(self, database: Database, hub: Hub, pins: Pins, clock: Callable[[], float]) -> None:
        self._database, self._hub, self._pins, self._clock = database, hub, pins, clock

    async def measure(self, resource: ResourceRow, untrusted_pcrs: Collection[int]) -> MeasurementRow:
        """`untrusted_pcrs`: none: the usual ones.  Raises Invalid, WrongState, Exhausted, Unavailable, DatabaseError."""
        if not set(untrusted_pcrs) <= set(PCRS):
            raise Invalid("PCR", f"a PCR is {PCRS.start} to {PCRS.stop - 1}", "ask for these")
        row = await self._ask(resource, frozenset(untrusted_pcrs) or frozenset(USUAL))
        self._hub.commands([resource.host_id])
        found = await self._told(row)
        if not found.found:
            raise WrongState("NOT_MEASURED", f"{resource.id} is not measured: {clean(found.why, limits.MAX_DETAIL)}")
        return found

    async def _ask(self, resource: ResourceRow, pcrs: frozenset[int]) -> MeasurementRow:
        now = self._clock()
        async with self._database.transaction() as connection:
            host = await inventory.host(connection, resource.host_id)
            if not resource.reachable:
                raise WrongState("MODULE", f"{resource.id} cannot be measured: {why_not_reachable(resource)}")
            if host is None or not host.is_there(now):
                raise WrongState("AWAY", f"{resource.id} cannot be measured: its host is away", "see hsmvisor fleet hosts")
            if not self._pins.vouch(resource, host):
                raise WrongState("IDENTITY", f"the identity of the module of {resource.id} is not what its host has signed")
            if await measurements.count(connection, resource.id, now - 60) >= limits.MOST_MEASURED:
                why = f"{resource.id} was measured {limits.MOST_MEASURED} times within a minute"
                raise Exhausted("MEASURED", why, "wait a while")
            return await measuring.ask(connection, resource, pcrs, now)

    async def _told(self, row: MeasurementRow) -> MeasurementRow:
        ends = time.monotonic() + WITHIN
        while time.monotonic() < ends:
            async with self._database.reading() as connection:
                found = await measurements.one(connection, row.id)
            if found is None or found.told_at:
                break
            await asyncio.sleep(_LOOK_EVERY)
        if found is None or not found.told_at:
            raise Unavailable("HOST", f"the host of {row.resource_id} has not answered within {WITHIN:.0f} s", "try again")
        return found
