"""Lines, their generations and deliveries in the database, and who looks at a line at the moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hsmvisor.manager.store.inventory import parts
from hsmvisor.manager.store.rows import UNMEASURED, DeliveryRow, GenerationRow, LineRow
from hsmvisor.manager.store.tables import commands, deliveries, envelopes, escrows, generations, lines, resources
from sqlalchemy import bindparam, case, delete, func, insert, literal, or_, select, union, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

FAR = 1e15  #: when nothing is to be looked at
BUSY = 4e15  #: while somebody does; a wake makes it 0


def new_line(id: str, request_id: str, resource_id: str, material: str, now: float) -> dict[str, Any]:
    return {
        "id": id,
        "request_id": request_id,
        "resource_id": resource_id,
        "material": material,
        "look_at": now,
        "lease_by": "",
        "lease_until": 0.0,
        "stage": "waiting",
        "why": "",
        "newest": 0,
        "serving": 0,
        "failures": 0,
        "failed_at": 0.0,
        "not_before": 0.0,
        "triggered_at": 0.0,
        "trigger": "",
        "changed_at": 0.0,
    }


async def add_lines(connection: AsyncConnection, rows: Sequence[dict[str, Any]]) -> None:
    for some in parts(rows):
        await connection.execute(insert(lines), list(some))


async def line(connection: AsyncConnection, id: str) -> LineRow | None:
    row = (await connection.execute(select(lines).where(lines.c.id == id))).one_or_none()
    return LineRow.of(row) if row is not None else None


async def lines_of_request(connection: AsyncConnection, request_id: str) -> list[LineRow]:
    query = select(lines).where(lines.c.request_id == request_id).order_by(lines.c.resource_id)
    return LineRow.all((await connection.execute(query)).all())


async def lines_of_requests(connection: AsyncConnection, request_ids: Sequence[str], resource_id: str) -> list[LineRow]:
    """Returns those that concern this resource: its own, and shared ones."""
    found: list[LineRow] = []
    for some in parts(request_ids):
        query = select(lines).where(lines.c.request_id.in_(some), lines.c.resource_id.in_(("", resource_id)))
        found += LineRow.all((await connection.execute(query)).all())
    return found


@dataclass(frozen=True)
class Sums:
    """Of one request's lines."""

    total: int = 0
    failing: int = 0
    stages: Mapping[str, int] = field(default_factory=dict)


async def sums_of_requests(connection: AsyncConnection, request_ids: Sequence[str]) -> dict[str, Sums]:
    """However many lines there are, few rows come."""
    found: dict[str, Sums] = {}
    fails = func.sum(case((or_(lines.c.failures > 0, lines.c.stage == UNMEASURED), 1), else_=0))
    for some in parts(request_ids):
        query = select(lines.c.request_id, lines.c.stage, func.count(), fails).where(lines.c.request_id.in_(some))
        for id, stage, count, failing in (await connection.execute(query.group_by(lines.c.request_id, lines.c.stage))).all():
            known = found.get(id, Sums())
            stages = {**known.stages, stage: int(count)}
            found[id] = Sums(known.total + int(count), known.failing + int(failing), stages)
    return found


async def page_of_request(connection: AsyncConnection, request_id: str, after: str, count: int) -> list[LineRow]:
    """Returns lines in the order of their resources, those behind `after`; empty: from the first."""
    query = select(lines).where(lines.c.request_id == request_id)
    if after:
        query = query.where(lines.c.resource_id > after)
    return LineRow.all((await connection.execute(query.order_by(lines.c.resource_id).limit(count))).all())


async def lines_on(connection: AsyncConnection, resource_id: str) -> list[LineRow]:
    """Returns the lines that are the resource's own, or delivered to it."""
    own = select(lines.c.id).where(lines.c.resource_id == resource_id)
    shared = select(deliveries.c.line_id).where(deliveries.c.resource_id == resource_id)
    return LineRow.all((await connection.execute(select(lines).where(_either(own, shared)))).all())


