"""What must be there before anything runs: directories, the one-instance lock, the host's key, the state file, the helpers.

Each step that cannot go on says precisely why and overwrites nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from dataclasses import dataclass, replace
from pathlib import Path

from hsmvisor.host import identity, restored
from hsmvisor.host.backup import remove_leftovers
from hsmvisor.host.config import Config
from hsmvisor.host.database import Database
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.launcher import Launcher, TpmLauncher
from hsmvisor.host.measures import Measure
from hsmvisor.host.places import Places
from hsmvisor.host.provider import Provider
from hsmvisor.host.restored import Note
from hsmvisor.serving import directories
from hsmvisor.serving.errors import Broken

_SOON = 2.0  #: seconds that a helper has to say what it is confined by


@dataclass(frozen=True)
class Foundation:
    config: Config
    places: Places
    lock: int  #: descriptor; the lock ends with it
    identity: HostIdentity
    database: Database
    launcher: Launcher
    tpm_launcher: TpmLauncher
    provider: Provider
    adopting: bool  #: workers of an earlier service serve, so the helpers can wait until the control API answers
    restored: Note | None = None  #: what was restored and is not audited yet

    async def helpers(self) -> tuple[str, tuple[Measure, ...]]:
        """Returns the key provider's status, and what launcher and key provider have given up, each under its name."""
        launcher, (status, provider) = await asyncio.gather(self.launcher.measures(_SOON), self.provider.status(_SOON))
        named = (("launcher", launcher), ("key provider", provider))
        return status, tuple(replace(m, name=f"{name}: {m.name}") for name, measures in named for m in measures)


def lay(config: Config) -> Foundation:
    """Raises Broken.

    The helpers are started last and come up while we go on.  Where workers of an earlier service serve, only the control API is
    missing, and the helpers are not started yet: they would compete with it for processors.
    """
    os.umask(0o077)
    directories.make(config.state, 0o700)
    lock = lock_state(config.state)
    note = restored.finish(config)
    remove_leftovers(config.state)
    places = Places(config.runtime)
    places.make()
    state_file = config.state / "state.db"
    _demand_state(config, state_file)
    # the host's key comes first: a state file without it is a loss, not a beginning
    host = identity.load(config.state / "host.key", new_host=not state_file.exists())
    database = Database(state_file)
    _demand_master_key(config, state_file)
    provider = Provider(config)
    launcher, adopting = Launcher(), places.some_worker_serves()
    if not adopting:
        launcher.child.spawn()
        provider.child.spawn()
    return Foundation(config, places, lock, host, database, launcher, TpmLauncher(), provider, adopting, note)


def lock_state(directory: Path) -> int:
    """Returns the descriptor that holds the lock; raises Broken when another instance has it."""
    return directories.lock(directory / "lock", "hsmvisor-host", f"runs with {directory}")


def _demand_state(config: Config, state_file: Path) -> None:
    """A host that has acted has a state file."""
    with contextlib.suppress(OSError):
        if not state_file.exists() and config.audit_file.stat().st_size > 0:
            raise Broken(
                "STATE_MISSING",
                f"{state_file} is missing, but {config.audit_file} tells of this host; nothing was written",
                "restore a backup (hsmvisor restore), or move the directory away to begin a new host",
            )


def _demand_master_key(config: Config, state_file: Path) -> None:
    """The key provider makes a missing key; not when sealed state is there that needs the lost one."""
    if config.master_key.exists() or config.plain_master_key.exists():
        return
    with contextlib.closing(sqlite3.connect(f"{state_file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        modules: int = connection.execute("SELECT count(*) FROM modules WHERE intent = 'present'").fetchone()[0]
    if modules:
        raise Broken(
            "MASTER_KEY_MISSING",
            f"{config.master_key} is missing, but {modules} modules are sealed with it; nothing was written",
            f"put your copy of it to {config.plain_master_key}; if it is lost, destroy the state and deliver the keys again",
        )
