"""Certificates that are to count no more: each is revoked at its authority, at once or as soon as it serves no longer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hsmvisor.manager.ca.interface import CaError, Later, Reason
from hsmvisor.manager.engine.obtaining import happened, leaf_der
from hsmvisor.manager.engine.parts import Parts
from hsmvisor.manager.engine.seen import Seen
from hsmvisor.manager.history.events import Kind
from hsmvisor.manager.store import lines
from hsmvisor.manager.store.lines import FAR
from hsmvisor.manager.store.rows import GenerationRow

PAUSE = 300.0  #: seconds after which an authority is asked again that could not answer


@dataclass(frozen=True)
class Revoking:
    """`again_at`: when something is to be asked again; FAR: nothing is left to do."""

    again_at: float = FAR
    why: str = ""


async def revoke(parts: Parts, seen: Seen, now: float) -> Revoking:
    """An authority that cannot revoke, or refuses to, keeps nobody from having the next certificate."""
    left = Revoking()
    for generation in list(seen.generations.values()):
        if not _is_asked_for(seen, generation, now):
            continue
        if generation.revoke_at <= now:
            generation = seen.generations[generation.number] = await _ask(parts, seen, generation, now)
        if generation.revoke and not generation.revoked_at:
            again_at = min(left.again_at, generation.revoke_at)
            left = Revoking(again_at, f"{generation.authority} cannot revoke generation {generation.number} yet")
    return left


def _is_asked_for(seen: Seen, generation: GenerationRow, now: float) -> bool:
    if not generation.revoke or generation.revoked_at or not generation.chain or generation.not_after <= now:
        return False
    serves = generation.number == seen.line.serving and bool(seen.members)
    return generation.revoke.startswith("!") or not serves


async def _ask(parts: Parts, seen: Seen, generation: GenerationRow, now: float) -> GenerationRow:
    """Returns it as it is now."""
    reason = generation.revoke.removeprefix("!")
    detail: dict[str, object] = {"generation": generation.number, "serial": generation.serial, "reason": reason}
    ca = parts.authorities.get(generation.authority)
    kind: Kind | None = Kind.FAILED
    try:
        if ca is None:
            raise CaError("it is not configured any more")
        await ca.revoke(leaf_der(generation), Reason(reason))
    except Later as error:
        kind = Kind.FAILED if not generation.revoke_at else None  # who asked is told once
        changed = replace(generation, revoke_at=now + max(error.seconds, PAUSE))
        detail["why"] = f"{generation.authority} cannot revoke it yet: {error}"
    except CaError as error:  # asking again is of no use
        changed = replace(generation, revoke="")
        detail["why"] = f"{generation.authority} does not revoke it: {error}"
    else:
        kind, changed = Kind.REVOKED, replace(generation, revoked_at=int(now))
    told = {name: getattr(changed, name) for name in ("revoke", "revoke_at", "revoked_at")}
    async with parts.database.transaction() as connection:
        await lines.change_generation(connection, seen.line.id, generation.number, **told)
        if kind is not None:
            await parts.history.add(connection, happened(seen, kind, detail))
    return changed
