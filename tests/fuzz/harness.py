"""The fuzz targets by name.  A target is a module of `fuzz.targets`:

    INVARIANT      what must hold for every input, in one sentence
    MAX_LENGTH     bytes of an input that are worth trying
    seeds()        valid inputs, by name, from which mutations start
    run(data)      tries one input; raises (AssertionError, or what should not have been raised) when the invariant is broken

The modules under test are imported by the target alone, so that they can be instrumented first.
"""

from __future__ import annotations

import hashlib
import importlib
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, cast

TARGETS = (
    "wire", "dispatcher", "commands", "state", "database", "internal", "handover", "reports", "vsock", "usb", "card", "tpm",
    "tpm_server", "event_log",
)  # fmt: skip
CORPUS = Path(__file__).parent / "corpus"


class Target(Protocol):
    INVARIANT: str
    MAX_LENGTH: int

    def seeds(self) -> dict[str, bytes]: ...

    def run(self, data: bytes) -> None: ...


def load(name: str) -> Target:
    return cast(Target, importlib.import_module(f"fuzz.targets.{name}"))


def kept(name: str) -> list[Path]:
    """The corpus in the repository: what fuzzing found worth keeping, and every reproducer."""
    return sorted((CORPUS / name).glob("*"))


def inputs(name: str) -> Iterator[tuple[str, bytes]]:
    """Gives seeds and kept corpus of a target."""
    yield from load(name).seeds().items()
    for path in kept(name):
        yield path.name, path.read_bytes()


def write_seeds(name: str, directory: Path) -> None:
    for data in load(name).seeds().values():
        (directory / hashlib.sha1(data).hexdigest()).write_bytes(data)


class Input:
    """Reads an input from front to back; past its end there are zeros, and nothing more to do."""

    def __init__(self, data: bytes) -> None:
        self._data, self._offset = data, 0

    @property
    def more(self) -> bool:
        return self._offset < len(self._data)

    def take(self, count: int) -> bytes:
        taken = self._data[self._offset : self._offset + count]
        self._offset += count
        return taken

    def byte(self) -> int:
        return int.from_bytes(self.take(1), "big")

    def block(self) -> bytes:
        """u16 length and as many bytes, or what is left of them."""
        return self.take(int.from_bytes(self.take(2), "big"))

    def rest(self) -> bytes:
        return self.take(len(self._data))


def block(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def blocks(parts: Iterable[bytes]) -> bytes:
    return b"".join(map(block, parts))
