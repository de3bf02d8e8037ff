"""A helper process of the supervisor: started with one end of a socketpair, watched by a pidfd, started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
from collections.abc import Callable, Sequence

from hsmvisor.host.link import Link, Violation
from hsmvisor.serving.errors import Unavailable
from hsmvisor.spawned import Spawned

_log = logging.getLogger(__name__)

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0
_STEADY = 1.0  #: seconds of life after which a death counts as the first one again
WAIT = 10.0  #: seconds that a request waits for a helper that is being started again


class HelperLost(Unavailable):
    """A helper ended or did not answer; what it was asked may be done or not."""


class Child:
    """Keeps one helper alive and speaks with it over a Link."""

    def __init__(self, name: str, module: str, arguments: Sequence[str]) -> None:
        self.name, self._module, self._arguments = name, module, list(arguments)
        self.restarts = 0
        self._spawned: Spawned | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._up = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self.on_death: Callable[[], None] = lambda: None

    def spawn(self) -> None:
        """Starts the process before an event loop is there: it comes up while we go on."""
        self._spawned = Spawned(self._module, self._arguments)

    def start(self) -> None:
        """Takes the helper over into the running event loop, or starts it there."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def link(self) -> Link:
        """Returns the link, waiting a moment for a helper that is being started; raises Unavailable."""
        if self._link is None or self._link.closed:
            try:
                async with asyncio.timeout(WAIT):
                    await self._up.wait()
            except TimeoutError:
                raise HelperLost("HELPER", f"the {self.name} does not start", "see the host's log for what it says") from None
        assert self._link is not None
        return self._link

    async def _keep(self) -> None:
        pause = _FIRST_PAUSE
        loop = asyncio.get_running_loop()
        while True:
            spawned, self._spawned = self._spawned or Spawned(self._module, self._arguments), None
            self._process, began = spawned.process, loop.time()
            self._link = Link(spawned.sock, self._ended)
            self._up.set()
            await self._death(spawned.process)
            self._up.clear()
            self._link.close()
            self.on_death()
            self.restarts += 1
            pause = _FIRST_PAUSE if loop.time() - began > _STEADY else min(pause * 2, _LONGEST_PAUSE)
            _log.error("the %s ended (%s); started again in %.2f s", self.name, spawned.process.returncode, pause)
            await asyncio.sleep(pause)

    async def renew(self) -> None:
        """Starts it anew; returns when the new one is there.  Raises Unavailable."""
        if self._link is not None:
            self._up.clear()
            self._link.close()
        if self._process is not None:
            self._process.kill()
        await self.link()

    def _ended(self, violation: Violation | None) -> None:
        self._up.clear()
        if violation is not None:
            _log.error("the %s broke the protocol: %s", self.name, violation)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # without its socket it is of no use, and it would have ended by itself

    async def _death(self, process: subprocess.Popen[bytes]) -> None:
        await wait_readable(pidfd := os.pidfd_open(process.pid))
        os.close(pidfd)
        process.wait()

    async def stop(self) -> None:
        """Closes the socket: the helper ends by itself."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._link is not None:
            self._link.close()
        process = self._spawned.process if self._spawned else self._process
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, 2)
            if process.poll() is None:
                process.kill()
                process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0


async def wait_readable(descriptor: int) -> None:
    """Returns when `descriptor` can be read (a pidfd: when its process has ended)."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)
