"""Guests whose boot has to be something before anything is delivered to them: measured anew each time.

The host is asked with a nonce (a command that is no signed one), and answers with what the module's TPM signs (attested.py).  That
counts for ATTESTATION_GOOD seconds from when it was asked, and for all that is delivered to the module; what is said because of it
is given to the host in this time, or not at all.  A boot that is not what it has to be is told once, and looked at again after
pauses as those after a refusal; what the guest has stays.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from hsmvisor.manager import limits
from hsmvisor.manager.engine.obtaining import happened
from hsmvisor.manager.engine.outcome import Again
from hsmvisor.manager.engine.parts import Parts
from hsmvisor.manager.engine.seen import Seen, pause
from hsmvisor.manager.history.events import Kind
from hsmvisor.manager.policy.measured import nearest
from hsmvisor.manager.policy.questions import Act, Decision, Source
from hsmvisor.manager.store import commands, measurements
from hsmvisor.manager.store.rows import UNMEASURED, CommandRow, DeliveryRow, MeasurementRow, ResourceRow
from hsmvisor_rpc.sealed.fleet import NONCE_SIZE, AttestationAsked
from sqlalchemy.ext.asyncio import AsyncConnection

ATTEST = "attest"  #: the action of a command that asks
ASKED = "its guest's boot is being measured"
_SILENT = f"its host has not said within {limits.ATTESTED_WITHIN} s what the guest's boot is"


@dataclass(frozen=True)
class Standing:
    """How a guest stands whose boot matters.  `until`: it is as it has to be, and things are given to its host until then.

    0: nothing is delivered; `why`, and when to look again.  `asked`: its host is at it.
    """

    until: float = 0.0
    why: str = ""
    again_at: float = 0.0
    asked: bool = False


async def ask(connection: AsyncConnection, resource: ResourceRow, pcrs: Collection[int], now: float) -> MeasurementRow:
    """Queues the question for the resource's host; whoever waits there is to be woken after the commit."""
    asked = AttestationAsked(os.urandom(NONCE_SIZE), tuple(sorted(pcrs)))
    row = MeasurementRow(
        id=uuid.uuid4().hex,
        resource_id=resource.id,
        module_id=resource.module_id,
        nonce=asked.nonce,
        pcrs=" ".join(map(str, asked.pcrs)),
        asked_at=now,
    )
    command = CommandRow(
        id=row.id,
        host_id=resource.host_id,
        resource_id=resource.id,
        module=resource.module,
        line_id="",  # it is for all lines of the resource
        generation=0,
        action=ATTEST,
        sequence=0,
        signed=asked.encode(),
        created_at=now,
        expires_at=int(now) + limits.ATTESTED_WITHIN,
    )
    await measurements.add(connection, row)
    await commands.add(connection, [command])
    return row


def is_open(row: MeasurementRow, now: float) -> bool:
    """Whether an answer may still come."""
    return not row.told_at and row.asked_at + limits.ATTESTED_WITHIN > now


# ---- the gate in front of each delivery ---------------------------------------------------------------------------------------


async def demand(parts: Parts, seen: Seen, resource: ResourceRow, now: float) -> float:
    """Returns until when commands may be given to its host; 0: its boot does not matter.  Raises Again."""
    if not can_be_told(seen, resource, now):
        return 0.0
    found = (await gate(parts, seen, [resource], now, renews=seen.serving is not None)).get(resource.id)
    if found is None or found.until:
        return found.until if found is not None else 0.0
    again = Again(found.why, max(found.again_at - now, 1.0))
    again.stage = UNMEASURED if seen.delivery(resource.id).state == UNMEASURED else ""
    raise again


def can_be_told(seen: Seen, resource: ResourceRow, now: float) -> bool:
    """Whether there is somebody to ask, and nothing else to wait for."""
    if seen.queued.get(resource.id) or not resource.reachable or seen.is_away(resource, now):
        return False
    return seen.delivery(resource.id).state == UNMEASURED or seen.rests_until(resource.id) <= now


async def gate(parts: Parts, seen: Seen, resources: Sequence[ResourceRow], now: float, renews: bool) -> dict[str, Standing]:
    """Returns how those stand whose boot matters; of others nothing.  Asks hosts, and writes down what is new."""
    depending = {r.id: depends for r in resources if (depends := _depending(parts, seen, r, renews))}
    free = [r for r in resources if r.id not in depending and seen.delivery(r.id).state == UNMEASURED]
    if not depending and not free:
        return {}
    async with parts.database.reading() as connection:
        known = await measurements.recent(connection, list(depending), now - limits.ATTESTATION_GOOD)
    looks = [_Look(parts, seen, r, depending[r.id], known.get(r.id, []), now) for r in resources if r.id in depending]
    found = {look.resource.id: look.stand() for look in looks}
    told: set[str] = set()
    if not free and not any(look.asks or look.row for look in looks):
        return found
    async with parts.database.transaction() as connection:
        for resource in free:
            await _write(parts, seen, connection, _measured(seen, resource.id), now)
        for look in looks:
            if look.asks:
                await ask(connection, look.resource, look.wanted, now)
                told.add(look.resource.host_id)
            if look.row is not None:
                await _write(parts, seen, connection, look.row, now)
    parts.hub.commands(told)
    return found


