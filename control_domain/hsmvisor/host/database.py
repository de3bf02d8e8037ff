"""The state file itself: opened with care, written by one thread, each change a synced transaction.

SQLite in WAL with synchronous=FULL: a commit is on the disk when it returns.  A damaged, truncated, foreign or newer file is
named and left alone.  SQLite itself takes a journal that was cut for a shorter one: so commits are numbered, and beside the file
stands `<file>.commits`, the newest number.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from hsmvisor.files import sync_path
from hsmvisor.host.migrations import APPLICATION_ID, NUMBERED, migrate
from hsmvisor.serving.errors import Broken, StorageUnavailable

P = ParamSpec("P")
T = TypeVar("T")

COMMITS = ".commits"  #: suffix of the file with the number of the newest commit
_SMALLEST = 512  #: bytes of the smallest database
_FORMATS, _NEWEST_FORMAT = slice(18, 20), 2  #: of the header: who may write and read it (SQLite's file format, 1.3.4)
#: What SQLite puts aside for a large change stays in memory: in a directory for temporary files the supervisor may make none.
_PRAGMAS = (
    *("journal_mode=WAL", "synchronous=FULL", "temp_store=MEMORY"),
    *("secure_delete=ON", "foreign_keys=ON", "trusted_schema=OFF"),
)
_RESTORE = "restore a backup (hsmvisor restore), or move the file away to begin with no modules"


class Database:
    """One connection in one thread of its own; `run` carries out a function there, so that the event loop never waits."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file at `path`; raises Broken."""
        self.path = path
        try:
            if path.exists():
                inspect(path)
            else:
                _create(path)
            self._note = os.open(_note_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._connection = _connect(path)
            self.migrated_from = migrate(self._connection, str(path))
        except sqlite3.Error as error:
            # SQLITE_ERROR is a statement that does not fit the file's schema
            if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_ERROR:
                hint = "look at the owner, mode and disk of the state directory"
                raise Broken("STATE_DIRECTORY", f"{path}: {error}; nothing was changed", hint) from None
            raise Broken("STATE_CORRUPT", f"{path}: {error}; nothing was written", _RESTORE) from None
        except UnicodeDecodeError:  # of a name in the file, also where SQLite quotes it
            raise Broken("STATE_CORRUPT", f"{path} holds text that is not UTF-8; nothing was written", _RESTORE) from None
        except OSError as error:
            raise Broken("STATE_DIRECTORY", f"{path}: {error.strerror}", "look at the directory's owner, mode and disk") from None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")

    async def run(self, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns work(connection, ...), done in one transaction; raises StorageUnavailable, or what `work` raises.

        A caller that is cancelled does not stop it: it is done, or not done, whole.
        """

        def call() -> T:
            connection, number = self._connection, 0
            with transaction(connection):
                before = connection.total_changes
                result = work(connection, *args, **kwargs)
                if connection.total_changes != before:
                    number = connection.execute("UPDATE commits SET number = number + 1 RETURNING number").fetchone()[0]
            if number:
                with contextlib.suppress(OSError):  # not synced: after a loss of power an older note is as good
                    os.pwrite(self._note, b"%20d\n" % number, 0)
            return result

        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def forget_journal(self) -> None:
        """Empties the journal, where what was deleted may still stand; tried again with the next deletion if it cannot be now."""

        def call() -> None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

        await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def close(self) -> None:
        self._executor.submit(self._connection.close).result()
        self._executor.shutdown()
        os.close(self._note)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing; the commit is synced.  Raises StorageUnavailable when the file cannot be read or written."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # a failed commit may have rolled back already
                connection.execute("ROLLBACK")
            raise
    except (sqlite3.Error, UnicodeDecodeError) as error:  # a damaged text comes as the latter
        raise StorageUnavailable(
            "STORAGE", f"the state cannot be stored: {error}", "look at the state directory's disk and permissions, then try again"
        ) from None


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    for pragma in _PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _create(path: Path) -> None:
    """Makes the whole file aside and renames it: a file under its own name is always complete."""
    journal = path.with_name(path.name + "-wal")
    if journal.exists() and journal.stat().st_size:  # SQLite would take it for the new file's
        raise Broken("STATE_MISSING", f"{journal} is there without {path.name}; nothing was written", _RESTORE)
    _note_path(path).unlink(missing_ok=True)
    new = path.with_name(path.name + ".new")
    for leftover in (new, new.with_name(new.name + "-wal"), new.with_name(new.name + "-shm")):
        leftover.unlink(missing_ok=True)
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    with contextlib.closing(_connect(new)) as connection:
        migrate(connection, str(new))
    sync_path(new)
    os.rename(new, path)
    sync_path(path.parent)


def inspect(path: Path) -> None:
    """Looks at an existing file without writing to it; raises sqlite3.Error or Broken when it is not a sound state file."""
    if (size := path.stat().st_size) < _SMALLEST:  # SQLite would take it for a new one
        raise Broken("STATE_CORRUPT", f"{path} has {size} bytes: it was truncated; nothing was written", _RESTORE)
    with path.open("rb") as file:
        head = file.read(_FORMATS.stop)
    if max(head[_FORMATS]) > _NEWEST_FORMAT:  # SQLite would read it, and take it for one that may not be written
        raise Broken("STATE_CORRUPT", f"{path}: the header is damaged; nothing was written", _RESTORE)
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
        if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise Broken("STATE_FOREIGN", f"{path} is not a state file of hsmvisor; nothing was written", _RESTORE)
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise Broken("STATE_CORRUPT", f"{path}: {verdict}; nothing was written", _RESTORE)
        if (found := _commits(connection)) < (noted := _noted_commits(path)):
            raise Broken(
                "STATE_OLDER",
                f"{path} ends with change {found}, but there were {noted}: its journal {path.name}-wal was cut or damaged, or the "
                "file is an older copy; nothing was written",
                f"restore the journal; to go on with what is here, remove {_note_path(path)}: later deliveries are lost then",
            )


def _note_path(path: Path) -> Path:
    return path.with_name(path.name + COMMITS)


def _noted_commits(path: Path) -> int:
    try:
        return int(_note_path(path).read_bytes())
    except (OSError, ValueError):
        return 0


def _commits(connection: sqlite3.Connection) -> int:
    if connection.execute("PRAGMA user_version").fetchone()[0] < NUMBERED:
        return 0
    number: int = connection.execute("SELECT number FROM commits").fetchone()[0]
    return number