def _either(*chosen: Any) -> Any:
    """Those with one of these ids.  Not OR: for that PostgreSQL reads all lines."""
    return lines.c.id.in_(union(*chosen))


async def change_line(connection: AsyncConnection, id: str, **values: Any) -> None:
    await connection.execute(update(lines).where(lines.c.id == id).values(values))


async def remove_line(connection: AsyncConnection, id: str) -> None:
    freed = [row.resource_id for row in await deliveries_of(connection, [id]) if not row.has_nothing]
    for table in (generations, deliveries, envelopes, escrows):
        await connection.execute(delete(table).where(table.c.line_id == id))
    await connection.execute(delete(commands).where(commands.c.line_id == id))
    await connection.execute(delete(lines).where(lines.c.id == id))
    await _wake_denied(connection, freed)


# ---- who looks, and when --------------------------------------------------------------------------------------------------


def _due(now: float) -> Any:
    """It is its turn behind those that are due already, however often it is woken: else a few would keep all others waiting."""
    return case((lines.c.look_at <= now, lines.c.look_at), else_=now)


async def lock(connection: AsyncConnection, *where: Any) -> None:
    """Whoever changes several lines takes them first, and all in one order: else two would wait for each other (PostgreSQL)."""
    if connection.dialect.name == "postgresql":
        chosen = select(lines.c.id).where(*where).order_by(lines.c.id)
        await connection.execute(chosen.with_for_update(key_share=True))


async def lock_by_id(connection: AsyncConnection, ids: Iterable[str]) -> None:
    for some in parts(sorted(set(ids))):
        if len(some) > 1:
            await lock(connection, lines.c.id.in_(some))


async def wake(connection: AsyncConnection, ids: Iterable[str], now: float, **values: Any) -> None:
    """They are looked at as soon as somebody has the time; again where somebody is at it."""
    chosen = sorted(set(ids))
    await lock_by_id(connection, chosen)
    for some in parts(chosen):
        await connection.execute(update(lines).where(lines.c.id.in_(some)).values(look_at=_due(now), **values))


async def wake_all(connection: AsyncConnection, now: float) -> None:
    """What policies say may be another thing now."""
    await lock(connection)
    await connection.execute(update(lines).values(look_at=_due(now)))


async def wake_on_host(connection: AsyncConnection, host_id: str, now: float) -> None:
    """What is known of a host is another thing now."""
    there = select(resources.c.id).where(resources.c.host_id == host_id)
    own = select(lines.c.id).where(lines.c.resource_id.in_(there))
    delivered = select(deliveries.c.line_id).where(deliveries.c.resource_id.in_(there))
    where = _either(own, delivered)
    await lock(connection, where)
    await connection.execute(update(lines).where(where).values(look_at=_due(now)))


async def claim(connection: AsyncConnection, by: str, now: float, lease: float, count: int) -> list[LineRow]:
    """Takes lines that are due; nobody else does until the lease is over.

    Those that are due since the same moment are taken host by host (a resource's id begins with its host's name): then a host has
    several commands in one exchange, and tells several results in one.
    """
    due = (
        select(lines)
        .where(lines.c.look_at <= now, lines.c.lease_until <= now)
        .order_by(lines.c.look_at, lines.c.resource_id)
        .limit(count)
        .with_for_update(skip_locked=True)
    )
    rows = LineRow.all((await connection.execute(due)).all())
    if rows:
        mine = lines.c.id.in_([row.id for row in rows])
        await connection.execute(update(lines).where(mine).values(lease_by=by, lease_until=now + lease, look_at=BUSY))
    return rows


async def keep(connection: AsyncConnection, by: str, ids: Sequence[str], until: float) -> None:
    await lock_by_id(connection, ids)
    for some in parts(ids):
        await connection.execute(update(lines).where(lines.c.id.in_(some), lines.c.lease_by == by).values(lease_until=until))


