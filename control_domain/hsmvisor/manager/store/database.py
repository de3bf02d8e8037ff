"""The manager's database: SQLite in a file, or PostgreSQL by URL.  What is committed survives a loss of power in both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from hsmvisor.serving.errors import StorageUnavailable
from sqlalchemy import event, func, make_url, select
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

_MIGRATIONS = Path(__file__).parent / "migrations"
_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
_MIGRATING = 0x68736D76  #: the lock that a manager has while it migrates (PostgreSQL)
BUSY_SECONDS = 30  #: that a writer waits for another one (SQLite)

__all__ = ["Database", "DatabaseError", "IntegrityError"]


class DatabaseError(StorageUnavailable):
    """The message says what to do; it holds no password."""

    def __init__(self, message: str) -> None:
        super().__init__("DATABASE", message, "look at the manager's database; the call may be made again")

    def __str__(self) -> str:
        return self.detail


class Database:
    """`url`: sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME."""

    def __init__(self, url: str) -> None:
        """Raises DatabaseError."""
        try:
            parsed = make_url(url)
        except Exception:
            raise DatabaseError("the database's URL is sqlite:///PATH or postgresql://USER@HOST/NAME") from None
        driver = _DRIVERS.get(parsed.drivername)
        if driver is None:
            raise DatabaseError(f"a database of kind {parsed.drivername!r}: use sqlite or postgresql")
        self.kind = parsed.drivername
        self.shown = parsed.render_as_string(hide_password=True)
        self._url = parsed.set(drivername=driver)
        options: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}} if self.kind == "sqlite" else {"pool_pre_ping": True}
        self.engine: AsyncEngine = create_async_engine(self._url, **options)
        if self.kind == "sqlite":
            event.listen(self.engine.sync_engine, "connect", _prepare_sqlite)
            event.listen(self.engine.sync_engine, "begin", _begin_immediately)

    async def migrate(self) -> None:
        """Brings the tables to this release's form.  Raises DatabaseError."""
        try:
            async with self.engine.begin() as connection:
                if self.kind == "postgresql":  # one manager at a time
                    await connection.execute(select(func.pg_advisory_xact_lock(_MIGRATING)))
                await connection.run_sync(_upgrade)
        except (DBAPIError, OSError) as error:
            raise DatabaseError(f"{self.shown}: {_plain(error)}") from None

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Commits at the end, or changes nothing.  Raises DatabaseError when the database is away or full; IntegrityError."""
        try:
            connection = await self.engine.connect()
        except (DBAPIError, OSError) as error:
            raise DatabaseError(f"{self.shown}: {_plain(error)}") from None
        try:
            async with connection.begin():
                yield connection
        except DBAPIError as error:
            if isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated:
                raise DatabaseError(f"{self.shown}: {_plain(error)}") from None
            raise
        finally:
            await asyncio.shield(connection.close())

    async def close(self) -> None:
        await asyncio.shield(self.engine.dispose())


def _plain(error: BaseException) -> str:
    """Returns what the driver says, without the statement and its values."""
    original = getattr(error, "orig", None)
    return str(original or error).splitlines()[0]


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_immediately` says so
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", "temp_store=MEMORY"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediately(connection: Any) -> None:
    """A reader that writes later would fail instead of waiting for its turn."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _upgrade(connection: Any) -> None:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
