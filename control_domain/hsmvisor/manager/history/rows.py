"""Events and their notices in the database: the statements, and nothing that decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hsmvisor.manager.history.happened import Event
from hsmvisor.manager.store.tables import events, notices
from sqlalchemy import BigInteger, Text, cast, delete, func, insert, literal, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True)
class Wanted:
    """Empty: all."""

    kind: str = ""
    owner: str = ""
    request_id: str = ""
    resource_id: str = ""

    def fits(self, event: Event) -> bool:
        return all(not wanted or wanted == getattr(event, name) for name, wanted in vars(self).items())

    def conditions(self) -> list[Any]:
        return [events.c[name] == wanted for name, wanted in vars(self).items() if wanted]


def event_of(row: Any) -> Event:
    return Event(
        row.id, row.at, row.kind, row.owner, row.request_id, row.material, row.resource_id, row.host_id, row.detail
    )  # fmt: skip


# ---- writing ------------------------------------------------------------------------------------------------------------


async def add(connection: AsyncConnection, values: dict[str, Any]) -> int:
    result = await connection.execute(insert(events).values(values))
    key = result.inserted_primary_key
    assert key is not None
    return int(key[0])


async def add_notices(connection: AsyncConnection, event_id: int, at: float, channels: Sequence[str]) -> None:
    told = {"event_id": event_id, "next_at": at, "attempts": 0, "lease_until": 0.0, "failure": ""}
    await connection.execute(insert(notices), [told | {"channel": channel} for channel in channels])


async def transaction_number(connection: AsyncConnection) -> int:
    """Gives the transaction its number, if it has none yet: higher than all that were given before.  PostgreSQL alone."""
    return int((await connection.execute(select(cast(cast(func.pg_current_xact_id(), Text), BigInteger)))).scalar_one())


# ---- reading ------------------------------------------------------------------------------------------------------------


async def after(
    connection: AsyncConnection, place: int, most: int, also: Sequence[int] = (), *, numbered: bool
) -> tuple[list[Event], int]:
    """Returns events behind `place`, lowest first, and the oldest transaction that had not ended as they were read.

    It is read in the same statement, so with the same snapshot.  `numbered`: a database that numbers transactions (PostgreSQL).
    """
    oldest: Any = literal(0)
    if numbered:
        oldest = cast(cast(func.pg_snapshot_xmin(func.pg_current_snapshot()), Text), BigInteger)
    where = or_(events.c.id > place, events.c.id.in_(also)) if also else events.c.id > place
    statement = select(events, oldest.label("oldest")).where(where).order_by(events.c.id).limit(most)
    rows = (await connection.execute(statement)).all()
    return [event_of(row) for row in rows], int(rows[0].oldest) if rows else 0


async def between(connection: AsyncConnection, place: int, top: int, most: int, wanted: Wanted) -> list[Event]:
    where = (events.c.id > place, events.c.id <= top, *wanted.conditions())
    rows = await connection.execute(select(events).where(*where).order_by(events.c.id).limit(most))
    return [event_of(row) for row in rows]


async def numbers(connection: AsyncConnection, place: int, top: int) -> list[int]:
    """Returns the ids behind `place` up to `top`."""
    where = (events.c.id > place, events.c.id <= top)
    return list((await connection.execute(select(events.c.id).where(*where))).scalars())


async def newest(connection: AsyncConnection, before: int, most: int, wanted: Wanted) -> list[Event]:
    """Newest first; `before` 0: from the newest on."""
    where = [events.c.id < before] if before else []
    rows = await connection.execute(select(events).where(*where, *wanted.conditions()).order_by(events.c.id.desc()).limit(most))
    return [event_of(row) for row in rows]


async def ends(connection: AsyncConnection) -> tuple[int, int]:
    """Returns the lowest and the highest id; 0 where there is none."""
    row = (await connection.execute(select(func.min(events.c.id), func.max(events.c.id)))).one()
    return int(row[0] or 0), int(row[1] or 0)


async def nth_newest(connection: AsyncConnection, number: int) -> int:
    """Returns the id of the `number`-th event from the end, or of the first one; 0 where there is none."""
    ids = select(events.c.id).order_by(events.c.id.desc()).limit(number).subquery()
    return int((await connection.execute(select(func.min(ids.c.id)))).scalar_one() or 0)


# ---- forgetting ---------------------------------------------------------------------------------------------------------


async def oldest_times(connection: AsyncConnection, most: int) -> list[tuple[int, float]]:
    rows = await connection.execute(select(events.c.id, events.c.at).order_by(events.c.id).limit(most))
    return [(row.id, row.at) for row in rows]


async def forget(connection: AsyncConnection, last: int) -> int:
    """Deletes events up to `last`, and what was to be told of them.  Returns how many there were."""
    await connection.execute(delete(notices).where(notices.c.event_id <= last))
    return int((await connection.execute(delete(events).where(events.c.id <= last))).rowcount)
