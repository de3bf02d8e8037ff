"""Into which guest a module is plugged as a USB device: by QMP, or by a listener for USB/IP; done, noted for the next supervisor,
taken back."""

from __future__ import annotations

import ipaddress
import logging
import time
from contextlib import suppress

from hsmvisor import addresses
from hsmvisor.host import limits, qemu_usb, qmp
from hsmvisor.host.attachments import held
from hsmvisor.host.module import Module
from hsmvisor.host.modules import Modules
from hsmvisor.host.qemu_usb import UsbPlug
from hsmvisor.host.state import State, UsbAttachmentRow
from hsmvisor.serving.errors import Invalid, ServiceError, WrongState
from hsmvisor.serving.events import Events
from hsmvisor.serving.requests import Request

_log = logging.getLogger(__name__)

_PLUGGED_WITHIN = 5.0  #: seconds after QEMU has the device
_UNPLUGGED_WITHIN = 5.0


class UsbAttachments:
    def __init__(self, modules: Modules, state: State, events: Events) -> None:
        self._modules, self._state, self._events = modules, state, events

    async def attach(self, name: str, path: str, request: Request) -> UsbAttachmentRow:
        """Plugs a module into the guest whose QMP socket is `path`.  Raises ServiceError."""
        async with held(self._modules, name) as module:
            _demand_free(module, path)
            await module.status()  # a reader in which nobody answers is of no use
            plug = usb_plug_of(module)
            async with qmp.connect(path) as connection:
                if module.faces.usb.plugged and not await qemu_usb.has(connection, plug):
                    hint = f"a USB device is in one guest: hsmvisor module detach {name} --as usb, or shut that guest down"
                    raise WrongState("ATTACHED", f"module {name} is the USB device of {module.faces.usb.peer}", hint)
                device = await qemu_usb.plug(connection, plug)
            try:
                await module.faces.usb.wait_plugged(_PLUGGED_WITHIN)
            except TimeoutError:
                hint = "QEMU's user must be able to use the socket: [guests] socket_group in the host's configuration"
                raise WrongState("DEVICE", f"QEMU has the device of module {name}, but does not reach the module", hint) from None
            row = UsbAttachmentRow(module.module_id, path, device, "", (), int(time.time()))
            await self._state.attach_usb(row, request, b"")
            module.faces.usb_attachment = row
        self._told(module, "module-attached", {"usb": path, "device": device})
        return row

    async def attach_usbip(self, name: str, address: str, peers: tuple[str, ...], request: Request) -> UsbAttachmentRow:
        """Has a module be imported by kernels of `peers` at `address`, also after a restart.  Raises ServiceError."""
        async with held(self._modules, name) as module:
            if module.faces.usb_attachment is not None and not module.faces.usb_attachment.listen:
                raise _attached(module)
            for other in self._modules.all():
                taken = other.faces.usb_attachment.listen if other is not module and other.faces.usb_attachment else ""
                if taken == address:
                    raise WrongState("USBIP_ADDRESS", f"module {other.name} listens at {address}", "a guest has one module")
            before = module.faces.usb_attachment
            row = UsbAttachmentRow(module.module_id, "", "", address, peers, int(time.time()))
            try:
                module.faces.usb.listen_usbip(address, peers)
                await self._state.attach_usb(row, request, b"")
            except BaseException:
                module.faces.usb.close_usbip()
                if before is not None:
                    module.faces.usb.listen_usbip(before.listen, before.peers)
                raise
            module.faces.usb_attachment = row
        self._told(module, "module-attached", {"usbip": address, "peers": list(peers)})
        return row

    async def detach(self, name: str, path: str, request: Request) -> bool:
        """Takes a module's USB device out of its guest; says whether it was in one.  Raises ServiceError."""
        async with held(self._modules, name) as module:
            row = module.faces.usb_attachment
            path = path or (row.qmp if row else "")
            if row is not None and row.listen:
                module.faces.usb.close_usbip()
            elif not path and module.faces.usb.plugged:
                hint = "it was plugged in when its guest was started: give that guest's QMP socket (--qmp), or shut it down"
                raise WrongState("NOT_ATTACHED", f"module {name} is in a guest that it was not attached to", hint)
            was = bool(path) and await _unplug(path, usb_plug_of(module))
            if module.faces.usb.plugged and not path:
                was = True
                await module.faces.usb.unplug()
            if path:
                with suppress(TimeoutError):
                    await module.faces.usb.wait_unplugged(_UNPLUGGED_WITHIN)
            await self._state.detach_usb(module.module_id, request, b"")
            module.faces.usb_attachment = None
        self._told(module, "module-detached", {"usb": path or (row.listen if row else ""), "was_plugged": was})
        return was

    async def clear(self, name: str, row: UsbAttachmentRow | None, plug: UsbPlug) -> None:
        """Takes what a destroyed module has left out of its guest."""
        if row is not None and row.qmp:
            try:
                await _unplug(row.qmp, plug)
            except ServiceError as error:
                _log.warning("module %s: destroyed, but its USB device is still in its guest: %s", name, error.detail)

    def _told(self, module: Module, kind: str, detail: dict[str, object]) -> None:
        _log.info("module %s: %s: %s", module.name, kind, detail)
        self._events.emit(kind, module.name, detail)
        module.touched()


