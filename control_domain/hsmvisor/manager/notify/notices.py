"""The queue of notices in the database: the statements.

A manager takes a notice by a lease: another one sees it again when the lease is over.  On PostgreSQL rows that another manager is
just taking are skipped; SQLite has one writer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hsmvisor.manager.history import rows
from hsmvisor.manager.history.happened import Event
from hsmvisor.manager.notify import limits
from hsmvisor.manager.store.tables import events, notices
from sqlalchemy import Select, and_, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True)
class Batch:
    """What goes out at once, with one lease."""

    channel: str
    events: tuple[Event, ...]
    attempts: int  #: the most that one of them had
    lease: float

    @property
    def ids(self) -> list[int]:
        return [event.id for event in self.events]


def _due(channel: str, now: float) -> Select[Any]:
    together = select(events, notices.c.attempts).join_from(notices, events, notices.c.event_id == events.c.id)
    where = (notices.c.channel == channel, notices.c.next_at <= now, notices.c.lease_until <= now)
    order = (notices.c.next_at, notices.c.event_id)
    return together.where(*where).order_by(*order).with_for_update(of=notices, skip_locked=True)


async def take(connection: AsyncConnection, channel: str, now: float, lease: float, *, digests: bool) -> Batch | None:
    """Takes what is due for the longest time: one notice, or many of one kind where there are more than DIGEST_OVER."""
    found = (await connection.execute(_due(channel, now).limit(1))).all()
    if digests and found:
        same = _due(channel, now).where(events.c.kind == found[0].kind).limit(limits.DIGEST_MOST)
        many = (await connection.execute(same)).all()
        found = many if len(many) > limits.DIGEST_OVER else found
    if not found:
        return None
    batch = Batch(channel, tuple(map(rows.event_of, found)), max(row.attempts for row in found), lease)
    mine = (notices.c.channel == channel, notices.c.event_id.in_(batch.ids))
    await connection.execute(update(notices).where(*mine).values(lease_until=lease))
    return batch


def _mine(batch: Batch) -> Any:
    """As long as nobody else has taken it."""
    return and_(notices.c.channel == batch.channel, notices.c.event_id.in_(batch.ids), notices.c.lease_until == batch.lease)


async def delivered(connection: AsyncConnection, batch: Batch) -> None:
    """Also where the lease was over: it need not be sent a third time."""
    await connection.execute(delete(notices).where(notices.c.channel == batch.channel, notices.c.event_id.in_(batch.ids)))


async def again(connection: AsyncConnection, batch: Batch, at: float, failure: str) -> None:
    told = {"next_at": at, "attempts": batch.attempts + 1, "lease_until": 0.0, "failure": failure}
    await connection.execute(update(notices).where(_mine(batch)).values(told))


async def give_back(connection: AsyncConnection, batch: Batch) -> None:
    await connection.execute(update(notices).where(_mine(batch)).values(lease_until=0.0))


async def lose(connection: AsyncConnection, batch: Batch, now: float) -> list[str]:
    """Deletes those of the channel whose time is over, `batch` among them; returns the kinds of their events."""
    mine = (await connection.execute(select(notices.c.event_id).where(_mine(batch)).with_for_update())).scalars().all()
    over = and_(
        notices.c.channel == batch.channel,
        notices.c.lease_until <= now,
        notices.c.attempts > 0,
        events.c.at <= now - limits.GIVE_UP,
    )
    return await _delete(
        connection, over, {event.id: (batch.channel, event.kind) for event in batch.events if event.id in set(mine)}
    )


async def sweep(connection: AsyncConnection, now: float) -> dict[str, list[str]]:
    """Deletes what nobody wanted to send for long; returns the kinds of the events by channel."""
    over = and_(notices.c.lease_until <= now, events.c.at <= now - limits.FORGET)
    lost: dict[str, list[str]] = {}
    for channel, kind in await _pairs(connection, over):
        lost.setdefault(channel, []).append(kind)
    return lost


async def _pairs(connection: AsyncConnection, over: Any) -> list[tuple[str, str]]:
    together = select(notices.c.event_id, notices.c.channel, events.c.kind).join_from(
        notices, events, notices.c.event_id == events.c.id
    )
    found = (
        await connection.execute(together.where(over).limit(limits.SWEPT_AT_ONCE).with_for_update(of=notices, skip_locked=True))
    ).all()
    for row in found:
        await connection.execute(delete(notices).where(notices.c.event_id == row.event_id, notices.c.channel == row.channel))
    return [(row.channel, row.kind) for row in found]


async def _delete(connection: AsyncConnection, over: Any, own: dict[int, tuple[str, str]]) -> list[str]:
    for event_id, (channel, _) in own.items():
        await connection.execute(delete(notices).where(notices.c.event_id == event_id, notices.c.channel == channel))
    return [kind for _, kind in own.values()] + [kind for _, kind in await _pairs(connection, over)]
