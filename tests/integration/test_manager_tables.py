"""The migrations make the tables that the code knows, on both databases."""

from __future__ import annotations

import asyncio
from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hsmvisor.manager.store.tables import metadata
from sqlalchemy import Column, Integer, MetaData, Table, inspect
from support.databases import opened


def differences(connection: Any, wanted: MetaData = metadata) -> list[Any]:
    options = {"compare_type": True, "compare_server_default": False}  # BIGSERIAL's default is the database's own
    return list(compare_metadata(MigrationContext.configure(connection, opts=options), wanted))


def test_migrations_and_tables_are_the_same(url: str) -> None:
    async def story() -> None:
        async with opened(url) as database, database.transaction() as connection:
            assert await connection.run_sync(differences) == []

    asyncio.run(story())


def test_a_difference_is_seen(url: str) -> None:
    other = MetaData(naming_convention=metadata.naming_convention)
    for table in metadata.tables.values():
        table.to_metadata(other)
    other.remove(other.tables["managers"])
    other.tables["events"].append_column(Column("mood", Integer))
    Table("extra", other, Column("id", Integer, primary_key=True))

    async def story() -> None:
        async with opened(url) as database, database.transaction() as connection:
            found = await connection.run_sync(differences, other)
            assert {row[0] for row in found} == {"add_table", "remove_table", "add_column"}

    asyncio.run(story())


def test_keys_and_foreign_keys_are_the_same(url: str) -> None:
    """compare_metadata does not look at primary keys."""

    def keys(connection: Any) -> dict[str, list[str]]:
        inspector = inspect(connection)
        return {name: inspector.get_pk_constraint(name)["constrained_columns"] for name in metadata.tables}

    async def story() -> None:
        async with opened(url) as database, database.transaction() as connection:
            found = await connection.run_sync(keys)
            assert found == {name: [c.name for c in table.primary_key] for name, table in metadata.tables.items()}

    asyncio.run(story())


def test_migrating_twice_changes_nothing(url: str) -> None:
    async def story() -> None:
        async with opened(url) as database:
            await database.migrate()
            async with database.transaction() as connection:
                assert await connection.run_sync(differences) == []

    asyncio.run(story())
