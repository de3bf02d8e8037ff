"""The launcher, seen from the supervisor: it forks workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass

from hsmvisor.host import reports
from hsmvisor.host.child import Child, HelperLost
from hsmvisor.host.link import LinkClosed, PeerError
from hsmvisor.host.measures import Measure
from hsmvisor_rpc.internal import messages as m

MODULE = "hsmvisord.launcher.main"
_FOR_EVER = 3600.0


@dataclass(frozen=True)
class Worker:
    """A forked worker: its pid and a pidfd (the owner's to close)."""

    pid: int
    pidfd: int


class Launcher:
    def __init__(self, module: str = MODULE) -> None:
        self.child = Child("launcher", module, [])

    async def measures(self, within: float) -> tuple[Measure, ...]:
        """Returns those of its own sandbox; none when it cannot be asked."""
        try:
            async with asyncio.timeout(within):
                link = await self.child.link()
                answer, _ = await link.ask(m.LauncherStatus(), m.Report, within=within)
        except (HelperLost, LinkClosed, PeerError, TimeoutError):
            return ()
        return reports.measures(reports.parse(answer.report))

    async def spawn(self, spawn: m.Spawn, control: int, guest: int, key_pipe: int, within: float) -> Worker:
        """Raises HelperLost when there is no launcher, or it does not answer."""
        link = await self.child.link()
        asked = asyncio.ensure_future(link.ask(spawn, m.Spawned, [control, guest, key_pipe], within=_FOR_EVER, take=1))
        try:
            async with asyncio.timeout(within):
                spawned, descriptors = await asyncio.shield(asked)
        except (LinkClosed, PeerError, TimeoutError) as error:
            asked.add_done_callback(_end_late)
            raise HelperLost("LAUNCHER", f"the launcher did not start the worker: {str(error) or 'no answer'}") from None
        except asyncio.CancelledError:
            asked.add_done_callback(_end_late)
            raise
        if not descriptors:
            raise HelperLost("LAUNCHER", "the launcher sent no pidfd")
        return Worker(spawned.pid, descriptors[0])


def _end_late(asked: asyncio.Future[tuple[m.Spawned, list[int]]]) -> None:
    """A worker that nobody waits for any more is not left behind."""
    if asked.cancelled() or asked.exception() is not None:
        return
    for pidfd in asked.result()[1]:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
