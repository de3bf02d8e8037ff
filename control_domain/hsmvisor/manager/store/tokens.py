"""Access tokens in the database: their hashes, and to whom they were given."""

from __future__ import annotations

from typing import Any

from hsmvisor.manager.store.rows import TokenRow
from hsmvisor.manager.store.tables import tokens
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection


async def token(connection: AsyncConnection, id: str) -> TokenRow | None:
    row = (await connection.execute(select(tokens).where(tokens.c.id == id))).one_or_none()
    return TokenRow.of(row) if row is not None else None


async def add(connection: AsyncConnection, row: TokenRow) -> None:
    await connection.execute(insert(tokens).values(vars(row)))


async def tokens_after(connection: AsyncConnection, id: str, count: int, owner: str = "") -> list[TokenRow]:
    query = select(tokens).where(tokens.c.id > id)
    if owner:
        query = query.where(tokens.c.owner == owner)
    return TokenRow.all((await connection.execute(query.order_by(tokens.c.id).limit(count))).all())


async def count_open(connection: AsyncConnection, now: int) -> int:
    where: tuple[Any, ...] = (tokens.c.revoked_at == 0, tokens.c.expires_at > now)
    return int((await connection.execute(select(func.count()).select_from(tokens).where(*where))).scalar_one())


async def made_by(connection: AsyncConnection, by: str) -> list[TokenRow]:
    query = select(tokens).where(tokens.c.created_by == by, tokens.c.revoked_at == 0)
    return TokenRow.all((await connection.execute(query)).all())


async def revoke(connection: AsyncConnection, id: str, at: int) -> None:
    await connection.execute(update(tokens).where(tokens.c.id == id, tokens.c.revoked_at == 0).values(revoked_at=at))


async def forget(connection: AsyncConnection, before: int) -> None:
    """Those that ended before that time."""
    await connection.execute(delete(tokens).where(tokens.c.expires_at < before))
