"""Where one module's keys live: in software, or behind a helper in an HSM, with which its worker is connected while both live."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from hsmvisor.host import pauses
from hsmvisor.host.hsm_helper import Helper, HsmFault
from hsmvisor.host.hsms import Hsms
from hsmvisor.host.link import LinkClosed, PeerError
from hsmvisor.host.measures import Measure
from hsmvisor.host.worker import WorkerProcess

STEADY = 5.0  #: seconds of life after which a helper's death counts as the first one again
_log = logging.getLogger(__name__)


class Cryptoprocessor:
    def __init__(
        self,
        hsms: Hsms,
        hsm: str,
        module: str,
        module_id: bytes,
        within: float,
        serving: Callable[[], WorkerProcess | None],
        told: Callable[[str], None],
    ) -> None:
        """`hsm`: its name, "" = software.  `serving` returns the module's worker while it serves.  `told` is called with why that
        worker cannot use its keys, or "" when it can again."""
        self._hsms, self.hsm, self._module, self._module_id = hsms, hsm, module, module_id
        self._within, self._serving, self._told = within, serving, told
        self._helper: Helper | None = None
        self._connected: WorkerProcess | None = None  #: who has an end of that helper
        self._one = asyncio.Lock()
        self._look = asyncio.Event()  #: something is different
        self._asked = asyncio.Event()  #: somebody wants it to be tried now
        self._keeper: asyncio.Task[None] | None = None
        self._failures = 0
        self.restarts = 0
        self.used = False  #: a helper was logged in for it: there may be keys

    # ---- for a worker that starts ---------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Returns when there is a helper that is logged in; raises HsmFault, OSError."""
        if self.hsm:
            async with self._one:
                if self._helper is None or not self._helper.usable:
                    self._helper, self._connected = await self._start(), None

    async def give(self, worker: WorkerProcess) -> None:
        """Connects a worker with the helper.  Raises HsmFault, PeerError, LinkClosed, TimeoutError, OSError."""
        if not self.hsm:
            return
        await self.ready()
        helper = self._helper
        assert helper is not None
        await self._connect(helper, worker)
        self._connected = worker

    async def _start(self) -> Helper:
        helper = await self._hsms.get(self.hsm).start(self._module_id, self._within)
        self.used = True
        helper.on_end = self.look
        return helper

    async def _connect(self, helper: Helper, worker: WorkerProcess) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await helper.serve(ours, self._within)
            await worker.use_hsm(theirs, self._within)

    # ---- a successor ----------------------------------------------------------------------------------------------

    async def fresh(self) -> Helper | None:
        """Returns a helper of its own for a worker that is to take over; the caller gives it to `connect`, then to `succeed`, or
        ends it.  None: software.  Raises HsmFault, OSError."""
        return await self._start() if self.hsm else None

    async def connect(self, helper: Helper | None, worker: WorkerProcess) -> None:
        """Raises as `give` does."""
        if helper is not None:
            await self._connect(helper, worker)

    def succeed(self, helper: Helper | None, worker: WorkerProcess) -> None:
        """Both have taken over: the helper before serves its worker to the end."""
        if helper is not None:
            if self._helper is not None:
                self._helper.retire()
            self._helper, self._connected = helper, worker

    # ---- service --------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Something is different: a worker serves, or a helper has ended."""
        if self.hsm:
            self._look.set()
            if self._keeper is None:
                self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def _keep(self) -> None:
        """Connects the worker that serves whenever it is not connected; until cancelled."""
        while True:
            self._look.clear()
            worker = self._serving()
            connected = self._connected is worker and self._helper is not None and self._helper.usable
            if worker is None or connected:
                if worker is not None:
                    self._told("")
                await self._look.wait()
                continue
            self._mourn()
            await self._rest()
            if self._serving() is not worker:
                continue
            try:
                await self.give(worker)
            except (HsmFault, PeerError, LinkClosed, TimeoutError, OSError) as error:
                if self._serving() is worker:
                    await self._failed(error)

    def _mourn(self) -> None:
        """Takes note of a helper's death."""
        helper = self._helper
        if helper is None or helper.usable:
            return
        self._helper = None
        self.restarts += 1
        if (hsm := self._hsms.find(self.hsm)) and helper.wrong_pin:
            hsm.bar(helper.last)
        _log.error("module %s: helper %d of HSM %s is gone; another one is started", self._module, helper.pid, self.hsm)
        if asyncio.get_running_loop().time() - helper.began > STEADY:
            self._failures = 0
            return
        self._failures += 1
        if not pauses.quick(self._failures):
            self._told(f"HSM {self.hsm}: its helper ends again and again: {helper.last or 'see the host log'}")

    async def _rest(self) -> None:
        """As long as failures demand, or until somebody asks."""
        if self._failures:
            self._asked.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pauses.after(self._failures)):
                    await self._asked.wait()

    async def _failed(self, error: Exception) -> None:
        self._failures += 1
        final = isinstance(error, HsmFault) and error.final
        why = str(error) or "no answer"
        if isinstance(error, HsmFault):
            why = f"{error.detail}: {error.hint}" if error.hint else error.detail
        if final or not pauses.quick(self._failures):
            self._told(why)
        else:
            _log.warning("module %s: its worker is not connected with HSM %s: %s; tried again", self._module, self.hsm, why)
        if final:
            await self.opened()

    # ---- asked by an operator -------------------------------------------------------------------------------------

    @property
    def barred(self) -> bool:
        """A wrong PIN stands in the way."""
        hsm = self._hsms.find(self.hsm)
        return hsm is not None and bool(hsm.barred)

    def reopen(self) -> None:
        """A wrong PIN may be tried once more, and what waits is tried now."""
        if hsm := self._hsms.find(self.hsm):
            hsm.reopen()
        self._failures = 0
        self._asked.set()

    async def opened(self) -> None:
        """Returns when a wrong PIN may be tried once more; of an HSM that is not configured, never."""
        hsm = self._hsms.find(self.hsm)
        await (hsm.opened if hsm else asyncio.Event()).wait()

    # ---- shown ----------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self._helper.pid if self._helper and not self._helper.ended else 0

    @property
    def token(self) -> str:
        return self._helper.token if self._helper else ""

    @property
    def measures(self) -> tuple[Measure, ...]:
        found = self._helper.measures if self._helper else ()
        return tuple(Measure(f"HSM helper: {m.name}", m.applied, m.detail) for m in found)

    # ---- the end --------------------------------------------------------------------------------------------------

    async def halt(self) -> None:
        """Starts no helper any more."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None

    async def end(self) -> None:
        """Once its worker has ended."""
        helper, self._helper, self._connected = self._helper, None, None
        if helper is not None:
            await helper.end()

    def kill(self) -> None:
        """No process that held a destroyed key goes on."""
        if self._helper is not None:
            self._helper.kill()
