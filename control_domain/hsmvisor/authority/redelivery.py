"""Brings a module up to what its authority knows of it: one that was restored from an older backup, or was made anew.

What is missing is delivered again as new generations, from where the owner keeps his keys; what was destroyed or taken out of
service in the time that was lost is destroyed or taken out again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hsmvisor.authority.pusher import Pusher, Staging
from hsmvisor.authority.records import Delivery, Known, content_of, key_of
from hsmvisor.bundle import Bundle, BundleError
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb

#: Returns the key and certificates of a material, by its name and the record of its delivery; raises BundleError, OSError.
Source = Callable[[str, Delivery], Bundle]


@dataclass(frozen=True)
class Outcome:
    """What was done about a material: delivered, destroyed, retired, or missing (`detail` says what is to be done)."""

    material: str
    done: str
    generation: int = 0
    detail: str = ""


def redeliver(pusher: Pusher, module: str, source: Source) -> list[Outcome]:
    """Returns what was done, nothing when there was nothing to do.  Raises as the pusher's calls do."""
    with pusher.catching_up(module) as record:
        there = {material.name: material for material in pusher.materials(module)}
        done: list[Outcome] = []
        for name, known in sorted(record.materials.items()):
            done += _of_material(pusher, module, name, known, there.get(name), source)
        pusher.settled(module, owed=[o.material for o in done if o.done == "missing"])
    return done


def _of_material(pusher: Pusher, module: str, name: str, known: Known, there: pb.Material | None, source: Source) -> list[Outcome]:
    done = []
    generations = {g.number: g for g in there.generations if g.state != "destroyed"} if there else {}
    current = next((g for g in generations.values() if g.state == "current"), None)
    if known.current is not None and (current is None or _content(current) != known.current.content):
        done.append(_deliver(pusher, module, name, known.current, source, _left_of(known.current, generations)))
    elif known.retired and current is not None and current.number == known.retired:
        pusher.retire(module, name, current.number)
        done.append(Outcome(name, "retired", current.number))
    is_replaced = any(o.done == "delivered" for o in done)
    for number in sorted(set(known.destroyed) & set(generations)):
        if generations[number].state == "current" and not is_replaced:
            pusher.retire(module, name, number)
        pusher.destroy(module, name, number, compromised=True)
        done.append(Outcome(name, "destroyed", number))
    return done


def _content(generation: pb.Generation) -> str:
    return content_of(generation.public_key, tuple(generation.certificates))


def _left_of(delivery: Delivery, generations: dict[int, pb.Generation]) -> pb.Generation | None:
    """Returns the newest generation that still has a key that the module made."""
    if not delivery.made:
        return None
    having = [g for g in generations.values() if key_of(g.public_key) == delivery.made]
    return max(having, key=lambda g: g.number, default=None)


def _deliver(pusher: Pusher, module: str, name: str, delivery: Delivery, source: Source, left: pb.Generation | None) -> Outcome:
    """`left`: has the key, of one that the module made."""
    try:
        bundle = source(name, delivery)
    except (BundleError, OSError) as error:
        push = f"hsmvisor material push {module} {name}"
        if left is not None:
            alone = delivery.content == content_of(left.public_key, ())
            cure = f"hsmvisor material activate {module} {name} {left.number}" if alone else f"{push} --cert FILE"
            return Outcome(name, "missing", 0, f"the module still has the key that it made, in generation {left.number}: {cure}")
        if delivery.made:
            cure = f"hsmvisor material generate {module} {name}"
            return Outcome(name, "missing", 0, f"its key was made in the module and was nowhere else, so it is lost: {cure}")
        return Outcome(name, "missing", 0, f"{error}: {push} --key FILE --cert FILE")
    values = delivery.staging | {"alias_id": bytes.fromhex(delivery.staging["alias_id"])}
    generation = pusher.next_generation(module, name)
    pusher.stage(module, name, bundle, Staging(**values), generation, delivery.key_file, delivery.cert_file)
    pusher.activate(module, name, generation)
    return Outcome(name, "delivered", generation)
