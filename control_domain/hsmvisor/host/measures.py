"""What the supervisor gives up for itself, and what it asks of the kernel; what could not be had is said, never passed over."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass

_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Measure:
    name: str
    applied: bool
    detail: str


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _no_core() -> str:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return "RLIMIT_CORE 0"


def _not_dumpable() -> str:
    _prctl(_PR_SET_DUMPABLE, 0)
    return "no ptrace, no /proc/self/mem for others"


def _no_new_privileges() -> str:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return "exec gains nothing"


def _subreaper() -> str:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    return "workers of a launcher that died are ours"


def _open_files() -> str:
    """Four descriptors a module: 200 modules pass the usual soft limit of 1024."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return f"open files {hard}"


_MEASURES: dict[str, Callable[[], str]] = {
    "core-dumps": _no_core,
    "not-dumpable": _not_dumpable,
    "no-new-privileges": _no_new_privileges,
    "subreaper": _subreaper,
    "limits": _open_files,
}


def apply_all() -> tuple[Measure, ...]:
    """Applies every measure to this process and its children."""
    return tuple(_apply(name, measure) for name, measure in _MEASURES.items())


def _apply(name: str, measure: Callable[[], str]) -> Measure:
    try:
        return Measure(name, True, measure())
    except (OSError, ValueError) as error:
        return Measure(name, False, str(error))
