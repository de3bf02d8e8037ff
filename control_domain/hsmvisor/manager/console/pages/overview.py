"""The fleet at a glance, and when certificates end."""

from __future__ import annotations

from hsmvisor.manager import limits as manager_limits
from hsmvisor.manager.console import limits
from hsmvisor.manager.console.timeline import Certificate, chart
from hsmvisor.manager.console.visit import HOSTS, Visit
from hsmvisor.manager.engine.beginning import snapshot_of
from hsmvisor.manager.renewal import decisions
from hsmvisor.manager.store import fleet, inventory, lines, overview
from hsmvisor.manager.store.rows import lines_of
from hsmvisor.manager.wanted.spec import Spec
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response


async def first(visit: Visit) -> Response:
    now, owner = visit.parts.clock(), visit.owner
    managers: list[str] = []
    async with visit.parts.database.reading() as connection:
        counts = await fleet.counts(connection, now, owner)
        if visit.may(HOSTS):
            counts |= await inventory.counts(connection, now - manager_limits.AWAY)
            managers = await fleet.manager_names(connection, now - manager_limits.MANAGER_AWAY)
        else:
            counts["resources"] = await inventory.count_resources(connection, owner)
        failing = await overview.failing(connection, owner, limits.ATTENTION)
        pending = await overview.pending(connection, owner, limits.ATTENTION)
        denied = await overview.denied(connection, owner, limits.ATTENTION)
        of_pending = {line.id: line for line in await lines.lines_by_id(connection, [row.line_id for row in pending])}
        ids = [line.request_id for line in (*failing, *of_pending.values())]
        requests = await overview.requests_by_id(connection, ids)
        certificates = await _certificates(connection, owner, now, limits.CERTIFICATES)
    events, _ = await visit.parts.history.page(size=limits.ATTENTION, owner=owner)
    return visit.page(
        "overview.html",
        counts=counts,
        managers=managers,
        policy_version=visit.parts.policy_version(),
        failing=[(line, requests[line.request_id]) for line in failing if line.request_id in requests],
        pending=[
            (row, of_pending[row.line_id], requests[of_pending[row.line_id].request_id])
            for row in pending
            if row.line_id in of_pending and of_pending[row.line_id].request_id in requests
        ],
        denied=denied,
        chart=chart(certificates[: limits.FIRST_CHART], now),
        shown=min(len(certificates), limits.FIRST_CHART),
        events=events,
    )


async def timeline(visit: Visit) -> Response:
    now = visit.parts.clock()
    async with visit.parts.database.reading() as connection:
        certificates = await _certificates(connection, visit.owner, now, limits.CERTIFICATES)
    return visit.page(
        "timeline.html",
        chart=chart(certificates[: limits.CHART], now),
        certificates=[(one, one.state(now)) for one in certificates],
        cut=len(certificates) == limits.CERTIFICATES,
    )


async def _certificates(connection: AsyncConnection, owner: str, now: float, count: int) -> list[Certificate]:
    """Returns those that serve, in the order in which something happens to them."""
    generations = await overview.serving(connection, owner, count)
    found = {line.id: line for line in await lines.lines_by_id(connection, [row.line_id for row in generations])}
    requests = await overview.requests_by_id(connection, [line.request_id for line in found.values()])
    certificates = []
    for row in generations:
        line = found.get(row.line_id)
        request = requests.get(line.request_id) if line is not None else None
        if line is None or request is None:
            continue
        spec = Spec.of_text(request.spec)
        decision = decisions.decide(snapshot_of(spec, line, row), now)
        renews = decision.due if request.state == "active" else 0.0
        why = decision.why if request.state == "active" else "the request was cancelled"
        names = lines_of(row.names)
        certificates.append(
            Certificate(request.id, line.material, request.owner, line.resource_id, row.number, names, row.not_after, renews, why)
        )
    return sorted(certificates, key=lambda one: (min(one.renews_at or one.ends_at, one.ends_at), one.material, one.resource))
