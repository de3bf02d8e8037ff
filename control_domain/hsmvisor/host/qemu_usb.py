"""A module is plugged into a running QEMU guest as a USB device (usb-redir) and taken out of it, by QMP.

It needs no shared memory and no port: only a USB 2 or 3 controller, which is plugged in too where a PCI port is free.  The chardev
has reconnect=1: whenever the module's side closes (its worker ended, the host service has it go), the guest sees the device go, and
come back a second later.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass

from hsmvisor.host.qemu_survey import CHARDEVS, NAMED, UNNAMED, Finding, children, demand_none, get, survey
from hsmvisor.host.qmp import Qmp, QmpError
from hsmvisor.serving.errors import WrongState

DRIVER = "usb-redir"
CONTROLLERS = ("qemu-xhci", "nec-usb-xhci", "usb-ehci", "ich9-usb-ehci1", "ich9-usb-ehci2")  #: high speed
CONTROLLER = "qemu-xhci"
CONTROLLER_ARGUMENTS = "-device qemu-xhci,id=hsmvisor-usb"
_CONTROLLER_ID = "hsmvisor-usb"
_PREFIX = "hsmvisor-usb-"
RECONNECT = 1  #: seconds


@dataclass(frozen=True)
class UsbPlug:
    """A module as QEMU is told of it."""

    name: str
    socket: str

    @property
    def id(self) -> str:
        """Of the device, and of its chardev."""
        return _PREFIX + self.name


async def plug(qmp: Qmp, ours: UsbPlug) -> str:
    """Plugs the module in and returns the device's id; one that is plugged in already is left as it is.  Raises ServiceError; then
    nothing is left in QEMU but a controller."""
    if (there := await _device(qmp, ours)) is not None:
        return there
    if not await qmp.execute("qom-list-types", implements=DRIVER):
        found = Finding("QEMU_DEVICE", f"this QEMU has no {DRIVER}", "install one that has: Debian's qemu-system-x86 does")
        demand_none([found])
    bus = await _bus(qmp)
    await _remove_leftover(qmp, ours)
    data = {"addr": {"type": "unix", "data": {"path": ours.socket}}, "server": False, "reconnect": RECONNECT}
    try:
        await qmp.execute("chardev-add", id=ours.id, backend={"type": "socket", "data": data})
    except QmpError as error:
        raise WrongState("QEMU", f"QEMU cannot use the module's socket: {error.said}", "see QEMU's own log for more") from None
    try:
        await qmp.execute("device_add", driver=DRIVER, id=ours.id, chardev=ours.id, bus=bus)
    except QmpError as error:
        with contextlib.suppress(QmpError):
            await qmp.execute("chardev-remove", id=ours.id)
        raise WrongState("QEMU", f"QEMU does not take the device: {error.said}", "see QEMU's own log for more") from None
    return ours.id


async def unplug(qmp: Qmp, ours: UsbPlug) -> bool:
    """Takes the module out of the guest, which is not asked; says whether it was there.  Raises ServiceError."""
    there = await _device(qmp, ours)
    if there is not None:
        with contextlib.suppress(QmpError):  # it went meanwhile
            await qmp.execute("device_del", id=there)
    await _remove_leftover(qmp, ours)
    return there is not None


async def has(qmp: Qmp, ours: UsbPlug) -> bool:
    return await _device(qmp, ours) is not None


async def _device(qmp: Qmp, ours: UsbPlug) -> str | None:
    """Returns the usb-redir device whose chardev is at the module's socket."""
    chardevs = {name for name, path in (await _sockets(qmp)).items() if path == ours.socket}
    for where in (NAMED, UNNAMED):
        for name, kind in (await children(qmp, where)).items():
            if kind == DRIVER and await get(qmp, f"{where}/{name}", "chardev") in chardevs:
                return name if where == NAMED else f"{where}/{name}"
    return None


async def _sockets(qmp: Qmp) -> dict[str, str]:
    found = {}
    for name, kind in (await children(qmp, CHARDEVS)).items():
        if kind == "chardev-socket":
            address = await get(qmp, f"{CHARDEVS}/{name}", "addr")
            if isinstance(address, dict) and address.get("type") == "unix":
                found[name] = str(address.get("path", ""))
    return found


async def _bus(qmp: Qmp) -> str:
    """Returns the USB bus of a controller, which is plugged in if there is none.  Raises WrongState."""
    for where in (NAMED, UNNAMED):
        for name, kind in (await children(qmp, where)).items():
            if kind in CONTROLLERS:
                buses = [bus for bus, what in (await children(qmp, f"{where}/{name}")).items() if what == "usb-bus"]
                if buses:
                    return buses[0]
    found = await survey(qmp)
    possible = [*(port.bus for port in found.ports if port.free and port.hotplug), *found.buses]
    if not possible:
        problem = "the guest has no USB controller of high speed, and no free port where one could be plugged in"
        demand_none([Finding("USB_CONTROLLER", problem, f"start QEMU with {CONTROLLER_ARGUMENTS}")])
    try:
        await qmp.execute("device_add", driver=CONTROLLER, id=_CONTROLLER_ID, bus=possible[0])
    except QmpError as error:
        raise WrongState(
            "USB_CONTROLLER", f"QEMU does not take a USB controller: {error.said}", f"start QEMU with {CONTROLLER_ARGUMENTS}"
        ) from None
    return f"{_CONTROLLER_ID}.0"


async def _remove_leftover(qmp: Qmp, ours: UsbPlug) -> None:
    """QEMU forgets the chardev with its device; of a plug that was cut off it is left."""
    if ours.id in await children(qmp, CHARDEVS):
        with contextlib.suppress(QmpError):
            await qmp.execute("chardev-remove", id=ours.id)


# ---- a guest that has it from its start ---------------------------------------------------------------------------------


def arguments(ours: UsbPlug) -> list[str]:
    """Returns the arguments that go beside the guest's own."""
    path = ours.socket.replace(",", ",,")
    return [
        "-chardev",
        f"socket,id={ours.id},path={path},reconnect={RECONNECT}",
        *CONTROLLER_ARGUMENTS.split(),
        "-device",
        f"{DRIVER},id={ours.id},chardev={ours.id},bus={_CONTROLLER_ID}.0",
    ]


def libvirt_xml(ours: UsbPlug) -> str:
    """Returns the parts of a domain that make the module its USB device; libvirt has an element for it."""
    path = json.dumps(ours.socket)
    lines = [
        "<domain type='kvm'>",
        "  <devices>",
        "    <controller type='usb' model='qemu-xhci'/>",
        "    <redirdev bus='usb' type='unix'>",
        f"      <source mode='connect' path={path}>",
        f"        <reconnect enabled='yes' timeout='{RECONNECT}'/>",
        "      </source>",
        "    </redirdev>",
        "  </devices>",
        "</domain>",
    ]
    return "\n".join(lines) + "\n"
