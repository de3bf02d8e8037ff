"""All modules of the host: made, found, destroyed; and what a kill left half-done is finished or undone at the next start."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from hsmvisor.host import places
from hsmvisor.host.adoption import end_orphans, end_stranger
from hsmvisor.host.module import DESTROYED, Module, Upgraded
from hsmvisor.host.settings import Settings
from hsmvisor.host.state import CREATING, DESTROYING, PRESENT, ModuleRow, PurgeRow
from hsmvisor.host.surroundings import Surroundings
from hsmvisor.serving.errors import Exhausted, Exists, Invalid, NotFound, ServiceError, Unavailable
from hsmvisor.serving.requests import Request

_log = logging.getLogger(__name__)

_STARTS_AT_ONCE = 8
_WATCH_BACKLOG = 1000  #: changes that wait for one watcher


@dataclass(frozen=True)
class Change:
    kind: str  #: present, created, changed, destroyed
    module: Module


class Modules:
    def __init__(self, surroundings: Surroundings) -> None:
        self._s = surroundings
        self._modules: dict[str, Module] = {}
        self._reserved: dict[str, int] = {}  #: names that are being created, with their numbers
        self._watchers: set[asyncio.Queue[Change | None]] = set()
        self._making: set[Module] = set()
        self._stopping = False

    # ---- the host's start and end -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Settles what was half-done; workers are adopted and started in the background."""
        self._s.launcher.child.on_death = self._s.tpm_launcher.child.on_death = self._end_orphans
        gate = asyncio.Semaphore(_STARTS_AT_ONCE)
        rows = await self._s.state.modules()
        for row in rows:
            if row.intent == PRESENT:
                self._modules[row.name] = Module(row, self._s, self._changed)
            else:
                await self._settle(row)
        await self._s.purges.start()
        by_id = {module.module_id: module for module in self._modules.values()}
        for attached in await self._s.state.attachments():
            if attached.module_id in by_id:
                by_id[attached.module_id].faces.attachment = attached
        for row_of_usb in await self._s.state.usb_attachments():
            if row_of_usb.module_id in by_id:
                by_id[row_of_usb.module_id].faces.usb_attachment = row_of_usb
        await self._end_strangers({row.module_id for row in rows})
        for module in self._modules.values():
            module.resume(gate)

    async def _settle(self, row: ModuleRow) -> None:
        """A creation that was never acknowledged is undone, a destruction that had begun is finished."""
        await end_stranger(self._s.places, row.module_id)
        await end_stranger(self._s.places.of_tpms, row.module_id)
        places.forget(self._s.places.of_tpms, row.module_id)
        places.remove(self._s.places, row.module_id, row.name)
        await self._s.state.remove(row.module_id, None, purge=_purge_of(row))
        kind = {CREATING: "module.create.undone", DESTROYING: "module.destroy.finished"}[row.intent]
        _log.warning("module %s: %s after an interruption", row.name, kind)
        await self._s.audit.record(kind, who="host", module=row.name, module_id=row.module_id.hex(), result="ok")

    async def _end_strangers(self, known: set[bytes]) -> None:
        for where in (self._s.places, self._s.places.of_tpms):
            for path in sorted(where.workers.glob("*.sock")):
                try:
                    module_id = bytes.fromhex(path.stem)
                except ValueError:
                    continue
                if module_id not in known:
                    await end_stranger(where, module_id)
                    places.forget(where, module_id)

    def _end_orphans(self) -> None:
        launchers = {self._s.launcher.child.pid, self._s.tpm_launcher.child.pid}
        helpers = {*launchers, self._s.provider.child.pid, *self._s.hsms.pids}
        end_orphans(helpers.union(*(m.pids for m in (*self._making, *self._modules.values()))))

    def end_watching(self) -> None:
        """Ends the streams of those who watch."""
        self._stopping = True
        for watcher in self._watchers:
            watcher.put_nowait(None)

    async def stop(self, *, leave_workers: bool) -> None:
        await asyncio.gather(*(m.stop(leave=leave_workers) for m in self._modules.values()))

    # ---- finding ------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Module:
        try:
            return self._modules[name]
        except KeyError:
            raise _not_found(name) from None

    def all(self) -> list[Module]:
        return list(self._modules.values())

    # ---- making and destroying ----------------------------------------------------------------------------------

    async def create(self, name: str, root: bytes, settings: Settings, request: Request) -> bytes:
        """Makes a module; returns its id when it serves, which is the stored answer to `request`.  Raises ServiceError."""
        self._demand_hsm(settings.cryptoprocessor)
        if name in self._modules or name in self._reserved:
            raise Exists("MODULE", f"module {name} exists", "choose another name, or destroy that one first")
        number = self._free_number()
        self._reserved[name] = number
        module = Module(_new_row(os.urandom(16), name, number, root, settings), self._s, self._changed)
        self._making.add(module)
        try:
            await self._make(module, request)
        finally:
            del self._reserved[name]
            self._making.discard(module)
        self._modules[name] = module
        self._tell(Change("created", module))
        self._s.events.emit("module-created", name, {"module_id": module.module_id.hex()})
        return module.module_id

    def _demand_hsm(self, name: str) -> None:
        if not name:
            return
        hsm = self._s.hsms.find(name)
        if hsm is None:
            raise Invalid("CRYPTOPROCESSOR", f"there is no HSM {name} in the host's configuration", self._s.hsms.known)
        hsm.reconsider()

    async def _make(self, module: Module, request: Request) -> None:
        """The intent is stored while the worker is forked; its first StoreState queues behind it."""
        row = module.row
        intent = asyncio.ensure_future(
            self._s.state.begin_create(row.module_id, row.name, row.number, row.created_at, row.root, row.settings)
        )
        try:
            try:
                await module.begin()
            finally:
                await intent
            await self._s.state.finish_create(row.module_id, request, row.module_id)
        except BaseException:
            await module.destroy()
            purge = _purge_of(row) if module.cryptoprocessor.used else None
            await self._s.state.remove(row.module_id, None, purge=purge)
            if purge:
                await self._s.purges.carry_out(purge)
            raise

    def _free_number(self) -> int:
        """The lowest free one: its worker's uid is built on it, and no two living workers share one."""
        taken = {m.row.number for m in self._modules.values()} | set(self._reserved.values())
        return next(n for n in range(len(taken) + 1) if n not in taken)

    async def upgrade(self, name: str, renew_launcher: bool) -> Upgraded:
        """Replaces the module's worker in service; with a launcher started anew before: its code is what is installed now, and its
        address layout is another one.  Raises ServiceError."""
        module = self.get(name)
        async with module.ending:
            if renew_launcher:
                await self._s.launcher.child.renew()
            upgraded = await self.get(name).upgrade()
        self._s.events.emit("worker-replaced", name, {"old_pid": upgraded.old_pid, "pid": upgraded.new_pid})
        return upgraded

    async def destroy(self, name: str, request: Request) -> str:
        """Returns "" or why keys of it are still in its HSM; they are destroyed when that is possible.  Raises ServiceError."""
        module = self.get(name)
        async with module.ending:  # of two who ask, the second finds none
            if self._modules.get(name) is not module:
                raise _not_found(name)
            await self._s.state.begin_destroy(module.module_id)
            await module.destroy()
            purge = _purge_of(module.row)
            await self._s.state.remove(module.module_id, request, purge=purge)
            del self._modules[name]
        self._s.events.emit("module-destroyed", name, {"module_id": module.module_id.hex()})
        return await self._s.purges.carry_out(purge) if purge else ""

    async def break_glass(self, name: str, root: bytes, request: Request) -> Module:
        """Empties a module and has it obey `root`: another id, another recipient key; the same name, address, uid and settings.

        The worker is ended first, so that nobody signs with a key that is forgotten.  Returns the new one.  Raises ServiceError;
        then the old one serves on.
        """
        old = self.get(name)
        async with old.ending:
            if self._modules.get(name) is not old:
                raise _not_found(name)
            row = _new_row(os.urandom(16), name, old.row.number, root, old.settings)
            guest = await old.give_way()
            try:
                purge = _purge_of(old.row)
                await self._s.state.replace(old.module_id, row, request, row.module_id, purge)
            except BaseException:
                old.take_place(guest)
                raise
            old.replaced()
            new = self._modules[name] = Module(row, self._s, self._changed)
            if old.faces.attachment is not None:
                new.faces.attachment = replace(old.faces.attachment, module_id=row.module_id)
            if old.faces.usb_attachment is not None:
                new.faces.usb_attachment = replace(old.faces.usb_attachment, module_id=row.module_id)
            new.take_place(guest)
        self._tell(Change("created", new))
        detail = {"old_module_id": old.module_id.hex(), "module_id": new.module_id.hex(), "root": hashlib.sha256(root).hexdigest()}
        self._s.events.emit("module-break-glass", name, detail)
        _log.warning("module %s was emptied and obeys another root (break-glass); its keys are to be delivered again", name)
        if purge:
            await self._s.purges.carry_out(purge)
        with contextlib.suppress(ServiceError):
            await new.status()  # the caller would rather see it serve
        return new

    # ---- watching -----------------------------------------------------------------------------------------------

    def _changed(self, module: Module) -> None:
        if self._modules.get(module.name) is not module:
            return  # one that is being made, or was not to be
        if module.state == DESTROYED:
            self._tell(Change("destroyed", module))
        else:
            self._tell(Change("changed", module))
            self._s.events.emit("module-state", module.name, {"state": module.state})

    def _tell(self, change: Change) -> None:
        for watcher in self._watchers:
            if watcher.qsize() < _WATCH_BACKLOG:
                watcher.put_nowait(change)

    async def watch(self, name: str) -> AsyncIterator[Change]:
        """Yields the present modules, then changes; `name` "" is all.  Raises Exhausted, Unavailable."""
        queue: asyncio.Queue[Change | None] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            for module in sorted(self._modules.values(), key=lambda m: m.name):
                if name in ("", module.name):
                    yield Change("present", module)
            while True:
                if queue.qsize() >= _WATCH_BACKLOG:
                    raise Exhausted("SLOW_CONSUMER", "reading is too slow: cut off", "watch again from the beginning")
                change = await queue.get()
                if change is None or self._stopping:
                    raise Unavailable("STOPPING", "the host service stops", "connect again")
                if name in ("", change.module.name):
                    yield change
        finally:
            self._watchers.discard(queue)


def _new_row(module_id: bytes, name: str, number: int, root: bytes, settings: Settings) -> ModuleRow:
    return ModuleRow(module_id, name, number, int(time.time()), root, settings.encode(), CREATING, 0)


def _purge_of(row: ModuleRow) -> PurgeRow | None:
    """Returns what is to be done in the HSM of a module that goes; None: it has none."""
    hsm = Settings.decode(row.settings).cryptoprocessor
    return PurgeRow(row.module_id, row.name, hsm) if hsm else None


def _not_found(name: str) -> NotFound:
    return NotFound("MODULE", f"there is no module {name}", "hsmvisor module list shows those there are")
