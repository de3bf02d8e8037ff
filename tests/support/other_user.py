"""Where a program of another user finds our code: here, or in a copy when the repository lies in a directory of our own alone."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from support.guest import REPOSITORY

_ROOTS = [REPOSITORY / name for name in ("daemon", "control_domain", "proto", "tests")]


def _open_to_all() -> bool:
    return all(directory.stat().st_mode & 0o001 for directory in (REPOSITORY, *REPOSITORY.parents))


@functools.cache
def python() -> tuple[str, str]:
    """Returns an interpreter and the PYTHONPATH for it."""
    if _open_to_all():
        return sys.executable, os.pathsep.join(map(str, _ROOTS))
    copy = Path(tempfile.mkdtemp(prefix="hsmu."))
    atexit.register(shutil.rmtree, copy)
    copy.chmod(0o755)
    roots = [*_ROOTS, Path(sysconfig.get_path("purelib"))]
    for root in roots:
        shutil.copytree(root, copy / root.name, ignore=shutil.ignore_patterns("__pycache__", "*.pth"))
    return os.path.realpath(sys.executable), os.pathsep.join(str(copy / root.name) for root in roots)
