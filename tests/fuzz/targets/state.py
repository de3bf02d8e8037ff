"""The sealed state: what a disk may give back, and what a release with a fault or a later one may have sealed.

The first byte chooses: sealed records changed as bytes, or the plaintext of one record (sealed as it should be).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from fuzz.harness import Input, block
from fuzz.records import varied
from fuzz.world import world
from hsmvisord.ck import CkError
from hsmvisord.keystore import persistence
from hsmvisord.keystore.records import GenerationRecord, MaterialRecord
from hsmvisord.keystore.vault import Manifest, UnsealError
from hsmvisord.token.token import Token

INVARIANT = (
    "a stored state opens as it was stored, or is refused with UnsealError (for a key: CkError) that shows nothing of it; it never "
    "opens changed, and what opens can be served"
)
MAX_LENGTH = 3000

CHANGE, PLAIN, MATERIAL = range(3)


def run(data: bytes) -> None:
    given = Input(data)
    head = given.byte()
    stored = dict(world().stored)
    names = sorted(stored)
    if head % 3 == CHANGE:
        damage(stored, names, given)
        found = loaded(stored)
        assert found is None or stored == world().stored, "a changed record opened"
        return
    name = names[given.byte() % len(names)]
    plain = given.rest()
    if head % 3 == MATERIAL:
        name, plain = "material/tls", material(plain)
    vault, version = world().bench.vault, int.from_bytes(stored[name][:8], "big")
    stored[name] = vault.seal(name, version, plain)
    state = loaded(stored)
    if state is not None:
        bench = world().bench
        world()._open(state, Manifest())
        token = Token("web-1", bench.keystore, bench.provider, lambda: bench.now, lambda: 0.0)
        for watermark in (0, token.watermark):
            token.index.view(watermark).find(())


def loaded(stored: dict[str, bytes]) -> Any:
    bench = world().bench
    try:
        return persistence.load(stored, bench.vault, bench.provider, world().version)[0]
    except CkError:  # a key that the provider refuses: the worker says so in an UnsealError
        return None
    except UnsealError as error:
        assert len(str(error)) < 300
        return None


def damage(stored: dict[str, bytes], names: list[str], given: Input) -> None:
    """Steps: which record, what is done to it, where, with what."""
    while given.more:
        name, what, place, words = names[given.byte() % len(names)], given.byte() % 6, given.byte(), given.take(2)
        blob = stored.get(name, b"")
        at = place * len(blob) // 256
        match what:
            case 0:
                stored[name] = blob[:at] + words + blob[at + len(words) :]
            case 1:
                stored[name] = blob[:at]
            case 2:
                stored[name] = blob[:at] + words + blob[at:]
            case 3:
                stored.pop(name, None)
            case 4:
                stored[name] = stored.get(names[place % len(names)], b"")
            case 5:
                stored[f"key/{place}"] = words


def material(plain: bytes) -> bytes:
    """The good record of a material with one field, or one of its last generation's, replaced by the input."""
    vault = world().bench.vault
    record = MaterialRecord.decode(vault.open("material/tls", world().stored["material/tls"]))
    given = Input(plain)
    if given.byte() & 1:
        return varied(record, given).encode()
    generation = varied(GenerationRecord.decode(record.generations[-1]), given)
    return replace(record, generations=(*record.generations[:-1], generation.encode())).encode()


def seeds() -> dict[str, bytes]:
    names = sorted(world().stored)
    vault = world().bench.vault
    made = {f"plain-{name.replace('/', '-')}": bytes((PLAIN, names.index(name))) for name in names}
    for name in names:
        made[f"plain-{name.replace('/', '-')}"] += vault.open(name, world().stored[name])
        for what in range(6):
            made[f"change-{names.index(name)}-{what}"] = bytes((CHANGE, names.index(name), what, 0x40)) + b"\0\1"
    for field in range(len(fields(GenerationRecord))):
        for which in (0, 1):
            made[f"material-{which}-{field}"] = bytes((MATERIAL, 0, which, field)) + bytes(7) + b"\5" + block(b"text")
    return made
