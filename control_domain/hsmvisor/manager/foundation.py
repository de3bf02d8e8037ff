"""What must be there before anything runs: directories, the lock, this manager's key.

Each step that cannot go on says precisely why and overwrites nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hsmvisor.manager import secrets
from hsmvisor.manager.config import Config
from hsmvisor.manager.secrets import ManagerKey
from hsmvisor.serving import directories

_SERVICE = "hsmvisor-manager"


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
    directories.make(config.state, 0o700)
    directories.make(config.fleet, 0o700)
    directories.make(config.runtime, 0o755)
    directories.make(config.runtime / "private", 0o700)
    for directory in config.written():  # what is missing now could not be made once the process is confined
        directories.make(directory)
    locks = [directories.lock(config.state / "lock", _SERVICE, f"runs with {config.state}")]
    if (file := config.database_file) is not None:
        why = f"has the database {file}: SQLite is for one; several need PostgreSQL"
        locks.append(directories.lock(file.with_name(file.name + ".lock"), _SERVICE, why))
    audited = _size(config.audit_file) > 0
    hint = "restore the file from a backup: the audit log is signed with it; or move the log away to begin a new one"
    key = ManagerKey(secrets.load(config.state / "manager.key", not audited, hint))
    return Foundation(config, tuple(locks), key, audited)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
