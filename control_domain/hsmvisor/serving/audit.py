"""The audit log: append-only JSON lines, chained by hashes, synced before what they tell is acknowledged.

A line is `{"seq":…,"at":…,"kind":…,…,"prev":…,"hash":…}`: `hash` is SHA-256 of the line's bytes before `,"hash"`, `prev` is that
of the line before.  A checkpoint is a line whose `signature` is the service key's over the chain up to it.  Beside the file stands
`<file>.head`, the signed newest place of the chain, so that lines cut off at the end are missed.  A full file is renamed to
`<file>.<first seq>` and the chain goes on in a new one.

One thread writes; lines that came meanwhile are written and synced together (group commit), so many actions share one sync.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hsmvisor.files import sync_path
from hsmvisor.serving.errors import Broken, Unavailable
from hsmvisor_rpc.sealed.canonical import Record

_log = logging.getLogger(__name__)

GENESIS = "0" * 64  #: `prev` of the first line of all
MAX_PENDING = 100_000  #: lines that wait while the file cannot be written
_RETRY = 1.0  #: seconds


@dataclass(frozen=True)
class AuditHead(Record):
    """What a checkpoint signs: the chain up to and without the line `sequence`."""

    TYPE: ClassVar[str] = "audit-head"
    sequence: int
    head: str  #: hash of the line before


@dataclass
class _Entry:
    kind: str
    fields: dict[str, Any]
    at: float
    written: asyncio.Future[None]


def seal_line(fields: dict[str, Any]) -> tuple[str, str]:
    """Returns the line (without its end) and its hash."""
    body = json.dumps(fields, separators=(",", ":"), ensure_ascii=True)
    digest = hashlib.sha256(body[:-1].encode()).hexdigest()
    return f'{body[:-1]},"hash":"{digest}"}}', digest


class Audit:
    """`sign` signs with the key of `service`, which is its name ("host"); `now` is in seconds since 1970."""

    def __init__(
        self,
        path: Path,
        sign: Callable[[bytes], bytes],
        *,
        service: str,
        rotate_bytes: int,
        checkpoint_lines: int,
        checkpoint_seconds: float,
        now: Callable[[], float] = time.time,
        begin_after: AuditHead | None = None,
    ) -> None:
        """Opens the log and finds its end; a torn last line is cut off, and the chain says so.  Raises Broken.

        `begin_after`: the place at which the chain goes on where there is no log at all: that of a restored backup.
        """
        self.path, self._sign, self._service, self._now = path, sign, service, now
        self._rotate_bytes, self._every_lines, self._every_seconds = rotate_bytes, checkpoint_lines, checkpoint_seconds
        self._pending: list[_Entry] = []
        self._wake = asyncio.Event()
        self._begin_after = begin_after
        self._failure = ""
        self._closing = False
        self._dropped = 0  #: lines that nobody waited for and there was no room for
        self._since_checkpoint = 0
        self._writer: asyncio.Task[None] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="audit")
        self.lines = 0  #: written by this process
        try:
            torn = self._open()
        except OSError as error:
            raise Broken("AUDIT", f"{path}: {error.strerror}", "look at the directory's owner, mode and disk") from None
        self.place = AuditHead(self._sequence + 1, self._head)  #: of the next line
        if torn:
            _log.warning("%s: the last line was torn (%d bytes); it is cut off and the chain says so", path, torn)
            self._begin_with("audit.recovered", torn_bytes=torn)
        if (noted := self._noted) > self._sequence:
            _log.error("%s ends with line %d; lines up to %d are missing, and the chain says so", path, self._sequence, noted)
            self._begin_with("audit.cut-off", last=self._sequence, noted=noted)

    # ---- the file, in the writer's thread (or before there is one) ----------------------------------------------

    def _open(self) -> int:
        """Returns the bytes of a torn last line."""
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._head_file = os.open(
            self.path.with_name(self.path.name + ".head"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        self._noted = self._read_note()
        sync_path(self.path.parent)  # whoever made the file may have been killed before its name was on the disk
        size = os.fstat(self._descriptor).st_size
        last, whole = _last_line(self._descriptor, size)
        if whole < size:
            os.ftruncate(self._descriptor, whole)
        self._size = whole
        if not last:
            last = self._last_of_rotated()
        try:
            values: dict[str, Any] = json.loads(last) if last else self._beginning()
            self._sequence, self._head = int(values["seq"]), str(values["hash"])
        except (ValueError, KeyError, TypeError):
            raise Broken(
                "AUDIT_DAMAGED",
                f"the last line of {self.path} is not a line of an audit log; nothing was written",
                "run hsmvisor audit verify; keep the file, and move it away to begin a new chain",
            ) from None
        return size - whole

    def _beginning(self) -> dict[str, Any]:
        place = self._begin_after or AuditHead(1, GENESIS)
        return {"seq": place.sequence - 1, "hash": place.head}

    def _begin_with(self, kind: str, **fields: int) -> None:
        try:
            self._write([self._line(kind, {"who": self._service, "result": "ok", **fields}, self._now())])
        except OSError as error:
            raise Broken("AUDIT", f"{self.path}: {error.strerror}", "look at the disk of the audit file") from None

    def _read_note(self) -> int:
        """Returns the last line that was noted, 0 without a note; raises Broken for a note that this key did not sign."""
        try:
            note = json.loads(os.pread(self._head_file, 4096, 0))
            record, signature = AuditHead(int(note["sequence"]), str(note["head"])), str(note["signature"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        if self._sign(record.encode()).hex() != signature:  # Ed25519: the same key signs the same way
            ours = self._service
            raise Broken(
                "AUDIT_FOREIGN",
                f"{self.path}.head is not signed by this {ours}'s key: one of them is not what it was; nothing was written",
                f"restore {ours}.key from a backup; if it is the right one, run hsmvisor audit verify and move the note away",
            )
        return record.sequence - 1

    def _last_of_rotated(self) -> bytes:
        files = rotated(self.path)
        if not files:
            return b""
        with open(files[-1], "rb") as file:
            return _last_line(file.fileno(), os.fstat(file.fileno()).st_size)[0]

    def _line(self, kind: str, fields: dict[str, Any], at: float) -> str:
        self._sequence += 1
        values = {"seq": self._sequence, "at": _stamp(at), "kind": kind, **fields, "prev": self._head}
        line, self._head = seal_line(values)
        return line

    def _checkpoint(self, at: float) -> str:
        signature = self._sign(AuditHead(self._sequence + 1, self._head).encode())
        self._since_checkpoint = 0
        return self._line("checkpoint", {"signature": signature.hex()}, at)

    def _write(self, lines: list[str]) -> None:
        """Appends and syncs; on failure the file is as it was.  Raises OSError."""
        data = "".join(f"{line}\n" for line in lines).encode()
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fdatasync(self._descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(data)
        self.lines += len(lines)
        self._note_head()

    def _note_head(self) -> None:
        """Notes the newest place beside the log; not synced: after a loss of power an older one is as good."""
        self.place = record = AuditHead(self._sequence + 1, self._head)
        note = {"sequence": record.sequence, "head": record.head, "signature": self._sign(record.encode()).hex()}
        with contextlib.suppress(OSError):
            os.pwrite(self._head_file, json.dumps(note).ljust(320).encode(), 0)

    def _write_batch(self, entries: list[_Entry], checkpoint: bool) -> None:
        before = self._sequence, self._head, self._since_checkpoint
        lines = [self._line(e.kind, e.fields, e.at) for e in entries]
        self._since_checkpoint += len(entries)
        try:
            if self._since_checkpoint and (checkpoint or self._since_checkpoint >= self._every_lines):
                lines.append(self._checkpoint(self._now()))
            self._write(lines)
        except OSError:
            self._sequence, self._head, self._since_checkpoint = before
            raise
        if self._size >= self._rotate_bytes:
            self._rotate()

    def _rotate(self) -> None:
        """Ends the full file with a checkpoint and begins a new one; a failure leaves the old one in use."""
        before = self._sequence, self._head, self._since_checkpoint
        try:
            if self._since_checkpoint:
                self._write([self._checkpoint(self._now())])
            before = self._sequence, self._head, self._since_checkpoint
            descriptor = self._begin_file()
        except OSError as error:
            self._sequence, self._head, self._since_checkpoint = before
            _log.error("%s: rotation failed: %s", self.path, error.strerror)
            return
        full, self._descriptor, self._size = self._descriptor, descriptor, 0
        with contextlib.suppress(OSError):  # all of it is synced
            os.close(full)

    def _begin_file(self) -> int:
        """Gives the full file its new name and returns the descriptor of one that begins; on failure all is as it was."""
        first = json.loads(os.pread(self._descriptor, 256, 0).split(b",", 1)[0] + b"}")["seq"]
        full = self.path.with_name(f"{self.path.name}.{first:012d}")
        if full.exists():
            raise FileExistsError(errno.EEXIST, f"{full} exists")
        os.rename(self.path, full)
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_EXCL, 0o600)
            try:
                sync_path(self.path.parent)
            except OSError:
                os.close(descriptor)
                raise
        except OSError:
            with contextlib.suppress(OSError):
                os.rename(full, self.path)
            raise
        return descriptor

    # ---- for the event loop -------------------------------------------------------------------------------------

    def start(self) -> None:
        self._writer = asyncio.get_running_loop().create_task(self._run())

    def note(self, kind: str, **fields: Any) -> asyncio.Future[None]:
        """Queues a line; the future is done when it is on the disk.  Lines keep the order of these calls."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if len(self._pending) >= MAX_PENDING:
            written.set_exception(
                Unavailable("AUDIT", "the audit log cannot be written", f"look at the {self._service}'s log and disk")
            )
            written.exception()  # the caller may not look
            self._dropped += 1
            return written
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self.note("audit.dropped", who=self._service, result="failed", count=dropped)
        self._pending.append(_Entry(kind, fields, self._now(), written))
        self._wake.set()
        return written

    async def record(self, kind: str, **fields: Any) -> None:
        """Returns when the line is on the disk; raises Unavailable while it cannot be written (it is kept and tried again)."""
        written = self.note(kind, **fields)
        self.demand_working()
        await asyncio.shield(written)

    def demand_working(self) -> None:
        """Raises Unavailable while lines cannot be written: nothing is acknowledged that the log does not hold."""
        if self._failure:
            raise Unavailable("AUDIT", f"the audit log cannot be written: {self._failure}", "look at the disk of the audit file")

    @property
    def failure(self) -> str:
        return self._failure

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._every_seconds
        while not self._closing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._wake.wait()
            checkpoint = loop.time() >= due
            if checkpoint:
                due = loop.time() + self._every_seconds
            await self._flush(checkpoint)

    async def _flush(self, checkpoint: bool) -> None:
        while self._pending or checkpoint:
            self._wake.clear()
            entries, self._pending = self._pending, []
            try:
                await asyncio.get_running_loop().run_in_executor(self._executor, self._write_batch, entries, checkpoint)
            except OSError as error:
                self._fail(entries, error)
                if self._closing:
                    return
                await asyncio.sleep(_RETRY)
                continue
            if self._failure:
                _log.warning("the audit log can be written again; no line is missing")
                self._failure = ""
            checkpoint = False
            for entry in entries:
                if not entry.written.done():
                    entry.written.set_result(None)

    def _fail(self, entries: list[_Entry], error: OSError) -> None:
        """Keeps the lines for the next attempt; those who wait are told now."""
        self._pending[:0] = entries
        if not self._failure:
            _log.error("%s cannot be written: %s; changing calls are refused until it can", self.path, error.strerror)
        self._failure = error.strerror or "input/output error"
        for entry in entries:
            if not entry.written.done():
                entry.written.set_exception(Unavailable("AUDIT", f"the audit log cannot be written: {self._failure}"))
                entry.written.exception()

    async def close(self) -> None:
        """Writes what waits and a last checkpoint."""
        if self._writer is not None:
            self._closing = True
            self._wake.set()
            await self._writer
        entries, self._pending = self._pending, []
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._write_batch, entries, True)
        except OSError as error:
            _log.error("%s: the last %d lines could not be written: %s", self.path, len(entries), error.strerror)
        self._executor.shutdown()
        for descriptor in (self._descriptor, self._head_file):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _stamp(at: float) -> str:
    whole = int(at)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{int((at - whole) * 1000):03d}Z"


def rotated(path: Path) -> list[Path]:
    """Returns the files that the log went on from, oldest first."""
    names = (p for p in path.parent.glob(f"{path.name}.*") if p.suffix[1:].isdigit())
    return sorted(names, key=lambda p: int(p.suffix[1:]))


def _last_line(descriptor: int, size: int) -> tuple[bytes, int]:
    """Returns the last whole line and the offset behind it."""
    step, tail = 65536, b""
    start = size
    while start > 0:
        start = max(0, start - step)
        tail = os.pread(descriptor, min(step, size - start - len(tail)), start) + tail
        end = tail.rfind(b"\n")
        if end >= 0 and (begin := tail.rfind(b"\n", 0, end)) >= 0:
            return tail[begin + 1 : end], start + end + 1
    end = tail.rfind(b"\n")
    return (tail[:end], end + 1) if end >= 0 else (b"", 0)
