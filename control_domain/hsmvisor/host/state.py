"""What the host keeps: modules and their sealed records, answered requests, enrolments, nonces, recent events.

Each method is one transaction.  The host holds ciphertext only: what a record's blob says is its worker's secret.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hsmvisor.host import limits
from hsmvisor.host.database import Database
from hsmvisor.serving import limits as serving_limits
from hsmvisor.serving.errors import Exhausted, WrongState
from hsmvisor.serving.events import EventRow
from hsmvisor.serving.requests import Request, reused
from hsmvisor_rpc.internal.messages import StoreState, StoreTpm

_NOBODY = ""  #: a key's name that there is not
CREATING, PRESENT, DESTROYING = "creating", "present", "destroying"


@dataclass(frozen=True)
class ModuleRow:
    module_id: bytes
    name: str
    number: int
    created_at: int
    root: bytes
    settings: str
    intent: str
    version: int


@dataclass(frozen=True)
class AttachmentRow:
    """Into which guest a module was plugged, and how; what a later supervisor needs to do it again.

    Of a guest whose monitor has a path `hybrid`, that is all."""

    module_id: bytes
    qmp: str
    asked_bus: str
    bus: str
    device: str
    chardev: str
    at: int
    hybrid: str = ""


@dataclass(frozen=True)
class UsbAttachmentRow:
    """Into which guest a module was plugged as a USB device, or where it may be imported by USB/IP."""

    module_id: bytes
    qmp: str
    device: str
    listen: str
    peers: tuple[str, ...]
    at: int


@dataclass(frozen=True)
class PurgeRow:
    """A module that is gone and whose keys are to be destroyed in the HSM where they lived."""

    module_id: bytes
    name: str
    hsm: str


@dataclass(frozen=True)
class EnrolmentRow:
    id: bytes
    secret_hash: bytes
    expires_at: int
    attempts: int


class State:
    """All reading and writing of the state file; every method may raise StorageUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sizes = _Sizes()

    # ---- modules ------------------------------------------------------------------------------------------------

    async def modules(self) -> list[ModuleRow]:
        return await self._database.run(_modules)

    async def begin_create(self, module_id: bytes, name: str, number: int, created_at: int, root: bytes, settings: str) -> None:
        """Records the intent: a module found `creating` at start was never acknowledged and is undone."""
        row = (module_id, name, number, created_at, root, settings, CREATING, 0, b"")

        def work(connection: sqlite3.Connection) -> None:
            # one that failed and could not be removed either is in nobody's way
            sql = "DELETE FROM modules WHERE intent = ? AND (name = ? OR number = ?)"
            connection.execute(sql, (CREATING, name, number))
            connection.execute("INSERT INTO modules VALUES (?,?,?,?,?,?,?,?,?)", row)

        await self._database.run(work)

    async def finish_create(self, module_id: bytes, request: Request, result: bytes) -> None:
        """The module is there, and so is the answer to the call that made it: one step."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE modules SET intent = ? WHERE module_id = ?", (PRESENT, module_id))
            store_answer(connection, request, result)

        await self._database.run(work)

    async def begin_destroy(self, module_id: bytes) -> None:
        await self._database.run(lambda c: c.execute("UPDATE modules SET intent = ? WHERE module_id = ?", (DESTROYING, module_id)))

    async def remove(self, module_id: bytes, request: Request | None, result: bytes = b"", purge: PurgeRow | None = None) -> None:
        """Forgets a module and its records (secure_delete overwrites them), with the answer to the call that asked for it; `purge`:
        what is to be done in its HSM then."""

        def work(connection: sqlite3.Connection) -> None:
            _note_purge(connection, purge)
            connection.execute("DELETE FROM modules WHERE module_id = ?", (module_id,))
            self._sizes.forget(module_id)
            if request is not None:
                store_answer(connection, request, result)

        await self._database.run(work)
        await self._database.forget_journal()

    async def replace(self, old_id: bytes, new: ModuleRow, request: Request, result: bytes, purge: PurgeRow | None = None) -> None:
        """Forgets a module with its records and has an empty one in its place, with the answer to the call: one step."""
        row = (new.module_id, new.name, new.number, new.created_at, new.root, new.settings, PRESENT, 0, b"")

        def work(connection: sqlite3.Connection) -> None:
            sql = "SELECT ?, qmp, asked_bus, bus, device, chardev, at, hybrid FROM attachments WHERE module_id = ?"
            attached = connection.execute(sql, (new.module_id, old_id)).fetchall()  # it stays in its guest
            usb = "SELECT ?, qmp, device, listen, peers, at FROM usb_attachments WHERE module_id = ?"
            by_usb = connection.execute(usb, (new.module_id, old_id)).fetchall()
            _note_purge(connection, purge)
            connection.execute("DELETE FROM modules WHERE module_id = ?", (old_id,))
            self._sizes.forget(old_id)
            connection.execute("INSERT INTO modules VALUES (?,?,?,?,?,?,?,?,?)", row)
            connection.executemany("INSERT INTO attachments VALUES (?,?,?,?,?,?,?,?)", attached)
            connection.executemany("INSERT INTO usb_attachments VALUES (?,?,?,?,?,?)", by_usb)
            store_answer(connection, request, result)

        await self._database.run(work)
        await self._database.forget_journal()

    async def update_settings(self, module_id: bytes, settings: str, request: Request, result: bytes) -> None:
        def work(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE modules SET settings = ? WHERE module_id = ?", (settings, module_id))
            store_answer(connection, request, result)

        await self._database.run(work)

    async def purges(self) -> list[PurgeRow]:
        sql = "SELECT module_id, name, hsm FROM purges ORDER BY name, module_id"
        return await self._database.run(lambda c: [PurgeRow(*row) for row in c.execute(sql)])

    async def purged(self, module_id: bytes) -> None:
        await self._database.run(lambda c: c.execute("DELETE FROM purges WHERE module_id = ?", (module_id,)))

    # ---- attachments --------------------------------------------------------------------------------------------

    async def attachments(self) -> list[AttachmentRow]:
        sql = "SELECT module_id, qmp, asked_bus, bus, device, chardev, at, hybrid FROM attachments"
        return await self._database.run(lambda c: [AttachmentRow(*row) for row in c.execute(sql)])

    async def attach(self, row: AttachmentRow, request: Request | None, result: bytes) -> None:
        """Notes where a module is plugged in, in the place of where it was, with the answer to the call, if there was one."""
        values = (row.module_id, row.qmp, row.asked_bus, row.bus, row.device, row.chardev, row.at, row.hybrid)

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO attachments VALUES (?,?,?,?,?,?,?,?)", values)
            if request is not None:
                store_answer(connection, request, result)

        await self._database.run(work)

    async def detach(self, module_id: bytes, request: Request, result: bytes) -> None:
        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM attachments WHERE module_id = ?", (module_id,))
            store_answer(connection, request, result)

        await self._database.run(work)

    async def usb_attachments(self) -> list[UsbAttachmentRow]:
        def row(values: tuple[Any, ...]) -> UsbAttachmentRow:
            module_id, qmp, device, listen, peers, at = values
            return UsbAttachmentRow(module_id, qmp, device, listen, tuple(json.loads(peers)), at)

        sql = "SELECT module_id, qmp, device, listen, peers, at FROM usb_attachments"
        return await self._database.run(lambda c: [row(values) for values in c.execute(sql)])

    async def attach_usb(self, row: UsbAttachmentRow, request: Request, result: bytes) -> None:
        """As `attach`, of a USB device."""
        values = (row.module_id, row.qmp, row.device, row.listen, json.dumps(row.peers), row.at)

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO usb_attachments VALUES (?,?,?,?,?,?)", values)
            store_answer(connection, request, result)

        await self._database.run(work)

    async def detach_usb(self, module_id: bytes, request: Request, result: bytes) -> None:
        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM usb_attachments WHERE module_id = ?", (module_id,))
            store_answer(connection, request, result)

        await self._database.run(work)

    # ---- sealed records -----------------------------------------------------------------------------------------

    async def sealed(self, module_id: bytes) -> tuple[int, list[tuple[str, bytes]]]:
        """Returns the version and the records of a module."""

        def work(connection: sqlite3.Connection) -> tuple[int, list[tuple[str, bytes]]]:
            row = connection.execute("SELECT version FROM modules WHERE module_id = ?", (module_id,)).fetchone()
            rows = connection.execute("SELECT name, blob FROM sealed WHERE module_id = ? ORDER BY name", (module_id,)).fetchall()
            return (row[0] if row else 0), rows

        return await self._database.run(work)

    async def store(self, module_id: bytes, change: StoreState, request: Request | None) -> None:
        """Carries out a worker's StoreState; raises WrongState, Exhausted, Conflict: then nothing has changed.

        The next version is stored; the stored one, with the same content, was stored before; anything else is refused.
        """
        await self._database.run(_store, module_id, change, request, self._sizes)

    # ---- TPMs -----------------------------------------------------------------------------------------------------

    async def tpm(self, module_id: bytes) -> tuple[int, bytes]:
        """Returns version and sealed state of a module's TPM; 0 and nothing where there is none yet."""

        def work(connection: sqlite3.Connection) -> tuple[int, bytes]:
            row = connection.execute("SELECT version, sealed FROM tpms WHERE module_id = ?", (module_id,)).fetchone()
            return (row[0], row[1]) if row else (0, b"")

        return await self._database.run(work)

    async def store_tpm(self, module_id: bytes, change: StoreTpm) -> None:
        """Carries out a StoreTpm; raises WrongState, Exhausted: then nothing has changed.  The stored version with the same content
        was stored before."""
        if len(change.sealed) > limits.MAX_TPM_STATE:
            raise Exhausted("TPM_STATE", f"a TPM's sealed state has at most {limits.MAX_TPM_STATE} bytes")

        def work(connection: sqlite3.Connection) -> None:
            row = connection.execute("SELECT version, sealed FROM tpms WHERE module_id = ?", (module_id,)).fetchone()
            version, sealed = row or (0, b"")
            if (change.version, change.sealed) == (version, sealed):
                return
            if change.version != version + 1:
                raise WrongState("VERSION", f"version {version} of the TPM is stored; {change.version} does not follow it")
            intent = connection.execute("SELECT intent FROM modules WHERE module_id = ?", (module_id,)).fetchone()
            if intent is None or intent[0] == DESTROYING:
                raise WrongState("MODULE", "the module is not there any more")
            connection.execute("INSERT OR REPLACE INTO tpms VALUES (?, ?, ?)", (module_id, change.version, change.sealed))

        await self._database.run(work)

    # ---- requests -----------------------------------------------------------------------------------------------

    async def answer(self, request: Request) -> bytes | None:
        """Returns what an equal call was answered before, or None; raises Conflict when that one asked for something else."""

        def work(connection: sqlite3.Connection) -> bytes | None:
            return _answered(connection, request)

        return await self._database.run(work)

    async def record(self, request: Request, result: bytes) -> None:
        await self._database.run(store_answer, request, result)

    async def prune(self, now: float) -> None:
        """Forgets answers, nonces and enrolments whose time is over."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM requests WHERE at < ?", (int(now) - serving_limits.REQUEST_KEPT,))
            connection.execute("DELETE FROM nonces WHERE expires_at < ?", (int(now),))
            connection.execute("DELETE FROM enrolments WHERE expires_at < ?", (int(now),))

        await self._database.run(work)

    # ---- enrolments ---------------------------------------------------------------------------------------------

    async def add_enrolment(self, id: bytes, secret_hash: bytes, expires_at: int, request: Request, result: bytes) -> None:
        """Raises Exhausted when too many are open."""

        def work(connection: sqlite3.Connection) -> None:
            if len(_open_enrolments(connection, int(time.time()))) >= limits.MAX_ENROLMENTS:
                raise Exhausted("ENROLMENTS", f"{limits.MAX_ENROLMENTS} one-time secrets are open", "use one, or let one expire")
            connection.execute("INSERT INTO enrolments VALUES (?, ?, ?, 0, NULL)", (id, secret_hash, expires_at))
            store_answer(connection, request, result)

        await self._database.run(work)

    async def open_enrolments(self, now: int) -> list[EnrolmentRow]:
        return await self._database.run(_open_enrolments, now)

    async def use_enrolment(self, id: bytes, manager: str, request: Request, result: bytes) -> bool:
        """Marks it used, with the answer to the call; says whether it was still open, so that of two who race one wins."""

        def work(connection: sqlite3.Connection) -> bool:
            sql = "UPDATE enrolments SET used_by = ? WHERE id = ? AND used_by IS NULL"
            won = connection.execute(sql, (manager, id)).rowcount == 1
            if won:
                store_answer(connection, request, result)
            return won

        return await self._database.run(work)

    async def count_wrong_proof(self, now: int) -> None:
        """A wrong proof counts against every secret that is open: which one was meant is not known."""
        sql = "UPDATE enrolments SET attempts = attempts + 1 WHERE used_by IS NULL AND expires_at > ?"
        await self._database.run(lambda c: c.execute(sql, (now,)))

    # ---- nonces -------------------------------------------------------------------------------------------------

    async def take_nonce(self, key: str, nonce: bytes, expires_at: int) -> bool:
        """Says whether the nonce is new for this key; it is kept until `expires_at` (seconds)."""

        def work(connection: sqlite3.Connection) -> bool:
            sql = "INSERT INTO nonces VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
            return connection.execute(sql, (key, nonce, expires_at)).rowcount == 1

        return await self._database.run(work)

    async def signed_from(self) -> int:
        """Returns the time up to which signed requests are refused, seconds: a restored state does not know which were seen."""
        row = await self._database.run(lambda c: c.execute("SELECT nonce FROM nonces WHERE key = ?", (_NOBODY,)).fetchone())
        return int.from_bytes(row[0], "big") if row else 0

    # ---- events -------------------------------------------------------------------------------------------------

    async def add_events(self, events: Iterable[EventRow]) -> None:
        rows = [(e.id, e.at_ms, e.kind, e.subject, e.detail) for e in events]

        def work(connection: sqlite3.Connection) -> None:
            connection.executemany("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?)", rows)
            sql = "DELETE FROM events WHERE id <= (SELECT id FROM events ORDER BY id DESC LIMIT 1 OFFSET ?)"
            connection.execute(sql, (serving_limits.EVENT_RING,))

        await self._database.run(work)

    async def events(self) -> list[EventRow]:
        sql = "SELECT id, at_ms, kind, module, detail FROM events ORDER BY id"
        return await self._database.run(lambda c: [EventRow(*row) for row in c.execute(sql)])


def forbid_signed_until(connection: sqlite3.Connection, at: int, skew: int) -> None:
    """For a restored state: requests that were signed up to `at` are refused, as long as they would be in time."""
    connection.execute("DELETE FROM nonces")
    connection.execute("INSERT INTO nonces VALUES (?, ?, ?)", (_NOBODY, at.to_bytes(8, "big"), at + 2 * skew + 1))


def _modules(connection: sqlite3.Connection) -> list[ModuleRow]:
    sql = "SELECT module_id, name, number, created_at, root, settings, intent, version FROM modules ORDER BY name"
    return [ModuleRow(*row) for row in connection.execute(sql)]


def _note_purge(connection: sqlite3.Connection, purge: PurgeRow | None) -> None:
    if purge is not None:
        row = (purge.module_id, purge.name, purge.hsm)
        connection.execute("INSERT OR IGNORE INTO purges VALUES (?, ?, ?)", row)


def _open_enrolments(connection: sqlite3.Connection, now: int) -> list[EnrolmentRow]:
    sql = "SELECT id, secret_hash, expires_at, attempts FROM enrolments WHERE used_by IS NULL AND expires_at > ? AND attempts < ?"
    return [EnrolmentRow(*row) for row in connection.execute(sql, (now, limits.MAX_ENROLMENT_ATTEMPTS))]


def _answered(connection: sqlite3.Connection, request: Request) -> bytes | None:
    sql = "SELECT method, content, result FROM requests WHERE request_id = ?"
    row = connection.execute(sql, (request.request_id,)).fetchone()
    if row is None:
        return None
    if (row[0], row[1]) != (request.method, request.content):
        raise reused(request.request_id)
    result: bytes = row[2]
    return result


def store_answer(connection: sqlite3.Connection, request: Request, result: bytes) -> None:
    """Within a transaction: together with what the call changes."""
    if _answered(connection, request) is None:
        row = (request.request_id, request.method, request.content, result, int(time.time()))
        connection.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?)", row)


class _Sizes:
    """Bytes of each module's sealed records, so that not all of them are looked at for each change; the state file's thread alone.

    A size is that of one version: of a transaction that was rolled back it is of one that is not stored, and is counted anew.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[int, int]] = {}  #: module -> version, bytes

    def before(self, connection: sqlite3.Connection, module_id: bytes, version: int, change: StoreState) -> int | None:
        """Returns the bytes of what `change` does not touch; None when they are not known."""
        known = self._known.get(module_id)
        if known is None or known[0] != version:
            return None
        sql = "SELECT length(blob) FROM sealed WHERE module_id = ? AND name = ?"
        touched = (connection.execute(sql, (module_id, name)).fetchone() for name in {*change.put_names, *change.delete_names})
        return known[1] - sum(int(row[0]) for row in touched if row is not None)

    def after(self, connection: sqlite3.Connection, module_id: bytes, change: StoreState, others: int | None) -> int:
        """Returns the bytes that there are with the change; `others`: from `before`."""
        if others is None:
            sql = "SELECT total(length(blob)) FROM sealed WHERE module_id = ?"
            size = int(connection.execute(sql, (module_id,)).fetchone()[0])
        else:
            size = others + sum(map(len, change.put_blobs))
        self._known[module_id] = (change.version, size)
        return size

    def forget(self, module_id: bytes) -> None:
        self._known.pop(module_id, None)