async def _unplug(path: str, plug: UsbPlug) -> bool:
    """A guest that has ended has no device any more."""
    try:
        async with qmp.connect(path) as connection:
            return await qemu_usb.unplug(connection, plug)
    except qmp.QemuGone:
        return False


def _demand_free(module: Module, path: str) -> None:
    row = module.faces.usb_attachment
    if row is not None and (row.listen or (row.qmp != path and module.faces.usb.plugged)):
        raise _attached(module)


def _attached(module: Module) -> WrongState:
    row = module.faces.usb_attachment
    where = (row.listen or row.qmp) if row else "a guest"
    hint = f"a USB device is in one guest: hsmvisor module detach {module.name} --as usb"
    return WrongState("ATTACHED", f"module {module.name} is attached to {where} as a USB device", hint)


def usb_plug_of(module: Module) -> UsbPlug:
    return UsbPlug(module.name, str(module.faces.usb.path))


# ---- what callers ask for ---------------------------------------------------------------------------------------------------


def usbip_address(untrusted_address: str) -> str:
    """Returns where USB/IP may be listened for; raises Invalid.  There is neither a login nor encryption, so never everywhere."""
    problem = "USB/IP listens at ADDRESS:PORT, an IP address of this host's own, as 192.0.2.1:3240"
    try:
        host, port = addresses.split(untrusted_address)
        address = ipaddress.ip_address(host)
    except ValueError:
        raise Invalid("USBIP_ADDRESS", problem) from None
    if not port or getattr(address, "ipv4_mapped", None) is not None:  # [::ffff:0.0.0.0] is every address too
        raise Invalid("USBIP_ADDRESS", problem)
    if address.is_unspecified or address.is_multicast:
        hint = "give the host's address on the guest's own network, as that of its tap device"
        raise Invalid("USBIP_ADDRESS", f"USB/IP knows no login: it does not listen at {host}", hint)
    return untrusted_address


def usbip_peers(untrusted_peers: list[str]) -> tuple[str, ...]:
    """Returns who may import; raises Invalid."""
    if not 1 <= len(untrusted_peers) <= limits.MAX_USBIP_PEERS:
        problem = f"1 to {limits.MAX_USBIP_PEERS} addresses or networks may import the device"
        raise Invalid("USBIP_PEERS", problem, "name the guest's address")
    found = []
    for peer in untrusted_peers:
        try:
            found.append(str(ipaddress.ip_network(peer)))
        except ValueError:
            raise Invalid("USBIP_PEERS", f"{peer!r:.60} is no address and no network, as 192.0.2.17 or 192.0.2.0/28") from None
    return tuple(sorted(set(found)))