async def release(connection: AsyncConnection, by: str, id: str, look_at: float, **values: Any) -> bool:
    """Ends the lease; a wake that came meanwhile counts.  Returns False where the lease had been lost."""
    sooner = func.min if connection.dialect.name == "sqlite" else func.least
    changed = await connection.execute(
        update(lines)
        .where(lines.c.id == id, lines.c.lease_by == by)
        .values(lease_by="", lease_until=0.0, look_at=sooner(lines.c.look_at, literal(min(look_at, FAR))), **values)
    )
    return bool(changed.rowcount)


async def take_back(connection: AsyncConnection, by: str) -> None:
    """What this manager was looking at when it ended is looked at again: nobody else has its id."""
    await lock(connection, lines.c.lease_by == by)
    await connection.execute(update(lines).where(lines.c.lease_by == by).values(lease_by="", lease_until=0.0, look_at=0.0))


async def rescue(connection: AsyncConnection, now: float) -> int:
    """What a manager left that is no more is looked at again."""
    where = (lines.c.lease_by != "", lines.c.lease_until <= now)
    await lock(connection, *where)
    return (await connection.execute(update(lines).where(*where).values(lease_by="", lease_until=0.0, look_at=now))).rowcount


async def is_woken(connection: AsyncConnection, id: str) -> bool:
    """Whether somebody woke it since it was claimed."""
    found = (await connection.execute(select(lines.c.look_at).where(lines.c.id == id))).scalar_one_or_none()
    return found is not None and found != BUSY


# ---- generations ------------------------------------------------------------------------------------------------------------


async def generations_of(connection: AsyncConnection, line_ids: Sequence[str]) -> list[GenerationRow]:
    found: list[GenerationRow] = []
    for some in parts(line_ids):
        query = select(generations).where(generations.c.line_id.in_(some)).order_by(generations.c.number)
        found += GenerationRow.all((await connection.execute(query)).all())
    return found


async def add_generation(connection: AsyncConnection, row: GenerationRow) -> None:
    await connection.execute(insert(generations).values(vars(row)))


async def change_generation(connection: AsyncConnection, line_id: str, number: int, was: str = "", **values: Any) -> bool:
    """`was`: the state that it has to be in.  Returns whether it was."""
    where = [generations.c.line_id == line_id, generations.c.number == number]
    if was:
        where.append(generations.c.state == was)
    return bool((await connection.execute(update(generations).where(*where).values(values))).rowcount)


async def forget_generations(connection: AsyncConnection, line_id: str, numbers: Sequence[int]) -> None:
    for table in (generations, envelopes, escrows):
        number = table.c.number if table is generations else table.c.generation
        await connection.execute(delete(table).where(table.c.line_id == line_id, number.in_(numbers)))


def the_one_before(line: LineRow, own: Iterable[GenerationRow], now: float) -> int:
    """Returns the newest generation that served before and may serve again, 0 where there is none."""
    fit = (g for g in own if g.state == "superseded" and g.number < line.serving and not g.revoked_at and not g.revoke)
    return max((g.number for g in fit if not g.not_after or g.not_after > now), default=0)


async def serve_the_one_before(
    connection: AsyncConnection, line: LineRow, own: Iterable[GenerationRow], why: str, now: float
) -> int:
    """Modules are told at the next look, and a new generation is not tried at once.  Returns the number of the one that serves
    again, 0 where there is none."""
    before = the_one_before(line, own, now)
    await change_generation(connection, line.id, line.serving, state="rolled-back", why=why)
    if before:
        await change_generation(connection, line.id, before, state="serving", activated_at=now)
    values = {"serving": before, "failures": line.failures + 1, "failed_at": now, "why": why, "look_at": now}
    await change_line(connection, line.id, trigger="", triggered_at=0.0, **values)
    return before


