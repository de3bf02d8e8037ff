"""What a renewal costs does not grow with the fleet: none of its statements reads a whole table (PostgreSQL says how it reads)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg
from hsmvisor.manager.store.database import Database
from sqlalchemy import event, text
from support.fleet import Fleet
from support.postgres import Postgres
from support.scenarios import SHARED, WEB, held, played

MANY = 5000  #: rows of each table: to read them all costs more than an index
OTHERS = {  #: what stands in other rows' place, by table: as MANY other guests with a key each
    "resources": {"id": "'x/' || i", "host_id": "'x'", "name": "'x' || i", "module": "'x' || i", "module_id": "md5('x' || i)"},
    "resource_attributes": {"resource_id": "'x/' || i", "value": "'x'"},
    "lines": {"id": "md5('l' || i)", "resource_id": "'x/' || i"},
    "generations": {"line_id": "md5('l' || i)"},
    "deliveries": {"line_id": "md5('l' || i)", "resource_id": "'x/' || i"},
}


class Statements:
    """Those that a database was given, with values of one call of each."""

    def __init__(self, database: Database) -> None:
        self.found: dict[str, Sequence[Any]] = {}
        event.listen(database.engine.sync_engine, "before_cursor_execute", self._note)

    def _note(self, connection: Any, cursor: Any, statement: str, values: Any, context: Any, many: bool) -> None:
        self.found.setdefault(statement, values[0] if many else values)


async def fill(database: Database) -> None:
    """Many other guests, each with what the first one has."""
    columns = text("select column_name from information_schema.columns where table_name = :table order by ordinal_position")
    async with database.transaction() as connection:
        await connection.execute(
            text(
                "insert into hosts select 'x', 'x', host_key, pin, state, trusted, owners, certificate, "
                "certificate_before, certificate_ends_at, joined_at, seen_at, version, session, number, away from hosts limit 1"
            )
        )
        for table, others in OTHERS.items():
            names = (await connection.execute(columns, {"table": table})).scalars().all()
            values = ", ".join(others.get(name, f'one."{name}"') for name in names)
            one = f"(select * from {table} limit 1) as one"
            await connection.execute(text(f"insert into {table} select {values} from {one}, generate_series(1, {MANY}) as i"))
        await connection.execute(text("analyze"))


async def whole_tables(url: str, statements: Statements) -> list[str]:
    """Returns the statements that read all of a large table, as they are carried out."""
    connection = await asyncpg.connect(url)
    wrong = []
    try:
        for statement, values in statements.found.items():
            if statement.lstrip().upper().startswith(("SELECT", "UPDATE", "DELETE")):
                plan = "\n".join(row[0] for row in await connection.fetch("explain " + statement, *(values or ())))
                wrong += [f"{statement}\n{plan}" for table in OTHERS if f"Seq Scan on {table}" in plan]
    finally:
        await connection.close()
    return wrong


def test_no_statement_of_a_renewal_reads_a_whole_table(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()

    async def scenario(fleet: Fleet) -> None:
        host = await fleet.host("h1")
        guest = host.add("web-1", env="prod")
        host.add("web-2", env="prod")
        await fleet.settle()
        requests = [
            await fleet.ask(**WEB, selector={"env": "prod"}),
            await fleet.ask(**SHARED | {"material": "shared"}, selector={"env": "prod"}),
        ]
        await fleet.settle()
        fleet.clock.pass_(60)
        for request in requests:
            async with fleet.database.transaction() as connection:
                await fleet.asking.rotate(connection, request, "h1/web-1", False, False, "", "alice", "")
        statements = Statements(fleet.database)
        await fleet.settle()
        late = host.add("web-3", env="prod")
        await fleet.settle()
        assert (held(guest), held(guest, "shared"), held(late)) == (2, 3, 1)
        found = dict(statements.found)
        await fill(fleet.database)
        statements.found = found
        assert await whole_tables(url, statements) == []

    played(tmp_path, url, scenario)
