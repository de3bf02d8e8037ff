"""What an authority has delivered to each module: by this it notices one that was set back, and can deliver again.

modules/<host>.<module>.json, in the authority's directory.  No key stands there, only where the owner's files were and the hash of
what was in them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hsmvisor.authority.store import AuthorityError
from hsmvisor.bundle import Bundle
from hsmvisor.files import write_private

KEPT = 8  #: delivered generations of a material that are remembered
KEPT_DESTROYED = 64  #: and numbers of destroyed ones


@dataclass
class Delivery:
    """One generation as it was delivered; `generation` 0: to a module that is no more."""

    generation: int
    content: str  #: SHA-256 of public key and certificates
    staging: dict[str, Any]
    key_file: str = ""
    cert_file: str = ""
    made: str = ""  #: SHA-256 of the public key of a key that the module made: nobody can deliver that again


@dataclass
class Known:
    """Of one material."""

    newest: int = 0
    current: Delivery | None = None
    retired: int = 0  #: the generation that was taken out of service without another one
    generations: list[Delivery] = field(default_factory=list)
    destroyed: list[int] = field(default_factory=list)


@dataclass
class ModuleRecord:
    """Of one module.  `sequence`: the highest that it was seen to have; `next_above`: none is used again, whatever it says."""

    module_id: str = ""
    sequence: int = 0
    next_above: int = 0
    materials: dict[str, Known] = field(default_factory=dict)
    owed: list[str] = field(default_factory=list)  #: materials that it had and does not have, for all that is known

    def meet(self, module_id: bytes) -> None:
        """Another module under the same name: all is owed to it, and nothing else of the old one counts."""
        if self.module_id == module_id.hex():
            return
        self.module_id, self.sequence, self.next_above = module_id.hex(), 0, 0
        for known in self.materials.values():
            known.newest, known.retired, known.generations, known.destroyed = 0, 0, [], []
            if known.current is not None:
                known.current.generation = 0
        self.materials = {name: known for name, known in self.materials.items() if known.current is not None}
        self.owed = sorted(self.materials)

    def of(self, material: str) -> Known:
        return self.materials.setdefault(material, Known())

    # ---- what the module carried out ----------------------------------------------------------------------------

    def acknowledged(self, sequence: int) -> None:
        self.sequence = max(self.sequence, sequence)
        self.next_above = max(self.next_above, sequence)

    def staged(self, material: str, delivery: Delivery, renewed: str = "") -> None:
        """`renewed`: SHA-256 of the public key when a certificate came alone."""
        known = self.of(material)
        known.newest = max(known.newest, delivery.generation)
        before = known.current
        if renewed and any(d.made == renewed for d in (*known.generations, *filter(None, [before]))):
            delivery.made = renewed
        if not delivery.key_file and before is not None:
            delivery.key_file = before.key_file  # a certificate alone, for the key that came from there
        known.generations = [*known.generations, delivery][-KEPT:]

    def certified(self, material: str, generation: int, content: str, cert_file: str) -> None:
        for delivery in self.of(material).generations:
            if delivery.generation == generation:
                delivery.content, delivery.cert_file = content, cert_file

    def activated(self, material: str, generation: int) -> None:
        known = self.of(material)
        found = next((d for d in known.generations if d.generation == generation), None)
        if found is not None:
            known.current, known.retired = found, 0
        elif known.current is None or known.current.generation != generation:
            known.current = None  # not ours, or from before there were records
        self.owed = [name for name in self.owed if name != material]

    def retired(self, material: str, generation: int) -> None:
        known = self.of(material)
        if known.current is not None and known.current.generation == generation:
            known.current, known.retired = None, generation

    def destroyed(self, material: str, generation: int) -> None:
        known = self.of(material)
        known.generations = [d for d in known.generations if d.generation != generation]
        known.destroyed = [*known.destroyed, generation][-KEPT_DESTROYED:]


def content_of(public_key: bytes, certificates: tuple[bytes, ...]) -> str:
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in (public_key, *certificates))).hexdigest()


def key_of(public_key: bytes) -> str:
    return hashlib.sha256(public_key).hexdigest()


def delivery_of(bundle: Bundle, generation: int, staging: Any, key_file: str, cert_file: str) -> Delivery:
    content = content_of(bundle.public_key, bundle.certificates)
    return Delivery(generation, content, _recorded(staging), key_file, cert_file)


def made_of(public_key: bytes, generation: int, staging: Any) -> Delivery:
    """A key that the module made, without a certificate so far."""
    return Delivery(generation, content_of(public_key, ()), _recorded(staging), made=key_of(public_key))


def _recorded(staging: Any) -> dict[str, Any]:
    values = asdict(staging)
    values["alias_id"] = staging.alias_id.hex()
    return values


class Records:
    """The records of one host's modules, known by the address that it is met at."""

    def __init__(self, directory: Path, address: str) -> None:
        self._directory, self._address = directory / "modules", address

    def _path(self, module: str) -> Path:
        return self._directory / f"{hashlib.sha256(self._address.encode()).hexdigest()[:16]}.{module}.json"

    def read(self, module: str) -> ModuleRecord:
        """Raises AuthorityError when the record cannot be read."""
        path = self._path(module)
        try:
            return _decoded(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return ModuleRecord()
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise AuthorityError(f"{path} cannot be read ({error}): restore it, or remove it and deliver all keys again") from None

    @contextlib.contextmanager
    def change(self, module: str) -> Iterator[ModuleRecord]:
        """Yields the record and writes what became of it; one process at a time."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                record = self.read(module)
                before = _encoded(self._address, module, record)
                yield record
                if (after := _encoded(self._address, module, record)) != before:
                    write_private(self._path(module), after)
            finally:
                os.close(lock)
        except OSError as error:
            raise AuthorityError(f"{self._directory} cannot be written: {error.strerror}") from None

    def forget(self, module: str) -> None:
        self._path(module).unlink(missing_ok=True)


def _encoded(address: str, module: str, record: ModuleRecord) -> bytes:
    return json.dumps({"address": address, "module": module, **asdict(record)}, indent=1).encode()


def _decoded(values: dict[str, Any]) -> ModuleRecord:
    materials = {}
    for name, row in values["materials"].items():
        current = Delivery(**row["current"]) if row["current"] else None
        generations = [Delivery(**d) for d in row["generations"]]
        materials[name] = Known(row["newest"], current, row["retired"], generations, row["destroyed"])
    return ModuleRecord(values["module_id"], values["sequence"], values["next_above"], materials, values["owed"])