# ---- deliveries ---------------------------------------------------------------------------------------------------------------


async def deliveries_of(connection: AsyncConnection, line_ids: Sequence[str]) -> list[DeliveryRow]:
    found: list[DeliveryRow] = []
    for some in parts(line_ids):
        query = select(deliveries).where(deliveries.c.line_id.in_(some)).order_by(deliveries.c.resource_id)
        found += DeliveryRow.all((await connection.execute(query)).all())
    return found


async def deliveries_on(connection: AsyncConnection, resource_id: str) -> list[DeliveryRow]:
    query = select(deliveries).where(deliveries.c.resource_id == resource_id)
    return DeliveryRow.all((await connection.execute(query)).all())


async def holdings_on(connection: AsyncConnection, resource_ids: Sequence[str]) -> list[tuple[DeliveryRow, LineRow]]:
    """Returns what these resources hold or are to hold, each with its line."""
    found: list[tuple[DeliveryRow, LineRow]] = []
    for some in parts(resource_ids):
        query = select(deliveries).where(deliveries.c.resource_id.in_(some)).order_by(deliveries.c.resource_id)
        there = DeliveryRow.all((await connection.execute(query)).all())
        known = {row.id: row for row in await lines_by_id(connection, [row.line_id for row in there])}
        found += [(row, known[row.line_id]) for row in there if row.line_id in known]
    return found


async def lines_by_id(connection: AsyncConnection, ids: Sequence[str]) -> list[LineRow]:
    found: list[LineRow] = []
    for some in parts(sorted(set(ids))):
        found += LineRow.all((await connection.execute(select(lines).where(lines.c.id.in_(some)))).all())
    return found


async def holders(connection: AsyncConnection, but: str, material: str, resource_ids: Sequence[str]) -> dict[str, str]:
    """Returns the lines other than `but` that have, or are to have, a material of this name there; by resource."""
    found: dict[str, str] = {}
    for some in parts(resource_ids):
        query = (
            select(deliveries.c.resource_id, deliveries.c.line_id)
            .join(lines, lines.c.id == deliveries.c.line_id)
            .where(deliveries.c.resource_id.in_(some), lines.c.material == material, lines.c.id != but)
            .where(or_(deliveries.c.state != "denied", deliveries.c.held != ""))
            .order_by(deliveries.c.line_id.desc())
        )
        found |= {row.resource_id: row.line_id for row in (await connection.execute(query)).all()}
    return found


async def delivery(connection: AsyncConnection, line_id: str, resource_id: str) -> DeliveryRow | None:
    where = (deliveries.c.line_id == line_id, deliveries.c.resource_id == resource_id)
    row = (await connection.execute(select(deliveries).where(*where))).one_or_none()
    return DeliveryRow.of(row) if row is not None else None


async def put_delivery(connection: AsyncConnection, row: DeliveryRow) -> None:
    values = vars(row)
    where = (deliveries.c.line_id == row.line_id, deliveries.c.resource_id == row.resource_id)
    changed = await connection.execute(update(deliveries).where(*where).values(values))
    if not changed.rowcount:
        await connection.execute(insert(deliveries).values(values))


async def mark(connection: AsyncConnection, rows: Iterable[DeliveryRow], known: Mapping[str, DeliveryRow], now: float) -> None:
    """Says of deliveries in which state they are, why, and what policy said.

    What a host told meanwhile stays, and what is gone is gone.

    `known`: as they were when they were looked at, by resource; others are new.
    """
    new, changed = [], []
    for row in rows:
        was = known.get(row.resource_id)
        if was is None:
            new.append({**vars(row), "changed_at": int(now)})
        elif (was.state, was.why, was.permitted) != (row.state, row.why, row.permitted):
            told = {"is": row.state, "because": row.why, "by": row.permitted}
            changed.append({"of": row.resource_id, "was": was.state, **told})
    some_insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    for some in parts(new):
        await connection.execute(some_insert(deliveries).on_conflict_do_nothing(), list(some))
    if changed:
        line_id = next(iter(known.values())).line_id
        where = (deliveries.c.line_id == line_id, deliveries.c.resource_id == bindparam("of"))
        values = {"state": bindparam("is"), "why": bindparam("because"), "permitted": bindparam("by"), "changed_at": int(now)}
        statement = update(deliveries).where(*where, deliveries.c.state == bindparam("was")).values(values)
        await connection.execute(statement, changed)


