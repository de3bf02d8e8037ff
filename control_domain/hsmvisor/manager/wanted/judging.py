"""What policy says of a line's resources, and what is recorded of it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from hsmvisor.manager.ca.names import BadName, Name
from hsmvisor.manager.history.events import Happened, History, Kind
from hsmvisor.manager.policy.engine import Policies
from hsmvisor.manager.policy.measured import Measured, either
from hsmvisor.manager.policy.questions import Act, Asked, Decision, Owner, Question, Resource, Rule
from hsmvisor.manager.policy.questions import Kind as ResourceKind
from hsmvisor.manager.store import wanted
from hsmvisor.manager.store.rows import HostRow, RequestRow, ResourceRow, lines_of
from hsmvisor.manager.wanted.spec import NotFilled, Spec
from sqlalchemy.ext.asyncio import AsyncConnection

NAMES = "names"  #: stands in a rule's place where a name cannot be made,
MEASURED = "measured"  #: and where the request itself demands that the guest's boot is measured as something
REMEMBERED = 50_000  #: decisions

_DELIVERS = frozenset({Act.REQUEST, Act.DISTRIBUTE, Act.RENEW, Act.IMPORT})

#: Returns the policies that count now.
Current = Callable[[], Policies]
#: Returns what a guest's boot may have to be, by name.
Measurements = Callable[[], Mapping[str, Measured]]


def question(
    act: Act, owner: Owner, spec: Spec, resource: ResourceRow, trusted: bool, names: tuple[Name, ...], automatic: bool
) -> Question:
    asked = Asked(
        material=spec.material,
        source=spec.source,
        key_type=spec.key_type,
        authority=spec.authority,
        profile=spec.profile,
        usage=spec.usage,
        names=names,
        lifetime=spec.lifetime,
        automatic=automatic,
    )
    what = Resource(
        id=resource.id,
        name=resource.name,
        kind=ResourceKind(resource.kind),
        owner=resource.owner,
        host=resource.host,
        attributes=resource.tags,
        host_trusted=trusted,
    )
    return Question(act, owner, what, asked)


class Judge:
    """Remembers what was decided about the same question under the same policies."""

    def __init__(self, policies: Current, history: History, clock: Callable[[], float], measurements: Measurements = dict) -> None:
        self._policies, self._history, self._clock, self._measurements = policies, history, clock, measurements
        self._known: OrderedDict[Any, Decision] = OrderedDict()

    def decide(
        self,
        act: Act,
        request: RequestRow,
        spec: Spec,
        resource: ResourceRow,
        host: HostRow | None,
        automatic: bool,
        measured: frozenset[str] | None = None,
    ) -> Decision:
        """A name that cannot be made for the resource is as good as a denial.

        `measured`: as what the guest's boot was measured just now; None: it was not, and where that makes the difference it is
        allowed and the decision says so (`Decision.measured`).
        """
        trusted = bool(host and host.trusted)
        policies = self._policies()
        known = frozenset(self._measurements()) if measured is None else None
        # all that is asked, and nothing that stands for it: within one second a resource may be two owners'
        told = (request.owner, request.groups, request.spec, resource.id, resource.owner, resource.kind, resource.attributes)
        key = (policies.version, act, hashlib.sha256(repr(told).encode()).digest(), trusted, automatic, measured, known)
        if (found := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return found
        try:
            names = spec.names_for(None if spec.shared else resource)
        except (NotFilled, BadName) as error:
            return Decision(False, (Rule(NAMES, str(error)),), policies.version)
        owner = Owner(request.owner, frozenset(lines_of(request.groups)))
        asked = question(act, owner, spec, resource, trusted, names, automatic)

        def decided(measured: frozenset[str]) -> Decision:
            if act in _DELIVERS and spec.measured and measured.isdisjoint(spec.measured):
                why = f"its request is for guests whose boot is measured as {either(spec.measured)}"
                return Decision(False, (Rule(MEASURED, why),), policies.version)
            return policies.decide(replace(asked, asked=replace(asked.asked, measured=measured)))

        decision = decided(measured) if measured is not None else _depending(decided, known or frozenset())
        self._known[key] = decision
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return decision

    async def record(
        self,
        connection: AsyncConnection,
        request: RequestRow,
        act: Act,
        decisions: Iterable[tuple[ResourceRow, Decision]],
        denied_before: Iterable[tuple[str, str]],
    ) -> None:
        """Denials are kept and told once; those that are none any more are taken back."""
        before = set(denied_before)
        permitted = []
        named = Spec.of_text(request.spec).resources
        for resource, decision in decisions:
            if decision.allowed:
                if (resource.id, str(act)) in before:
                    permitted.append(resource.id)
                continue
            why = decision.why
            if await wanted.deny(connection, request.id, resource.id, str(act), why, decision.version, int(self._clock())):
                happened = Happened(
                    Kind.DENIED,
                    owner=request.owner if resource.owner == request.owner or resource.id in named else "",
                    request_id=request.id,
                    material=request.material,
                    resource_id=resource.id,
                    host_id=resource.host_id,
                    detail={"action": str(act), "why": why, "policy_version": decision.version},
                )
                await self._history.add(connection, happened)
        if permitted:
            await wanted.permit(connection, request.id, permitted, str(act))


def _depending(decided: Callable[[frozenset[str]], Decision], known: frozenset[str]) -> Decision:
    """Of a guest whose boot was not measured: what is denied and would be allowed to another boot depends on it."""
    bare = decided(frozenset())
    if bare.allowed or not known:
        return bare
    best = decided(known)
    if not best.allowed:
        return best
    alone = tuple(name for name in sorted(known) if decided(frozenset({name})).allowed)
    return replace(best, measured=alone or tuple(sorted(known)), together=not alone)
