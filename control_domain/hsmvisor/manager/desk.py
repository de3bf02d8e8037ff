"""Requests and what became of them, for whoever carries a question in: the control API and the console ask here.

Who may see or change what is decided here, so that both say the same; each change is one transaction with its answer in it, happens
once, and stands in the audit log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hsmvisor.manager.access.callers import FleetCaller
from hsmvisor.manager.access.owners import demand_owner, may_see
from hsmvisor.manager.answers import Answers
from hsmvisor.manager.engine.beginning import snapshot_of
from hsmvisor.manager.engine.hub import Hub
from hsmvisor.manager.renewal.decisions import decide
from hsmvisor.manager.store import inventory, lines, locks, wanted
from hsmvisor.manager.store.database import Database
from hsmvisor.manager.store.lines import Sums
from hsmvisor.manager.store.rows import DeliveryRow, GenerationRow, LineRow, RequestRow
from hsmvisor.manager.wanted.asking import is_told
from hsmvisor.manager.wanted.spec import Spec
from hsmvisor.manager.wanted.summary import summary
from hsmvisor.serving.errors import NotFound
from hsmvisor.serving.requests import Origin, Request, Requests
from hsmvisor.serving.text import clean
from sqlalchemy.ext.asyncio import AsyncConnection

SHOWN = 100  #: lines of a request that are shown at once
MOST_DENIALS = 1000

Work = Callable[[AsyncConnection, RequestRow], Awaitable[object]]


@dataclass(frozen=True)
class Listed:
    row: RequestRow
    lines: int
    summary: str


@dataclass(frozen=True)
class Shown:
    row: RequestRow
    lines: Sequence[LineRow]
    generations: Sequence[GenerationRow]
    deliveries: Sequence[DeliveryRow]
    denials: Sequence[Any]
    sums: Sums
    next: str = ""  #: the resource of the last of `lines`, where there are more

    @property
    def summary(self) -> str:
        return summary(self.row, self.sums, bool(self.denials))


class Desk:
    def __init__(self, database: Database, requests: Requests, answers: Answers, hub: Hub) -> None:
        self._database, self._requests, self._answers, self._hub = database, requests, answers, hub

    async def listed(self, who: FleetCaller, untrusted_owner: str, state: str, after: str, count: int) -> list[Listed]:
        """Returns at most `count` requests behind id `after`: none of those that the caller may not see."""
        owner = untrusted_owner
        if not may_see(who, owner):  # an empty owner is everybody
            owner = who.owner
            if untrusted_owner and untrusted_owner != owner:
                return []
        async with self._database.reading() as connection:
            rows = await wanted.requests_after(connection, after, count, owner, state)
            ids = [row.id for row in rows]
            denied = await wanted.denied_requests(connection, ids)
            sums = await lines.sums_of_requests(connection, ids)
        return [Listed(row, (own := sums.get(row.id, Sums())).total, summary(row, own, row.id in denied)) for row in rows]

    async def shown(self, who: FleetCaller, id: str, after: str = "", most: int = SHOWN) -> Shown:
        """At most so many of its lines, in the order of their resources.  Raises NotFound, also for what the caller may not see."""
        async with self._database.reading() as connection:
            row = await self.seen(connection, who, id)
            sums = (await lines.sums_of_requests(connection, [row.id])).get(row.id, Sums())
            found = await lines.page_of_request(connection, row.id, after, most + 1)
            there, more = found[:most], len(found) > most
            behind = there[-1].resource_id if more else ""
            ids = [line.id for line in there]
            generations = await lines.generations_of(connection, ids)
            deliveries = await lines.deliveries_of(connection, ids)
            denials = await wanted.denied(connection, row.id)
            if not may_see(who, ""):
                hidden = await _hidden(connection, row, [line.resource_id for line in there], deliveries, denials)
                there = [line for line in there if line.resource_id not in hidden]
                deliveries = [one for one in deliveries if one.resource_id not in hidden]
                denials = [one for one in denials if one.resource_id not in hidden]
            return Shown(row, there, generations, deliveries, denials[:MOST_DENIALS], sums, behind)

    async def seen(self, connection: AsyncConnection, who: FleetCaller, id: str) -> RequestRow:
        """Raises NotFound."""
        row = await wanted.request(connection, id)
        if row is None or not may_see(who, row.owner):
            raise no_request(id)
        return row

    async def next_renewal(self, connection: AsyncConnection, owner: str, material: str, now: float) -> tuple[float, str]:
        """Returns when the first of its lines is renewed, and why; 0 where nothing asks for it."""
        row = await wanted.request_of(connection, owner, material)
        if row is None or row.state != "active":
            return 0.0, ""
        spec, there = Spec.of_text(row.spec), await lines.lines_of_request(connection, row.id)
        made = await lines.generations_of(connection, [line.id for line in there])
        serving = {(one.line_id, one.number): one for one in made}
        found = [decide(snapshot_of(spec, line, serving.get((line.id, line.serving))), now) for line in there if line.serving]
        first = min((decision for decision in found if decision.due), key=lambda decision: decision.due, default=None)
        return (first.due, first.why) if first is not None else (0.0, "")

    async def change(
        self, who: FleetCaller, origin: Origin, call: Request, id: str, kind: str, fields: dict[str, Any], work: Work
    ) -> None:
        """Changes one of an owner's requests.  `call` has the caller's scope in it; `kind` and `fields` are for the audit log.

        Raises NotFound, Forbidden, and what `work` and `Requests.once` raise.
        """

        async def carry_out() -> bytes:
            async with self._database.transaction() as connection:
                await locks.members(connection)
                row = await self.seen(connection, who, id)
                demand_owner(who, row.owner)
                fields["material"] = row.material
                await work(connection, row)
                await self._answers.store(connection, call, row.id.encode())
            self._hub.lines()
            return id.encode()

        await self._requests.once(origin, kind, call, fields, lambda: self._answers.quickest(call, carry_out))


def no_request(untrusted_name: str) -> NotFound:
    return NotFound("REQUEST", f"there is no request {clean(untrusted_name)!r}", "hsmvisor request list shows them")


async def _hidden(
    connection: AsyncConnection, row: RequestRow, own: Sequence[str], deliveries: Sequence[DeliveryRow], denials: Sequence[Any]
) -> set[str]:
    """Returns the resources of which an owner is told nothing: others', that it has not named, and that get nothing."""
    ids = {id for id in own if id} | {one.resource_id for one in (*deliveries, *denials)}
    spec, found = Spec.of_text(row.spec), await inventory.resources_of(connection, ids)
    served = {one.resource_id for one in deliveries if one.state != "denied"}
    return {id for id, resource in found.items() if id not in served and not is_told(row, spec, resource)}
