"""Checks an audit log: finds a changed, removed, reordered or cut off line and says where."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hsmvisor.host.audit import GENESIS, AuditHead, rotated

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
class Verdict:
    findings: list[Finding] = field(default_factory=list)
    lines: int = 0
    first: int = 0  #: sequence of the first line; above 1: older files are kept elsewhere
    last: int = 0
    head: str = GENESIS
    checkpoints: int = 0
    signed_until: int = 0  #: last sequence that a good checkpoint covers

    @property
    def sound(self) -> bool:
        return not self.findings


def verify(path: Path, host_public: bytes, exported: bool = False) -> Verdict:
    """Walks the log at `path` and the files it went on from; `host_public` is the host's raw Ed25519 key.  Raises OSError.

    Cut off lines at the end are found by the `.head` file beside the log, as far as that was not set back with it.  One that was
    `exported` has none: its chain is checked, and where it was to end cannot be told.
    """
    verdict = Verdict()
    key = Ed25519PublicKey.from_public_bytes(host_public)
    note = _read_note(path)  # first: a host that is running writes it after its lines
    for file, number, raw in _lines(path):
        _check(verdict, key, file, number, raw)
    if not exported:
        _check_end(verdict, key, path, note)
    return verdict


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


def _check(verdict: Verdict, key: Ed25519PublicKey, file: str, number: int, raw: bytes) -> None:
    def find(what: str, sequence: int = 0) -> None:
        verdict.findings.append(Finding(file, number, sequence, what))

    verdict.lines += 1
    if not raw.endswith(b"\n"):
        find(f"the line is cut off after {len(raw)} bytes (after line {verdict.last} of the chain)")
        return
    line = raw[:-1]
    try:
        values = json.loads(line)
        sequence, prev, said = int(values["seq"]), str(values["prev"]), str(values["hash"])
    except (ValueError, KeyError, TypeError):
        find(f"not a line of an audit log (after line {verdict.last} of the chain)")
        return
    digest = hashlib.sha256(line[:-_HASH_TAIL]).hexdigest()
    changed = said != digest or not line.endswith(f',"hash":"{said}"}}'.encode())
    if changed:
        find(f"line {sequence} was changed: its hash does not fit its bytes", sequence)
    if verdict.first == 0:
        verdict.first = sequence
        if sequence == 1 and prev != GENESIS:
            find("line 1 names a line before it", 1)
    elif sequence > verdict.last + 1:
        find(f"lines {verdict.last + 1} to {sequence - 1} were removed", sequence)
    elif sequence <= verdict.last:
        find(f"line {sequence} stands after line {verdict.last}: reordered or repeated", sequence)
    elif prev != verdict.head and not changed:
        find(f"line {sequence} does not follow line {verdict.last}: one of them was replaced", sequence)
    if values.get("kind") == "audit.cut-off":
        find(f"lines up to {values.get('noted')} had been cut off when the host service began", sequence)
    if values.get("kind") == "checkpoint" and not changed:
        if _signed(key, AuditHead(sequence, prev), str(values.get("signature"))):
            verdict.checkpoints += 1
            verdict.signed_until = sequence
        else:
            find(f"the checkpoint in line {sequence} is not signed by this host's key", sequence)
    verdict.last, verdict.head = sequence, said


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
        find(f"{_note_path(path).name} is not signed by this host's key")
    elif head.sequence - 1 > verdict.last:
        find(f"the log ends with line {verdict.last}; lines up to {head.sequence - 1} were cut off")
    elif head.sequence - 1 == verdict.last and head.head != verdict.head:
        find(f"line {verdict.last} is not the one that was written last")