def _store(connection: sqlite3.Connection, module_id: bytes, change: StoreState, request: Request | None, sizes: _Sizes) -> None:
    row = connection.execute("SELECT version, digest, intent FROM modules WHERE module_id = ?", (module_id,)).fetchone()
    if row is None or row[2] == DESTROYING:
        raise WrongState("MODULE", "the module is not there any more")
    stored, digest = row[0], hashlib.sha256(change.encode()).digest()
    if change.version == stored and digest == row[1]:
        return
    if change.version != stored + 1:
        raise WrongState("VERSION", f"version {stored} is stored; {change.version} does not follow it")
    if len(change.put_names) != len(change.put_blobs) or len(set(change.put_names)) != len(change.put_names):
        raise WrongState("RECORDS", "names and blobs do not pair up")
    if any(not 1 <= len(name) <= limits.MAX_RECORD_NAME for name in change.put_names):
        raise WrongState("RECORDS", f"a record's name has 1-{limits.MAX_RECORD_NAME} characters")
    others = sizes.before(connection, module_id, stored, change)
    connection.executemany("DELETE FROM sealed WHERE module_id = ? AND name = ?", [(module_id, n) for n in change.delete_names])
    puts = [(module_id, name, blob) for name, blob in zip(change.put_names, change.put_blobs, strict=True)]
    connection.executemany(
        "INSERT INTO sealed VALUES (?, ?, ?) ON CONFLICT (module_id, name) DO UPDATE SET blob = excluded.blob", puts
    )
    if sizes.after(connection, module_id, change, others) > limits.MAX_MODULE_STATE:
        raise Exhausted("MODULE_STATE", f"a module's sealed state has at most {limits.MAX_MODULE_STATE} bytes")
    connection.execute("UPDATE modules SET version = ?, digest = ? WHERE module_id = ?", (change.version, digest, module_id))
    if request is not None:
        store_answer(connection, request, change.result)
