"""What a service gives up for itself, and what it asks of the kernel; what could not be had is said, never passed over."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from hsmvisor.addresses import split
from hsmvisor_rpc.confine import capabilities, landlock

_LOW_PORTS = 1024
_IN_WRITTEN = landlock.EVERYTHING & ~landlock.MAKING_DEVICES & ~landlock.EXECUTING


@dataclass(frozen=True)
class Measure:
    name: str
    applied: bool
    detail: str


def apply(name: str, measure: Callable[[], str]) -> Measure:
    try:
        return Measure(name, True, measure())
    except (OSError, ValueError, ImportError) as error:
        return Measure(name, False, str(error))


def no_core() -> str:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return "RLIMIT_CORE 0"


def not_dumpable() -> str:
    capabilities.prctl(capabilities.PR_SET_DUMPABLE, 0)
    return "no ptrace, no /proc/self/mem for others"


def no_new_privileges() -> str:
    capabilities.prctl(capabilities.PR_SET_NO_NEW_PRIVS, 1)
    return "exec gains nothing"


def low_ports(addresses: Iterable[str]) -> frozenset[int]:
    """Returns the capability that listening at one of these, HOST:PORT, needs."""
    low = any(split(address)[1] < _LOW_PORTS for address in addresses)
    return frozenset({capabilities.NET_BIND_SERVICE}) if low else frozenset()


def file_rules(written: Iterable[str]) -> list[tuple[str, int]]:
    """For landlock.restrict: reads and executes everything, changes what lies in `written`."""
    rules = [("/", landlock.EXECUTING | landlock.READING), ("/dev/null", landlock.READING | landlock.WRITING_FILE)]
    return rules + [(path, _IN_WRITTEN) for path in written]


def confine_files(directories: Iterable[Path], more: Iterable[str], tcp: int, connecting: Collection[int] = ()) -> str:
    """Reads and executes everything; changes what lies in these directories, and `more`: paths that others of ours write to.

    Once all modules are imported and all directories made, and before there is a second thread.  Signals stay: processes that
    another service left are in no domain of ours.  `tcp`: what is refused, but to connect to the ports `connecting`.
    """
    if (threads := len(os.listdir("/proc/self/task"))) != 1:
        raise OSError(f"{threads} threads run already")
    written = sorted({str(path) for path in directories if path.is_dir()} | set(more))
    version = landlock.restrict(file_rules(written), tcp=tcp, scoped=False, connecting=connecting)
    told = f"ABI {version}: changes files in {', '.join(written)} alone"
    if version < landlock.NETWORK_FROM or not tcp:
        return told
    ports = ", ".join(map(str, sorted(connecting)))
    return f"{told}; TCP to {f'ports {ports} alone' if ports else 'nobody'}"
