"""What hosts carried out, and what they could not: from a command's result to the state of its delivery, generation and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hsmvisor.manager import limits
from hsmvisor.manager.engine import attested, made
from hsmvisor.manager.engine.measuring import ATTEST
from hsmvisor.manager.history.events import Happened, History, Kind
from hsmvisor.manager.inventory import modules
from hsmvisor.manager.renewal.trigger import Trigger
from hsmvisor.manager.store import commands, inventory, lines, wanted
from hsmvisor.manager.store.rows import CommandRow, DeliveryRow, GenerationRow, HostRow, LineRow, held_text
from hsmvisor.manager.wanted.spec import Spec
from hsmvisor.serving.text import clean
from hsmvisor_rpc.sealed.commands import Action
from hsmvisor_rpc.sealed.refusal import Reason
from sqlalchemy.ext.asyncio import AsyncConnection

#: Refusals after which the same is said again, with what was learnt: nobody's failure.
_SAID_AGAIN = frozenset(
    {
        Reason.STALE_SEQUENCE,
        Reason.REPLAY,
        Reason.EXPIRED,
        Reason.WRONG_MODULE,
        Reason.STALE_GENERATION,
        Reason.UNKNOWN_GENERATION,
        Reason.UNKNOWN_MATERIAL,
    }
)
_UNSAID = frozenset({Reason.WRONG_STATE})  #: it may be so already: the module's next report says how it is
MALFORMED, UNTRUE = "MALFORMED", "UNTRUE"  #: reasons that are ours: what a host told cannot be, or is not so
_PAUSE = 5.0  #: seconds before it is said again


@dataclass(frozen=True)
class Result:
    """`states`: the material's generations as they are now, by number; None where that is not known."""

    id: str
    done: bool
    reason: str = ""
    detail: str = ""
    public_key: bytes = b""
    csr: bytes = b""
    sequence: int = 0
    states: Mapping[int, str] | None = None
    attestation: bytes = b""
    tpm_certificates: bytes = b""


