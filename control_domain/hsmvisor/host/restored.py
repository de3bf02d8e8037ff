"""The last steps of a restore, which any later start finishes: what was unpacked is moved into its place.

restore.new/     being unpacked and checked: of no meaning, removed at the next start
restore.ready/   all is checked: renaming the directory to this name is the moment at which the restore has happened
restored.json    what was restored, until the audit log has it
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hsmvisor.files import sync_path
from hsmvisor.host.backup_file import HOST_KEY, STATE
from hsmvisor.host.config import Config
from hsmvisor.host.database import COMMITS
from hsmvisor.serving.audit import AuditHead, rotated
from hsmvisor.serving.errors import Broken

NEW, READY, NOTE = "restore.new", "restore.ready", "restored.json"


@dataclass(frozen=True)
class Note:
    """What was restored, by whom, and what became of that which was there."""

    backup: str  #: id, hexadecimal
    host_id: str
    modules: int
    made_at: int  #: seconds
    restored_at: int
    who: str
    why: str
    aside: str  #: directory with what was there before, beside the state
    audit_aside: bool  #: the audit log is of another host: set aside as well
    audit_sequence: int  #: where the log goes on if there is none
    audit_head: str

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        path.chmod(0o600)
        sync_path(path)

    @classmethod
    def read(cls, path: Path) -> Note | None:
        """Returns None when there is none; raises Broken when it cannot be read."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            raise Broken("RESTORE", f"{path} cannot be read", "restore the backup again") from None

    @property
    def place(self) -> AuditHead:
        return AuditHead(self.audit_sequence, self.audit_head)


def finish(config: Config) -> Note | None:
    """Finishes a restore that has happened and forgets one that has not; returns what was restored and is not audited yet.

    Each step may be the last one before a kill: the new file leaves `restore.ready` when it is in its place, so what stands there
    before is the old one.  Raises Broken.
    """
    state = config.state
    shutil.rmtree(state / NEW, ignore_errors=True)
    ready = state / READY
    try:
        if (note := Note.read(ready / NOTE)) is not None:
            aside = state / note.aside
            for name in (STATE, HOST_KEY):
                if (ready / name).exists():
                    for old in (f"{name}-wal", f"{name}-shm", f"{name}{COMMITS}", name):
                        _set_aside(state / old, aside)
                    move(ready / name, state / name)
            if note.audit_aside:
                for path in (*rotated(config.audit_file), _head_of(config.audit_file), config.audit_file):
                    _set_aside(path, config.audit_file.parent / note.aside)
            sync_path(state)
            move(ready / NOTE, state / NOTE)
            sync_path(state)
        with contextlib.suppress(FileNotFoundError):
            ready.rmdir()
    except OSError as error:
        hint = "look at the directory's owner, mode and disk, then start the service or restore again: it goes on from there"
        raise Broken("RESTORE", f"the restore cannot be finished: {error.filename}: {error.strerror}", hint) from None
    return Note.read(state / NOTE)


def forget(config: Config) -> None:
    """The audit log has it."""
    with contextlib.suppress(FileNotFoundError):
        (config.state / NOTE).unlink()


def move(source: Path, target: Path) -> None:
    os.rename(source, target)


def _set_aside(path: Path, directory: Path) -> None:
    if path.exists():
        directory.mkdir(mode=0o700, exist_ok=True)
        move(path, directory / path.name)
        sync_path(directory)


def _head_of(audit_file: Path) -> Path:
    return audit_file.with_name(audit_file.name + ".head")
