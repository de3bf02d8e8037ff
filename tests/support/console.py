"""A manager's console of a test's own: the real one, over a socket, before a fleet of light hosts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from hsmvisor.manager.access.callers import FleetCaller
from hsmvisor.manager.access.tokens import Tokens
from hsmvisor.manager.answers import Answers
from hsmvisor.manager.auth import Authenticator
from hsmvisor.manager.ca.builtin.authority import open_authority
from hsmvisor.manager.ca.builtin.keys import FileKeys
from hsmvisor.manager.ca.builtin.profiles import PROFILES
from hsmvisor.manager.config import Config
from hsmvisor.manager.config import Console as Settings
from hsmvisor.manager.console.console import Console
from hsmvisor.manager.console.parts import Parts
from hsmvisor.manager.desk import Desk
from hsmvisor.manager.inventory.identities import Identities, OwnCertificate
from hsmvisor.manager.roles import GIVEN
from hsmvisor.manager.store import policies
from hsmvisor.manager.store.rows import PolicyRow
from hsmvisor.manager.web import Tls
from hsmvisor.serving.audit import Audit
from hsmvisor.serving.requests import Requests
from support.fleet import POLICY, Clock, Fleet

_CSRF = re.compile(r'name="csrf" value="([^"]+)"')
_REQUEST = re.compile(r'name="request" value="([^"]+)"')


class Ticks:
    """What sessions are timed by."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Rig:
    fleet: Fleet
    console: Console
    tokens: Tokens
    ticks: Ticks
    audit: Audit
    own: OwnCertificate
    config: Config
    secure: bool
    browsers: list[httpx.AsyncClient] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{'https' if self.secure else 'http'}://localhost:{self.console.server.port}"

    async def token(self, owner: str = "alice", *roles: str) -> str:
        giver = FleetCaller("test", GIVEN, owner="root")
        async with self.fleet.database.transaction() as connection:
            id, _ = await self.tokens.create(connection, giver, owner, (), roles, 0)
        return await self.tokens.text(id)

    async def revoke(self, token: str) -> None:
        row = await self.tokens.find(token)
        async with self.fleet.database.transaction() as connection:
            await self.tokens.revoke(connection, row, "test")

    def browser(self, **options: Any) -> Browser:
        client = httpx.AsyncClient(base_url=self.url, **options)
        self.browsers.append(client)
        return Browser(client, self.url)

    async def logged_in(self, owner: str = "alice", *roles: str) -> Browser:
        browser = self.browser()
        answer = await browser.post("/login", token=await self.token(owner, *roles))
        assert answer.status_code == 303, answer.text
        return browser

    async def audited(self) -> str:
        """With all that was noted until now."""
        await self.audit.record("test.read", who="test")
        return await asyncio.to_thread(self.audit.path.read_text)


@dataclass
class Browser:
    """What a browser adds to its requests."""

    client: httpx.AsyncClient
    url: str

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.client.get(path, headers={"sec-fetch-site": "same-origin", "sec-fetch-dest": "document", **headers})

    async def text(self, path: str) -> str:
        answer = await self.get(path)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
        return answer.text

    async def post(self, path: str, headers: dict[str, str] | None = None, **form: str) -> httpx.Response:
        own = {"origin": self.url, "sec-fetch-site": "same-origin", "sec-fetch-dest": "document"}
        return await self.client.post(path, data=form, headers=own if headers is None else headers)

    async def confirm(self, path: str, **form: str) -> httpx.Response:
        """Opens the page that asks once more, and sends its form."""
        page = await self.text(path)
        csrf, request = _CSRF.search(page), _REQUEST.search(page)
        assert csrf and request
        return await self.post(path, **{"csrf": csrf[1], "request": request[1], **form})

    async def csrf(self) -> str:
        found = _CSRF.search(await self.text("/you"))
        assert found
        return found[1]


@contextlib.asynccontextmanager
async def rig(
    directory: Path,
    fleet: Fleet | None = None,
    settings: Settings | None = None,
    config: Config | None = None,
    tls: bool = False,
    client_ca: Path | None = None,
) -> AsyncIterator[Rig]:
    fleet = fleet or await Fleet.begin(directory, clock=Clock(time.time()) if tls else None)
    clock, database = fleet.clock, fleet.database
    audit = Audit(
        directory / "audit.log",
        lambda data: bytes(64),
        service="manager",
        rotate_bytes=1 << 30,
        checkpoint_lines=10**6,
        checkpoint_seconds=3600,
    )
    audit.start()
    async with database.transaction() as connection:
        await policies.add(connection, PolicyRow(1, POLICY, int(clock()), "otto", "what a test begins with"))
    ca = await open_authority("fleet", FileKeys(directory / "fleet"), database, {"host": PROFILES["host"]}, clock=clock)
    identities = Identities(ca)
    own = OwnCertificate(identities, directory, ("localhost",), clock)
    config = config or Config()
    tokens = Tokens(database, fleet.history, os.urandom(32), clock)
    authenticator = Authenticator(config, identities, database, tokens, clock)
    answers = Answers(database, clock)
    parts = Parts(
        database=database,
        desk=Desk(database, Requests(answers, audit), answers, fleet.hub),
        asking=fleet.asking,
        history=fleet.history,
        authenticator=lambda: authenticator,
        audit=audit,
        policy_version=lambda: fleet.policies.version,
        manager="one",
        version="0.1.0",
        clock=clock,
    )
    files = None
    if tls:
        await own.ensure()
        files = Tls(str(own.file), str(own.file), str(client_ca or ""))
    ticks = Ticks()
    settings = settings or Settings(address="127.0.0.1:0", plain=not tls)
    console = Console(parts, settings, files, ticks)
    made = Rig(fleet, console, tokens, ticks, audit, own, config, tls)
    try:
        async with console:
            yield made
            await asyncio.gather(*(browser.aclose() for browser in made.browsers))
    finally:
        await audit.close()
        await fleet.end()


async def web(fleet: Fleet, count: int = 2, **more: Any) -> Any:
    """A host with so many of alice's web servers, and her request for them.  Returns the request."""
    host = await fleet.host("rack-1")
    for number in range(count):
        host.add(f"web-{number + 1}", role="web")
    await fleet.settle()
    spec = {"material": "tls", "names": ("dns:{name}.example.net",), "lifetime": 30 * 86400, "selector": {"role": "web"}} | more
    row = await fleet.ask(**spec)
    await fleet.settle()
    return row
