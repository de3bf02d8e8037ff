"""What the supervisor gives up for itself, and what it asks of the kernel; what could not be had is said, never passed over.

It opens files, sockets and databases, starts helpers, and ends workers of other users.  Everything else can go.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from hsmvisor.host import swap
from hsmvisor.host.config import UNIX, Config
from hsmvisor.host.uplink.membership import BadMembership, Memory, port_of
from hsmvisor.serving import measures, syscalls
from hsmvisor.serving.measures import Measure, apply
from hsmvisor_rpc.confine import capabilities, landlock

#: Files, modes and sockets of others' groups; workers of other users to end; and what a launcher needs, which has no more than we.
_CAPABILITIES = capabilities.FOR_WORKERS | {
    capabilities.CHOWN,
    capabilities.FOWNER,
    capabilities.DAC_OVERRIDE,
    capabilities.KILL,
}
_LOCKED = 1 << 30  #: bytes of memory that a worker may lock; as in hsmvisord/memory.py

__all__ = ["Measure", "apply_all", "confine", "reachable"]


def _subreaper() -> str:
    capabilities.prctl(capabilities.PR_SET_CHILD_SUBREAPER, 1)
    return "workers of a launcher that died are ours"


def _limits() -> str:
    """Four descriptors a module: 200 modules pass the usual soft limit of 1024.  Locked memory: for the workers."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if resource.RLIM_INFINITY not in (soft, most) and most < _LOCKED:
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (_LOCKED, _LOCKED))
        except (OSError, ValueError):
            return f"open files {hard}, locked memory {most >> 10} KiB (LimitMEMLOCK=infinity would be better)"
    return f"open files {hard}"


def _no_swap() -> str:
    try:
        return swap.keep_out()
    except OSError as error:
        there = swap.areas()
        now = f"in use here: {', '.join(there)}; encrypt it" if there else "none is in use here"
        raise OSError(f"{error}; swap: {now}") from None


def _before(config: Config) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "core-dumps", measures.no_core
    yield "not-dumpable", measures.not_dumpable
    yield "no-new-privileges", measures.no_new_privileges
    yield "subreaper", _subreaper
    yield "limits", _limits
    yield "no-swap", _no_swap
    yield "capabilities", lambda: capabilities.keep_only(_wanted(config))
    yield "seccomp", syscalls.refuse


def apply_all(config: Config) -> tuple[Measure, ...]:
    """Applies to this process and its children what can be given up before anything is opened."""
    return tuple(apply(name, measure) for name, measure in _before(config))


def confine(config: Config) -> Measure:
    """The last one, once all modules are imported and all directories made, and before there is a second thread."""
    return apply("landlock", lambda: _landlock(config))


def _wanted(config: Config) -> frozenset[int]:
    return _CAPABILITIES | measures.low_ports(config.addresses().values())


def _landlock(config: Config) -> str:
    """Its own directories, and TCP to managers alone, or to everybody where an HSM's library connects."""
    tcp = 0 if _reach_all(config) else landlock.CONNECT_TCP
    return measures.confine_files(_written(config), _for_hsms(config), tcp, managers_ports(config))


def _reach_all(config: Config) -> bool:
    return any(hsm.network for hsm in config.hsms)


def managers_ports(config: Config) -> frozenset[int]:
    """Returns the ports at which managers may be reached: of the configuration, and of a manager that was joined."""
    found = set(config.manager.ports)
    with contextlib.suppress(BadMembership, OSError):
        if (membership := Memory(config.state).membership()) is not None:
            found |= {port_of(address) for address in membership.addresses}
    return frozenset(found)


def reachable(config: Config, applied: Iterable[Measure]) -> frozenset[int] | None:
    """Returns the TCP ports that are left to this process by what it has `applied`; None: all."""
    restricted = any(measure.name == "landlock" and measure.applied for measure in applied)
    if not restricted or _reach_all(config) or landlock.abi() < landlock.NETWORK_FROM:
        return None
    return managers_ports(config)


def _for_hsms(config: Config) -> set[str]:
    """What HSMs' libraries change: their helpers are our children, and have no more than we."""
    return {path for hsm in config.hsms for path in hsm.writes if os.path.exists(path)}


def _written(config: Config) -> Iterator[Path]:
    yield from (config.state, config.runtime, config.audit_file.parent, config.control_socket.parent, config.master_key.parent)
    yield from map(Path, config.guests.directories)
    if config.signed.address.startswith(UNIX):
        yield Path(config.signed.address.removeprefix(UNIX)).parent
