"""One helper process of a module whose keys live in an HSM: the maker's library is loaded in it, and it is logged in there.

Unlike the host's other helpers (child.py) it is not started again by itself: whoever tries a wrong PIN again locks the HSM.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from hsmvisor.host import limits, reports
from hsmvisor.host.link import Link, LinkClosed, PeerError, Violation
from hsmvisor.host.measures import Measure
from hsmvisor.serving.errors import Unavailable
from hsmvisor.serving.text import clean
from hsmvisor.serving.throttle import Throttle
from hsmvisor.spawned import Spawned
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.canonical import Record

MODULE = "hsmvisord.hsm.main"
_PREFIX = re.compile(r"hsmvisord: (hsm of module [0-9a-f]+: )?")
_WRONG_PIN = "the PIN"  #: so begins what a helper says of a PIN that it has not, or that the HSM does not take
_LAST_WORDS = 1.0  #: seconds that a helper which closed its socket has to say why
_TO_END = 2.0  #: seconds that one has to end whose sockets are closed

_log = logging.getLogger(__name__)
R = TypeVar("R", bound=Record)


class HsmFault(Unavailable):
    """A module's HSM cannot be used; the detail says why, the hint what to do."""

    def __init__(self, hsm: str, detail: str, hint: str = "", *, wrong_pin: bool = False, final: bool = False) -> None:
        """`final`: it is of no use to try again before somebody has done something."""
        super().__init__("HSM", f"HSM {hsm}: {detail}", hint)
        self.said, self.wrong_pin, self.final = detail, wrong_pin, final or wrong_pin


class Helper:
    """A running one: its process, our end of its control socket, and what it says.  Made inside the running event loop."""

    def __init__(self, hsm: str, arguments: Sequence[str], gone: Callable[[Helper], None]) -> None:
        """`gone` is called once, when the process has ended and is reaped.  Raises OSError."""
        self.hsm = hsm
        self._gone: Callable[[Helper], None] = gone
        self._loop = asyncio.get_running_loop()
        self._errors, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            spawned = Spawned(MODULE, arguments, theirs)
        except BaseException:
            os.close(self._errors)
            raise
        finally:
            os.close(theirs)
        self._process = spawned.process
        self.pid = spawned.process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._ended = asyncio.Event()
        self._link = Link(spawned.sock, self._closed)
        self._line, self.last = b"", ""
        self._throttle = Throttle(limits.HELPER_LINES, 1)
        self.token = ""  #: maker, model and serial number, as the helper says
        self.measures: tuple[Measure, ...] = ()
        self.began = self._loop.time()
        self.on_end: Callable[[], None] = lambda: None
        self._loop.add_reader(self._errors, self._said)
        self._loop.add_reader(self._pidfd, self._process_ended)

    # ---- asking -------------------------------------------------------------------------------------------------

    async def logged_in(self, within: float) -> None:
        """Returns when it is logged in to its HSM; raises HsmFault."""
        report = reports.parse((await self._ask(m.HsmStatus(), m.Report, [], within)).report)
        self.token, self.measures = str(report.get("token", ""))[: limits.MAX_SAID], reports.measures(report)

    async def serve(self, sock: socket.socket, within: float) -> None:
        """Has it serve the worker at the other end of `sock`; raises HsmFault."""
        await self._ask(m.ServeWorker(), m.Done, [sock.fileno()], within)

    async def _ask(self, request: Record, expected: type[R], give: list[int], within: float) -> R:
        try:
            answer, _ = await self._link.ask(request, expected, give, within=within)
        except PeerError as error:
            raise self._fault(error.error.detail) from None
        except LinkClosed:
            await self._end_within(_LAST_WORDS)
            raise self._fault(self.last or "its helper ended") from None
        except TimeoutError:
            raise self._fault(f"its helper did not answer within {within:.0f} s") from None
        return answer

    async def done(self, within: float) -> None:
        """For one that was started to do something and end: returns when that is done; raises HsmFault."""
        if not await self._end_within(within):
            self.kill()
            raise self._fault(f"its helper did not end within {within:.0f} s")
        if self._process.returncode != 0:
            raise self._fault(self.last or f"its helper ended with {self._process.returncode}")

    @property
    def wrong_pin(self) -> bool:
        """Says whether its last words were of a PIN that the HSM does not take any more."""
        return self.last.startswith(_WRONG_PIN)

    def _fault(self, untrusted_detail: str) -> HsmFault:
        detail = clean(untrusted_detail)
        return HsmFault(self.hsm, detail, wrong_pin=detail.startswith(_WRONG_PIN))

    # ---- hearing ------------------------------------------------------------------------------------------------

    def _said(self) -> None:
        """The library in it writes here too, as it likes."""
        try:
            data = os.read(self._errors, 4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._errors)
            return
        *lines, rest = (self._line + data).split(b"\n")
        self._line = rest[: limits.MAX_SAID * 4]
        for line in filter(None, lines):
            self.last = _PREFIX.sub("", clean(line.decode(errors="replace")), count=1)
            if self._throttle.admit():
                _log.error("helper %d of HSM %s: %s", self.pid, self.hsm, self.last)

    def _closed(self, violation: Violation | None) -> None:
        if violation is not None:
            _log.error("helper %d of HSM %s broke the protocol: %s", self.pid, self.hsm, violation)
        self.kill()  # one that closed its socket is on its way out

    def _process_ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._process.wait()
        self._said()  # what it said last
        self._let_go()
        self._ended.set()
        self._gone(self)
        self.on_end()

    # ---- the end ------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    @property
    def usable(self) -> bool:
        return not self.ended and not self._link.closed

    async def _end_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        return self.ended

    def kill(self) -> None:
        if not self.ended:
            self._process.kill()

    def retire(self) -> None:
        """Serves on whom it serves, and ends then."""
        self._link.close()

    async def end(self) -> None:
        """For one that serves nobody any more."""
        self.retire()
        if not await self._end_within(_TO_END):
            self.kill()
            await self._ended.wait()

    def abandon(self) -> None:
        """Lets go of it: it outlives this service, as long as its worker does."""
        self._loop.remove_reader(self._pidfd)
        self._let_go()

    def _let_go(self) -> None:
        self._link.close()
        self._loop.remove_reader(self._errors)
        os.close(self._errors)
        os.close(self._pidfd)
