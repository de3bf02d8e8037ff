"""Logs of measured boot: those of real firmware, with the PCRs that a TPM had when they were taken, and made ones."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

REAL = Path(__file__).resolve().parents[1] / "fuzz/corpus/event_log"  #: each as long as its events are

SHA1, SHA256, SHA384 = 0x0004, 0x000B, 0x000C
HASHES = {SHA1: hashlib.sha1, SHA256: hashlib.sha256, SHA384: hashlib.sha384}
NO_ACTION, SEPARATOR, ACTION, EVENT_TAG, IPL = 0x03, 0x04, 0x05, 0x06, 0x0D


def first(data: bytes, kind: int = NO_ACTION) -> bytes:
    """TCG_PCClientPCREvent."""
    return struct.pack("<II20sI", 0, kind, bytes(20), len(data)) + data


def spec_id(sizes: Sequence[tuple[int, int]] = ((SHA256, 32),), vendor: bytes = b"", count: int | None = None) -> bytes:
    """TCG_EfiSpecIDEvent; `sizes`: algorithms with the bytes of their digests."""
    head = b"Spec ID Event03\0" + struct.pack("<I4BI", 0, 0, 2, 0, 2, len(sizes) if count is None else count)
    return head + b"".join(struct.pack("<HH", *one) for one in sizes) + bytes([len(vendor)]) + vendor


def begun(*algorithms: int) -> bytes:
    """The start of a log with digests of these, or of SHA-256."""
    return first(spec_id([(algorithm, HASHES[algorithm]().digest_size) for algorithm in algorithms or (SHA256,)]))


def event(pcr: int, kind: int, data: bytes, digests: Mapping[int, bytes] | None = None) -> bytes:
    """TCG_PCR_EVENT2; of `data` unless there are other digests, and of none where nothing is measured."""
    if digests is None:
        digests = {SHA256: bytes(32) if kind == NO_ACTION else hashlib.sha256(data).digest()}
    listed = b"".join(struct.pack("<H", algorithm) + digest for algorithm, digest in digests.items())
    return struct.pack("<III", pcr, kind, len(digests)) + listed + struct.pack("<I", len(data)) + data


def started_at(locality: int) -> bytes:
    return event(0, NO_ACTION, b"StartupLocality\0" + bytes([locality]))


def real(name: str) -> bytes:
    return (REAL / name).read_bytes()
