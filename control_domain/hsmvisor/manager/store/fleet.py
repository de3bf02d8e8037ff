"""What a fleet's managers have the same, which of them there are, and how much there is of everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hsmvisor.manager.store.rows import UNMEASURED
from hsmvisor.manager.store.tables import (
    certificates,
    deliveries,
    denials,
    fleet,
    generations,
    lines,
    managers,
    requests,
)
from sqlalchemy import Table, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection


async def fingerprints(connection: AsyncConnection) -> dict[str, str]:
    """Hexadecimal, by name."""
    return {row.name: row.fingerprint for row in (await connection.execute(select(fleet))).all()}


async def put_fingerprints(connection: AsyncConnection, found: Mapping[str, str], at: int) -> None:
    """Raises IntegrityError where another manager was quicker."""
    rows = [{"name": name, "fingerprint": fingerprint, "made_at": at} for name, fingerprint in found.items()]
    await connection.execute(insert(fleet), rows)


async def note_manager(connection: AsyncConnection, id: str, name: str, now: float, forget_before: float) -> None:
    """This manager is there; those that were not heard of for long are forgotten."""
    await connection.execute(delete(managers).where(managers.c.seen_at < forget_before, managers.c.id != id))
    changed = await connection.execute(update(managers).where(managers.c.id == id).values(name=name, seen_at=now))
    if not changed.rowcount:
        await connection.execute(insert(managers).values(id=id, name=name, seen_at=now))


async def forget_manager(connection: AsyncConnection, id: str) -> None:
    await connection.execute(delete(managers).where(managers.c.id == id))


async def manager_names(connection: AsyncConnection, seen_after: float) -> list[str]:
    query = select(managers.c.name).where(managers.c.seen_at >= seen_after).order_by(managers.c.name)
    return list((await connection.execute(query)).scalars())


async def counts(connection: AsyncConnection, now: float, owner: str = "") -> dict[str, int]:
    """Of requests and what became of them, in one statement; `owner`: of what is this owner's, empty: of all."""
    of_request, of_line = _of_owner(owner)
    serves = (generations.c.state == "serving", generations.c.not_after > 0, *of_line(generations))
    left, life = generations.c.not_after - int(now), generations.c.not_after - generations.c.not_before
    pending = deliveries.c.state.in_(("pending", "staged", UNMEASURED, "leaving"))
    fails = or_(lines.c.failures > 0, lines.c.stage == UNMEASURED)
    active = (requests.c.state == "active", *([requests.c.owner == owner] if owner else []))
    one: dict[str, Any] = {
        "requests": select(func.count()).select_from(requests).where(*active),
        "certificates": select(func.count()).select_from(generations).where(*serves),
        "expiring": select(func.count()).select_from(generations).where(*serves, left > 0, left * 3 < life),
        "expired": select(func.count()).select_from(generations).where(*serves, left <= 0),
        "failing": select(func.count()).select_from(lines).where(fails, *of_request(lines)),
        "pending": select(func.count()).select_from(deliveries).where(pending, *of_line(deliveries)),
        "denied": select(func.count()).select_from(denials).where(*of_request(denials)),
    }
    found = (await connection.execute(select(*(query.scalar_subquery() for query in one.values())))).one()
    return dict(zip(one, map(int, found), strict=True))


def _of_owner(owner: str) -> tuple[Callable[[Table], list[Any]], Callable[[Table], list[Any]]]:
    """Returns what tables with a request_id, and those with a line_id, are restricted by."""
    if not owner:
        return (lambda table: []), (lambda table: [])
    own = select(requests.c.id).where(requests.c.owner == owner)
    own_lines = select(lines.c.id).where(lines.c.request_id.in_(own))
    return (lambda table: [table.c.request_id.in_(own)]), (lambda table: [table.c.line_id.in_(own_lines)])


async def stages(connection: AsyncConnection) -> dict[str, int]:
    """Returns how many lines are in each stage."""
    query = select(lines.c.stage, func.count()).group_by(lines.c.stage)
    return {stage: int(count) for stage, count in (await connection.execute(query)).all()}


async def issued(connection: AsyncConnection) -> dict[str, tuple[int, int]]:
    """Returns how many certificates each authority issued, and how many of these are revoked: the built-in ones by their own
    records, others as far as lines remember them."""
    found: dict[str, tuple[int, int]] = {}
    for name, revoked_at, where in (
        (generations.c.authority, generations.c.revoked_at, generations.c.serial != ""),
        (certificates.c.authority, certificates.c.revoked_at, certificates.c.serial != ""),
    ):
        query = select(name, func.count(), func.count().filter(revoked_at > 0)).where(where).group_by(name)
        found |= {row[0]: (int(row[1]), int(row[2])) for row in (await connection.execute(query)).all()}
    return found
