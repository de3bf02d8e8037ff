"""The console's beginning and end: `async with` it, once what it asks is there."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from hsmvisor.addresses import LOOPBACK
from hsmvisor.manager import config
from hsmvisor.manager.console.app import Application
from hsmvisor.manager.console.door import Door
from hsmvisor.manager.console.parts import Parts
from hsmvisor.manager.console.sessions import Sessions
from hsmvisor.manager.web import Server, Tls


class Console:
    def __init__(
        self, parts: Parts, settings: config.Console, tls: Tls | None, ticks: Callable[[], float] = time.monotonic
    ) -> None:
        """`tls` None: plain, on a loopback address, where no other name than that may lead."""
        sessions = Sessions(settings.session_seconds, settings.idle_seconds, ticks)
        self.door = Door(parts, sessions, secure=tls is not None)
        self.application = Application(parts, self.door, frozenset() if tls else frozenset(LOOPBACK))
        self.server = Server(self.application.asgi, settings.address, tls, "console")

    async def __aenter__(self) -> Self:
        """Returns when it answers.  Raises Broken."""
        await self.server.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.application.close()
        await self.server.stop()
