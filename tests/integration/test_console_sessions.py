"""What a session of the console asks of the database."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from hsmvisor.manager.store.tables import tokens
from sqlalchemy import event as happenings
from sqlalchemy import update
from support.console import rig


def test_a_session_asks_for_its_token_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as made:
            browser, engine = await made.logged_in("alice"), made.fleet.database.engine.sync_engine
            asked: list[str] = []

            def note(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
                asked.append(statement)

            happenings.listen(engine, "before_cursor_execute", note)
            await browser.text("/you")
            happenings.remove(engine, "before_cursor_execute", note)
            assert len([statement for statement in asked if "FROM tokens" in " ".join(statement.split())]) == 1

    asyncio.run(scenario())


def test_a_session_has_no_rights_that_were_written_into_the_database(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as made:
            browser = await made.logged_in("alice")
            async with made.fleet.database.transaction() as connection:
                await connection.execute(update(tokens).values(roles="operator"))
            assert (await browser.get("/you")).status_code == 303

    asyncio.run(scenario())
