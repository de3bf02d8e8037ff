"""The HSMs of the host's configuration: who logs in there, one after the other, and never again with a PIN that was wrong.

An HSM counts wrong PINs and locks itself after a few, for everybody.  So the first helper logs in alone; while its PIN is known to
be right the others may at once; and after a wrong one nobody tries before somebody asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pwd
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from hsmvisor.host import config
from hsmvisor.host.hsm_helper import Helper, HsmFault

_PROVED_FOR = 60.0  #: seconds after a login that others may log in at the same time
_log = logging.getLogger(__name__)


class Hsm:
    def __init__(self, row: config.Hsm, ready: asyncio.Event, helpers: set[Helper]) -> None:
        self.row, self._ready, self._helpers = row, ready, helpers
        self._one = asyncio.Lock()
        self._proved = -_PROVED_FOR
        self._tried: tuple[int, ...] = ()  #: which PIN file it was that was wrong
        self.barred = ""  #: what was said of a wrong PIN
        self.opened = asyncio.Event()  #: set while it is not barred
        self.opened.set()

    # ---- helpers ------------------------------------------------------------------------------------------------

    async def start(self, module_id: bytes, within: float) -> Helper:
        """Returns a new helper that is logged in; raises HsmFault, OSError."""
        async with self._turn():
            helper = self._launch(module_id)
            try:
                await helper.logged_in(within)
            except BaseException as error:
                helper.kill()
                self._note(error)
                raise
            self._succeeded()
        return helper

    async def purge(self, module_id: bytes, within: float) -> None:
        """Destroys all keys of a module that is gone; raises HsmFault, OSError."""
        async with self._turn():
            helper = self._launch(module_id, "--purge")
            try:
                await helper.done(within)
            except BaseException as error:
                helper.kill()
                self._note(error)
                raise
            self._succeeded()

    def _launch(self, module_id: bytes, *more: str) -> Helper:
        helper = Helper(self.row.name, [*self._arguments(module_id), *more], self._helpers.discard)
        self._helpers.add(helper)
        return helper

    def _arguments(self, module_id: bytes) -> Iterable[str]:
        """Raises HsmFault."""
        row = self.row
        values = {"module-id": module_id.hex(), "library": row.library, "token": row.token, "pin-file": row.pin_file}
        values["uid"] = str(self._uid())
        for name, value in values.items():
            yield f"--{name}={value}"
        for setting in row.environment:
            yield f"--environment={setting}"

    def _uid(self) -> int:
        """Of the helper; 0 = our own."""
        if not self.row.user:
            return 0
        try:
            uid = pwd.getpwnam(self.row.user).pw_uid
        except KeyError:
            raise HsmFault(self.row.name, f"there is no user {self.row.user!r}", f"adduser --system {self.row.user}") from None
        if os.geteuid() not in (0, uid):
            raise HsmFault(self.row.name, f"only root may run its helpers as {self.row.user}", "leave hsms.user empty")
        return uid if os.geteuid() == 0 else 0

    # ---- logins -------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Raises HsmFault while a wrong PIN stands in the way."""
        await self._ready.wait()
        self._demand_open()
        if asyncio.get_running_loop().time() - self._proved < _PROVED_FOR:
            yield
            return
        async with self._one:
            self._demand_open()
            yield

    def _demand_open(self) -> None:
        if self.barred:
            raise HsmFault(self.row.name, f"{self.barred}; it is not tried again", self.what_to_do, wrong_pin=True)

    @property
    def what_to_do(self) -> str:
        return f"put the right PIN into {self.row.pin_file} (a locked one: unlock it), then hsmvisor module upgrade NAME"

    def _note(self, error: BaseException) -> None:
        if isinstance(error, HsmFault) and error.wrong_pin:
            error.hint = self.what_to_do
            self.bar(error.said)
        elif isinstance(error, HsmFault) and not error.hint:
            error.hint = "hsmvisor doctor looks at library and token"

    def bar(self, why: str) -> None:
        """Nobody logs in before somebody asks."""
        self.barred, self._tried, self._proved = why, self._pin_file(), -_PROVED_FOR
        self.opened.clear()
        told = "HSM %s: %s; nothing is tried there before you ask: wrong PINs lock it.  %s"
        _log.error(told, self.row.name, why, self.what_to_do)

    def _succeeded(self) -> None:
        self._proved = asyncio.get_running_loop().time()
        self.reopen()

    def _pin_file(self) -> tuple[int, ...]:
        try:
            found = Path(self.row.pin_file).stat()
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def reopen(self) -> None:
        """Somebody asks: the PIN may be tried once more."""
        self.barred = ""
        self.opened.set()

    def reconsider(self) -> None:
        """Somebody asks for something else: the PIN may be tried once more if its file is another."""
        if self.barred and self._pin_file() != self._tried:
            self.reopen()


class Hsms:
    """Made inside the running event loop."""

    def __init__(self, rows: Iterable[config.Hsm]) -> None:
        self._ready = asyncio.Event()
        self._helpers: set[Helper] = set()
        self._hsms = {row.name: Hsm(row, self._ready, self._helpers) for row in rows}

    def start(self) -> None:
        """From now on helpers may start: they come after the control API where workers of an earlier service serve."""
        self._ready.set()

    def all(self) -> list[Hsm]:
        return list(self._hsms.values())

    def find(self, name: str) -> Hsm | None:
        return self._hsms.get(name)

    def get(self, name: str) -> Hsm:
        """Raises HsmFault for one that is not configured."""
        try:
            return self._hsms[name]
        except KeyError:
            raise HsmFault(name, "it is not in the host's configuration", self.known, final=True) from None

    @property
    def known(self) -> str:
        """In words, for somebody who named another."""
        if not self._hsms:
            return "none is configured: [[hsms]] in the host's configuration, then start the service again"
        return f"known are {', '.join(sorted(self._hsms))}"

    @property
    def pids(self) -> set[int]:
        return {helper.pid for helper in self._helpers}

    def abandon(self) -> None:
        """The service ends: helpers live as long as their workers."""
        for helper in list(self._helpers):
            helper.abandon()
        self._helpers.clear()
