"""The fallback when a module's device is lost while its guest runs: it is plugged in anew by QMP, without anybody asking.

A worker's successor takes the device over and the guest notes nothing.  Where that cannot be (worker and supervisor killed at once,
a device that its guest broke) QEMU still has the device, and nobody behind it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from hsmvisor.host.attachments import Attachments, lost
from hsmvisor.host.module import Module
from hsmvisor.host.modules import Modules
from hsmvisor.serving.audit import Audit
from hsmvisor.serving.errors import Exhausted, NotFound, ServiceError
from hsmvisor.serving.events import Events
from hsmvisor.serving.text import clean

_log = logging.getLogger(__name__)

_PAUSES = (0.2, 1.0, 3.0, 10.0, 30.0, 60.0, 300.0)  #: seconds before an attempt, by how many there were of late
_OF_LATE = 900.0  #: seconds; a guest that breaks its device again and again gets it back ever more rarely


class Replugs:
    def __init__(self, modules: Modules, attachments: Attachments, audit: Audit, events: Events) -> None:
        self._modules, self._attachments, self._audit, self._events = modules, attachments, audit, events
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._attempts: dict[str, deque[float]] = {}

    async def run(self) -> None:
        """Until cancelled, or the modules' watches end."""
        try:
            while True:
                try:
                    async for change in self._modules.watch(""):
                        self._consider(change.module)
                except Exhausted:  # too many changes at once: all are looked at anew
                    continue
                except ServiceError:
                    return
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _consider(self, module: Module) -> None:
        if lost(module) and module.name not in self._tasks:
            self._tasks[module.name] = asyncio.get_running_loop().create_task(self._bring_back(module.name))

    async def _bring_back(self, name: str) -> None:
        try:
            while not await self._attempt(name):
                pass
        finally:
            del self._tasks[name]

    async def _attempt(self, name: str) -> bool:
        """Says whether nothing more is to be done."""
        await asyncio.sleep(self._pause(name))
        try:
            row = await self._attachments.bring_back(name)
        except NotFound:
            return True
        except ServiceError as error:
            detail = clean(error.detail)
            _log.warning("module %s: its device is lost, and is not plugged in again: %s (%s)", name, detail, error.hint)
            self._audit.note("module.replug", who="host", module=name, result="failed", reason=error.reason, detail=detail)
            return False
        if row is not None:
            _log.warning("module %s: its device was lost; it is plugged into the guest at %s again", name, row.qmp)
            self._audit.note("module.replug", who="host", module=name, qmp=row.qmp, bus=clean(row.bus), result="ok")
            self._events.emit("module-replugged", name, {"qmp": row.qmp, "bus": row.bus})
        return True

    def _pause(self, name: str) -> float:
        """Counts an attempt; returns the seconds before it."""
        now = asyncio.get_running_loop().time()
        attempts = self._attempts.setdefault(name, deque(maxlen=len(_PAUSES) - 1))
        while attempts and now - attempts[0] > _OF_LATE:
            attempts.popleft()
        pause = _PAUSES[len(attempts)]
        attempts.append(now)
        return pause
