"""The launchers, seen from the supervisor: they fork workers, and TPMs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from hsmvisor.host import reports
from hsmvisor.host.child import Child, HelperLost
from hsmvisor.host.link import LinkClosed, PeerError
from hsmvisor.host.measures import Measure
from hsmvisor_rpc.internal import messages as m

MODULE = "hsmvisord.launcher.main"
OF_TPMS = "hsmvisord.tpm.launcher"
_FOR_EVER = 3600.0


@dataclass(frozen=True)
class Worker:
    """A forked process: its pid and a pidfd (the owner's to close)."""

    pid: int
    pidfd: int


class Launcher:
    def __init__(self, module: str = MODULE, name: str = "launcher") -> None:
        self.child = Child(name, module, [])

    async def measures(self, within: float) -> tuple[Measure, ...]:
        """Returns those of its own sandbox; none when it cannot be asked."""
        try:
            async with asyncio.timeout(within):
                link = await self.child.link()
                answer, _ = await link.ask(m.LauncherStatus(), m.Report, within=within)
        except (HelperLost, LinkClosed, PeerError, TimeoutError):
            return ()
        return reports.measures(reports.parse(answer.report))

    async def spawn(self, spawn: m.Spawn, descriptors: Sequence[int], within: float) -> Worker:
        """`descriptors`: as Spawn says.  Raises HelperLost when there is no launcher, or it does not answer."""
        link = await self.child.link()
        asked = asyncio.ensure_future(link.ask(spawn, m.Spawned, descriptors, within=_FOR_EVER, take=1))
        try:
            async with asyncio.timeout(within):
                spawned, given = await asyncio.shield(asked)
        except (LinkClosed, PeerError, TimeoutError) as error:
            asked.add_done_callback(_end_late)
            raise HelperLost("LAUNCHER", f"the {self.child.name} did not start the process: {str(error) or 'no answer'}") from None
        except asyncio.CancelledError:
            asked.add_done_callback(_end_late)
            raise
        if not given:
            raise HelperLost("LAUNCHER", "the launcher sent no pidfd")
        return Worker(spawned.pid, given[0])


def _end_late(asked: asyncio.Future[tuple[m.Spawned, list[int]]]) -> None:
    """A worker that nobody waits for any more is not left behind."""
    if asked.cancelled() or asked.exception() is not None:
        return
    for pidfd in asked.result()[1]:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


class TpmLauncher(Launcher):
    """Of TPMs; started when the first one is wanted."""

    def __init__(self) -> None:
        super().__init__(OF_TPMS, "launcher of TPMs")
        self._started = False

    async def spawn(self, spawn: m.Spawn, descriptors: Sequence[int], within: float) -> Worker:
        if not self._started:
            self._started = True
            self.child.start()
        return await super().spawn(spawn, descriptors, within)
