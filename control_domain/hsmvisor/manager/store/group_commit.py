"""SQLite's transactions, several at a time: each is a savepoint in one that is synced for all of them.

SQLite has one writer, and a commit waits for the disk.  Whoever comes while a commit is waited for would wait for the disk once
more, one after the other; so those who wait in line share the next commit.  Nobody goes on before its changes are on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from hsmvisor.manager.store.whole import carried_out, to_its_end
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncTransaction


class _Batch:
    """One transaction of the database's, with the changes of several."""

    def __init__(self, connection: AsyncConnection, whole: AsyncTransaction, committed: asyncio.Future[None]) -> None:
        self.connection, self.whole, self.committed = connection, whole, committed


class GroupCommit:
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._turn = asyncio.Lock()  #: first come, first served: that is what makes a batch end
        self._open: _Batch | None = None
        self._committers: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Returns when the changes are on the disk.  Raises what the driver raises."""
        async with self._turn:
            batch = self._open
            if batch is None:
                batch = await to_its_end(self._begin())
            async with carried_out(batch.connection.begin_nested()):
                yield batch.connection
        await asyncio.shield(batch.committed)

    async def _begin(self) -> _Batch:
        connection = await self._engine.connect()
        try:
            whole = await connection.begin()
        except BaseException:
            await connection.close()
            raise
        committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        committed.add_done_callback(_looked_at)
        self._open = batch = _Batch(connection, whole, committed)
        task = asyncio.get_running_loop().create_task(self._commit(batch))
        self._committers.add(task)
        task.add_done_callback(self._committers.discard)
        return batch

    async def _commit(self, batch: _Batch) -> None:
        """Its turn comes after those who wait already."""
        async with self._turn:
            self._open = None
            try:
                await batch.whole.commit()
            except BaseException as error:
                batch.committed.set_exception(error)
            try:
                await batch.connection.close()
            finally:  # nobody waits for ever, whatever becomes of the connection
                if not batch.committed.done():
                    batch.committed.set_result(None)

    async def close(self) -> None:
        await asyncio.gather(*self._committers, return_exceptions=True)


def _looked_at(committed: asyncio.Future[None]) -> None:
    """Whoever waited for it may be gone."""
    if not committed.cancelled():
        committed.exception()
