"""Restores a backup on a host whose service does not run.

Everything is checked before anything is changed: the file, the master key that opens it, the state in it, what stands in the way.
Then the workers that a stopped service left are ended (they hold a newer state than the restored one), and one rename decides
(restored.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from hsmvisor.files import sync_path
from hsmvisor.host import backup_file, database, foundation, identity, restored
from hsmvisor.host.adoption import end_all
from hsmvisor.host.backup_file import BadBackup, Manifest, WrongKey
from hsmvisor.host.config import Config
from hsmvisor.host.migrations import STEPS
from hsmvisor.host.places import Places
from hsmvisor.host.provider import Provider
from hsmvisor.host.restored import NEW, READY, Note
from hsmvisor.host.state import forbid_signed_until
from hsmvisor.serving import directories
from hsmvisor.serving.errors import Broken, ServiceError

_KEY_WITHIN = 10.0  #: seconds


def restore(config: Config, path: Path, *, why: str, force: bool, check: bool, say: Callable[[str], None]) -> Note:
    """Returns what was restored (`check`: what would be).  Raises Broken; then the state is as it was."""
    os.umask(0o077)
    directories.make(config.state, 0o700)
    lock = foundation.lock_state(config.state)
    try:
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(path, "rb"))
                manifest = backup_file.verify(file)
            except BadBackup as error:
                raise Broken("BACKUP", f"{path}: {error}", "take another backup") from None
            say(f"the backup is whole: host {manifest.host_id.hex()[:16]}, {len(manifest.modules)} modules")
            done = restored.finish(config)
            if done is not None and done.backup == manifest.backup_id.hex() and not force:
                say("this backup is restored already")
                return done
            note = _note(config, manifest, why)
            if not force:
                _demand_nothing_there(config, manifest)
            try:
                _unpack(config, file, manifest, note)
                if check:
                    return note
                ended = asyncio.run(end_all(Places(config.runtime), config.workers.drain_seconds))
                say(f"{ended} workers ended; guests wait until the service is started")
                _commit(config)
            finally:
                shutil.rmtree(config.state / NEW, ignore_errors=True)
            restored.finish(config)
            return note if (config.state / note.aside).exists() else dataclasses.replace(note, aside="")
    except OSError as error:
        raise Broken("RESTORE", f"{error.filename}: {error.strerror}", "look at the disk; the state is as it was") from None
    finally:
        os.close(lock)


def _note(config: Config, manifest: Manifest, why: str) -> Note:
    now = time.time()
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    aside = f"replaced-{stamp}-{os.urandom(2).hex()}"
    return Note(
        backup=manifest.backup_id.hex(),
        host_id=manifest.host_id.hex(),
        modules=len(manifest.modules),
        made_at=manifest.made_at,
        restored_at=int(now),
        who=f"uid:{os.getuid()} pid:{os.getpid()}",
        why=why,
        aside=aside,
        audit_aside=_host_key(config) not in (b"", manifest.host_key) and config.audit_file.exists(),
        audit_sequence=manifest.audit_sequence,
        audit_head=manifest.audit_head,
    )


def _host_key(config: Config) -> bytes:
    """Returns the public key of the host that is there, empty when there is none that can be read."""
    try:
        return identity.load(config.state / backup_file.HOST_KEY, new_host=False).public
    except Broken:
        return b""


def _demand_nothing_there(config: Config, manifest: Manifest) -> None:
    if (config.state / backup_file.STATE).exists() or _host_key(config) not in (b"", manifest.host_key):
        raise Broken(
            "STATE_EXISTS",
            f"{config.state} holds a state already; nothing was changed",
            "give --force to replace it: what is there is set aside in the same directory, not deleted",
        )


def _unpack(config: Config, file: BinaryIO, manifest: Manifest, note: Note) -> None:
    """Opens and checks what is in the backup, beside the state."""
    new = config.state / NEW
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    was_sealed = config.provider.kind == "tpm" and config.master_key.exists()
    key, provider = asyncio.run(_provider_key(config))
    try:
        backup_file.unpack(file, manifest, key, new)
    except WrongKey:
        if config.provider.kind == "tpm" and not was_sealed:
            config.master_key.unlink(missing_ok=True)  # the TPM has just sealed what is not the right one
        raise Broken(
            "MASTER_KEY_WRONG",
            f"the backup was made with the master key {manifest.provider!r}; this host has {provider!r}; nothing was changed",
            f"put your copy of the right one to {config.plain_master_key}"
            + (f", and take {config.master_key} away" if was_sealed else ""),
        ) from None
    except BadBackup as error:
        raise Broken("BACKUP", f"{error}; nothing was changed", "take another backup") from None
    if identity.load(new / backup_file.HOST_KEY, new_host=False).public != manifest.host_key:
        raise Broken("BACKUP", "the host's key in it is not the one that signed it; nothing was changed", "take another backup")
    _prepare(new / backup_file.STATE, note.restored_at + config.signed.skew_seconds, config.signed.skew_seconds)
    note.write(new / restored.NOTE)
    sync_path(new)


async def _provider_key(config: Config) -> tuple[bytes, str]:
    """Returns the key that opens backups, and the master key's kind and fingerprint.  A master key that is missing is not made."""
    if not (config.master_key.exists() or config.plain_master_key.exists()):
        raise Broken(
            "MASTER_KEY_MISSING",
            f"{config.master_key} is missing: without it the backup cannot be opened; nothing was changed",
            f"put your copy of it to {config.plain_master_key} (chmod 600); if it is lost, begin a new host and deliver the keys "
            "again",
        )
    provider = Provider(config)
    provider.child.start()
    try:
        return await provider.backup_key(_KEY_WITHIN), (await provider.status(_KEY_WITHIN))[0]
    except ServiceError as error:
        raise Broken(error.reason, f"{error.detail}; nothing was changed", error.hint) from None
    finally:
        await provider.child.stop()


def _prepare(path: Path, signed_until: int, skew: int) -> None:
    """Checks the state and takes out what must not come back: one-time secrets, and the chance to replay signed requests."""
    try:
        database.inspect(path)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            schema: int = connection.execute("PRAGMA user_version").fetchone()[0]
            if schema > len(STEPS):
                raise Broken("STATE_NEWER", f"the backup has schema {schema}, this release knows {len(STEPS)}", "use that one")
            connection.execute("PRAGMA secure_delete=ON")
            with database.transaction(connection):
                connection.execute("DELETE FROM enrolments")
                forbid_signed_until(connection, signed_until, skew)
    except sqlite3.Error as error:
        raise Broken("BACKUP", f"the state in it is damaged: {error}; nothing was changed", "take another backup") from None
    sync_path(path)


def _commit(config: Config) -> None:
    """From here on the restore has happened."""
    sync_path(config.state / NEW)
    restored.move(config.state / NEW, config.state / READY)
    sync_path(config.state)
