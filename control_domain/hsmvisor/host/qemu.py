"""A module is plugged into a running QEMU guest and taken out of it: what must hold first, and what is undone when a step fails."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from hsmvisor.host.qemu_survey import DRIVER, SHARED, Chardev, Finding, Survey, Vsock, demand_none, survey
from hsmvisor.host.qmp import Json, QemuSilent, Qmp, QmpError
from hsmvisor.serving.errors import ServiceError, WrongState

UNPLUG_WITHIN = 10.0  #: seconds that a guest has to let go of the device
_PLUG_WITHIN = 10.0  #: seconds for QEMU and the module to agree; the guest stands still meanwhile
_FREE_WITHIN = 2.0  #: seconds until a chardev is free after its device is gone
_PREFIX = "hsmvisor-"

MEMORY = "-object memory-backend-memfd,id={id},size={size},share=on -machine memory-backend={id}"
PORT = "-device pcie-root-port,id=hsmvisor-port,chassis=250"


@dataclass(frozen=True)
class Plug:
    """A module as QEMU is told of it."""

    name: str
    socket: str

    @property
    def id(self) -> str:
        """Of the device, and of its chardev: QEMU keeps the two apart."""
        return _PREFIX + self.name


@dataclass(frozen=True)
class Plugged:
    device: str  #: its id, or its place in QOM
    chardev: str
    bus: str


async def check(qmp: Qmp, ours: Plug, bus: str = "") -> str:
    """Returns the bus to plug into: `bus`, if it is given.  Raises WrongState with all that has to change."""
    return _checked(await survey(qmp), ours, bus)


async def has(qmp: Qmp, ours: Plug) -> bool:
    """Says whether the module's device is in the guest, connected or not."""
    return (await survey(qmp)).of_socket(ours.socket) is not None


async def remains(qmp: Qmp, ours: Plug) -> bool:
    """Says whether the module's device is in the guest, or the chardev of one that the guest has let go of."""
    found = await survey(qmp)
    return found.of_socket(ours.socket) is not None or any(chardev.path == ours.socket for chardev in found.chardevs)


async def plug(qmp: Qmp, ours: Plug, bus: str = "") -> Plugged:
    """Plugs the module in; one that is plugged in already is left as it is, one whose connection is lost is plugged anew.

    Raises ServiceError; then nothing is left in QEMU, but by one that does not answer (QemuSilent).
    """
    found = await survey(qmp)
    if (there := found.of_socket(ours.socket)) is not None:
        device, chardev = there
        if chardev.connected:
            demand_none(_memory(found))
            return Plugged(device.id, chardev.id, device.bus)
        await _remove(qmp, device, chardev, UNPLUG_WITHIN)
        found = await survey(qmp)
    chosen = _checked(found, ours, bus)
    await _remove_leftover(qmp, found, ours)
    address = {"type": "unix", "data": {"path": ours.socket}}
    try:
        # without reconnect=: with it the connection comes later than the device that wants it
        await qmp.execute("chardev-add", id=ours.id, backend={"type": "socket", "data": {"addr": address, "server": False}})
    except QmpError as error:
        hint = "QEMU's user must be able to use the socket: [guests] socket_group in the host's configuration; AppArmor, SELinux"
        raise WrongState("QEMU", f"QEMU cannot use the module's socket: {error.said}", hint) from None
    try:
        await qmp.execute("device_add", _PLUG_WITHIN, driver=DRIVER, id=ours.id, chardev=ours.id, bus=chosen)
    except QmpError as error:
        with contextlib.suppress(ServiceError):
            await _remove_chardev(qmp, ours.id)
        raise WrongState("QEMU", f"QEMU does not take the device: {error.said}", _why(error.said)) from None
    except QemuSilent as error:  # what it makes of it is found by the next plug
        hint = f"the guest stands still until the module answers: hsmvisor module upgrade {ours.name}, then attach it again"
        raise QemuSilent(error.reason, f"QEMU waits for the module's device for {_PLUG_WITHIN:g} s", hint) from None
    return Plugged(ours.id, ours.id, chosen)


async def unplug(qmp: Qmp, ours: Plug, within: float = UNPLUG_WITHIN) -> bool:
    """Takes the module out of the guest; says whether it was in it.  Raises WrongState when the guest keeps it, ServiceError."""
    found = await survey(qmp)
    if (there := found.of_socket(ours.socket)) is None:
        await _remove_leftover(qmp, found, ours)
        return False
    await _remove(qmp, *there, within)
    return True


# ---- what must hold -----------------------------------------------------------------------------------------------------


def _checked(found: Survey, ours: Plug, bus: str) -> str:
    chosen, findings = _bus(found, bus)
    demand_none([*_memory(found), *_others(found, ours), *findings])
    return chosen


def _memory(found: Survey) -> list[Finding]:
    findings = []
    for backend in found.memory:
        example = MEMORY.format(id="hsmvisor-ram", size=f"{backend.size >> 20}M")
        if backend.kind not in SHARED:
            problem = f"the guest's memory ({backend.id}) is a {backend.kind}: no other process can map it"
            findings.append(Finding("GUEST_MEMORY", problem, f"start QEMU with {example}"))
        elif not backend.share:
            problem = f"the guest's memory ({backend.id}) is private to QEMU (share=off): the module would see nothing of it"
            findings.append(
                Finding("GUEST_MEMORY", problem, f"start QEMU with share=on in its -object {backend.kind}, as in {example}")
            )
    return findings


