"""What a worker gives up before it reads a guest's first byte, and what the helpers do.  Each measure says whether it was
applied, and why not.

Order: identity first (needs privileges), then the rights that cannot come back, seccomp last.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from typing import Any

from hsmvisor_rpc.confine import capabilities, landlock

from hsmvisord import limits, memory
from hsmvisord.confined import scheduling, seccomp

MAX_DATA = memory.MOST  #: bytes of heap, stacks and other memory of its own; what is mapped shared does not count
THREADS = 9 + limits.LANE_THREADS  #: reactor.py, module.py, express.py and vsock/device.py start at most


class Missing(Exception):
    """The kernel or the installation lacks what a measure needs."""


def enter(uid: int, threads: int = THREADS, calls: Callable[[], str] = seccomp.load) -> list[dict[str, Any]]:
    """Applies every measure to a process that will start so many threads; returns [{"name", "applied", "detail"}].

    `calls`: loads the filter of system calls.
    """
    return [_apply(name, measure) for name, measure in _measures(uid, threads, calls)]


def _apply(name: str, measure: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "applied": True, "detail": measure()}
    except (OSError, Missing, ValueError, ImportError) as error:
        return {"name": name, "applied": False, "detail": str(error)}


def _measures(uid: int, threads: int, calls: Callable[[], str]) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "core-dumps", _no_core
    yield "limits", _limits
    yield "short-turns", _short_turns
    yield "memory", lambda: memory.keep(threads)  # needs privileges where the limit is low
    yield "bounding-set", _no_bounding_set
    yield "own-user", lambda: _own_user(uid)
    yield "capabilities", _no_capabilities
    yield "not-dumpable", _not_dumpable
    yield "no-new-privileges", _no_new_privileges
    yield "landlock", lambda: landlock.said(landlock.restrict(), "files")
    yield "seccomp", calls


def withdraw(measures: list[dict[str, Any]], name: str, why: str) -> None:
    """A measure that was applied holds no more."""
    for measure in measures:
        if measure["name"] == name:
            measure.update(applied=False, detail=why)


def prepare() -> None:
    """First of all: what needs the rights that are given up next, and what all children shall have."""
    memory.raise_limit()
    capabilities.prctl(capabilities.PR_SET_THP_DISABLE, 1)  # a heap with room to grow would take 2 MB at the first touch


def enter_launcher() -> list[dict[str, Any]]:
    """What the launcher can bear once everything is loaded: it forks, and its children change their user and give up the rest
    themselves.  It stays root where it was: without that it could give no child a user of its own."""
    return [
        _apply("core-dumps", _no_core),
        _apply("capabilities", lambda: capabilities.keep_only(capabilities.FOR_WORKERS)),
        _apply("not-dumpable", _not_dumpable),
        _apply("no-new-privileges", _no_new_privileges),
        _apply("landlock", lambda: landlock.said(landlock.restrict([("/proc", landlock.READING)]), "files, but to read /proc")),
        _apply("seccomp", seccomp.load_for_launcher),
    ]


def enter_helper(uid: int) -> list[dict[str, Any]]:
    """What a process can bear that has a maker's library in it: that opens files and sockets, starts threads and maps code."""
    return [
        _apply("core-dumps", _no_core),
        _apply("bounding-set", _no_bounding_set),
        _apply("own-user", lambda: _own_user(uid)),
        _apply("capabilities", _no_capabilities),
        _apply("not-dumpable", _not_dumpable),
        _apply("no-new-privileges", _no_new_privileges),
    ]


def _no_core() -> str:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return "RLIMIT_CORE 0"


def _limits() -> str:
    soft = min(limits.MAX_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = MAX_DATA if most == resource.RLIM_INFINITY else min(MAX_DATA, most)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return f"open files {soft}, file size 0, memory {most >> 20} MiB"


def _short_turns() -> str:
    scheduling.shorten(limits.TURN)
    return f"{limits.TURN // 1000} µs"


def _own_user(uid: int) -> str:
    if not uid:
        raise Missing("not started as root, or no user range is configured: it runs as the supervisor's user")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    resource.setrlimit(resource.RLIMIT_NPROC, (limits.MAX_THREADS, limits.MAX_THREADS))
    return f"uid {uid}"


def _no_bounding_set() -> str:
    capabilities.drop_bounding_set()
    return "empty"


def _no_capabilities() -> str:
    capabilities.clear()
    left = [name for name, value in capabilities.sets().items() if value and name != "CapBnd"]
    if left:
        raise Missing(f"not empty: {', '.join(left)}")
    return "inheritable, permitted, effective and ambient sets empty"


def _not_dumpable() -> str:
    capabilities.prctl(capabilities.PR_SET_DUMPABLE, 0)
    return "no ptrace, no /proc/self/mem for others"


def _no_new_privileges() -> str:
    capabilities.prctl(capabilities.PR_SET_NO_NEW_PRIVS, 1)
    return "exec gains nothing"
