"""A backup of the running host: a consistent copy of the state file and the host's key, sealed into one file.

SQLite's own online backup makes the copy in one step, while the service goes on.  Temporary files lie beside the state and have no
name any more when the first byte is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hsmvisor.host import backup_file
from hsmvisor.host.backup_file import Manifest
from hsmvisor.host.config import Config
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.provider import Provider
from hsmvisor.serving.audit import AuditHead
from hsmvisor.serving.errors import StorageUnavailable

_PREFIX = ".backup-"
_KEY_WITHIN = 10.0  #: seconds


@dataclass(frozen=True)
class Made:
    manifest: Manifest
    file: BinaryIO  #: the caller's to close; it has no name
    size: int


class Backups:
    def __init__(
        self, config: Config, identity: HostIdentity, provider: Provider, place: Callable[[], AuditHead], version: str
    ) -> None:
        """`place`: where the audit log is."""
        self._config, self._identity, self._provider, self._place, self._version = config, identity, provider, place, version
        self._making = asyncio.Lock()  # there is room for one beside the state

    async def make(self) -> Made:
        """Raises Unavailable while there is no key from the key provider, or no room."""
        async with self._making:
            key = await self._provider.backup_key(_KEY_WITHIN)
            provider, _ = await self._provider.status(_KEY_WITHIN)
            return await asyncio.to_thread(self._make, key, provider, self._place())

    def _make(self, key: bytes, provider: str, place: AuditHead) -> Made:
        state = self._config.state
        remove_leftovers(state)
        directory: Path | None = None
        try:
            directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=state))
            schema, modules = _copy(state / backup_file.STATE, directory / backup_file.STATE)

            def describe(backup_id: bytes, salt: bytes, sizes: tuple[int, ...], digests: tuple[bytes, ...]) -> Manifest:
                return Manifest(
                    backup_id, self._identity.public, int(time.time()), self._version, schema, provider, salt,
                    place.sequence, place.head, modules, backup_file.MEMBERS, sizes, digests,
                )  # fmt: skip

            with (
                open(state / backup_file.HOST_KEY, "rb") as host_key,
                open(directory / backup_file.STATE, "rb") as copy,
                contextlib.ExitStack() as on_failure,
            ):
                file = on_failure.enter_context(open(directory / "sealed", "w+b"))
                manifest = backup_file.write(file, (host_key, copy), key, self._identity.sign, describe)
                size = file.tell()
                file.seek(0)
                on_failure.pop_all()
            return Made(manifest, file, size)
        except (OSError, sqlite3.Error) as error:
            hint = f"a backup needs room for two copies of the state in {state} while it is made"
            raise StorageUnavailable("BACKUP", f"the backup cannot be made: {error}", hint) from None
        finally:
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)


def remove_leftovers(state: Path) -> None:
    """Removes what a service that was killed while it made a backup has left."""
    for path in state.glob(f"{_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _copy(source: Path, target: Path) -> tuple[int, tuple[str, ...]]:
    """Returns the schema and the names of the modules in the copy."""
    with (
        contextlib.closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as live,
        contextlib.closing(sqlite3.connect(target, isolation_level=None)) as copy,
    ):
        live.backup(copy)  # all pages in one step: one moment of the state
        copy.execute("PRAGMA journal_mode=DELETE")  # one file
        schema: int = copy.execute("PRAGMA user_version").fetchone()[0]
        rows = copy.execute("SELECT name FROM modules WHERE intent = 'present' ORDER BY name").fetchall()
    return schema, tuple(name for (name,) in rows)
