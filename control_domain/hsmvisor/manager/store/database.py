"""The manager's database: SQLite in a file, or PostgreSQL by URL.  What is committed survives a loss of power in both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import asyncpg
from alembic import command
from alembic.config import Config
from hsmvisor.manager.store.group_commit import GroupCommit
from hsmvisor.manager.store.whole import WholeEngine, carried_out, to_its_end
from hsmvisor.serving.errors import Invalid, StorageUnavailable
from sqlalchemy import event, func, make_url, select
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

_MIGRATIONS = Path(__file__).parent / "migrations"
_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
_READING: dict[str, dict[str, Any]] = {
    "sqlite": {"reading": True},
    "postgresql": {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
}
_MIGRATING = 0x68736D76  #: the lock that a manager has while it migrates (PostgreSQL)
CONNECTIONS = 24  #: that stay open; to open one costs as much as ten transactions
_BAD_DATA, _ROLLED_BACK = "22", "40"  #: classes of SQLSTATE (PostgreSQL's appendix A)
BUSY_SECONDS = 30  #: that a writer waits for another one (SQLite)

__all__ = ["Conflict", "Database", "DatabaseError", "IntegrityError"]


class DatabaseError(StorageUnavailable):
    """The message says what to do; it holds no password."""

    def __init__(self, message: str) -> None:
        super().__init__("DATABASE", message, "look at the manager's database; the call may be made again")

    def __str__(self) -> str:
        return self.detail


class Conflict(DatabaseError):
    """Others were quicker: the same may be done again at once."""


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
        options: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}} if self.kind == "sqlite" else {}
        self.engine: AsyncEngine = create_async_engine(self._url, pool_size=CONNECTIONS, max_overflow=CONNECTIONS, **options)
        self._group: GroupCommit | None = None
        self.statements = self.transactions = 0  #: since the beginning
        event.listen(self.engine.sync_engine, "before_cursor_execute", self._count_statement)
        event.listen(self.engine.sync_engine, "begin", self._count_transaction)
        if self.kind == "sqlite":
            self.engine = WholeEngine(self.engine.sync_engine)
            event.listen(self.engine.sync_engine, "connect", _prepare_sqlite)
            event.listen(self.engine.sync_engine, "begin", _begin_immediately)

    def _count_statement(self, *arguments: object) -> None:
        self.statements += 1

    def _count_transaction(self, connection: object) -> None:
        self.transactions += 1

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
        """Commits at the end, or changes nothing.

        Raises Conflict where it has to be done again; DatabaseError when the database is away or full; Invalid for a value that
        it cannot keep; IntegrityError.
        """
        if self.kind == "sqlite":
            if self._group is None:
                self._group = GroupCommit(self.engine)
            async with self._told_plainly(self._group.transaction()) as connection:
                yield connection
        else:
            async with self._told_plainly(self._whole({})) as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """One state of all tables, and nothing is changed: nobody waits for it, and it for nobody.  Raises DatabaseError."""
        async with self._told_plainly(self._whole(_READING[self.kind])) as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def _whole(self, options: dict[str, Any]) -> AsyncIterator[AsyncConnection]:
        connection = self.engine.connect()
        try:
            # a server that does not answer is waited for no longer than one wants
            await (to_its_end(connection.start()) if self.kind == "sqlite" else connection.start())
            if options:
                await to_its_end(connection.execution_options(**options))
            async with carried_out(connection.begin()):
                yield connection
        finally:
            if connection.sync_connection is not None:
                await to_its_end(connection.close())

    @contextlib.asynccontextmanager
    async def _told_plainly(self, transaction: AbstractAsyncContextManager[AsyncConnection]) -> AsyncIterator[AsyncConnection]:
        """What the driver raises because the database is away or full comes out as DatabaseError, what the caller does as it is."""
        entered = False
        try:
            async with transaction as connection:
                entered = True
                yield connection
        except IntegrityError:
            raise
        except DBAPIError as error:
            state = str(getattr(error.orig, "sqlstate", None) or "")
            if entered and state.startswith(_BAD_DATA):
                raise Invalid(
                    "TEXT", "a text has a character that cannot stand in the database, or a number is too large"
                ) from None
            away = isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
            if state.startswith(_ROLLED_BACK):
                raise Conflict(f"{self.shown}: {_plain(error)}") from None
            if not entered or away:
                raise DatabaseError(f"{self.shown}: {_plain(error)}") from None
            raise
        except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            if entered:
                raise
            raise DatabaseError(f"{self.shown}: {_plain(error)}") from None

    async def close(self) -> None:
        if self._group is not None:
            await self._group.close()
        await asyncio.shield(self.engine.dispose())


def _plain(error: BaseException) -> str:
    """Returns what the driver says, without the statement and its values."""
    original = getattr(error, "orig", None)
    return (str(original or error) or type(error).__name__).splitlines()[0]


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_immediately` says so
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", "temp_store=MEMORY"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediately(connection: Any) -> None:
    """A reader that writes later would fail instead of waiting for its turn; one that never does takes nobody's."""
    connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("reading") else "BEGIN IMMEDIATE")


def _upgrade(connection: Any) -> None:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
