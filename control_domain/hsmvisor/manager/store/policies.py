"""Versions of the policies in the database."""

from __future__ import annotations

from hsmvisor.manager.store.rows import PolicyRow
from hsmvisor.manager.store.tables import policies
from sqlalchemy import func, insert, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection


async def newest(connection: AsyncConnection) -> int:
    """Returns the version that counts, 0 where there is none."""
    return int((await connection.execute(select(func.max(policies.c.version)))).scalar_one_or_none() or 0)


async def version(connection: AsyncConnection, number: int) -> PolicyRow | None:
    row = (await connection.execute(select(policies).where(policies.c.version == number))).one_or_none()
    return PolicyRow.of(row) if row is not None else None


async def add(connection: AsyncConnection, row: PolicyRow) -> None:
    """Raises IntegrityError where the version is there."""
    await connection.execute(insert(policies).values(vars(row)))


async def before(connection: AsyncConnection, number: int, count: int) -> list[PolicyRow]:
    """Newest first, without texts; `number` 0: from the newest on."""
    columns = (policies.c.version, literal("").label("text"), policies.c.uploaded_at, policies.c.uploaded_by, policies.c.comment)
    query = select(*columns).order_by(policies.c.version.desc()).limit(count)
    if number:
        query = query.where(policies.c.version < number)
    return PolicyRow.all((await connection.execute(query)).all())
