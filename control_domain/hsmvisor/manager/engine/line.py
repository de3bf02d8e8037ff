"""One look at one line: what is the next step, and when to look again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import replace

from hsmvisor.manager.ca.interface import CaError
from hsmvisor.manager.engine import beginning, delivering, leaving, measuring, obtaining
from hsmvisor.manager.engine.beginning import life_of
from hsmvisor.manager.engine.delivering import Delivered
from hsmvisor.manager.engine.obtaining import NO_WORD, happened, leaf_der
from hsmvisor.manager.engine.outcome import Again, Interrupted, Outcome
from hsmvisor.manager.engine.parts import Parts
from hsmvisor.manager.engine.revoking import Revoking, revoke
from hsmvisor.manager.engine.seen import Seen, gather
from hsmvisor.manager.engine.signing import Said
from hsmvisor.manager.history.events import Kind
from hsmvisor.manager.policy.questions import Act, Source
from hsmvisor.manager.renewal import decisions, timing
from hsmvisor.manager.renewal.decisions import LOOK, Decision
from hsmvisor.manager.renewal.decisions import Act as Renewal
from hsmvisor.manager.store import lines, locks, wanted
from hsmvisor.manager.store.lines import FAR
from hsmvisor.manager.store.rows import UNMEASURED, DeliveryRow, GenerationRow, LineRow, ResourceRow

TAKEN = "another request has a material of this name there"
FORGED = "its module's identity is not what its host has signed"
EXPIRING = 1 / 6  #: of a certificate's life is left: somebody is told
DENIED_LOOK = 3600.0  #: seconds after which policy is asked again that did not permit a renewal


async def look(parts: Parts, line: LineRow) -> Outcome | None:
    """Returns None where the line is no more.  Raises Failed, Again, DatabaseError."""
    now = parts.clock()
    async with parts.database.reading() as connection:
        seen = await gather(connection, line, parts.pins, now)
    if seen is None:
        return None
    await _forget_denials(parts, seen)
    leaves = await leaving.leave(parts, seen, now)
    revoking = await revoke(parts, seen, now)
    sooner = min(FAR if leaves is None else leaves, revoking.again_at)
    if not seen.members:
        return await _end(parts, seen, revoking) if leaves is None else Outcome(sooner, "leaving", "it is taken away")
    try:
        outcome = await _Look(parts, seen, now).go()
    except Again as again:
        again.seconds = min(again.seconds, max(sooner - now, 1.0))
        raise
    return outcome.or_sooner(sooner, revoking.why)


async def _forget_denials(parts: Parts, seen: Seen) -> None:
    """What was denied on a resource that is not meant any more is nobody's concern."""
    if over := sorted({id for id, _ in seen.denied} - seen.members):
        async with parts.database.transaction() as connection:
            await wanted.forget_denials_on(connection, over, seen.request.id)


async def _end(parts: Parts, seen: Seen, revoking: Revoking) -> Outcome | None:
    """Nobody is meant: a line of one resource, or of a cancelled request, is no more."""
    if revoking.again_at < FAR:
        return Outcome(revoking.again_at, "leaving", revoking.why)
    if seen.request.state == "cancelled" and seen.request.kept:
        return Outcome(FAR, "gone", "the request was cancelled; what was delivered stays")
    if not seen.line.resource_id and seen.spec.shared and seen.request.state == "active":
        return Outcome(FAR, "waiting", "no resource has what is asked for")
    async with parts.database.transaction() as connection:
        await locks.members(connection)
        if await lines.is_woken(connection, seen.line.id):  # it may be wanted again since it was looked at
            return Outcome(FAR, "leaving", "it is taken away")
        await lines.remove_line(connection, seen.line.id)
    return None


