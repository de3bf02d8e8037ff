"""A guest that has the module from its start: QEMU's arguments, libvirt's XML; and what is wrong with a command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import quoteattr

from hsmvisor.host.qemu import MEMORY, PORT, Plug
from hsmvisor.host.qemu_survey import DRIVER, PORTS, SHARED, Finding
from hsmvisor.serving.errors import Invalid

_RAM, _PORT_ID = "hsmvisor-ram", "hsmvisor-port"
MACHINES = ("q35", "pc")
_OFF = ("off", "no", "false", "n", "0")

Options = dict[str, str]


def arguments(ours: Plug, memory: str, machine: str) -> list[str]:
    """Returns the arguments that go beside the guest's own; `memory` as -m takes it, `machine` one of MACHINES."""
    backend = MEMORY.format(id=_RAM, size=memory).split()
    return ["-m", memory, *backend, *device(ours, machine)]


def device(ours: Plug, machine: str) -> list[str]:
    """Returns the arguments of the device alone.  On q35 it has a port of its own, so that it can be unplugged."""
    if machine not in MACHINES:
        raise Invalid("MACHINE", f"machine is one of {', '.join(MACHINES)}, not {machine!r}")
    described = f"{DRIVER},id={ours.id},chardev={ours.id}"
    port = PORT.split() if machine == "q35" else []
    bus = f",bus={_PORT_ID}" if port else ""
    return ["-chardev", f"socket,id={ours.id},path={_escaped(ours.socket)}", *port, "-device", described + bus]


def libvirt_xml(ours: Plug, machine: str) -> str:
    """Returns the parts of a domain that make the module its device.  libvirt's own <vsock> is the kernel's: so QEMU is told."""
    lines = [
        "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>",
        "  <memoryBacking>",
        "    <source type='memfd'/>",
        "    <access mode='shared'/>",
        "  </memoryBacking>",
        "  <qemu:commandline>",
        *(f"    <qemu:arg value={quoteattr(argument)}/>" for argument in device(ours, machine)),
        "  </qemu:commandline>",
        "</domain>",
    ]
    return "\n".join(lines) + "\n"


def check(ours: Plug, text: str) -> list[Finding]:
    """Returns what is wrong with a guest's command line; it may have the device, or room to plug it in.  Raises Invalid."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise Invalid("COMMAND_LINE", f"the command line cannot be read: {error}", "quote it as the shell would have it") from None
    line = _Line(list(_options(words)))
    return [*_memory(line), *_chardevs(line, ours), *_devices(line, ours)]


# ---- a command line -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    options: list[tuple[str, Options]]  #: name without its dash, and what it says; what has no key has the key ""

    def all(self, name: str) -> list[Options]:
        return [values for option, values in self.options if option == name]


def _options(words: list[str]) -> Iterator[tuple[str, Options]]:
    name = ""
    for word in words:
        if word.startswith("-") and len(word) > 1:
            if name:
                yield name, {}
            name = word.lstrip("-")
            name = {"M": "machine"}.get(name, name)
        elif name:
            yield name, _values(word)
            name = ""
    if name:
        yield name, {}


def _values(word: str) -> Options:
    """Of key=value,...; a comma in a value is doubled.  The newer JSON form is read as well."""
    if word.startswith("{"):
        try:
            found = json.loads(word)
        except (ValueError, RecursionError):
            return {"": word}
        values = {str(k): str(v).lower() if isinstance(v, bool) else str(v) for k, v in found.items()}
        return values | {"": values.get("driver") or values.get("qom-type", "")}
    parts = [part.replace("\0", ",") for part in word.replace(",,", "\0").split(",")]
    found = {}
    for number, part in enumerate(parts):
        key, equals, value = part.partition("=")
        if not equals and number == 0:
            found[""] = key
        else:
            found[key] = value if equals else "on"
    return found


def _memory(line: _Line) -> Iterator[Finding]:
    machine = [values["memory-backend"] for values in line.all("machine") if "memory-backend" in values]
    used = machine or [values["memdev"] for values in line.all("numa") if "memdev" in values]
    objects = {values.get("id", ""): values for values in line.all("object")}
    example = MEMORY.format(id=_RAM, size="SIZE")
    if not used:
        problem = "the guest's memory is not shared: the command line names no memory backend for it"
        yield Finding("GUEST_MEMORY", problem, f"add {example}, SIZE as in -m")
    for ident in used:
        kind = objects.get(ident, {}).get("", "")
        default = "on" if kind in ("memory-backend-memfd", "memory-backend-shm") else "off"
        if kind not in SHARED:
            problem = f"the guest's memory ({ident}) is {'a ' + kind if kind else 'not described'}: no other process can map it"
            yield Finding("GUEST_MEMORY", problem, f"use {example}, SIZE as in -m")
        elif objects[ident].get("share", default) in _OFF:
            yield Finding(
                "GUEST_MEMORY", f"the guest's memory ({ident}) is private to QEMU", f"add share=on to -object {kind},id={ident}"
            )


def _chardevs(line: _Line, ours: Plug) -> Iterator[Finding]:
    for values in line.all("chardev"):
        if values.get("path") != ours.socket:
            continue
        if any(values.get(key, "0") != "0" for key in ("reconnect", "reconnect-ms")):
            problem = "with reconnect= the connection comes later than the device, which then fails"
            yield Finding("CHARDEV", problem, f"leave reconnect= out of -chardev id={values.get('id', '')}")
        if values.get("server", "off") not in _OFF or "listen" in values:
            yield Finding(
                "CHARDEV", "QEMU would listen where the module does", f"leave server= out of -chardev id={values.get('id', '')}"
            )


def _devices(line: _Line, ours: Plug) -> Iterator[Finding]:
    devices = line.all("device")
    vsocks = [d for d in devices if "vsock" in d.get("", "") and d.get("", "").startswith("vhost")]
    chardevs = [c.get("id") for c in line.all("chardev") if c.get("path") == ours.socket]
    mine = [d for d in vsocks if d.get("chardev") in chardevs]
    for other in vsocks:
        if other not in mine:
            problem = f"the guest has another vsock device ({other.get('', '')}); Linux drives one alone"
            yield Finding("VSOCK_TAKEN", problem, "leave it out")
    ports = {d.get("id", "") for d in devices if d.get("", "") in PORTS}
    q35 = any("q35" in (values.get("type") or values.get("", "")) for values in line.all("machine"))
    if mine:
        if q35 and mine[0].get("bus") not in ports:
            yield Finding(
                "PCI_PORT",
                "on pcie.0 the device can never be unplugged",
                f"give it a port: {PORT}, and bus={_PORT_ID} in its -device",
            )
        return
    if chardevs:
        yield Finding(
            "CHARDEV", f"the chardev {chardevs[0]} has no device", f"add -device {DRIVER},id={ours.id},chardev={chardevs[0]}"
        )
        return
    if q35 and not ports - {d.get("bus", "") for d in devices}:
        yield Finding("PCI_PORT", "no root port is free: nothing can be plugged into the running guest", f"add {PORT}")
    if not line.all("qmp") and not any(values.get("mode") == "control" for values in line.all("mon")):
        yield Finding("QMP", "there is no QMP socket to plug the module in by", "add -qmp unix:PATH,server=on,wait=off")


def _escaped(path: str) -> str:
    return path.replace(",", ",,")
