"""What owners ask for, change, and end.  Each is one transaction: what was asked, the lines that it concerns, what is told."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from hsmvisor.manager import limits
from hsmvisor.manager.ca.interface import Reason
from hsmvisor.manager.ca.names import BadName
from hsmvisor.manager.history.events import Happened, History, Kind
from hsmvisor.manager.policy.questions import Act, Decision, Owner, Source, permits
from hsmvisor.manager.renewal.decisions import BadRule, Rule
from hsmvisor.manager.renewal.trigger import Trigger
from hsmvisor.manager.store import inventory, lines, locks, wanted
from hsmvisor.manager.store.rows import HostRow, LineRow, RequestRow, ResourceRow, text_of
from hsmvisor.manager.wanted import membership
from hsmvisor.manager.wanted.judging import NAMES, Judge
from hsmvisor.manager.wanted.spec import BadSpec, NotFilled, Spec
from hsmvisor.serving.errors import Exhausted, Forbidden, Invalid, NotFound, WrongState
from sqlalchemy.ext.asyncio import AsyncConnection

#: What does not say anything about key or certificate: a change of it makes no new generation.
_ASIDE = (
    "resources", "selector", "renewal", "two_step", "health", "escrow", "drain_seconds", "after_drain", "on_expiry", "measured",
)  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What would happen with one resource."""

    resource: str
    decision: Decision
    names: tuple[str, ...]
    outcome: str


@dataclass(frozen=True)
class Explanation:
    expected: tuple[Expected, ...]
    remarks: tuple[str, ...]
    change: str  #: nothing, create, change


