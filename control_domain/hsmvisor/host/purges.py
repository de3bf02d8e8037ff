"""Keys of modules that are gone, to be destroyed in the HSMs where they lived: noted in the step that forgets the module, and tried
until it is done, also by the next service."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from hsmvisor.host import pauses
from hsmvisor.host.hsms import Hsms
from hsmvisor.host.state import PurgeRow, State
from hsmvisor.serving.audit import Audit
from hsmvisor.serving.errors import ServiceError

_PATIENCE = 5.0  #: seconds that a caller waits while it is tried again
_log = logging.getLogger(__name__)


class Purges:
    def __init__(self, hsms: Hsms, state: State, audit: Audit, within: float) -> None:
        """`within`: seconds that one may take."""
        self._hsms, self._state, self._audit, self._within = hsms, state, audit, within
        self._tasks: dict[PurgeRow, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Goes on with those that an earlier service did not finish."""
        for row in await self._state.purges():
            self._begin(row)

    async def carry_out(self, row: PurgeRow) -> str:
        """Returns "" when it is done, or why it is not done yet; it is tried on then."""
        return await self._begin(row)

    def _begin(self, row: PurgeRow) -> asyncio.Future[str]:
        tried: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        task = self._tasks[row] = asyncio.get_running_loop().create_task(self._run(row, tried))
        task.add_done_callback(lambda _: self._tasks.pop(row, None))
        return tried

    async def _run(self, row: PurgeRow, tried: asyncio.Future[str]) -> None:
        failures, began = 0, asyncio.get_running_loop().time()
        while (why := await self._try(row)) != "":
            failures += 1
            hopeless = self._closed(row) or not pauses.quick(failures)
            if not tried.done() and (hopeless or asyncio.get_running_loop().time() - began > _PATIENCE):
                tried.set_result(why)
                _log.warning("module %s: its keys are left in HSM %s: %s; tried again", row.name, row.hsm, why)
            await self._rest(row, failures)
        if not tried.done():
            tried.set_result("")

    async def _try(self, row: PurgeRow) -> str:
        try:
            await self._hsms.get(row.hsm).purge(row.module_id, self._within)
            await self._audit.record(
                "module.purge", who="host", module=row.name, module_id=row.module_id.hex(), hsm=row.hsm, result="ok"
            )
            await self._state.purged(row.module_id)
        except (ServiceError, OSError) as error:
            return error.detail if isinstance(error, ServiceError) else str(error)
        return ""

    async def _rest(self, row: PurgeRow, failures: int) -> None:
        hsm = self._hsms.find(row.hsm)
        if hsm is None:
            await asyncio.Event().wait()  # until the service is started with another configuration
        elif hsm.barred:
            await hsm.opened.wait()
        else:
            await asyncio.sleep(pauses.after(failures))

    def _closed(self, row: PurgeRow) -> bool:
        """Says whether somebody has to do something first."""
        hsm = self._hsms.find(row.hsm)
        return hsm is None or bool(hsm.barred)

    def left(self, hsm: str) -> int:
        """Returns of how many modules keys may be left in an HSM."""
        return sum(row.hsm == hsm for row in self._tasks)

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
