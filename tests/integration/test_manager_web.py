"""A web server inside the manager that ends by itself."""

from __future__ import annotations

import asyncio

import pytest
from hsmvisor.manager import web
from hsmvisor.manager.pki import Pki


def test_a_web_server_that_ends_says_which_one_it_was(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks = asyncio.Event()

    async def broken(server: web._Server) -> None:
        await breaks.wait()
        raise RuntimeError("no more")

    monkeypatch.setattr(web._Server, "main_loop", broken)

    async def scenario() -> None:
        async with Pki({}, "127.0.0.1:0"):
            breaks.set()
            await asyncio.sleep(0.1)

    asyncio.run(scenario())
    assert [record.getMessage() for record in caplog.records if record.name == web.__name__] == ["the pki has ended: no more"]
