"""Commands on their way to hosts: signed ones, and what hosts are asked of their guests' boots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hsmvisor.manager.store.inventory import parts
from hsmvisor.manager.store.rows import CommandRow
from hsmvisor.manager.store.tables import commands, hosts
from sqlalchemy import delete, exists, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection


async def add(connection: AsyncConnection, rows: Sequence[CommandRow]) -> None:
    for some in parts([vars(row) for row in rows]):
        await connection.execute(insert(commands), list(some))


async def queued(
    connection: AsyncConnection, host_id: str, count: int, now: float, expires_after: float, but: Sequence[str] = ()
) -> list[CommandRow]:
    """In the order in which each module has to have them.  A host that was revoked, also while it waits, gets none."""
    joined = exists().where(hosts.c.id == host_id, hosts.c.state == "joined")
    where = (commands.c.host_id == host_id, commands.c.expires_at > expires_after, joined, _still_given(now))
    query = (
        select(commands).where(*where, commands.c.id.not_in(but)).order_by(commands.c.created_at, commands.c.sequence).limit(count)
    )
    return CommandRow.all((await connection.execute(query)).all())


def _still_given(now: float) -> Any:
    return or_(commands.c.give_until == 0, commands.c.give_until > now)


async def forget_late(connection: AsyncConnection, host_id: str, now: float) -> None:
    """A host that begins anew is not given any more what was to be given for a while only, and has not carried it out."""
    await connection.execute(delete(commands).where(commands.c.host_id == host_id, ~_still_given(now)))


async def waiting_hosts(connection: AsyncConnection, host_ids: Sequence[str], after: float) -> set[str]:
    """Returns those of the hosts for which there are commands that are newer than `after`."""
    found: set[str] = set()
    for some in parts(host_ids):
        where = (commands.c.host_id.in_(some), commands.c.created_at >= after)
        found |= set((await connection.execute(select(commands.c.host_id).where(*where).distinct())).scalars())
    return found


async def of_line(connection: AsyncConnection, line_id: str) -> list[CommandRow]:
    where = commands.c.line_id == line_id
    return CommandRow.all((await connection.execute(select(commands).where(where).order_by(commands.c.sequence))).all())


async def by_ids(connection: AsyncConnection, host_id: str, ids: Sequence[str]) -> dict[str, CommandRow]:
    found: dict[str, CommandRow] = {}
    for some in parts(ids):
        where = (commands.c.host_id == host_id, commands.c.id.in_(some))
        found |= {row.id: row for row in CommandRow.all((await connection.execute(select(commands).where(*where))).all())}
    return found


async def remove(connection: AsyncConnection, ids: Iterable[str]) -> None:
    for some in parts(list(ids)):
        await connection.execute(delete(commands).where(commands.c.id.in_(some)))


async def prune(connection: AsyncConnection, now: float) -> None:
    """Those that no module would carry out any more."""
    await connection.execute(delete(commands).where(commands.c.expires_at <= now))


async def remove_of_resource(connection: AsyncConnection, resource_id: str) -> None:
    await connection.execute(delete(commands).where(commands.c.resource_id == resource_id))


async def count_on_hosts(connection: AsyncConnection, host_ids: Sequence[str]) -> dict[str, int]:
    query = select(commands.c.host_id, func.count()).where(commands.c.host_id.in_(host_ids)).group_by(commands.c.host_id)
    return {id: int(count) for id, count in (await connection.execute(query)).all()}
