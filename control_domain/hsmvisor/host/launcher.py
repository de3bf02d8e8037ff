"""The launcher, seen from the supervisor: it forks workers."""

from __future__ import annotations

from dataclasses import dataclass

from hsmvisor.host.child import Child
from hsmvisor.host.errors import Unavailable
from hsmvisor.host.link import LinkClosed, PeerError
from hsmvisor_rpc.internal import messages as m

MODULE = "hsmvisord.launcher.main"


@dataclass(frozen=True)
class Worker:
    """A forked worker: its pid and a pidfd (the owner's to close)."""

    pid: int
    pidfd: int


class Launcher:
    def __init__(self, module: str = MODULE) -> None:
        self.child = Child("launcher", module, [])

    async def spawn(self, spawn: m.Spawn, control: int, guest: int, key_pipe: int, within: float) -> Worker:
        """Raises Unavailable when there is no launcher, or it does not answer."""
        link = await self.child.link()
        try:
            spawned, descriptors = await link.ask(spawn, m.Spawned, [control, guest, key_pipe], within=within, take=1)
        except (LinkClosed, PeerError, TimeoutError) as error:
            raise Unavailable("LAUNCHER", f"the launcher did not start the worker: {error or 'no answer'}") from None
        if not descriptors:
            raise Unavailable("LAUNCHER", "the launcher sent no pidfd")
        return Worker(spawned.pid, descriptors[0])
