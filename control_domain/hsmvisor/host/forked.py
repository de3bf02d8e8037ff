"""One living process that a launcher forked for a module: its control connection, its phase, and what it may ask by the table of
phases.

It may be in its guest's hands.  Whatever is not in its row, is malformed or comes from another process ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hsmvisor.host.link import Link, LinkClosed, PeerError, Violation
from hsmvisor.host.refusals import refused
from hsmvisor.serving import errors
from hsmvisor.serving.throttle import Throttle
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame
from hsmvisor_rpc.internal.phases import Phase, by_type
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record, record_type

R = TypeVar("R", bound=Record)
_log = logging.getLogger(__name__)

REAP_TRIES, REAP_PAUSE = 5, 0.5  #: of one that has ended, and seconds between them

Asked = Callable[[Frame], Coroutine[Any, Any, Record]]
Notified = Callable[[Frame], None]


class ProcessFault(Exception):
    """A process could not be started, adopted or understood; it is ended.  The message says why."""


class Forked:
    """One that runs.  Owns its pidfd and its control connection."""

    WHAT: ClassVar[str]  #: it is, for people
    MAY: ClassVar[Mapping[Phase, frozenset[type[Record]]]]  #: ask and tell
    LISTENERS: ClassVar[int] = 0  #: that it gives back when it is attached and serves

    def __init__(self, name: str, pid: int, pidfd: int, phase: Phase | None) -> None:
        """`phase` None: an earlier supervisor's; its phase is not known before it answers Attach."""
        self.name, self.pid, self._pidfd = name, pid, pidfd
        self.phase = phase
        self.violation = ""
        self._said = Throttle(5, 0.1)
        self._link: Link | None = None
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, self._process_ended)

    # ---- beginning ----------------------------------------------------------------------------------------------

    def _connect(self, path: Path, asked: Asked, notified: Notified) -> None:
        """Connects to its control socket, which listens from before it was forked.  Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            sock.connect(str(path))  # a listening unix socket with room takes us at once, another one says EAGAIN
        except OSError:
            sock.close()
            raise
        self._link = Link(sock, self._closed, asked, notified)
        self._link.expected_pid = self.pid

    async def attach(self, stored_version: int, within: float) -> tuple[m.Attached, list[int]]:
        """Returns what it says of itself, and the guest listener if it serves.  Raises ProcessFault, LinkClosed, TimeoutError."""
        attached, descriptors = await self._ask(m.Attach(m.PROTOCOL, stored_version), m.Attached, within, take=self.LISTENERS)
        try:
            self.phase = Phase(attached.phase)
        except ValueError:
            raise ProcessFault(f"a phase that cannot be: {attached.phase[:20]!r}") from None
        if attached.pid != self.pid or attached.name != self.name:
            raise ProcessFault("it says that it is another one")
        return attached, descriptors

    # ---- asking -------------------------------------------------------------------------------------------------

    async def _ask(
        self, request: Record, expected: type[R], within: float, take: int = 0, give: Sequence[int] = ()
    ) -> tuple[R, list[int]]:
        if self._link is None:
            raise LinkClosed("there is no connection to it")
        return await self._link.ask(request, expected, give, within=within, take=take)

    async def ask(self, request: Record, expected: type[R], within: float) -> R:
        """Raises ServiceError: Refused by the worker, or Unavailable."""
        try:
            reply, _ = await self._ask(request, expected, within)
        except PeerError as error:
            raise refused(error.error) from None
        except LinkClosed:
            raise errors.Unavailable(
                "WORKER", f"the {self.WHAT} of module {self.name} ended meanwhile", "try again with the same request_id"
            ) from None
        except TimeoutError:
            raise errors.Unavailable(
                "WORKER",
                f"the {self.WHAT} of module {self.name} did not answer in {within:.0f} s",
                "try again with the same request_id",
            ) from None
        return reply

    # ---- being asked --------------------------------------------------------------------------------------------

    def _allowed(self, frame: Frame) -> Record:
        """Returns the record if this phase's row has it; raises Violation.

        One that we adopt may finish what it had asked of the supervisor before us: as in phase serving.
        """
        row = self.MAY[self.phase or Phase.SERVING]
        try:
            kind = by_type(row).get(record_type(frame.payload))
            if kind is None:
                raise Violation(f"{record_type(frame.payload)[:40]!r} in phase {self.phase}")
            return kind.decode(frame.payload)
        except MalformedRecord as error:
            raise Violation(f"malformed: {error}") from None

    async def _stored(self, storing: Awaitable[None]) -> Record:
        """Returns the answer to a request to store."""
        try:
            await storing
        except errors.ServiceError as error:
            if self._said.admit():
                _log.warning("module %s: a change of its %s could not be stored: %s", self.name, self.WHAT, error.detail)
            return m.Error(m.REASON_STORAGE, error.detail)
        except Exception:
            _log.exception("module %s: a change could not be stored", self.name)
            return m.Error(m.REASON_INTERNAL, "an error inside the host service")
        return m.Done()

    def _closed(self, violation: Violation | None) -> None:
        """Without its connection it is not ours any more, whoever's fault that is."""
        if violation is not None:
            self.violation = str(violation)
            _log.error("module %s: its %s broke the protocol and is ended: %s", self.name, self.WHAT, violation)
        self.kill()

    # ---- the end ------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _process_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        with contextlib.suppress(OSError):  # no descriptor left
            reap(os.dup(self._pidfd))
        self._ended.set()

    async def ended(self) -> None:
        """Returns when the process has ended."""
        await self._ended.wait()

    async def shut_down(self, drain: float, within: float = 2.0) -> None:
        """Has it drain for at most `drain` seconds and end; ends it by force after that and `within`."""
        self.phase = Phase.CLOSING
        with contextlib.suppress(PeerError, LinkClosed, TimeoutError):
            await self._ask(m.Shutdown(int(drain * 1000)), m.Done, drain + within)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self.ended()
                return
        self.kill()
        await self.ended()

    async def out(self, within: float) -> None:
        """Returns when it has ended and is let go of; it is ended by force after `within` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self.ended()
        self.kill()
        await self.ended()
        self.leave()

    def leave(self) -> None:
        """Lets go of it; one that still runs goes on, and the next supervisor adopts it."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        if self._link is not None:
            self._link.close()
        os.close(self._pidfd)


def reap(pidfd: int, tries: int = REAP_TRIES) -> None:
    """Waits for one that a launcher forked, and that has ended: ours only if its launcher has died, which may be after it, and not
    yet.  Inside the running event loop; closes `pidfd`."""
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        if tries > 1:
            asyncio.get_running_loop().call_later(REAP_PAUSE, reap, pidfd, tries - 1)
            return
    os.close(pidfd)
