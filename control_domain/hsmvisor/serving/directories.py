"""Directories that a service has to itself: made with their modes, and locked against another service."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from hsmvisor.serving.errors import Broken


def make(path: Path, mode: int | None = None) -> None:
    """Makes it where it is missing, with what leads to it; `mode`: it gets this mode in any case.  Raises Broken."""
    try:
        path.mkdir(mode=0o700 if mode is None else mode, parents=True, exist_ok=True)
        if mode is not None and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)
    except OSError as error:
        raise Broken(
            "DIRECTORY",
            f"{path}: {error.strerror}",
            "look at the directory's owner and mode; not as root: name your own (state_directory, runtime_directory in a file for "
            "--config)",
        ) from None


def lock(path: Path, service: str, why: str) -> int:
    """Returns the descriptor that holds the lock.  Raises Broken: another `service` has it, and `why` that is in the way."""
    try:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(held, 32, 0).decode("ascii", "replace").strip() or "?"
            os.close(held)
            raise Broken("LOCKED", f"another {service} (pid {holder}) {why}", "stop it first") from None
        os.ftruncate(held, 0)
        os.pwrite(held, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise Broken("LOCK", f"{path}: {error.strerror}", "look at the directory's owner, mode and disk") from None
    return held