class _Look:
    def __init__(self, parts: Parts, seen: Seen, now: float) -> None:
        self._parts, self._seen, self._now = parts, seen, now

    async def go(self) -> Outcome:
        seen = self._seen
        allowed = await self._judge(Act.DISTRIBUTE)
        if not allowed:
            await self._note_denied(set())
            why = next(why for _, why in sorted(self._why_denied.items()))
            return Outcome(FAR, "denied", why)
        await self._note_denied({resource.id for resource in allowed})
        if (working := seen.working) is not None:
            if seen.serving is not None:
                await self._tell_the_end(seen.serving)
            return await self._go_on(working, allowed)
        return await self._serve(allowed)

    # ---- policy --------------------------------------------------------------------------------------------------

    async def _judge(self, act: Act) -> list[ResourceRow]:
        """Returns the members for which policy allows it."""
        seen = self._seen
        decided = []
        for id in sorted(seen.members):
            resource = seen.resources[id]
            host = seen.hosts.get(resource.host_id)
            decided.append((resource, self._parts.judge.decide(act, seen.request, seen.spec, resource, host, True)))
        seen.permits |= {resource.id: decision for resource, decision in decided if decision.allowed}
        self._why_denied = {(id, str(act)): TAKEN for id in seen.taken}
        self._why_denied |= {(id, str(act)): FORGED for id in seen.forged}
        self._why_denied |= {(resource.id, str(act)): d.why for resource, d in decided if not d.allowed}
        changed = any(seen.denied.get((r.id, str(act))) != (None if d.allowed else d.why) for r, d in decided)
        if changed:
            async with self._parts.database.transaction() as connection:
                await self._parts.judge.record(connection, seen.request, act, decided, seen.denied)
        kept_out = seen.taken | seen.forged
        return [resource for resource, decision in decided if decision.allowed and resource.id not in kept_out]

    async def _note_denied(self, allowed: set[str]) -> None:
        seen = self._seen
        rows = []
        for id in sorted(seen.members - allowed):
            why = self._why_denied.get((id, str(Act.DISTRIBUTE)), "")
            known = seen.delivery(id)
            if (known.state, known.why) != ("denied", why):
                rows.append(replace(known, state="denied", why=why))
        if rows:
            async with self._parts.database.transaction() as connection:
                await lines.mark(connection, rows, seen.deliveries, self._now)

    # ---- a generation that is being made ---------------------------------------------------------------------------

    async def _go_on(self, working: GenerationRow, allowed: Sequence[ResourceRow]) -> Outcome:
        if (why := self._is_overtaken(working)) is not None:
            await self._give_up(working, why)
            return Outcome(0, "waiting", why)
        if (again := self._again_at()) > self._now:
            return Outcome(again, _STAGES[working.state], self._seen.line.why)
        return await self._step(working, allowed)

    async def _step(self, working: GenerationRow, allowed: Sequence[ResourceRow]) -> Outcome:
        try:
            return await self._take(working, allowed)
        except Interrupted as interrupted:
            interrupted.stage = interrupted.stage or _STAGES[working.state]
            raise

    async def _take(self, working: GenerationRow, allowed: Sequence[ResourceRow]) -> Outcome:
        until = 0.0
        if not self._seen.spec.shared and working.state in ("keying", "ordered") and not working.kept:
            until = await measuring.demand(self._parts, self._seen, allowed[0], self._now)
        if working.state == "keying":
            await obtaining.make_key(self._parts, self._seen, working, allowed, self._now, until)
            return Outcome(0, "keying")
        if working.state == "ordered":
            issued = await obtaining.order(self._parts, self._seen, working)
            if issued is None:  # another manager was quicker
                return Outcome(0, "ordering")
            self._seen.now_has(working := issued)
        return await self._deliver(working, allowed)

    def _is_overtaken(self, working: GenerationRow) -> str | None:
        """Says why another one is begun in its place."""
        line, life = self._seen.line, life_of(working)
        begun = any(d.active == working.number for d in self._seen.deliveries.values())
        if begun:
            return None
        if line.changed_at > working.created_at:
            return "the request was changed"
        if line.triggered_at > working.created_at and working.state != "keying":
            return "somebody asked for another one"
        if life is not None and timing.due(life, working.drawn, self._seen.spec.renewal.lead) <= self._now:
            return "its certificate nears its end before it was delivered"
        return None

    def _again_at(self) -> float:
        return decisions.again_at(beginning.snapshot(self._seen))

    async def _give_up(self, working: GenerationRow, why: str) -> None:
        async with self._parts.database.transaction() as connection:
            told = {"state": "failed", "why": why}  # unless a module has activated it meanwhile
            await lines.change_generation(connection, self._seen.line.id, working.number, was=working.state, **told)

    async def _deliver(self, working: GenerationRow, allowed: Sequence[ResourceRow]) -> Outcome:
        done = await delivering.deliver(self._parts, self._seen, working, allowed, self._now)
        if done.lost and not done.waiting and not done.done:
            await self._give_up(working, "its key is not at hand any more")
            return Outcome(0, "waiting", "its key is not at hand any more: a new one is made")
        life = life_of(working)
        overtaken = timing.due(life, working.drawn, self._seen.spec.renewal.lead) if life else FAR
        look_at = self._now + NO_WORD if done.waiting else FAR
        stage = UNMEASURED if done.unmeasured else "delivering"
        return Outcome(min(look_at, overtaken, done.again_at), stage, _why(done))

    # ---- the generation that serves --------------------------------------------------------------------------------

    async def _serve(self, allowed: Sequence[ResourceRow]) -> Outcome:
        seen, serving = self._seen, self._seen.serving
        if serving is None:
            return await self._begin_the_first(allowed)
        serving = await self._ask_for_window(serving)
        decision = self._if_it_may(beginning.decide(seen, self._now))
        done, stage = None, "serving"
        if decision.act is not Renewal.RENEW:
            done = await delivering.deliver(self._parts, seen, serving, allowed, self._now)
            if done.lost:
                decision = self._forced(decision, "a module needs a key that is not at hand")
        if decision.act is Renewal.RENEW:
            if permitted := await self._may_renew(allowed):
                return await self._renew(decision, permitted)
            why = next(iter(self._why_denied.values()), "policy does not permit it")
            stage, decision = "denied", _wait(decision, self._now + DENIED_LOOK, f"it is not renewed: {why}")
        done = done or await delivering.deliver(self._parts, seen, serving, allowed, self._now)
        waits = await self._tidy(serving, allowed)
        if not done.waiting:
            await self._check_health(serving)
        told = await self._tell_the_end(serving)
        look_at = min(decision.look_at, told, serving.ask_at or FAR, done.again_at)
        if done.waiting:
            look_at = min(look_at, self._now + NO_WORD)
        if done.waiting or done.stragglers or done.lost or done.refusing or waits:
            stage = "delivering"
        if done.unmeasured:
            stage = UNMEASURED
        return Outcome(look_at, stage, _why(done) or decision.why)

    async def _begin_the_first(self, allowed: Sequence[ResourceRow]) -> Outcome:
        if self._seen.spec.source is Source.IMPORTED:
            return Outcome(FAR, "waiting", "its key has not been imported")
        decision = self._not_too_often(beginning.decide(self._seen, self._now))
        if decision.act is Renewal.RENEW:
            return await self._renew(decision, allowed)
        return Outcome(decision.look_at, "waiting", decision.why)

    def _if_it_may(self, decision: Decision) -> Decision:
        spec = self._seen.spec
        if decision.act is Renewal.RENEW and spec.source is Source.IMPORTED and (decision.compromised or not spec.authority):
            return _wait(decision, self._now + LOOK, f"{decision.why}; its owner is to import the next key")
        return self._not_too_often(decision)

    def _not_too_often(self, decision: Decision) -> Decision:
        if decision.act is not Renewal.RENEW or (until := beginning.too_many_until(self._seen, self._now)) <= self._now:
            return decision
        return _wait(decision, until, f"{decision.why}; many were made already, the next one waits")

    def _forced(self, decision: Decision, why: str) -> Decision:
        if self._seen.spec.source is Source.IMPORTED:
            return decision
        if (again := self._again_at()) > self._now:
            return dataclasses.replace(decision, look_at=min(decision.look_at, again))
        return self._not_too_often(dataclasses.replace(decision, act=Renewal.RENEW, why=why, rekey=True))

    async def _may_renew(self, allowed: Sequence[ResourceRow]) -> list[ResourceRow]:
        permitted = {resource.id for resource in await self._judge(Act.RENEW)}
        return [resource for resource in allowed if resource.id in permitted]

    async def _renew(self, decision: Decision, allowed: Sequence[ResourceRow]) -> Outcome:
        begun = await beginning.begin(self._parts, self._seen, allowed, decision, self._now)
        self._seen.now_has(begun)
        if self._again_at() > self._now:
            return Outcome(0, _STAGES[begun.state], decision.why)
        return await self._step(begun, allowed)

    async def _ask_for_window(self, serving: GenerationRow) -> GenerationRow:
        """The authority's suggestion (RFC 9773), where it makes some."""
        ca = self._parts.authorities.get(serving.authority)
        if ca is None or not serving.chain or serving.ask_at > self._now:
            return serving
        der = leaf_der(serving)
        window, ask_at = serving.window, self._now + 6 * timing.HOUR
        try:
            found = await ca.window(der)
            if found is None:
                window, ask_at = "", FAR
            else:
                window = _window_text(found.start, found.end, found.why)
                ask_at = self._now + min(max(found.ask_again, 60.0), timing.DAY)
        except CaError:
            pass
        changed = replace(serving, window=window, ask_at=ask_at)
        async with self._parts.database.transaction() as connection:
            await lines.change_generation(connection, serving.line_id, serving.number, window=window, ask_at=ask_at)
        self._seen.generations[serving.number] = changed
        return changed

    async def _tidy(self, serving: GenerationRow, allowed: Sequence[ResourceRow]) -> bool:
        """Has superfluous generations destroyed.  Returns whether that waits for a host: then it is looked at again when that is
        back."""
        seen, told, waits = self._seen, set(), False
        todo: list[tuple[ResourceRow, list[Said]]] = []
        rows: list[DeliveryRow] = []
        for resource in allowed:
            delivery = seen.delivery(resource.id)
            if seen.queued.get(resource.id) or delivery.active != serving.number:
                continue
            said = delivering.superfluous(seen, resource, serving)
            can = resource.reachable and not seen.is_away(resource, self._now)
            state, why = (
                ("pending", "old generations are to be destroyed when its host is back") if said and not can else ("active", "")
            )
            waits |= state == "pending"
            if (delivery.state, delivery.why) != (state, why):
                rows.append(replace(delivery, state=state, why=why))
            if said and can and seen.rests_until(resource.id) <= self._now:
                todo.append((resource, said))
        if not todo and not rows:
            return waits
        async with self._parts.database.transaction() as connection:
            await lines.mark(connection, rows, seen.deliveries, self._now)
            for resource, said in todo:
                await self._parts.commands.queue(connection, resource, seen.line, said)
                told.add(resource.host_id)
        self._parts.hub.commands(told)
        return waits

    async def _check_health(self, serving: GenerationRow) -> None:
        seen = self._seen
        check = self._parts.health.get(seen.spec.health)
        if serving.checked or not seen.spec.health or check is None:
            return
        told = {
            "material": seen.line.material,
            "owner": seen.request.owner,
            "generation": serving.number,
            "names": serving.names.split("\n") if serving.names else [],
            "resources": sorted(seen.members),
            "certificate": serving.chain,
        }
        wrong = await check.run(told)
        async with self._parts.database.transaction() as connection:
            await lines.change_generation(connection, seen.line.id, serving.number, checked=2 if wrong else 1)
            if wrong:
                await self._parts.history.add(
                    connection, happened(seen, Kind.HEALTH_FAILED, {"generation": serving.number, "why": wrong})
                )
                await lines.serve_the_one_before(connection, seen.line, list(seen.generations.values()), wrong, self._now)
        if wrong:
            raise Again(wrong, 0)

    async def _tell_the_end(self, serving: GenerationRow) -> float:
        """Tells once that a certificate nears its end, and once that it has come.  Returns when to look for that."""
        life = life_of(serving)
        if life is None:
            return FAR
        points = ((1, life.not_after - life.seconds * EXPIRING, Kind.EXPIRING), (2, life.not_after, Kind.EXPIRED))
        for number, at, kind in points:
            if serving.told >= number:
                continue
            if at > self._now:
                return at
            detail = {"generation": serving.number, "not_after": serving.not_after, "names": serving.names}
            async with self._parts.database.transaction() as connection:
                await lines.change_generation(connection, serving.line_id, serving.number, told=number)
                await self._parts.history.add(connection, happened(self._seen, kind, detail))
        return FAR


_STAGES = {"keying": "keying", "ordered": "ordering", "issued": "delivering"}


def _wait(decision: Decision, look_at: float, why: str) -> Decision:
    return dataclasses.replace(decision, act=Renewal.WAIT, look_at=look_at, why=why)


def _why(done: Delivered) -> str:
    parts = [
        (done.waiting, "at work"),
        (done.held_back, "staged, until all are"),
        (done.stragglers, "cannot be reached"),
        (done.refusing, "refuse, and are asked again"),
        (done.lost, "need a key that is not at hand"),
    ]
    told = [f"{len(ids)} {what}" for ids, what in parts if ids]
    if done.unmeasured:
        resource, why = min(done.unmeasured.items())
        count = len(done.unmeasured)
        told.insert(0, why if count == 1 else f"{count} boots are not what they have to be, {resource}: {why}")
    return "; ".join(told)


def _window_text(start: float, end: float, why: str) -> str:
    return json.dumps({"start": start, "end": end, "why": why})
