"""Cores that dying processes leave (core(5)): whether an ordinary one does here, and where they would lie."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """Processes that are started meanwhile may write cores, unless they take care."""
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, limits)


def _pattern() -> str:
    return Path("/proc/sys/kernel/core_pattern").read_text().strip()


def left_by_an_ordinary_process(directory: Path) -> bool:
    """True too where cores are not written beside the process: what becomes of them is not seen then."""
    ordinary = subprocess.run([sys.executable, "-c", "import os; os.abort()"], cwd=directory, check=False)
    assert ordinary.returncode == -signal.SIGABRT
    return _pattern().startswith(("|", "/")) or bool(list(directory.glob("*core*")))


def places(pids: Collection[int]) -> set[Path]:
    """Where those of these processes would lie."""
    pattern = _pattern()
    return {Path(os.readlink(f"/proc/{pid}/cwd")) for pid in pids} | ({Path(pattern).parent} if pattern.startswith("/") else set())


def found(directories: Collection[Path]) -> set[Path]:
    return {path for directory in directories for path in directory.glob("*core*")}