def _others(found: Survey, ours: Plug) -> list[Finding]:
    """What stands in the way of a device that is not there yet."""
    findings = []
    if not found.has_driver:
        findings.append(Finding("QEMU_DEVICE", f"this QEMU has no {DRIVER}", "install one that has: Debian's qemu-system-x86 does"))
    if ours.id in found.ids:
        change = f"device_del {ours.id} in QEMU's monitor, or start the guest without it"
        findings.append(Finding("ID_TAKEN", f"the guest has another device of the id {ours.id}", change))
    elif found.vsocks:
        other = found.vsocks[0]
        problem = f"the guest has a vsock device already ({other.id}); Linux drives one alone"
        change = f"start QEMU without its -device {other.kind}"
        if other.id.startswith(_PREFIX):
            name = other.id.removeprefix(_PREFIX)
            change = f"hsmvisor module detach {name}, or, if {name} was destroyed, device_del {other.id} in QEMU's monitor"
        findings.append(Finding("VSOCK_TAKEN", problem, change))
    for chardev in found.chardevs:
        if chardev.id == ours.id and chardev.path != ours.socket:
            problem, change = f"QEMU has another chardev of the id {ours.id}", f"chardev-remove {ours.id} in QEMU's monitor"
            findings.append(Finding("ID_TAKEN", problem, change))
        elif chardev.id != ours.id and chardev.path == ours.socket:
            problem = (
                f"QEMU's chardev {chardev.id} uses the module's socket without a device (with reconnect= it comes back and back)"
            )
            findings.append(
                Finding("CHARDEV", problem, f"chardev-remove {chardev.id} in QEMU's monitor; never use reconnect= here")
            )
    return findings


def _bus(found: Survey, bus: str) -> tuple[str, list[Finding]]:
    """Returns the bus to use, and what keeps it from being used."""
    free = [port.bus for port in found.ports if port.free and port.hotplug]
    possible = [*free, *found.buses]
    if not bus:
        if possible:
            return possible[0], []
        taken = f"all root ports are taken ({', '.join(p.bus for p in found.ports)})" if found.ports else "there is no root port"
        return "", [Finding("PCI_PORT", f"{taken}: nothing can be plugged into the running guest", f"start QEMU with {PORT}")]
    if bus in possible:
        return bus, []
    port = next((port for port in found.ports if port.bus == bus), None)
    if port is None:
        problem = f"nothing can be plugged into {bus}: it is no root port, and no bridge, that has this id"
    elif not port.free:
        problem = f"the root port {bus} is taken: a guest would not see a second device on it"
    else:
        problem = f"the root port {bus} has hotplug=off"
    change = f"free here: {', '.join(possible)}" if possible else f"start QEMU with {PORT}"
    return "", [Finding("PCI_PORT", problem, change)]


def _why(said: str) -> str:
    if "vhost" in said:
        return "the module's device did not answer as it should: see hsmvisor module show, and the host's log"
    return "see QEMU's own log for more"


# ---- taking out ---------------------------------------------------------------------------------------------------------


async def _remove(qmp: Qmp, device: Vsock, chardev: Chardev, within: float) -> None:
    qmp.forget_events()
    try:
        await qmp.execute("device_del", id=device.id)
    except QmpError as error:
        if "hotplug" in error.said:
            hint = f"shut the guest down; to plug and unplug, start it with {PORT}, and the device on that bus"
            raise WrongState("PCI_PORT", f"the device cannot be unplugged from {device.bus}: {error.said}", hint) from None
        if error.kind != "DeviceNotFound" and "in the process of unplug" not in error.said:
            raise
    await _deleted(qmp, device, within)
    await _remove_chardev(qmp, chardev.id)


async def _deleted(qmp: Qmp, device: Vsock, within: float) -> None:
    """Returns when the device is gone; raises WrongState when the guest keeps it."""

    def ours(name: str, data: Json) -> bool:
        return name in ("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR") and data.get("path") == device.path

    end = asyncio.get_running_loop().time() + within
    if device.path not in [vsock.path for vsock in (await survey(qmp)).vsocks]:
        return
    with contextlib.suppress(TimeoutError):
        name = await qmp.event(ours, end - asyncio.get_running_loop().time())
        if name == "DEVICE_DELETED":
            return
        raise WrongState("GUEST", f"the guest refuses to let go of the device {device.id}", "see the guest's kernel log")
    status = await qmp.execute("query-status")
    state = str(status.get("status", "?")) if isinstance(status, dict) else "?"
    hint = "a guest lets go when its kernel runs, with ACPI or pciehp hot-plug: try again when it does; QEMU has asked it"
    if state != "running":
        hint = f"the guest is not running ({state}): let it go on (cont), then try again"
    raise WrongState("GUEST", f"the guest did not let go of the device {device.id} within {within:g} s", hint)


async def _remove_leftover(qmp: Qmp, found: Survey, ours: Plug) -> None:
    """Removes our chardev where it has no device: of a plug that was cut off, or of one with reconnect=."""
    if any((chardev.id, chardev.path) == (ours.id, ours.socket) for chardev in found.chardevs):
        await _remove_chardev(qmp, ours.id)


async def _remove_chardev(qmp: Qmp, ident: str) -> None:
    end = asyncio.get_running_loop().time() + _FREE_WITHIN
    while True:
        try:
            await qmp.execute("chardev-remove", id=ident)
            return
        except QmpError as error:
            if "not found" in error.said:
                return
            if "busy" not in error.said or asyncio.get_running_loop().time() > end:
                raise
            await asyncio.sleep(0.05)


__all__ = ["MEMORY", "PORT", "UNPLUG_WITHIN", "Plug", "Plugged", "check", "has", "plug", "remains", "unplug"]
