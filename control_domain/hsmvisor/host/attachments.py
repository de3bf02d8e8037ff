"""Which guest a module is in, by QMP or where its monitor connects: done, noted for the next supervisor, taken back."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hsmvisor.host import qemu, qmp
from hsmvisor.host.hybrid import peer_of
from hsmvisor.host.module import SERVING, Module
from hsmvisor.host.modules import Modules
from hsmvisor.host.state import AttachmentRow, State
from hsmvisor.serving.errors import NotFound, ServiceError, WrongState
from hsmvisor.serving.events import Events
from hsmvisor.serving.requests import Request
from hsmvisor_rpc.internal import messages as m

_log = logging.getLogger(__name__)

_PLUGGED_WITHIN = 5.0  #: seconds after QEMU has the device
_UNPLUGGED_WITHIN = 5.0  #: seconds after QEMU has it no more
_CLEARED_WITHIN = 3.0  #: seconds that a guest has to let go of a destroyed module


class Attachments:
    def __init__(self, modules: Modules, state: State, events: Events) -> None:
        self._modules, self._state, self._events = modules, state, events

    async def attach(self, name: str, path: str, bus: str, request: Request) -> AttachmentRow:
        """Plugs a module into the guest whose QMP socket is `path`, on `bus` or any that is free.  Raises ServiceError."""
        async with held(self._modules, name) as module:
            if module.faces.attachment is not None and module.faces.attachment.hybrid:
                raise _attached(module)
            await module.status()  # a device that nobody answers would stop the guest
            async with qmp.connect(path) as connection:
                if module.faces.device.plugged and not await qemu.has(connection, plug_of(module)):
                    where = (
                        f"the guest at {module.faces.attachment.qmp}"
                        if module.faces.attachment
                        else "a guest that was started with it"
                    )
                    hint = f"a module is in one guest: hsmvisor module detach {name}, or shut that guest down"
                    raise WrongState("ATTACHED", f"module {name} is plugged into {where}", hint)
                plugged = await qemu.plug(connection, plug_of(module), bus)
            row = await self._is_in(module, path, bus, plugged, request)
        _log.info("module %s: plugged into the guest at %s, bus %s", name, path, row.bus)
        self._events.emit("module-attached", name, {"qmp": path, "bus": row.bus, "device": row.device})
        module.touched()
        return row

    async def _is_in(self, module: Module, path: str, bus: str, plugged: qemu.Plugged, request: Request | None) -> AttachmentRow:
        """Notes where QEMU has plugged it in.  Raises ServiceError."""
        row = AttachmentRow(module.module_id, path, bus, plugged.bus, plugged.device, plugged.chardev, int(time.time()))
        try:
            await module.faces.device.wait_plugged(_PLUGGED_WITHIN)
        except TimeoutError:
            hint = "hsmvisor module detach, then attach it again; see the host's log"
            raise WrongState("DEVICE", f"QEMU has the device of module {module.name}, but the module has no QEMU", hint) from None
        await self._state.attach(row, request, b"")
        module.faces.attachment = row
        return row

    async def bring_back(self, name: str) -> AttachmentRow | None:
        """Plugs a module anew into the guest that it was attached to, if that has its device still, or what is left of it.

        None: there is nothing to bring back, or nowhere.  Raises ServiceError.
        """
        async with held(self._modules, name) as module:
            row = module.faces.attachment
            if row is None or not lost(module):
                return None
            try:
                async with qmp.connect(row.qmp) as connection:
                    if not await qemu.remains(connection, plug_of(module)):
                        return None  # it was taken out by hand, or another guest was started
                    plugged = await qemu.plug(connection, plug_of(module), row.asked_bus)
            except qmp.QemuGone:
                return None
            row = await self._is_in(module, row.qmp, row.asked_bus, plugged, None)
        module.touched()
        return row

    async def destroy(self, name: str, request: Request) -> str:
        """Destroys a module and takes its device out of its guest; returns as Modules.destroy.  Raises ServiceError."""
        module = self._modules.get(name)
        left = await self._modules.destroy(name, request)  # first: keys end at once, whatever the guest does
        if module.faces.attachment is not None and module.faces.attachment.qmp:
            await self._clear(plug_of(module), module.faces.attachment.qmp)
        return left

    async def _clear(self, left: qemu.Plug, path: str) -> None:
        """Takes what a destroyed module has left out of the guest that it was in, if that guest lets go of it soon."""
        try:
            async with qmp.connect(path) as connection:
                await qemu.unplug(connection, left, _CLEARED_WITHIN)
        except qmp.QemuGone:
            return
        except ServiceError as error:
            _log.warning("module %s: destroyed, but its device is still in the guest at %s: %s", left.name, path, error.detail)

    async def attach_hybrid(self, name: str, path: str, request: Request) -> None:
        """Has a module serve the guest whose monitor's vsock has `path` (hybrid.py), also after a restart.  Raises ServiceError."""
        async with held(self._modules, name) as module:
            if module.faces.device.plugged or (module.faces.attachment is not None and module.faces.attachment.hybrid != path):
                raise _attached(module)
            for other in self._modules.all():
                if other is not module and other.faces.attachment is not None and other.faces.attachment.hybrid == path:
                    raise WrongState("HYBRID_TAKEN", f"module {other.name} is attached to {path}", "a guest has one module")
            was = module.faces.attachment
            row = was or AttachmentRow(module.module_id, "", "", "", "", "", int(time.time()), path)
            module.faces.hybrid.listen(path)
            try:
                await self._state.attach(row, request, b"")
            except BaseException:
                if was is None:
                    module.faces.hybrid.close()
                raise
            module.faces.attachment = row
        _log.info("module %s: attached to the monitor at %s", name, path)
        self._events.emit("module-attached", name, {"hybrid": path})
        module.touched()

    async def detach(self, name: str, path: str, request: Request) -> bool:
        """Takes a module out of its guest; says whether it was in one.  `path` "": of the guest that it was attached to.

        A guest that has ended has no device any more: then only the note is forgotten.  Raises ServiceError.
        """
        async with held(self._modules, name) as module:
            if module.faces.attachment is not None and module.faces.attachment.hybrid:
                return await self._detach_hybrid(module, module.faces.attachment.hybrid, path, request)
            path = path or (module.faces.attachment.qmp if module.faces.attachment else "")
            if not path and module.faces.device.plugged:
                hint = "it was plugged in when its guest was started: give that guest's QMP socket (--qmp), or shut it down"
                raise WrongState("NOT_ATTACHED", f"module {name} is in a guest that it was not attached to", hint)
            was = bool(path) and await self._unplug(module, path)
            await self._state.detach(module.module_id, request, b"")
            module.faces.attachment = None
        if path:
            _log.info("module %s: unplugged from the guest at %s", name, path)
            self._events.emit("module-detached", name, {"qmp": path, "was_plugged": was})
            module.touched()
        return was

    async def _detach_hybrid(self, module: Module, hybrid: str, path: str, request: Request) -> bool:
        if path:
            hint = f"hsmvisor module detach {module.name}, without --qmp"
            raise WrongState("NOT_ATTACHED", f"module {module.name} is attached to {hybrid}, not by QMP", hint)
        was = bool(module.faces.hybrid.path)
        await self._state.detach(module.module_id, request, b"")
        module.faces.attachment = None
        module.faces.hybrid.close()
        with contextlib.suppress(ServiceError):  # a worker that has ended has no connections
            await module.ask(m.DropConnections(peer_of(hybrid)), m.Done)
        _log.info("module %s: detached from the monitor at %s", module.name, hybrid)
        self._events.emit("module-detached", module.name, {"hybrid": hybrid, "was_plugged": was})
        module.touched()
        return was

    async def _unplug(self, module: Module, path: str) -> bool:
        try:
            async with qmp.connect(path) as connection:
                was = await qemu.unplug(connection, plug_of(module))
        except qmp.QemuGone:
            if not await self._let_go(module):
                raise  # its QEMU lives, only not at this path
            return False
        if not await self._let_go(module):
            if not was:
                hint = "give the QMP socket of the guest that it is in (--qmp), or shut that guest down"
                raise WrongState("NOT_ATTACHED", f"module {module.name} is not in the guest at {path}, but in another", hint)
            _log.warning("module %s: the guest let go of it, but its QEMU keeps the connection", module.name)
        return was

    async def _let_go(self, module: Module) -> bool:
        """Says whether no QEMU is connected to the module, now or in a moment."""
        try:
            await module.faces.device.wait_unplugged(_UNPLUGGED_WITHIN)
        except TimeoutError:
            return False
        return True


@asynccontextmanager
async def held(modules: Modules, name: str) -> AsyncIterator[Module]:
    """The module, which nobody destroys or replaces meanwhile.  Raises NotFound."""
    module = modules.get(name)
    async with module.ending:
        if modules.get(name) is not module:
            raise NotFound("MODULE", f"there is no module {name} any more", "hsmvisor module list shows those there are")
        yield module


def lost(module: Module) -> bool:
    """Says whether a module that serves should be in a guest by QMP and is in none."""
    wanted = module.faces.attachment is not None and bool(module.faces.attachment.qmp)
    return wanted and module.state == SERVING and not module.faces.device.plugged


def _attached(module: Module) -> WrongState:
    row = module.faces.attachment
    where = (row.hybrid or row.qmp) if row else "a guest that was started with it"
    hint = f"a module is in one guest: hsmvisor module detach {module.name}, or shut that guest down"
    return WrongState("ATTACHED", f"module {module.name} is attached to {where}", hint)


def plug_of(module: Module) -> qemu.Plug:
    return qemu.Plug(module.name, str(module.faces.device.path))