class Asking:
    def __init__(
        self,
        history: History,
        judge: Judge,
        authorities: Collection[str],
        default_authority: str,
        health: Collection[str],
        clock: Callable[[], float],
        measured: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """`measured`: returns the names of what a guest's boot may have to be."""
        self._history, self._judge, self._authorities, self._default = history, judge, authorities, default_authority
        self._health, self._clock, self._measured = health, clock, measured

    # ---- asking ------------------------------------------------------------------------------------------------------

    async def apply(self, connection: AsyncConnection, owner: Owner, asked: Spec, sees_all: bool = False) -> RequestRow:
        """The same again changes nothing.  `sees_all`: who asks may see what is others' too.

        Raises Invalid, Forbidden, WrongState, Exhausted.
        """
        await locks.members(connection)
        spec, _ = await self._checked(connection, asked, "" if sees_all else owner.name)
        before = await wanted.request_of(connection, owner.name, spec.material)
        groups = text_of(sorted(owner.groups))
        if before is not None and (before.state, before.spec, before.groups) == ("active", spec.text(), groups):
            return before
        earlier = Spec.of_text(before.spec) if before is not None else None
        if before is not None and before.state == "active" and earlier is not None:
            _demand_changeable(earlier, spec)
        now = self._clock()
        row = RequestRow(
            id=before.id if before else uuid.uuid4().hex,
            owner=owner.name,
            groups=groups,
            material=spec.material,
            spec=spec.text(),
            state="active",
            kept=0,
            created_at=before.created_at if before else int(now),
            changed_at=int(now),
        )
        policy = await self._demand_allowed(connection, row, spec, sees_all)
        if before is None or before.state != "active":
            await self._demand_room(connection, owner.name)
        await wanted.put_request(connection, row, spec.resources, spec.selector)
        again = earlier is not None and _essence(earlier) != _essence(spec)
        await membership.request_changed(connection, row, spec, now, again)
        kind = Kind.REQUESTED if before is None or before.state != "active" else Kind.CHANGED
        await self._tell(connection, row, kind, {"by": owner.name, **policy})
        return row

    async def _demand_room(self, connection: AsyncConnection, owner: str) -> None:
        if await wanted.count_active(connection, owner) >= limits.MAX_REQUESTS:
            raise Exhausted("REQUESTS", f"{owner} has {limits.MAX_REQUESTS} requests already", "use selectors, or cancel some")

    async def _checked(self, connection: AsyncConnection, asked: Spec, seen_by: str) -> tuple[Spec, list[str]]:
        """Returns the specification with what was left open, and remarks.  `seen_by`: whose resources are found by their names
        alone; empty: all."""
        spec = replace(asked, authority=asked.authority or ("" if asked.bare or asked.source is Source.IMPORTED else self._default))
        remarks: list[str] = []
        if spec.authority and spec.authority not in self._authorities:
            raise Invalid("AUTHORITY", f"there is no authority {spec.authority!r}: {', '.join(sorted(self._authorities))}")
        if spec.health and spec.health not in self._health:
            known = ", ".join(sorted(self._health)) or "none is configured"
            raise Invalid("HEALTH", f"there is no health check {spec.health!r}: {known}")
        if unknown := sorted(set(spec.measured) - set(self._measured())):
            known = ", ".join(sorted(self._measured())) or "none is configured"
            raise Invalid("MEASURED", f"there is no [measured.{unknown[0]}] in the manager's configuration: {known}")
        found = []
        for name in spec.resources:
            found.append(await self._resolved(connection, name, seen_by, remarks))
        spec = replace(spec, resources=tuple(dict.fromkeys(found)))
        try:
            return spec.check(), remarks
        except BadSpec as error:
            raise Invalid("SPEC", str(error)) from None

    async def _resolved(self, connection: AsyncConnection, name: str, seen_by: str, remarks: list[str]) -> str:
        if "/" in name:
            if await inventory.resource(connection, name) is None:
                remarks.append(f"{name} is not known yet: it gets the material when its host reports it")
            return name
        found = await inventory.resources_named(connection, name, seen_by)
        if not found:
            raise Invalid("RESOURCE", f"there is no resource {name!r}", "write HOST/NAME for one that is still to come")
        if len(found) > 1:
            raise Invalid(
                "RESOURCE", f"several resources are called {name}: {', '.join(row.id for row in found)}", "write HOST/NAME"
            )
        return found[0].id

    async def _demand_allowed(
        self, connection: AsyncConnection, row: RequestRow, spec: Spec, sees_all: bool
    ) -> Mapping[str, object]:
        """Where policy denies it everywhere, the request is refused; otherwise the denials stand beside it.

        Returns what the history tells of the rules that permit it.
        """
        decided = [(r, d) for r, d in await self._decide(connection, row, spec) if d.allowed or sees_all or is_told(row, spec, r)]
        if decided and not any(decision.allowed for _, decision in decided):
            for resource, decision in decided[:20]:
                detail = {"action": str(_act(spec)), "why": decision.why, "policy_version": decision.version}
                await self._history.add(connection, replace(self._happened(row, Kind.DENIED, detail), resource_id=resource.id))
            why = "; ".join(sorted({decision.why for _, decision in decided}))
            raise Denied(f"policy does not allow it on {', '.join(r.id for r, _ in decided[:5])}: {why}")
        return permits(decision for _, decision in decided)

    async def _decide(
        self, connection: AsyncConnection, row: RequestRow, spec: Spec, act: Act | None = None
    ) -> list[tuple[ResourceRow, Decision]]:
        members = await membership.members(connection, spec)
        hosts = await inventory.hosts_of(connection, [resource.host_id for resource in members])
        act = act or _act(spec)
        return [(r, self._judge.decide(act, row, spec, r, hosts.get(r.host_id), False)) for r in members]

    async def explain(self, connection: AsyncConnection, owner: Owner, asked: Spec, sees_all: bool = False) -> Explanation:
        """Of what is others' and denied nothing is said, but that it is denied where it was named.  Raises Invalid."""
        spec, remarks = await self._checked(connection, asked, "" if sees_all else owner.name)
        before = await wanted.request_of(connection, owner.name, spec.material)
        row = RequestRow("explain", owner.name, text_of(sorted(owner.groups)), spec.material, spec.text(), "active", 0, 0, 0)
        expected = []
        members = await membership.members(connection, spec)
        hosts = await inventory.hosts_of(connection, [resource.host_id for resource in members])
        there = {line.resource_id: line for line in await lines.lines_of_request(connection, before.id)} if before else {}
        for resource in members:
            one = self._expect(row, spec, resource, hosts.get(resource.host_id), there)
            if one.decision.allowed or sees_all or resource.owner == owner.name:
                expected.append(one)
            elif is_told(row, spec, resource):
                expected.append(replace(one, names=(), outcome=_NOTHING))
        if not expected:
            remarks.append("no resource is meant at this moment; those that come later are served when they come")
        change = "create"
        if before is not None and before.state == "active":
            change = "nothing" if before.spec == spec.text() else "change"
            try:
                _demand_changeable(Spec.of_text(before.spec), spec)
            except WrongState as error:
                remarks.append(error.detail)
        return Explanation(tuple(expected), tuple(remarks), change)

    def _expect(
        self, row: RequestRow, spec: Spec, resource: ResourceRow, host: HostRow | None, there: Mapping[str, LineRow]
    ) -> Expected:
        try:
            names = tuple(map(str, spec.names_for(None if spec.shared else resource)))
        except (NotFilled, BadName) as error:
            names, decision = (), self._judge.decide(_act(spec), row, spec, resource, host, False)
            return Expected(resource.id, decision, (), str(error))
        asked = self._judge.decide(_act(spec), row, spec, resource, host, False)
        later = self._judge.decide(Act.DISTRIBUTE, row, spec, resource, host, True)
        decision = asked if not asked.allowed else later
        line = there.get("" if spec.shared else resource.id)
        if not decision.allowed:
            outcome = _NOTHING
        elif not resource.reachable:
            outcome = "it waits: the resource has no module that obeys this fleet"
        elif line is not None and line.serving:
            outcome = f"it has generation {line.serving}"
        else:
            outcome = _OUTCOMES[spec.source]
        if decision.allowed and decision.measured:
            outcome = f"{outcome}; each delivery {decision.condition}"
        return Expected(resource.id, decision, names, outcome)

    # ---- what there is -----------------------------------------------------------------------------------------------

    async def cancel(
        self, connection: AsyncConnection, row: RequestRow, keep: bool, why: str, by: str, bound: bool = False
    ) -> RequestRow:
        """What was delivered is taken away, or stays and is not renewed.  `bound`: who asks is, by policy.  Raises Denied."""
        if row.state == "cancelled" and (keep or not row.kept):
            return row
        if bound:
            await self.demand_not_forbidden(connection, row, Act.CANCEL, "")
        changed = replace(row, state="cancelled", kept=int(keep), changed_at=int(self._clock()))
        await wanted.change_request(connection, row.id, state="cancelled", kept=int(keep), changed_at=changed.changed_at)
        await wanted.forget_denials(connection, row.id)
        await membership.request_changed(connection, changed, Spec.of_text(row.spec), self._clock(), False)
        await self._tell(connection, row, Kind.CANCELLED, {"by": by, "why": why, "kept": keep})
        return changed

    async def rotate(
        self,
        connection: AsyncConnection,
        row: RequestRow,
        resource: str,
        urgent: bool,
        revoke: bool,
        reason: str,
        by: str,
        why: str,
        bound: bool = False,
    ) -> None:
        """`reason`: why the old certificate is revoked; empty: superseded, or where it is urgent, a compromise, after which the
        old key serves nobody.  `bound`: as for `cancel`.  Raises Invalid, NotFound, WrongState, Denied."""
        _demand_active(row)
        if bound:
            await self.demand_not_forbidden(connection, row, Act.ROTATE, resource)
        reason = _reason(reason or (Reason.KEY_COMPROMISE if urgent else Reason.SUPERSEDED))
        rekey = urgent or reason == Reason.KEY_COMPROMISE
        spec = Spec.of_text(row.spec)
        if spec.source is Source.IMPORTED and (rekey or not spec.authority):
            raise WrongState("IMPORTED", f"the key of {row.material} is its owner's: it is not made here", _NEXT_KEY)
        chosen = await self._lines(connection, row, resource)
        asked = Trigger(why, by, urgent, revoke or urgent, reason, rekey)
        ids = [line.id for line in chosen]
        await lines.wake(connection, ids, self._clock(), triggered_at=self._clock(), trigger=asked.text())
        await self._tell(connection, row, Kind.CHANGED, {"by": by, "why": why, "what": "rotate", "urgent": urgent})

    async def activate(self, connection: AsyncConnection, row: RequestRow, resource: str) -> None:
        """Raises NotFound, WrongState."""
        _demand_active(row)
        chosen = await self._lines(connection, row, resource)
        done = 0
        for line in chosen:
            done += await lines.change_generation(connection, line.id, line.newest, was="issued", released=1)
        if not done:
            raise WrongState("STAGED", "no generation is staged that waits for its activation")
        await lines.wake(connection, [line.id for line in chosen], self._clock())

    async def roll_back(
        self, connection: AsyncConnection, row: RequestRow, resource: str, why: str, by: str, now: float
    ) -> list[int]:
        """Returns the generations that serve again.  Raises NotFound, WrongState."""
        _demand_active(row)
        chosen = await self._lines(connection, row, resource)
        generations = await lines.generations_of(connection, [line.id for line in chosen])
        done = []
        for line in chosen:
            own = [g for g in generations if g.line_id == line.id]
            if not lines.the_one_before(line, own, now):
                continue
            done.append(
                await lines.serve_the_one_before(connection, line, own, f"rolled back: {why}" if why else "rolled back", now)
            )
        if not done:
            raise WrongState("GENERATION", "there is no generation before that could serve again")
        await self._tell(connection, row, Kind.ROLLED_BACK, {"by": by, "why": why})
        return done

    async def revoke(
        self,
        connection: AsyncConnection,
        row: RequestRow,
        resource: str,
        number: int,
        reason: str,
        by: str,
        why: str,
        bound: bool = False,
    ) -> None:
        """`bound`: as for `cancel`.  Raises Invalid, NotFound, Denied."""
        if bound:
            await self.demand_not_forbidden(connection, row, Act.REVOKE, resource)
        if number > limits.MAX_GENERATION:
            raise NotFound("GENERATION", f"there is no generation {number}")
        word = _reason(reason or "unspecified")
        chosen = await self._lines(connection, row, resource)
        done = 0
        for line in chosen:
            told = {"revoke": f"!{word}"}
            done += await lines.change_generation(connection, line.id, number or line.serving, **told)
        if not done:
            raise NotFound("GENERATION", f"there is no generation {number or 'that serves'}")
        await lines.wake(connection, [line.id for line in chosen], self._clock())
        await self._tell(connection, row, Kind.CHANGED, {"by": by, "why": why, "what": "revoke", "generation": number})

    async def set_renewal(self, connection: AsyncConnection, row: RequestRow, rule: Rule, by: str) -> RequestRow:
        """Raises Invalid, WrongState."""
        _demand_active(row)
        try:
            spec = dataclasses.replace(Spec.of_text(row.spec), renewal=rule.check())
        except BadRule as error:
            raise Invalid("RULE", str(error)) from None
        changed = replace(row, spec=spec.text(), changed_at=int(self._clock()))
        await wanted.change_request(connection, row.id, spec=changed.spec, changed_at=changed.changed_at)
        await lines.wake(connection, [line.id for line in await lines.lines_of_request(connection, row.id)], self._clock())
        await self._tell(connection, row, Kind.CHANGED, {"by": by, "what": "renewal"})
        return changed

    async def demand_rekey(self, connection: AsyncConnection, resource: str) -> None:
        """Asks policy for each key of the resource, as for `rotate`.  Raises Denied."""
        for line in await lines.lines_on(connection, resource):
            if (row := await wanted.request(connection, line.request_id)) is not None:
                await self.demand_not_forbidden(connection, row, Act.ROTATE, resource)

    async def demand_not_forbidden(self, connection: AsyncConnection, row: RequestRow, act: Act, resource: str) -> None:
        """What one has may be changed, and ended, where no rule forbids it on all that it concerns.  That nothing permits it (any
        more) keeps nobody from giving it back.  Raises Denied."""
        spec = Spec.of_text(row.spec)
        decided = [d for r, d in await self._decide(connection, row, spec, act) if resource in ("", r.id) or spec.shared]
        forbidding = [[rule for rule in d.rules if rule.id != NAMES] for d in decided if not d.allowed]
        if decided and len(forbidding) == len(decided) and all(forbidding):
            why = "; ".join(sorted({str(rule) for rules in forbidding for rule in rules}))
            raise Denied(f"policy forbids to {act} {row.material}: {why}")

    async def _lines(self, connection: AsyncConnection, row: RequestRow, resource: str) -> Sequence[LineRow]:
        found = await lines.lines_of_request(connection, row.id)
        if resource:
            found = [line for line in found if line.resource_id in (resource, "")]
        if not found:
            raise NotFound("LINE", f"nothing was made yet for {resource or row.material}")
        return found

    # ---- telling -----------------------------------------------------------------------------------------------------

    def _happened(self, row: RequestRow, kind: Kind, detail: Mapping[str, object]) -> Happened:
        return Happened(kind, owner=row.owner, request_id=row.id, material=row.material, detail=dict(detail))

    async def _tell(self, connection: AsyncConnection, row: RequestRow, kind: Kind, detail: Mapping[str, object]) -> None:
        await self._history.add(connection, self._happened(row, kind, detail))


class Denied(Forbidden):
    """Policy denies it everywhere: what was told of that is kept, although the request is not."""

    def __init__(self, detail: str) -> None:
        super().__init__("POLICY", detail, "hsmvisor policy show says what is allowed; whoever keeps the policies may change them")


def _act(spec: Spec) -> Act:
    return Act.IMPORT if spec.source is Source.IMPORTED else Act.REQUEST


def _reason(text: str) -> str:
    try:
        return str(Reason(text))
    except ValueError:
        raise Invalid("REASON", f"a reason is one of {', '.join(Reason)}") from None


def _demand_active(row: RequestRow) -> None:
    if row.state != "active":
        raise WrongState("CANCELLED", f"the request for {row.material} was cancelled", "ask for it again")


def _demand_changeable(before: Spec, spec: Spec) -> None:
    for name in ("source", "mode", "bare"):
        if getattr(before, name) != getattr(spec, name):
            hint = "cancel the request and ask anew, or give the material another name"
            raise WrongState("FIXED", f"{name} cannot be changed from {getattr(before, name)} to {getattr(spec, name)}", hint)


def _essence(spec: Spec) -> dict[str, object]:
    return {name: value for name, value in dataclasses.asdict(spec).items() if name not in _ASIDE}


def is_told(row: RequestRow, spec: Spec, resource: ResourceRow) -> bool:
    """Whether an owner is told that something is denied on a resource: its own, or one that it has named.  A selector would else
    list what others have."""
    return resource.owner == row.owner or resource.id in spec.resources


_NOTHING = "nothing is delivered"
_NEXT_KEY = "hsmvisor request import brings the next one"
_OUTCOMES = {
    Source.MODULE: "its module makes a key, the authority certifies it, and it is activated",
    Source.ISSUER: "the issuer makes a key that all share, and it is sealed to its module",
    Source.IMPORTED: "the key that you import is sealed to its module",
}