async def remove_delivery(connection: AsyncConnection, line_id: str, resource_id: str) -> None:
    where = (deliveries.c.line_id == line_id, deliveries.c.resource_id == resource_id)
    await connection.execute(delete(deliveries).where(*where))
    await _wake_denied(connection, [resource_id])


async def _wake_denied(connection: AsyncConnection, resource_ids: Sequence[str]) -> None:
    """A name is free there, for which another line may wait."""
    for some in parts(resource_ids):
        denied = select(deliveries.c.line_id).where(deliveries.c.resource_id.in_(some), deliveries.c.state == "denied")
        await connection.execute(update(lines).where(lines.c.id.in_(denied)).values(look_at=0.0))


async def wake_pending(connection: AsyncConnection, resource_ids: Sequence[str], now: float) -> None:
    """Lines with a delivery on these resources that is not done, or with a generation on its way, are looked at again."""
    for some in parts(resource_ids):
        pending = select(deliveries.c.line_id).where(
            deliveries.c.resource_id.in_(some), deliveries.c.state.not_in(("active", "denied"))
        )
        at_work = or_(lines.c.stage != "serving", lines.c.newest != lines.c.serving)
        where = _either(pending, select(lines.c.id).where(lines.c.resource_id.in_(some), at_work))
        await lock(connection, where)
        await connection.execute(update(lines).where(where).values(look_at=_due(now)))


# ---- keys on their way, and kept ----------------------------------------------------------------------------------------------


async def add_envelopes(connection: AsyncConnection, rows: Sequence[dict[str, Any]]) -> None:
    """`rows`: line_id, generation, resource_id, module_id, envelope, expires_at; those that there were are replaced."""
    for row in rows:
        where = [envelopes.c[name] == row[name] for name in ("line_id", "generation", "resource_id")]
        await connection.execute(delete(envelopes).where(*where))
    for some in parts(rows):
        await connection.execute(insert(envelopes), list(some))


async def envelopes_of(connection: AsyncConnection, line_id: str, generation: int, now: float) -> dict[str, Any]:
    where = (envelopes.c.line_id == line_id, envelopes.c.generation == generation, envelopes.c.expires_at > now)
    return {row.resource_id: row for row in (await connection.execute(select(envelopes).where(*where))).all()}


async def remove_envelope(connection: AsyncConnection, line_id: str, generation: int, resource_id: str) -> None:
    where = (
        envelopes.c.line_id == line_id,
        envelopes.c.generation == generation,
        envelopes.c.resource_id == resource_id,
    )
    await connection.execute(delete(envelopes).where(*where))


async def prune_envelopes(connection: AsyncConnection, now: float) -> None:
    await connection.execute(delete(envelopes).where(envelopes.c.expires_at <= now))


async def put_escrow(connection: AsyncConnection, line_id: str, generation: int, wrapped: bytes, at: int) -> None:
    values = {"line_id": line_id, "generation": generation, "wrapped": wrapped, "at": at}
    await connection.execute(insert(escrows).values(values))


async def escrow(connection: AsyncConnection, line_id: str, generation: int) -> bytes:
    """Returns the wrapped key, empty where none was kept."""
    where = (escrows.c.line_id == line_id, escrows.c.generation == generation)
    found = (await connection.execute(select(escrows.c.wrapped).where(*where))).scalar_one_or_none()
    return bytes(found or b"")
