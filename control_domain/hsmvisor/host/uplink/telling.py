"""What the manager does not know yet of this host's guests: looked up when something happens, told by the next exchange.

Everything is told again until an exchange that carried it was answered.  A look asks the guest's module; it takes place apart, so
that a module that does not answer keeps nobody else's news back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace

from hsmvisor.host import limits
from hsmvisor.host.guest_rows import Guest
from hsmvisor.host.guests import Guests
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.modules import Modules
from hsmvisor.host.uplink.told import GuestTold, Told
from hsmvisor.serving.errors import Exhausted, Lost, NotFound, ServiceError, Unavailable
from hsmvisor.serving.events import Events

_log = logging.getLogger(__name__)

_LOOKS_AT_ONCE = 32
_LOOK_WITHIN = 2.0  #: seconds that a module has to answer
_COMPLETE_WITHIN = 3.0  #: seconds until all is told, of whatever answered
USAGE_EVERY = 60.0  #: seconds

#: Events after which a module may be another, have another identity, or hold something else.
_TELLING = frozenset(
    {
        "module-created", "module-destroyed", "module-break-glass", "module-state", "command-executed", "worker-adopted",
        "generation-activated", "generation-retired", "generation-destroyed", "drain-extended",
    }
)  # fmt: skip


class Telling:
    def __init__(self, guests: Guests, modules: Modules, identity: HostIdentity, news: asyncio.Event) -> None:
        """`news` is set whenever there is something to tell."""
        self._guests, self._modules, self._identity, self._news = guests, modules, identity, news
        self._told: dict[str, GuestTold] = {}
        self._ready: dict[str, GuestTold] = {}
        self._gone: set[str] = set()
        self._all = True
        self._looks: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()  #: changed while they were looked at
        self._usage: set[str] = set()  #: whose use counts as a change
        self._gate = asyncio.Semaphore(_LOOKS_AT_ONCE)

    # ---- what happens ---------------------------------------------------------------------------------------------

    def mark(self, name: str) -> None:
        """Something of this guest may be different."""
        if self._guests.find(name) is None:
            self._told.pop(name, None)
            self._ready.pop(name, None)
            self._gone.add(name)
            self._news.set()
            return
        self._gone.discard(name)
        if name in self._looks:
            self._again.add(name)
        else:
            self._looks[name] = asyncio.get_running_loop().create_task(self._look(name))

    def tell_all(self) -> None:
        """The manager knows nothing of what was told."""
        self._all = True
        self._told.clear()
        self.mark_all()
        self._news.set()

    async def follow(self, events: Events) -> None:
        """Marks the guests of modules to which something happens."""
        while True:
            try:
                async for row in events.follow(0, ""):
                    if row.kind in _TELLING and (guest := self._guests.of_module(row.subject)) is not None:
                        self.mark(guest.name)
            except (Exhausted, Lost):
                self.mark_all()
            except Unavailable:  # the service stops
                return

    async def sweep(self) -> None:
        """How much keys are used is told now and then; what slipped by is found as well."""
        while True:
            await asyncio.sleep(USAGE_EVERY)
            self._usage.update(guest.name for guest in self._guests.all())
            self.mark_all()

    def mark_all(self) -> None:
        for guest in self._guests.all():
            self.mark(guest.name)

    def stop(self) -> None:
        for task in self._looks.values():
            task.cancel()

    # ---- looking --------------------------------------------------------------------------------------------------

    async def _look(self, name: str) -> None:
        try:
            while True:
                self._again.discard(name)
                guest = self._guests.find(name)
                if guest is None:
                    return
                report = await self._report(guest)
                if name not in self._again:
                    break
            if report is not None and self._guests.find(name) is guest:
                self._found(report)
        except Exception:
            _log.exception("guest %s: it cannot be looked at", name)
        finally:
            del self._looks[name]

    def _found(self, report: GuestTold) -> None:
        name, told = report.name, self._told.get(report.name)
        if name in self._usage:
            self._usage.discard(name)
            known = told == report
        else:
            known = told is not None and told.without_usage() == report.without_usage()
        if known:
            self._ready.pop(name, None)
        else:
            self._ready[name] = report
            self._news.set()

    async def _report(self, guest: Guest) -> GuestTold | None:
        """Returns None where the module does not answer now and the manager knows of the guest: what it knows stays."""
        bare = _bare(guest)
        if not guest.module:
            return bare
        try:
            module = self._modules.get(guest.module)
        except NotFound:
            return replace(bare, module="")
        try:  # one that is being started is waited for
            async with self._gate, asyncio.timeout(_LOOK_WITHIN):
                status = await module.status()
        except (ServiceError, TimeoutError):
            told = self._told.get(guest.name)
            return None if told is not None and told.guest() == bare else bare
        row = module.row
        identity = self._identity.certify(row.module_id, row.name, module.recipient, module.root, row.created_at)
        return replace(bare, identity=identity, sequence=status.sequence, materials=status.materials)

    # ---- an exchange ------------------------------------------------------------------------------------------------

    @property
    def all(self) -> bool:
        return self._all

    async def complete(self) -> None:
        """Returns when every guest was looked at, or has had its time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_COMPLETE_WITHIN):
                while self._looks:
                    await asyncio.wait(list(self._looks.values()))

    def take(self) -> Told:
        """Returns what is to be told; `confirm` or `failed` says what became of it."""
        if self._all:
            guests = tuple(self._ready.get(guest.name) or _bare(guest) for guest in self._guests.all())
            gone: tuple[str, ...] = ()
        else:
            names = sorted(self._ready)[: limits.MAX_REPORTED]
            guests, gone = tuple(self._ready[name] for name in names), tuple(sorted(self._gone)[: limits.MAX_REPORTED])
        told = Told(self._all, guests, gone)
        for row in guests:
            self._ready.pop(row.name, None)
        self._gone = set() if self._all else self._gone.difference(gone)
        self._all = False
        return told

    def confirm(self, told: Told, refused: Mapping[str, str]) -> None:
        for row in told.guests:
            if self._guests.find(row.name) is None:
                continue
            if not row.bare:
                self._told[row.name] = row
                self._note(row.name, refused.get(row.name, ""))
            elif row.name not in self._ready:  # it is told of when it serves
                self._told.setdefault(row.name, row)
        if self._ready or self._gone:
            self._news.set()

    def _note(self, name: str, why: str) -> None:
        if why and self._guests.refused.get(name) != why:
            _log.warning("guest %s: the manager does not take it: %s", name, why)
        if why:
            self._guests.refused[name] = why
        else:
            self._guests.refused.pop(name, None)

    def failed(self, told: Told) -> None:
        """It is told again, or what is newer."""
        self._all = self._all or told.all
        for row in told.guests:
            if self._guests.find(row.name) is not None:
                self._ready.setdefault(row.name, row)
        self._gone.update(name for name in told.gone if self._guests.find(name) is None)
        if self._all or self._ready or self._gone:
            self._news.set()


def _bare(guest: Guest) -> GuestTold:
    return GuestTold(guest.name, guest.kind, guest.owner, guest.attributes, guest.module)
