"""A new generation: whether it is time for one, and what it is to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hsmvisor.manager.engine.parts import Parts
from hsmvisor.manager.engine.seen import Seen
from hsmvisor.manager.policy.questions import Source
from hsmvisor.manager.renewal import decisions
from hsmvisor.manager.renewal.decisions import Decision, Failures, Held, Snapshot, Suggested
from hsmvisor.manager.renewal.timing import HOUR, Lifetime
from hsmvisor.manager.store import lines
from hsmvisor.manager.store.rows import GenerationRow, LineRow, ResourceRow, text_of
from hsmvisor.manager.wanted.spec import Spec

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
    return Snapshot(spec.renewal, held, failures, line.triggered_at, line.changed_at)


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


async def begin(
    parts: Parts, seen: Seen, allowed: Sequence[ResourceRow], decision: Decision, now: float, rekey: bool
) -> GenerationRow:
    """Stores the next generation's beginning, and returns it."""
    spec, serving = seen.spec, seen.serving
    trigger: dict[str, Any] = json.loads(seen.line.trigger) if seen.line.trigger else {}
    triggered = bool(trigger) and (serving is None or seen.line.triggered_at > serving.created_at)
    new_key = serving is None or not serving.csr or spec.bare or rekey or decision.rekey
    if spec.source is Source.IMPORTED:
        new_key = False
    elif serving is not None and _says_another_thing(seen, serving):
        new_key = True
    number = seen.newest_anywhere + 1
    names = () if spec.bare else spec.names_for(None if spec.shared else allowed[0])
    row = GenerationRow(
        line_id=seen.line.id,
        number=number,
        state="keying" if new_key else "ordered",
        key_of=number if new_key or serving is None else serving.key_of,
        public_key=b"" if new_key or serving is None else serving.public_key,
        csr=b"" if new_key or serving is None else serving.csr,
        names=text_of(map(str, names)),
        authority=spec.authority,
        kept="",
        chain="",
        serial="",
        not_before=0,
        not_after=0,
        drawn=parts.draw(),
        window="",
        ask_at=0.0,
        created_at=now,
        activated_at=0.0,
        revoked_at=0,
        revoke="",
        signatures=0,
        urgent=int(decision.urgent or bool(triggered and trigger.get("urgent"))),
        released=0,
        checked=0,
        told=0,
        why=decision.why,
    )
    old = sorted(n for n, g in seen.generations.items() if n != seen.line.serving)
    async with parts.database.transaction() as connection:
        await lines.add_generation(connection, row)
        await lines.change_line(connection, seen.line.id, newest=number)
        if triggered and trigger.get("revoke") and serving is not None and not serving.revoke and not serving.revoked_at:
            await lines.change_generation(
                connection, seen.line.id, serving.number, revoke=str(trigger.get("reason") or "superseded")
            )
        if len(old) >= KEPT:
            await lines.forget_generations(connection, seen.line.id, old[: len(old) - KEPT + 1])
    return row


def _says_another_thing(seen: Seen, serving: GenerationRow) -> bool:
    """The request was changed since: names and kind of key are in the certificate request, which is made with the key."""
    return seen.line.changed_at > serving.created_at
