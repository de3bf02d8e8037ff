"""Materials: what was asked for, which generations there are, who holds which, and why something waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hsmvisor.manager import limits as manager_limits
from hsmvisor.manager.access.owners import may_change
from hsmvisor.manager.console import limits
from hsmvisor.manager.console.actions import offered
from hsmvisor.manager.console.visit import Visit, cut
from hsmvisor.manager.desk import Shown
from hsmvisor.manager.engine.beginning import snapshot_of
from hsmvisor.manager.renewal import decisions
from hsmvisor.manager.renewal.decisions import Decision
from hsmvisor.manager.store import inventory, overview
from hsmvisor.manager.store.rows import DeliveryRow, GenerationRow, LineRow
from hsmvisor.manager.wanted.spec import Spec
from starlette.responses import Response

_STATES = ("", "active", "cancelled")


@dataclass(frozen=True)
class Holding:
    row: DeliveryRow
    wanted: int
    state: str
    behind: bool  #: it does not have yet what serves

    @property
    def held(self) -> Sequence[tuple[int, str]]:
        return sorted(self.row.generations.items(), reverse=True)


@dataclass(frozen=True)
class Key:
    """A line as it is shown."""

    line: LineRow
    serving: GenerationRow | None
    generations: Sequence[GenerationRow]  #: newest first
    holdings: Sequence[Holding]
    renewal: Decision | None  #: None: it is not renewed any more


async def listed(visit: Visit) -> Response:
    state, after = visit.asked("state"), visit.asked("after", 64)
    owner = visit.asked("owner", manager_limits.MAX_OWNER)
    state = state if state in _STATES else ""
    found = await visit.parts.desk.listed(visit.who, owner or visit.owner, state, after, limits.PAGE + 1)
    rows, more = cut(found)
    return visit.page("materials.html", rows=rows, more=rows[-1].row.id if more else "", state=state, owner=owner)


async def denials(visit: Visit) -> Response:
    async with visit.parts.database.reading() as connection:
        rows = await overview.denied(connection, visit.owner, limits.CERTIFICATES)
    return visit.page("denials.html", rows=rows, cut=len(rows) == limits.CERTIFICATES)


async def one(visit: Visit) -> Response:
    parts, now = visit.parts, visit.parts.clock()
    shown = await parts.desk.shown(visit.who, visit.request.path_params["id"], visit.asked("key", 130), limits.SHOWN_LINES)
    away = await _away(visit, shown, now)
    spec = Spec.of_text(shown.row.spec)
    events, _ = await parts.history.page(size=limits.SHOWN_EVENTS, request_id=shown.row.id)
    return visit.page(
        "material.html",
        row=shown.row,
        spec=spec,
        summary=shown.summary,
        keys=[_key(shown, spec, line, away, now) for line in shown.lines],
        count=shown.sums.total,
        more=shown.next,
        denials=shown.denials,
        events=events,
        actions=offered(shown) if may_change(visit.who, shown.row.owner) else [],
        open_keys=len(shown.lines) <= 3,
    )


async def _away(visit: Visit, shown: Shown, now: float) -> frozenset[str]:
    """Returns the resources whose hosts are not heard of."""
    async with visit.parts.database.reading() as connection:
        resources = await inventory.resources_of(connection, [row.resource_id for row in shown.deliveries])
        hosts = await inventory.hosts_of(connection, [row.host_id for row in resources.values()])
    silent = {id for id, host in hosts.items() if not host.is_there(now)}
    return frozenset(id for id, row in resources.items() if row.host_id in silent)


def _key(shown: Shown, spec: Spec, line: LineRow, away: frozenset[str], now: float) -> Key:
    generations: Mapping[int, GenerationRow] = {row.number: row for row in shown.generations if row.line_id == line.id}
    serving = generations.get(line.serving)
    holdings = []
    for row in shown.deliveries:
        if row.line_id == line.id:
            state = "away" if row.state == "pending" and row.resource_id in away else row.state
            behind = row.active != line.serving and row.state not in ("leaving", "gone", "denied")
            holdings.append(Holding(row, line.serving, state, behind))
    renewal = decisions.decide(snapshot_of(spec, line, serving), now) if shown.row.state == "active" else None
    newest_first = sorted(generations.values(), key=lambda row: -row.number)
    return Key(line, serving, newest_first, sorted(holdings, key=lambda one: (not one.behind, one.row.resource_id)), renewal)
