"""What must be there before anything runs: directories, the lock, this manager's key.

Each step that cannot go on says precisely why and overwrites nothing.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from hsmvisor.manager import secrets
from hsmvisor.manager.config import Config
from hsmvisor.manager.secrets import ManagerKey
from hsmvisor.serving.errors import Broken


@dataclass(frozen=True)
class Foundation:
    config: Config
    locks: tuple[int, ...]  #: descriptors; the locks end with them
    key: ManagerKey
    audited: bool  #: this manager has acted before

    def close(self) -> None:
        for lock in self.locks:
            os.close(lock)


def lay(config: Config) -> Foundation:
    """Raises Broken."""
    os.umask(0o077)
    make_directory(config.state, 0o700)
    make_directory(config.fleet, 0o700)
    make_directory(config.runtime, 0o755)
    make_directory(config.runtime / "private", 0o700)
    for directory in config.written():  # what is missing now could not be made once the process is confined
        make_directory(directory, None)
    locks = [lock(config.state / "lock", f"another hsmvisor-manager (pid {{pid}}) runs with {config.state}")]
    if (file := config.database_file) is not None:
        path = file.with_name(file.name + ".lock")
        locks.append(
            lock(
                path, f"another hsmvisor-manager (pid {{pid}}) has the database {file}: SQLite is for one; several need PostgreSQL"
            )
        )
    audited = _size(config.audit_file) > 0
    hint = "restore the file from a backup: the audit log is signed with it; or move the log away to begin a new one"
    key = ManagerKey(secrets.load(config.state / "manager.key", not audited, hint))
    return Foundation(config, tuple(locks), key, audited)


def make_directory(path: Path, mode: int | None) -> None:
    """`mode`: it gets this mode where others may do more."""
    try:
        path.mkdir(mode=0o700 if mode is None else mode, parents=True, exist_ok=True)
        if mode is not None and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)
    except OSError as error:
        raise Broken(
            "DIRECTORY",
            f"{path}: {error.strerror}",
            "look at the directory's owner and mode; not as root: name your own (state_directory, runtime_directory)",
        ) from None


def lock(path: Path, taken: str) -> int:
    """Returns the descriptor that holds the lock.  Raises Broken: `taken`, with the pid of who has it."""
    try:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(held, 32, 0).decode("ascii", "replace").strip() or "?"
            os.close(held)
            raise Broken("LOCKED", taken.format(pid=holder), "stop it first") from None
        os.ftruncate(held, 0)
        os.pwrite(held, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise Broken("LOCK", f"{path}: {error.strerror}", "look at the directory's owner, mode and disk") from None
    return held


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