def _depending(parts: Parts, seen: Seen, resource: ResourceRow, renews: bool) -> dict[Act, Decision]:
    """Returns the decisions that depend on the boot: a condition of the request holds at each delivery of it."""
    acts = [Act.IMPORT if seen.spec.source is Source.IMPORTED else Act.REQUEST, Act.DISTRIBUTE, *([Act.RENEW] if renews else [])]
    found = {act: _decide(parts, seen, resource, act, None) for act in acts}
    return {act: decision for act, decision in found.items() if decision.allowed and decision.measured}


def _decide(parts: Parts, seen: Seen, resource: ResourceRow, act: Act, measured: frozenset[str] | None) -> Decision:
    automatic = act in (Act.DISTRIBUTE, Act.RENEW)
    host = seen.hosts.get(resource.host_id)
    return parts.judge.decide(act, seen.request, seen.spec, resource, host, automatic, measured)


class _Look:
    """At one guest; `asks` and `row` (its delivery, where that changes) are what is to be written."""

    def __init__(
        self,
        parts: Parts,
        seen: Seen,
        resource: ResourceRow,
        depending: dict[Act, Decision],
        known: Sequence[MeasurementRow],
        now: float,
    ) -> None:
        self._parts, self._seen, self.resource, self._depending, self._now = parts, seen, resource, depending, now
        self._sets = parts.measurements()
        self.wanted = frozenset(number for one in self._sets.values() for number in one.pcrs)
        fitting = (row for row in known if row.module_id == resource.module_id and self.wanted <= row.asked)
        self._newest = next(fitting, None)
        self.asks = False
        self.row: DeliveryRow | None = None

    def stand(self) -> Standing:
        newest, now = self._newest, self._now
        if newest is None:
            return self._not_known()
        if newest.found:
            wrong = self._judged(newest)
            if wrong is None:
                self._fits()
                return Standing(until=newest.asked_at + limits.ATTESTATION_GOOD)
            return self._wrong(newest, wrong)
        if is_open(newest, now):
            return self._waits(newest.asked_at + limits.ATTESTED_WITHIN)
        return self._wrong(newest, newest.why or _SILENT)

    # ---- what it comes to -----------------------------------------------------------------------------------------

    def _judged(self, row: MeasurementRow) -> str | None:
        """Returns why this boot is not what it has to be, None where it is."""
        names = frozenset(name for name, one in self._sets.items() if one.fits(row.values))
        for act, before in self._depending.items():
            decision = _decide(self._parts, self._seen, self.resource, act, names)
            if not decision.allowed:
                lacking = [self._sets[name] for name in before.measured if name in self._sets and name not in names]
                return "; ".join(filter(None, (nearest(lacking, row.values), decision.why)))
            if act is Act.DISTRIBUTE:
                self._seen.permits[self.resource.id] = decision
        self._seen.measured[self.resource.id] = tuple(sorted(names))
        return None

    def _not_known(self) -> Standing:
        """Nobody has asked lately."""
        delivery = self._seen.delivery(self.resource.id)
        rests_until = self._seen.rests_until(self.resource.id) if delivery.state == UNMEASURED else 0.0
        if rests_until > self._now:
            return Standing(why=delivery.why, again_at=rests_until)
        return self._asks()

    def _asks(self) -> Standing:
        self.asks = True
        return self._waits(self._now + limits.ATTESTED_WITHIN)

    def _waits(self, until: float) -> Standing:
        delivery = self._seen.delivery(self.resource.id)
        why = delivery.why if delivery.state == UNMEASURED else ASKED
        return Standing(why=why, again_at=until, asked=True)

    def _fits(self) -> None:
        if self._seen.delivery(self.resource.id).state == UNMEASURED:
            self.row = _measured(self._seen, self.resource.id)

    def _wrong(self, row: MeasurementRow, why: str) -> Standing:
        """What is counted already is asked again when its pause is over."""
        delivery = self._seen.delivery(self.resource.id)
        if delivery.state == UNMEASURED and delivery.failed_at >= row.asked_at:
            return self._not_known()
        failures = delivery.failures + 1 if delivery.state == UNMEASURED else 1
        self.row = replace(delivery, state=UNMEASURED, why=why, failures=failures, failed_at=self._now)
        return Standing(why=why, again_at=self._now + pause(failures))


def _measured(seen: Seen, resource_id: str) -> DeliveryRow:
    """It does not wait for another boot any more."""
    return replace(seen.delivery(resource_id), state="pending", why="", failures=0, failed_at=0.0)


async def _write(parts: Parts, seen: Seen, connection: AsyncConnection, row: DeliveryRow, now: float) -> None:
    """What changes is told: once that the boot is not what it has to be, once that it is."""
    before = seen.deliveries.get(row.resource_id)
    written = await measurements.mark(connection, row, before, now)
    was = before.state if before is not None else ""
    if written and row.state == UNMEASURED and was != UNMEASURED:
        await parts.history.add(connection, happened(seen, Kind.NOT_MEASURED, {"why": row.why}, row.resource_id))
    elif written and was == UNMEASURED and row.state != UNMEASURED:
        matters = row.resource_id in seen.measured
        why = "its guest's boot is what it has to be" if matters else "its guest's boot does not matter any more"
        await parts.history.add(connection, happened(seen, Kind.RECOVERED, {"why": why}, row.resource_id))
    seen.deliveries[row.resource_id] = row
