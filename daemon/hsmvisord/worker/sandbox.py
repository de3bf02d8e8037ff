"""What a worker gives up before it reads a guest's first byte.  Each measure says whether it was applied, and why not.

Order: identity first (needs privileges), then the rights that cannot come back, seccomp last.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

from hsmvisord.worker import landlock, process, seccomp

MAX_OPEN_FILES = 2048
MAX_THREADS = 1536  #: 1024 connections at most, and our own


class Missing(Exception):
    """The kernel or the installation lacks what a measure needs."""


def enter(uid: int) -> list[dict[str, Any]]:
    """Applies every measure; returns [{"name", "applied", "detail"}]."""
    return [_apply(name, measure) for name, measure in _measures(uid)]


def _apply(name: str, measure: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "applied": True, "detail": measure()}
    except (OSError, Missing, ValueError, ImportError) as error:
        return {"name": name, "applied": False, "detail": str(error)}


def _measures(uid: int) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "core-dumps", _no_core
    yield "limits", _limits
    yield "bounding-set", _no_bounding_set
    yield "own-user", lambda: _own_user(uid)
    yield "capabilities", _no_capabilities
    yield "not-dumpable", _not_dumpable
    yield "no-new-privileges", _no_new_privileges
    yield "landlock", landlock.restrict
    yield "seccomp", seccomp.load


def enter_key_provider() -> list[dict[str, Any]]:
    """What the key provider can bear once it has its master key: as a worker, but for the user."""
    names = ("core-dumps", "bounding-set", "capabilities", "not-dumpable", "no-new-privileges", "landlock", "seccomp")
    return [_apply(name, measure) for name, measure in _measures(0) if name in names]


def enter_launcher() -> list[dict[str, Any]]:
    """What the launcher can bear: it forks, and its children change their user and give up the rest themselves."""
    kept = frozenset({process.CAP_SETUID, process.CAP_SETGID, process.CAP_SETPCAP}) if os.geteuid() == 0 else frozenset()
    return [
        _apply("core-dumps", _no_core),
        _apply("bounding-set", lambda: _only(kept)),
        _apply("not-dumpable", _not_dumpable),
        _apply("no-new-privileges", _no_new_privileges),
        _apply("landlock", lambda: landlock.restrict(reading=True)),
    ]


def _only(kept: frozenset[int]) -> str:
    if kept:
        process.drop_bounding_set(kept)
    process.clear_capabilities(kept)
    return "setuid, setgid and setpcap left, for its children" if kept else "empty"


def _no_core() -> str:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return "RLIMIT_CORE 0"


def _limits() -> str:
    soft = min(MAX_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return f"open files {soft}, file size 0"


def _own_user(uid: int) -> str:
    if not uid:
        raise Missing("not started as root, or no user range is configured: it runs as the supervisor's user")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    resource.setrlimit(resource.RLIMIT_NPROC, (MAX_THREADS, MAX_THREADS))
    return f"uid {uid}"


def _no_bounding_set() -> str:
    process.drop_bounding_set()
    return "empty"


def _no_capabilities() -> str:
    process.clear_capabilities()
    left = [name for name, value in process.capability_sets().items() if value and name != "CapBnd"]
    if left:
        raise Missing(f"not empty: {', '.join(left)}")
    return "inheritable, permitted, effective and ambient sets empty"


def _not_dumpable() -> str:
    process.prctl(process.PR_SET_DUMPABLE, 0)
    return "no ptrace, no /proc/self/mem for others"


def _no_new_privileges() -> str:
    process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
    return "exec gains nothing"


def measure_names() -> list[str]:
    return [name for name, _ in _measures(0)]


def complain(measures: list[dict[str, Any]], program: str) -> None:
    """Says what the kernel lacks."""
    for measure in measures:
        if not measure["applied"]:
            print(f"{program}: {measure['name']} is not applied: {measure['detail']}", file=sys.stderr, flush=True)
