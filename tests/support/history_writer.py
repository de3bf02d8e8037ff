"""Writes events into a manager's database from another process.  usage: python -m support.history_writer URL COUNT"""

from __future__ import annotations

import asyncio
import sys

from hsmvisor.manager.history.events import Happened, History, Kind
from hsmvisor.manager.store.database import Database


async def write(url: str, count: int) -> None:
    database = Database(url)
    history = History(database)
    for number in range(count):
        async with database.transaction() as connection:
            await history.add(connection, Happened(Kind.ROTATED, "alice", material="web", detail={"number": number}))
    await history.close()
    await database.close()


if __name__ == "__main__":
    asyncio.run(write(sys.argv[1], int(sys.argv[2])))