class Results:
    def __init__(self, history: History, clock: Callable[[], float]) -> None:
        self._history, self._clock = history, clock

    async def take(self, connection: AsyncConnection, host: HostRow, results: Sequence[Result]) -> bool:
        """Each counts once: of a command that is not open, nothing happens.  Returns whether a line is to be looked at."""
        if not results:
            return False
        known = await commands.by_ids(connection, host.id, [result.id for result in results])
        measured = sorted({command.resource_id for command in known.values() if command.action == ATTEST})
        on_them = [line.id for id in measured for line in await lines.lines_on(connection, id)]
        await lines.lock_by_id(connection, [*on_them, *(command.line_id for command in known.values())])
        woken: dict[str, float] = {}
        done: list[str] = []
        failed: set[tuple[str, str]] = set()  # what is refused behind that is refused because of it
        for result in results:
            command = known.pop(result.id, None)
            if command is None:
                continue
            done.append(command.id)
            if command.action == ATTEST:
                told = (result.done, result.reason, result.detail, result.attestation, result.tpm_certificates)
                await attested.take(connection, host, command.id, *told, self._clock())
                continue
            line = await lines.line(connection, command.line_id)
            if line is None:
                continue
            result = await self._checked(connection, line, command, result)
            await inventory.raise_sequence(connection, command.resource_id, result.sequence)
            delivery = await self._noted(connection, command, result)
            if result.done:
                await self._done(connection, line, command, result, delivery)
                woken[line.id] = 0.0
            else:
                first = (command.line_id, command.resource_id) not in failed
                failed.add((command.line_id, command.resource_id))
                pause = await self._refused(connection, line, command, result, delivery) if first else _PAUSE
                woken[line.id] = min(woken.get(line.id, pause), pause)
        await commands.remove(connection, done)
        await lines.wake(connection, [id for id, pause in woken.items() if not pause], self._clock())
        for id, pause in woken.items():
            if pause:
                await lines.change_line(connection, id, look_at=self._clock() + pause)
        if measured:
            await lines.wake_pending(connection, measured, self._clock())
        return bool(woken or measured)

    async def _checked(self, connection: AsyncConnection, line: LineRow, command: CommandRow, result: Result) -> Result:
        """What cannot be, or is not what was asked for, is a failure."""
        told = result.states or {}
        wrong = modules.wrong_sequence(result.sequence) or modules.wrong_generations(told.items())
        if wrong or len(told) > limits.MAX_GENERATIONS:
            return Result(result.id, False, MALFORMED, wrong or f"a material has at most {limits.MAX_GENERATIONS} generations")
        if result.states is not None:
            told = {number: state for number, state in told.items() if modules.believed(number, line.newest)}
            result = replace(result, states=told)
        if not result.done:
            return result
        wrong = made.wrong_state(command.action, command.generation, result.states)
        if not wrong and command.action == Action.GENERATE:
            wrong = await self._wrong_key(connection, line, command, result)
        return replace(result, done=False, reason=UNTRUE, detail=wrong) if wrong else result

    async def _wrong_key(self, connection: AsyncConnection, line: LineRow, command: CommandRow, result: Result) -> str:
        request = await wanted.request(connection, line.request_id)
        known = {row.number: row for row in await lines.generations_of(connection, [line.id])}
        working = known.get(command.generation)
        if request is None or working is None or working.state != "keying":
            return ""  # nobody waits for it any more
        key_type = Spec.of_text(request.spec).key_type
        return made.wrong_key(result.csr, result.public_key, key_type, working, list(known.values()))

    async def _noted(self, connection: AsyncConnection, command: CommandRow, result: Result) -> DeliveryRow:
        """Writes down what the module has now."""
        found = await lines.delivery(connection, command.line_id, command.resource_id)
        row = found or DeliveryRow(command.line_id, command.resource_id, 0, 0, "", "pending", "", 0)
        changed = row
        if result.states is not None:
            there = {number: state for number, state in result.states.items() if state != "destroyed"}
            current = next((number for number, state in there.items() if state == "current"), 0)
            changed = replace(changed, held=held_text(there), active=current)
        if result.done and command.action in (Action.STAGE, Action.CERTIFY):
            changed = replace(changed, staged=command.generation)
        if result.done and command.action in (Action.ACTIVATE, Action.ROLL_BACK):
            changed = replace(changed, staged=command.generation, state="active", why="")
        if changed != row or found is None:
            await lines.put_delivery(connection, replace(changed, changed_at=int(self._clock())))
        return changed

    async def _done(
        self, connection: AsyncConnection, line: LineRow, command: CommandRow, result: Result, delivery: DeliveryRow
    ) -> None:
        match command.action:
            case Action.GENERATE:
                generation = await _generation(connection, line, command.generation)
                if generation is not None:
                    state = "ordered" if generation.names else "issued"
                    told = {"public_key": result.public_key, "csr": result.csr, "state": state}
                    await lines.change_generation(connection, line.id, generation.number, was="keying", **told)
            case Action.ACTIVATE:
                await self._activated(connection, line, command, delivery)
                if delivery.failures:
                    await self._recovered(connection, line, command, delivery)
            case Action.ROLL_BACK:
                if delivery.failures:
                    await self._recovered(connection, line, command, delivery)
                await self._tell(connection, line, command, Kind.ROLLED_BACK)

    async def _activated(self, connection: AsyncConnection, line: LineRow, command: CommandRow, delivery: DeliveryRow) -> None:
        now, number = self._clock(), command.generation
        policy: dict[str, object] = json.loads(delivery.permitted) if delivery.permitted else {}
        first = await lines.change_generation(connection, line.id, number, was="issued", state="serving", activated_at=now)
        if not first:
            await self._tell(connection, line, command, Kind.DELIVERED, **policy)
            return
        if line.serving and line.serving != number:
            await lines.change_generation(connection, line.id, line.serving, was="serving", state="superseded")
        told = {"serving": number, "failures": 0, "failed_at": 0.0, "not_before": 0.0, "why": ""}
        await lines.change_line(connection, line.id, **told)
        if command.resource_id:
            await lines.remove_envelope(connection, line.id, number, command.resource_id)
        await self._tell(connection, line, command, Kind.ROTATED if line.serving else Kind.DELIVERED, **policy)
        if line.failures:
            await self._tell(connection, line, command, Kind.RECOVERED)

    async def _recovered(self, connection: AsyncConnection, line: LineRow, command: CommandRow, delivery: DeliveryRow) -> None:
        await lines.put_delivery(connection, replace(delivery, failures=0, failed_at=0.0))
        if not line.resource_id:
            await self._tell(connection, line, command, Kind.RECOVERED)

    async def _refused(
        self, connection: AsyncConnection, line: LineRow, command: CommandRow, result: Result, delivery: DeliveryRow
    ) -> float:
        """Returns seconds after which the line is looked at again; 0: at once."""
        detail, reason = clean(result.detail, limits.MAX_DETAIL), result.reason
        if reason == Reason.STALE_GENERATION and command.action in (Action.GENERATE, Action.STAGE):
            newest = max(result.states or {}, default=0)
            if newest >= command.generation:  # one that shows none is not believed
                await self._begin_above(connection, line, command.generation, max(line.newest, newest))
                if not delivery.failures:
                    await lines.put_delivery(connection, replace(delivery, failures=1))
                    return 0.0
        taking_away = command.action in (Action.DESTROY, Action.RETIRE)
        if reason == Reason.WRONG_STATE and (taking_away or command.action == Action.ACTIVATE) and result.states is not None:
            if not made.wrong_state(command.action, command.generation, result.states):
                return 0.0  # it is so already
        elif taking_away and reason in (Reason.UNKNOWN_MATERIAL, Reason.UNKNOWN_GENERATION):
            delivery = _without(delivery, command.generation if reason == Reason.UNKNOWN_GENERATION else 0)
        delivery = replace(delivery, failures=delivery.failures + 1, failed_at=self._clock(), why=detail)
        await lines.put_delivery(connection, delivery)
        if reason in _SAID_AGAIN or (reason in _UNSAID and result.states is None):
            return _PAUSE
        values: dict[str, object] = {"why": f"{command.resource_id}: {detail}"}
        if line.resource_id:  # of a key that several have, one of them does not keep the others waiting
            values |= {"failures": line.failures + 1, "failed_at": self._clock()}
        await lines.change_line(connection, line.id, **values)
        await self._tell(connection, line, command, Kind.FAILED, reason=reason, why=detail)
        return _PAUSE

    async def _begin_above(self, connection: AsyncConnection, line: LineRow, number: int, newest: int) -> None:
        """The module knows newer generations, of a time that nobody here remembers: the next one is above them."""
        why = "a module knows a newer generation"
        for state in ("keying", "issued"):
            await lines.change_generation(connection, line.id, number, was=state, state="failed", why=why)
        values: dict[str, object] = {"newest": newest}
        if number == line.serving:
            values |= {"triggered_at": self._clock(), "trigger": Trigger(why).text()}
        await lines.change_line(connection, line.id, **values)

    async def _tell(self, connection: AsyncConnection, line: LineRow, command: CommandRow, kind: Kind, **more: object) -> None:
        request = await wanted.request(connection, line.request_id)
        happened = Happened(
            kind,
            owner=request.owner if request else "",
            request_id=line.request_id,
            material=line.material,
            resource_id=command.resource_id,
            host_id=command.host_id,
            detail={"generation": command.generation, "action": command.action, **more},
        )
        await self._history.add(connection, happened)


def _without(delivery: DeliveryRow, number: int) -> DeliveryRow:
    """`number`: of the generation that the module does not know; 0: it knows none."""
    left = {n: state for n, state in delivery.generations.items() if number and n != number}
    return replace(delivery, held=held_text(left), active=delivery.active if delivery.active in left else 0)


async def _generation(connection: AsyncConnection, line: LineRow, number: int) -> GenerationRow | None:
    found = await lines.generations_of(connection, [line.id])
    return next((row for row in found if row.number == number), None)
