"""What the issuer gives up once everything is loaded, and its children besides.  What the kernel lacks is said, not passed over.

Without a token there is nothing to open: no file, no socket, no program.  With one, a child that asks it has a maker's library in
it, which opens files and maps code; so the issuer itself keeps the right to, and children that ask no token give it up.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsmvisor.manager.issuer import limits, syscalls
from hsmvisor.serving import measures
from hsmvisor.serving.measures import Measure, apply
from hsmvisor_rpc.confine import capabilities, landlock

_CURRENT, _FUTURE, _ON_FAULT = 1, 2, 4  # mlockall(2)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Needs:
    """What a token's library needs: directories that it writes into, and whether its token is reached by a network."""

    writes: Sequence[Path] = ()
    network: bool = False


def prepare() -> list[Measure]:
    """First of all, before there is a secret, and while there are rights to do it."""
    applied = [apply("core-dumps", measures.no_core), apply("not-dumpable", measures.not_dumpable)]
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    return applied


def enter(needs: Needs | None) -> list[Measure]:
    """After `prepare`.  `needs`: of a token's library; None: there is no token."""
    return [apply(name, measure) for name, measure in _measures(needs)]


def enter_child(asks_token: bool, rules: syscalls.Rules | None) -> None:
    """`rules`: built before the fork.  What the issuer could not apply, it has said."""
    apply("memory", lock_memory)  # locks do not pass to a child
    resource.setrlimit(resource.RLIMIT_CPU, (limits.CHILD_SECONDS, limits.CHILD_SECONDS))
    if not asks_token and rules is not None:
        rules.load()


def lock_memory() -> str:
    """Raises OSError: under a low limit what comes later is not locked, for then memory could not grow."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    low = limit != resource.RLIM_INFINITY and limit < limits.MAX_MEMORY
    done = _libc.mlockall(_CURRENT | _ON_FAULT | (0 if low else _FUTURE)) == 0  # as CAP_IPC_LOCK may, whatever the limit is
    if low or not done:
        what = "the issuer's own keys alone are locked" if done else "nothing is locked"
        raise OSError(f"RLIMIT_MEMLOCK is {limit >> 10} KiB: {what}, others may be swapped (LimitMEMLOCK=infinity)")
    return "locked as it comes into use"


def _measures(needs: Needs | None) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "allocator", _allocator
    yield "limits", lambda: _limits(needs)
    yield "memory", lock_memory
    yield "capabilities", lambda: capabilities.keep_only(frozenset())
    yield "no-new-privileges", measures.no_new_privileges
    yield "landlock", lambda: _landlock(needs)
    yield "seccomp", lambda: syscalls.refuse(needs.network) if needs else syscalls.allow_parent()


def _allocator() -> str:
    if os.environ.get("PYTHONMALLOC") != "malloc" or "perturb" not in os.environ.get("GLIBC_TUNABLES", ""):
        raise OSError("freed memory is not overwritten: PYTHONMALLOC and GLIBC_TUNABLES are not set")
    return "freed memory is overwritten"


def _limits(needs: Needs | None) -> str:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits.MAX_OPEN_FILES, limits.MAX_OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_DATA, (limits.MAX_MEMORY, limits.MAX_MEMORY))
    if needs is None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return f"open files {limits.MAX_OPEN_FILES}, memory {limits.MAX_MEMORY >> 20} MiB{', file size 0' if needs is None else ''}"


def _landlock(needs: Needs | None) -> str:
    if needs is None:
        return landlock.said(landlock.restrict(), "files")
    rules = measures.file_rules(map(str, needs.writes))
    tcp = 0 if needs.network else landlock.BIND_TCP | landlock.CONNECT_TCP
    version = landlock.restrict(rules, tcp=tcp)
    where = f"files are changed in {', '.join(map(str, needs.writes))} alone" if needs.writes else "files are read alone"
    return landlock.said(version, where, tcp=bool(tcp))
