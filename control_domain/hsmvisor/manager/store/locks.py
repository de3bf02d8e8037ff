"""What managers do one after the other.  SQLite has one writer in any case."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

_MEMBERS = 0x68736D6D


async def members(connection: AsyncConnection) -> None:
    """Held to the transaction's end by whoever changes what resources there are, what is asked for, or many lines at once.

    A resource that comes while somebody asks is seen by one of the two.  Taken first in a transaction, so that nobody waits for it
    with rows in hand.
    """
    if connection.dialect.name == "postgresql":
        await connection.execute(select(func.pg_advisory_xact_lock(_MEMBERS)))
