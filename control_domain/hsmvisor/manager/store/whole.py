"""What a cancellation must not interrupt.

A connection to SQLite does not survive one: its driver may be left in the middle of a statement, with the transaction open, and the
database locked for everybody.  So a statement is waited for, and the cancellation counts then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncTransaction

T = TypeVar("T")


async def to_its_end(work: Awaitable[T]) -> T:
    """Waits for the end of `work`, also when one is cancelled meanwhile; that counts then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except BaseException:
            break
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # one is told of the cancellation, whatever became of the work
        raise cancelled
    return task.result()


@contextlib.asynccontextmanager
async def carried_out(transaction: AsyncTransaction) -> AsyncIterator[None]:
    """Begins it; commits it at the end, or rolls it back."""
    try:
        await to_its_end(transaction.start())
        yield
    except BaseException:
        if transaction.sync_transaction is not None and transaction.is_active:
            await to_its_end(transaction.rollback())
        raise
    await to_its_end(transaction.commit())


class WholeConnection(AsyncConnection):
    """Carries its statements out to their end."""

    async def execute(self, *arguments: Any, **options: Any) -> Any:
        return await to_its_end(super().execute(*arguments, **options))

    async def run_sync(self, *arguments: Any, **options: Any) -> Any:
        return await to_its_end(super().run_sync(*arguments, **options))


class WholeEngine(AsyncEngine):
    _connection_cls = WholeConnection
