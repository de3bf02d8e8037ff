"""Both databases of a manager, each new for a test."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hsmvisor.manager.store.database import Database


def new_url(kind: str, request: pytest.FixtureRequest) -> str:
    if kind == "postgresql":
        return str(request.getfixturevalue("postgres").database())
    directory: Path = request.getfixturevalue("tmp_path")
    return f"sqlite:///{directory}/fleet.db"


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    database = Database(url)
    await database.migrate()
    try:
        yield database
    finally:
        await database.close()
