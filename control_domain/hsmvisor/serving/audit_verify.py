"""Checks an audit log: finds a changed, removed, reordered or cut off line and says where."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hsmvisor.serving.audit import GENESIS, AuditHead, rotated

_MAX_LINE = 1024 * 1024
_HASH_TAIL = len(',"hash":"') + 64 + len('"}')


@dataclass(frozen=True)
class Finding:
    """One fault; `line` counts from 1 in `file`, `sequence` is the place in the chain (0 = unknown)."""

    file: str
    line: int
    sequence: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


@dataclass
class _Gap:
    """Lines that are not where they belong; some of them may come later."""

    first: int
    last: int
    finding: int  #: its place among the findings
    found: int = 0


@dataclass
class Verdict:
    service: str  #: who wrote the log
    findings: list[Finding] = field(default_factory=list)
    lines: int = 0
    first: int = 0  #: sequence of the first line
    last: int = 0  #: highest sequence
    head: str | None = GENESIS  #: hash of that line; None: it was changed
    checkpoints: int = 0
    signed_until: int = 0  #: last sequence that a good checkpoint covers
    gaps: list[_Gap] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.findings


def verify(path: Path, public: bytes, *, service: str = "host", exported: bool = False, first: int = 1) -> Verdict:
    """Walks the log at `path` and the files it went on from; `public` is the raw Ed25519 key of the `service`
    that wrote it; older lines than `first` are kept elsewhere.  Raises OSError.

    Cut off lines at the end are found by the `.head` file beside the log, as far as that was not set back with it.  One that was
    `exported` has none: its chain is checked, and where it was to end cannot be told.
    """
    verdict = Verdict(service)
    key = Ed25519PublicKey.from_public_bytes(public)
    note = _read_note(path)  # first: a service that is running writes it after its lines
    for file, number, raw in _lines(path):
        _Line(verdict, key, file, number).check(raw, first)
    for gap in verdict.gaps:
        if gap.found > gap.last - gap.first:
            found = verdict.findings[gap.finding]
            verdict.findings[gap.finding] = replace(found, what=f"{_span(gap.first, gap.last)} come later: reordered")
    if not exported:
        _check_end(verdict, key, path, note)
    return verdict


def _span(first: int, last: int) -> str:
    return f"lines {first} to {last}"


def _lines(path: Path) -> Iterator[tuple[str, int, bytes]]:
    files = [*rotated(path), path] if path.exists() else rotated(path)
    if not files:
        raise FileNotFoundError(errno.ENOENT, "there is no audit log", str(path))
    for file in files:
        with open(file, "rb") as stream:
            number = 0
            while raw := stream.readline(_MAX_LINE):
                number += 1
                yield file.name, number, raw


@dataclass
class _Line:
    """One line of one file, against what was read before it."""

    verdict: Verdict
    key: Ed25519PublicKey
    file: str
    number: int

    def find(self, what: str, sequence: int = 0) -> None:
        self.verdict.findings.append(Finding(self.file, self.number, sequence, what))

    def check(self, raw: bytes, first: int) -> None:
        verdict = self.verdict
        verdict.lines += 1
        if not raw.endswith(b"\n"):
            self.find(f"the line is cut off after {len(raw)} bytes (after line {verdict.last} of the chain)")
            return
        line = raw[:-1]
        try:
            values = json.loads(line)
            sequence, prev, said = int(values["seq"]), str(values["prev"]), str(values["hash"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            self.find(f"not a line of an audit log (after line {verdict.last} of the chain)")
            return
        digest = hashlib.sha256(line[:-_HASH_TAIL]).hexdigest()
        if said != digest or not line.endswith(f',"hash":"{said}"}}'.encode()):
            self._changed(sequence, first)
            return
        self._place(sequence, prev, first)
        if values.get("kind") == "audit.cut-off":
            self.find(f"lines up to {values.get('noted')} had been cut off when the {self.verdict.service} service began", sequence)
        if values.get("kind") == "checkpoint":
            self._checkpoint(sequence, prev, str(values.get("signature")))
        if sequence > verdict.last:
            verdict.last, verdict.head = sequence, said

    def _changed(self, sequence: int, first: int) -> None:
        """What it says of its place is not believed."""
        verdict = self.verdict
        place = verdict.last + 1 if verdict.first else first
        verdict.first = verdict.first or place
        self.find(f"line {place} was changed: its hash does not fit its bytes", place)
        verdict.last, verdict.head = place, None

    def _place(self, sequence: int, prev: str, first: int) -> None:
        verdict = self.verdict
        if verdict.first == 0:
            verdict.first, verdict.last = sequence, min(sequence, first) - 1
            verdict.head = GENESIS if sequence == 1 else None
        if sequence > verdict.last + 1:
            verdict.gaps.append(_Gap(verdict.last + 1, sequence - 1, len(verdict.findings)))
            archived = f", or are kept elsewhere: then say --first {sequence}" if verdict.first == sequence else ""
            self.find(f"{_span(verdict.last + 1, sequence - 1)} were removed{archived}", sequence)
        elif sequence <= verdict.last:
            for gap in verdict.gaps:
                gap.found += gap.first <= sequence <= gap.last
            self.find(f"line {sequence} stands after line {verdict.last}: reordered or repeated", sequence)
        elif sequence == 1 and prev != GENESIS:
            self.find("line 1 names a line before it", 1)
        elif verdict.head is not None and prev != verdict.head:
            self.find(f"line {sequence} does not follow line {verdict.last}: one of them was replaced", sequence)

    def _checkpoint(self, sequence: int, prev: str, signature: str) -> None:
        if _signed(self.key, AuditHead(sequence, prev), signature):
            self.verdict.checkpoints += 1
            self.verdict.signed_until = sequence
        else:
            self.find(f"the checkpoint in line {sequence} is not signed by this {self.verdict.service}'s key", sequence)


def _signed(key: Ed25519PublicKey, head: AuditHead, signature: str) -> bool:
    try:
        key.verify(bytes.fromhex(signature), head.encode())
    except (InvalidSignature, ValueError):
        return False
    return True


def _read_note(path: Path) -> tuple[AuditHead, str] | None:
    try:
        values = json.loads(_note_path(path).read_bytes())
        return AuditHead(int(values["sequence"]), str(values["head"])), str(values["signature"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _note_path(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _check_end(verdict: Verdict, key: Ed25519PublicKey, path: Path, note: tuple[AuditHead, str] | None) -> None:
    """Compares the end with the signed note of the newest place."""

    def find(what: str) -> None:
        verdict.findings.append(Finding(path.name, 0, verdict.last, what))

    if note is None:
        if verdict.lines:
            find(f"{_note_path(path).name} is missing or damaged: whether lines were cut off at the end cannot be told")
        return
    head, signature = note
    if not _signed(key, head, signature):
        find(f"{_note_path(path).name} is not signed by this {verdict.service}'s key")
    elif head.sequence - 1 > verdict.last:
        find(f"the log ends with line {verdict.last}; lines up to {head.sequence - 1} were cut off")
    elif head.sequence - 1 == verdict.last and verdict.head not in (None, head.head):
        find(f"line {verdict.last} is not the one that was written last")
