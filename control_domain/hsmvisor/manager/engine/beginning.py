"""A new generation: whether it is time for one, and what it is to be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from hsmvisor.manager.engine.parts import Parts
from hsmvisor.manager.engine.seen import Seen
from hsmvisor.manager.policy.questions import Source
from hsmvisor.manager.renewal import decisions
from hsmvisor.manager.renewal.decisions import Decision, Failures, Held, Snapshot, Suggested
from hsmvisor.manager.renewal.timing import HOUR, Lifetime
from hsmvisor.manager.renewal.trigger import Trigger
from hsmvisor.manager.store import lines
from hsmvisor.manager.store.rows import GenerationRow, LineRow, ResourceRow, text_of
from hsmvisor.manager.wanted.spec import Spec
from sqlalchemy.ext.asyncio import AsyncConnection

KEPT = 12  #: generations of a line that are remembered
MOST, MOST_ASKED = 6, 10  #: of them that are begun in an hour, or half of a certificate's life; and where an owner asks for them
BARE = 300.0  #: seconds that count where there is no certificate


def life_of(generation: GenerationRow) -> Lifetime | None:
    """From when it was ordered: authorities date certificates back, and of a short one that may be most of its life."""
    if not generation.not_after:
        return None
    return Lifetime(min(max(generation.not_before, generation.created_at), generation.not_after), generation.not_after)


def decide(seen: Seen, now: float) -> Decision:
    return decisions.decide(snapshot(seen), now)


def snapshot(seen: Seen) -> Snapshot:
    return snapshot_of(seen.spec, seen.line, seen.serving)


def snapshot_of(spec: Spec, line: LineRow, serving: GenerationRow | None) -> Snapshot:
    held = None
    if serving is not None:
        window = json.loads(serving.window) if serving.window else None
        held = Held(
            number=serving.number,
            activated_at=serving.activated_at,
            life=life_of(serving),
            drawn=serving.drawn,
            suggested=Suggested(window["start"], window["end"], window["why"]) if window else None,
            revoked_at=serving.revoked_at,
            signatures=serving.signatures,
            begun_at=serving.created_at,
        )
    failures = Failures(line.failures, line.failed_at, line.not_before)
    return Snapshot(spec.renewal, held, failures, line.triggered_at, Trigger.of_text(line.trigger), line.changed_at)


def too_many_until(seen: Seen, now: float) -> float:
    """Returns when the next generation may begin.  Modules that lose each key at once, requests that change all the time, would
    have certificates made as fast as messages travel, and use up what an authority gives to all."""
    begun = sorted((row.created_at for row in seen.generations.values()), reverse=True)
    asked = max(seen.line.triggered_at, seen.line.changed_at) > max(begun, default=0.0)
    most = MOST_ASKED if asked else MOST
    return begun[most - 1] + _within(seen) if len(begun) >= most else now


def _within(seen: Seen) -> float:
    if seen.spec.bare:
        return BARE
    lives = [life.seconds for row in seen.generations.values() if (life := life_of(row)) is not None]
    shortest = min(lives, default=float(seen.spec.lifetime or 2 * HOUR))
    return min(shortest / 2, HOUR)


async def begin(parts: Parts, seen: Seen, allowed: Sequence[ResourceRow], decision: Decision, now: float) -> GenerationRow:
    """Stores the next generation's beginning, and returns it."""
    spec, serving = seen.spec, seen.serving
    number = seen.newest_anywhere + 1
    names = () if spec.bare else spec.names_for(None if spec.shared else allowed[0])
    keeps = serving if serving is not None and _keeps_its_key(seen, serving, decision) else None
    row = GenerationRow(
        line_id=seen.line.id,
        number=number,
        state="ordered" if keeps else "keying",
        key_of=keeps.key_of if keeps else number,
        public_key=keeps.public_key if keeps else b"",
        csr=keeps.csr if keeps else b"",
        names=text_of(map(str, names)),
        authority=spec.authority,
        drawn=parts.draw(),
        created_at=now,
        urgent=int(decision.urgent),
        why=decision.why,
    )
    async with parts.database.transaction() as connection:
        await lines.add_generation(connection, row)
        await lines.change_line(connection, seen.line.id, newest=number)
        await revoke_if_asked(connection, seen.line, serving)
        if forgotten := _forgotten(seen.line, [*seen.generations.values(), row]):
            await lines.forget_generations(connection, seen.line.id, forgotten)
    return row


async def revoke_if_asked(connection: AsyncConnection, line: LineRow, serving: GenerationRow | None) -> None:
    """Once the generation that begins now serves, the one before is revoked, if that is what somebody asked for."""
    asked = Trigger.of_text(line.trigger)
    if asked is None or not asked.revoke or serving is None or line.triggered_at <= serving.created_at:
        return
    if not serving.revoke and not serving.revoked_at:
        await lines.change_generation(connection, line.id, serving.number, revoke=asked.reason)


def _forgotten(line: LineRow, generations: Iterable[GenerationRow]) -> list[int]:
    """The oldest, but none whose key another one has, nor one that is still to be revoked."""
    known = {row.number: row for row in generations}
    left = [row for row in known.values() if row.number == line.serving or (row.revoke and not row.revoked_at)]
    left += [known[number] for number in sorted(known)[-KEPT:]]
    return sorted(set(known) - {row.number for row in left} - {row.key_of for row in left})


def _keeps_its_key(seen: Seen, serving: GenerationRow, decision: Decision) -> bool:
    if seen.spec.source is Source.IMPORTED:
        return True
    # names and kind of key are in the certificate request, which is made with the key
    changed = seen.line.changed_at > serving.created_at
    return bool(serving.csr) and not seen.spec.bare and not decision.rekey and not changed
