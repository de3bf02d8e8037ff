"""What a running QEMU says of itself, as far as it matters for a module's device.  Read by QOM alone: query-pci knows nothing of a
port that the guest's firmware has not numbered yet."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hsmvisor.host.qmp import Qmp, QmpError
from hsmvisor.serving.errors import WrongState

DRIVER = "vhost-user-vsock-pci"
PORTS = ("pcie-root-port", "ioh3420", "xio3130-downstream")  #: a port takes one device
SHARED = ("memory-backend-memfd", "memory-backend-file", "memory-backend-shm")  #: what a back-end gets a descriptor of
_MOST = 1024  #: rows that are looked at in one list

NAMED, UNNAMED, CHARDEVS = "/machine/peripheral", "/machine/peripheral-anon", "/chardevs"
_CHILD = re.compile(r"child<([\w.-]+)>")
_VSOCK = re.compile(r"vhost-(user-)?vsock-.+")


@dataclass(frozen=True)
class Finding:
    """What keeps the device from working: `reason` for programs, `problem` and `change` one sentence each for people."""

    reason: str
    problem: str
    change: str


def demand_none(findings: list[Finding]) -> None:
    """Raises WrongState, with the reason of the first one and the words of all."""
    if findings:
        problems, changes = (
            "; ".join(dict.fromkeys(texts)) for texts in zip(*((f.problem, f.change) for f in findings), strict=True)
        )
        raise WrongState(findings[0].reason, problems, changes)


@dataclass(frozen=True)
class Backend:
    """A memory backend that the guest's RAM is made of."""

    id: str
    kind: str
    share: bool
    size: int  #: bytes


@dataclass(frozen=True)
class Port:
    bus: str
    free: bool
    hotplug: bool


@dataclass(frozen=True)
class Chardev:
    id: str
    path: str  #: of a unix socket; "" for others
    connected: bool


@dataclass(frozen=True)
class Vsock:
    """A vsock device of the guest; `chardev` "" for one of the kernel's."""

    path: str  #: in QOM
    kind: str
    chardev: str
    bus: str

    @property
    def id(self) -> str:
        """Its id, or its place in QOM where it has none: device_del takes both."""
        return self.path.removeprefix(f"{NAMED}/")


@dataclass(frozen=True)
class Survey:
    memory: tuple[Backend, ...]
    ports: tuple[Port, ...]
    buses: tuple[str, ...]  #: of bridges, which take several devices; pci.0 of an i440fx is one
    chardevs: tuple[Chardev, ...]
    vsocks: tuple[Vsock, ...]
    ids: frozenset[str]  #: of all devices
    has_driver: bool

    def of_socket(self, socket: str) -> tuple[Vsock, Chardev] | None:
        """Returns the device that is plugged into a module's socket."""
        for vsock in self.vsocks:
            for chardev in self.chardevs:
                if vsock.chardev == chardev.id and chardev.path == socket:
                    return vsock, chardev
        return None


async def survey(qmp: Qmp) -> Survey:
    """Raises ServiceError."""
    machine, named, unnamed = [await children(qmp, path) for path in ("/machine", NAMED, UNNAMED)]
    ports, buses = [], ["pci.0"] if "i440fx" in machine else []
    for name, kind in named.items():
        if kind in PORTS:
            ports += await _ports(qmp, f"{NAMED}/{name}")
        elif "bridge" in kind:
            buses.append(name)
    paths = {f"{where}/{name}": kind for where, found in ((NAMED, named), (UNNAMED, unnamed)) for name, kind in found.items()}
    return Survey(
        memory=tuple(await _memory(qmp)),
        ports=tuple(sorted(ports, key=lambda port: port.bus)),
        buses=tuple(sorted(buses)),
        chardevs=tuple(await _chardevs(qmp)),
        vsocks=tuple([await _vsock(qmp, path, kind) for path, kind in paths.items() if _VSOCK.fullmatch(kind)]),
        ids=frozenset(named),
        has_driver=bool(await qmp.execute("qom-list-types", implements=DRIVER)),
    )


async def _memory(qmp: Qmp) -> list[Backend]:
    """The machine's own backend; with NUMA nodes it has none, and all that there are count."""
    memdevs = {row["id"]: row for row in _rows(await qmp.execute("query-memdev")) if isinstance(row.get("id"), str)}
    main = await get(qmp, "/machine", "memory-backend")
    chosen = [str(main).rpartition("/")[2]] if main else list(memdevs)
    found = []
    for ident in chosen:
        row = memdevs.get(ident, {})
        share = row.get("share", await get(qmp, f"/objects/{ident}", "share"))
        kind, size = await get(qmp, f"/objects/{ident}", "type"), row.get("size")
        found.append(Backend(ident, str(kind), share is True, size if isinstance(size, int) else 0))
    return found


async def _ports(qmp: Qmp, path: str) -> list[Port]:
    found = []
    for name, kind in (await children(qmp, path)).items():
        if kind == "PCIE":
            taken = any(
                str(row.get("name")).startswith("child[") for row in _rows(await qmp.execute("qom-list", path=f"{path}/{name}"))
            )
            found.append(Port(name, not taken, await get(qmp, path, "hotplug") is not False))
    return found


async def _chardevs(qmp: Qmp) -> list[Chardev]:
    found = []
    for name, kind in (await children(qmp, CHARDEVS)).items():
        path = ""
        if kind == "chardev-socket":
            address = await get(qmp, f"{CHARDEVS}/{name}", "addr")
            values = address if isinstance(address, dict) else {}
            path = str(values.get("path", "")) if values.get("type") == "unix" else ""
        connected = bool(path) and await get(qmp, f"{CHARDEVS}/{name}", "connected") is True
        found.append(Chardev(name, path, connected))
    return found


async def _vsock(qmp: Qmp, path: str, kind: str) -> Vsock:
    chardev = await get(qmp, path, "chardev") if kind.startswith("vhost-user") else None
    bus = str(await get(qmp, path, "parent_bus") or "").rpartition("/")[2]
    return Vsock(path, kind, chardev if isinstance(chardev, str) else "", bus)


async def children(qmp: Qmp, path: str) -> dict[str, str]:
    """Returns name and type of each child; none where there is no such path."""
    try:
        rows = _rows(await qmp.execute("qom-list", path=path))
    except QmpError:
        return {}
    kinds = ((row.get("name"), _CHILD.fullmatch(str(row.get("type")))) for row in rows)
    return {name: kind[1] for name, kind in kinds if kind and isinstance(name, str)}


async def get(qmp: Qmp, path: str, name: str) -> Any:
    """Returns a property, None where there is none."""
    try:
        return await qmp.execute("qom-get", path=path, property=name)
    except QmpError:
        return None


def _rows(answer: Any) -> list[dict[str, Any]]:
    return [row for row in answer[:_MOST] if isinstance(row, dict)] if isinstance(answer, list) else []
