"""What guests' boots were, and which deliveries wait for another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hsmvisor.manager.store.inventory import parts
from hsmvisor.manager.store.rows import UNMEASURED, DeliveryRow, MeasurementRow
from hsmvisor.manager.store.tables import deliveries, measurements
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection


async def add(connection: AsyncConnection, row: MeasurementRow) -> None:
    await connection.execute(insert(measurements).values(vars(row)))


async def one(connection: AsyncConnection, id: str) -> MeasurementRow | None:
    row = (await connection.execute(select(measurements).where(measurements.c.id == id))).one_or_none()
    return MeasurementRow.of(row) if row is not None else None


async def recent(connection: AsyncConnection, resource_ids: Sequence[str], after: float) -> dict[str, list[MeasurementRow]]:
    """Returns those that were asked for after `after`, by resource, the newest first."""
    found: dict[str, list[MeasurementRow]] = {}
    for some in parts(resource_ids):
        where = (measurements.c.resource_id.in_(some), measurements.c.asked_at > after)
        query = select(measurements).where(*where).order_by(measurements.c.asked_at.desc(), measurements.c.id)
        for row in MeasurementRow.all((await connection.execute(query)).all()):
            found.setdefault(row.resource_id, []).append(row)
    return found


async def count(connection: AsyncConnection, resource_id: str, after: float) -> int:
    where = (measurements.c.resource_id == resource_id, measurements.c.asked_at > after)
    return int((await connection.execute(select(func.count()).select_from(measurements).where(*where))).scalar_one())


async def tell(connection: AsyncConnection, id: str, **values: Any) -> None:
    """Once: what was told first counts."""
    await connection.execute(update(measurements).where(measurements.c.id == id, measurements.c.told_at == 0).values(values))


async def prune(connection: AsyncConnection, before: float) -> None:
    await connection.execute(delete(measurements).where(measurements.c.asked_at < before))


async def remove_of_resource(connection: AsyncConnection, resource_id: str) -> None:
    await connection.execute(delete(measurements).where(measurements.c.resource_id == resource_id))


# ---- deliveries -----------------------------------------------------------------------------------------------------------


async def mark(connection: AsyncConnection, row: DeliveryRow, was: DeliveryRow | None, now: float) -> bool:
    """Says how a delivery stands with its guest's boot: its state, why, and how often it was not what it has to be.

    `was`: as it was when it was looked at; None: it is new.  What a host told meanwhile stays.  Returns False where its state was
    another one by then.
    """
    values = {"state": row.state, "why": row.why, "failures": row.failures, "failed_at": row.failed_at, "changed_at": int(now)}
    if was is None:
        some_insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
        new = some_insert(deliveries).values({**vars(row), "changed_at": int(now)}).on_conflict_do_nothing()
        return bool((await connection.execute(new)).rowcount)
    where = (deliveries.c.line_id == row.line_id, deliveries.c.resource_id == row.resource_id, deliveries.c.state == was.state)
    return bool((await connection.execute(update(deliveries).where(*where).values(values))).rowcount)


async def try_again(connection: AsyncConnection) -> None:
    """What a guest's boot has to be may be another thing now: nobody waits for the next attempt."""
    await connection.execute(update(deliveries).where(deliveries.c.state == UNMEASURED).values(failures=0, failed_at=0.0))
