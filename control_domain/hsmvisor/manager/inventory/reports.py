"""What a host tells of its guests: checked, compared with what is known, and passed on to the lines that it concerns.

A host speaks for itself alone: a resource's id begins with the host's name, a module's identity has to be signed by the key that
was pinned when the host joined, and where the host is for some owners' guests, it is for those alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hsmvisor.manager import limits
from hsmvisor.manager.history.events import Happened, History, Kind
from hsmvisor.manager.inventory import modules
from hsmvisor.manager.policy.questions import Kind as ResourceKind
from hsmvisor.manager.store import inventory, lines, wanted
from hsmvisor.manager.store.rows import DeliveryRow, HostRow, LineRow, ResourceRow, held_text, lines_of
from hsmvisor.manager.wanted import membership
from hsmvisor.manager.wanted.spec import Spec
from hsmvisor_rpc.sealed.commands import fingerprint
from hsmvisor_rpc.sealed.identity import ModuleIdentity, verify_identity
from hsmvisor_rpc.sealed.refusal import Refusal
from sqlalchemy.ext.asyncio import AsyncConnection

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KEY = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KINDS = frozenset(map(str, ResourceKind))


@dataclass(frozen=True)
class Told:
    """One generation, as its module has it."""

    state: str  #: staged, current, retiring, destroyed
    operations: int = 0


@dataclass(frozen=True)
class Report:
    """Of one guest."""

    name: str
    kind: str
    owner: str
    attributes: Mapping[str, str]
    module: str = ""
    signed_identity: bytes = b""
    sequence: int = 0
    materials: Mapping[str, Mapping[int, Told]] = field(default_factory=dict)

    @property
    def silent(self) -> bool:
        """It has a module that does not serve at the moment: nothing is said of it, and nothing is to be concluded."""
        return bool(self.module) and not self.signed_identity


class BadReport(ValueError):
    """A guest that is not taken; `reason` is stable."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class NotTaken:
    name: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Taken:
    refused: Sequence[NotTaken] = ()  #: nothing of them has changed
    changed: int = 0


@dataclass(frozen=True)
class _Module:
    """What a resource's row says of its module."""

    module_id: str
    recipient: bytes
    identity: bytes
    obeys: int
    sequence: int


def _module_of(row: ResourceRow) -> _Module:
    return _Module(row.module_id, row.recipient, row.identity, row.obeys, row.sequence)


class Reports:
    def __init__(self, history: History, root: bytes, clock: Callable[[], float]) -> None:
        """`root`: raw Ed25519, what modules have to obey to be sent anything."""
        self._history, self._root, self._clock = history, fingerprint(root), clock

    async def take(
        self, connection: AsyncConnection, host: HostRow, reports: Sequence[Report], gone: Sequence[str], all_there_are: bool
    ) -> Taken:
        if not reports and not gone and not all_there_are:
            return Taken()
        known = {row.id: row for row in await self._compared(connection, host, reports, gone, all_there_are)}
        new = {f"{host.name}/{report.name}" for report in reports} - set(known)
        count = len(known) if all_there_are or not new else await inventory.count_on(connection, host.id)
        of_module = {row.module_id: row.id for row in known.values() if row.module_id}
        refused: list[NotTaken] = []
        changed = 0
        for report in reports:
            try:
                checked = self._checked(host, report, known, of_module, count >= limits.MAX_GUESTS)
            except BadReport as error:
                refused.append(NotTaken(report.name[: limits.MAX_NAME], error.reason, str(error)))
                continue
            before = known.get(checked.id)
            known[checked.id] = await self._settle(connection, checked, before, report)
            if before is not None and of_module.get(before.module_id) == before.id:
                del of_module[before.module_id]
            of_module[checked.module_id] = checked.id
            count += before is None
            changed += known[checked.id] is not before
        for id in self._gone(host, known, reports, gone, all_there_are):
            await membership.resource_gone(connection, self._history, known[id], self._clock())
        for one in refused:
            detail = {"name": one.name, "reason": one.reason, "why": one.detail}
            await self._history.add(connection, Happened(Kind.RESOURCE_REFUSED, host_id=host.id, detail=detail))
        return Taken(refused, changed)

    async def _compared(
        self, connection: AsyncConnection, host: HostRow, reports: Sequence[Report], gone: Sequence[str], all_there_are: bool
    ) -> list[ResourceRow]:
        """Returns what there is of what is told: all of the host's where it tells all."""
        if all_there_are:
            return await inventory.resources_on(connection, host.id)
        ids = [f"{host.name}/{name}" for name in (*gone, *(report.name for report in reports)) if _NAME.fullmatch(name)]
        modules = [
            report.module for report in reports if 1 <= len(report.module) <= limits.MAX_NAME and report.module.isprintable()
        ]
        return await inventory.resources_told(connection, host.id, ids, modules)

    def _gone(
        self, host: HostRow, known: Mapping[str, ResourceRow], reports: Sequence[Report], gone: Sequence[str], all_there_are: bool
    ) -> list[str]:
        told = {f"{host.name}/{report.name}" for report in reports}
        if all_there_are:
            return sorted(set(known) - told)
        return sorted({f"{host.name}/{name}" for name in gone} & set(known) - told)

    # ---- one guest -----------------------------------------------------------------------------------------------

    def _checked(
        self, host: HostRow, report: Report, known: Mapping[str, ResourceRow], of_module: Mapping[str, str], is_full: bool
    ) -> ResourceRow:
        """Returns the row as it is from now on.  `of_module`: whose each module is; `is_full`: the host has no room for another
        guest.  Raises BadReport."""
        if not _NAME.fullmatch(report.name):
            raise BadReport("NAME", f"a guest's name has 1-{limits.MAX_NAME} of a-z 0-9 . _ -")
        if report.kind not in _KINDS:
            raise BadReport("KIND", f"a kind is one of {', '.join(sorted(_KINDS))}")
        if not 1 <= len(report.owner) <= limits.MAX_OWNER or not report.owner.isprintable():
            raise BadReport("OWNER", f"an owner's name has 1 to {limits.MAX_OWNER} printable characters")
        if (allowed := lines_of(host.owners)) and report.owner not in allowed:
            raise BadReport("OWNER", f"this host is not for guests of {report.owner}")
        if is_full and f"{host.name}/{report.name}" not in known:
            raise BadReport("LIMIT", f"a host has at most {limits.MAX_GUESTS} guests")
        _check_attributes(report.attributes)
        _check_told(report)
        id = f"{host.name}/{report.name}"
        before = known.get(id)
        identity = self._identity(host, report, before)
        module_id = identity.module_id.hex() if identity else ""
        if module_id and (other := of_module.get(module_id, id)) != id:
            raise BadReport("MODULE", f"module {report.module} is that of {other}")
        if report.silent and before is not None and before.module == report.module:
            return self._row(host, report, before, _module_of(before))
        obeys = int(bool(identity and identity.root == self._root))
        sequence = max(report.sequence, before.sequence if before and before.module_id == module_id else 0)
        recipient, signed = (identity.recipient, report.signed_identity) if identity else (b"", b"")
        return self._row(host, report, before, _Module(module_id, recipient, signed, obeys, sequence))

    def _row(self, host: HostRow, report: Report, before: ResourceRow | None, module: _Module) -> ResourceRow:
        now = int(self._clock())
        return ResourceRow(
            id=f"{host.name}/{report.name}",
            host_id=host.id,
            name=report.name,
            kind=report.kind,
            owner=report.owner,
            attributes=json.dumps(dict(report.attributes), sort_keys=True),
            present=1,
            first_seen_at=before.first_seen_at if before else now,
            changed_at=now,
            module=report.module if module.module_id else "",
            **vars(module),
        )

    def _identity(self, host: HostRow, report: Report, before: ResourceRow | None) -> ModuleIdentity | None:
        if not report.module or report.silent:
            return None
        try:
            identity = verify_identity(report.signed_identity, host.host_key)
        except Refusal as error:
            raise BadReport("IDENTITY", error.detail) from None
        if identity.name != report.module:
            raise BadReport("IDENTITY", f"the identity is that of module {identity.name}, not of {report.module}")
        if wrong := modules.wrong_identity(identity, before.recipient if before else b""):
            raise BadReport("IDENTITY", wrong)
        return identity

    async def _settle(
        self, connection: AsyncConnection, row: ResourceRow, before: ResourceRow | None, report: Report
    ) -> ResourceRow:
        if before is not None and replace(row, changed_at=before.changed_at) == before:
            await self._reconcile(connection, before, report)
            return before
        await inventory.put_resource(connection, row, before)
        kind = Kind.RESOURCE_APPEARED if before is None else Kind.RESOURCE_CHANGED
        what = _changes(before, row)
        if what:
            happened = Happened(kind, owner=row.owner, resource_id=row.id, host_id=row.host_id, detail={"what": what})
            await self._history.add(connection, happened)
        await self._reconcile(connection, row, report)
        if what:
            await membership.resource_changed(connection, row, self._clock())
        return row

    async def _reconcile(self, connection: AsyncConnection, row: ResourceRow, report: Report) -> None:
        """What the module says it holds counts, whatever was acknowledged before: it may have been set back, or made anew."""
        if report.silent:
            return
        deliveries = await lines.deliveries_on(connection, row.id)
        if not deliveries:
            return
        materials = {line.id: line for line in await lines.lines_on(connection, row.id)}
        now = self._clock()
        for delivery in deliveries:
            line = materials.get(delivery.line_id)
            if line is None or delivery.has_nothing:
                continue
            there = report.materials.get(line.material, {})
            told = {number: one for number, one in there.items() if modules.believed(number, line.newest)}
            if (changed := corrected(delivery, told, int(now))) != delivery:
                await lines.put_delivery(connection, changed)
                await lines.wake(connection, [line.id], now)
            made = max((one.operations for one in told.values() if one.state == "current"), default=0)
            if made and delivery.active:
                await _note_signatures(connection, line, delivery.active, made, now)


async def _note_signatures(connection: AsyncConnection, line: LineRow, number: int, made: int, now: float) -> None:
    """The busiest module counts."""
    found = {row.number: row for row in await lines.generations_of(connection, [line.id])}
    generation = found.get(number)
    if generation is None or generation.signatures >= made:
        return
    await lines.change_generation(connection, line.id, number, signatures=made)
    request = await wanted.request(connection, line.request_id)
    if request is not None and Spec.of_text(request.spec).renewal.signatures:  # nobody else is concerned
        await lines.wake(connection, [line.id], now)


def corrected(delivery: DeliveryRow, told: Mapping[int, Told], now: int) -> DeliveryRow:
    """Returns the delivery as the module's own word has it."""
    there = {number: one.state for number, one in told.items() if one.state != "destroyed"}
    current = next((number for number, state in there.items() if state == "current"), 0)
    held = held_text(there)
    if held == delivery.held and current == delivery.active:
        return delivery
    state = delivery.state
    if state == "active" and current != delivery.active:
        state = "pending"
    staged = delivery.staged if delivery.staged in there else max((n for n, s in there.items() if s == "current"), default=0)
    return replace(delivery, held=held, active=current, staged=staged, state=state, changed_at=now)


def _check_attributes(attributes: Mapping[str, str]) -> None:
    if len(attributes) > limits.MAX_ATTRIBUTES:
        raise BadReport("ATTRIBUTES", f"a resource has at most {limits.MAX_ATTRIBUTES} attributes")
    for key, value in attributes.items():
        if not _KEY.fullmatch(key):
            raise BadReport("ATTRIBUTES", f"an attribute's name has 1 to {limits.MAX_KEY} of A-Z a-z 0-9 . _ -")
        if len(value) > limits.MAX_VALUE or not value.isprintable():
            raise BadReport("ATTRIBUTES", f"{key}: a value has at most {limits.MAX_VALUE} printable characters")


def _check_told(report: Report) -> None:
    """A worker says what it likes, and its host passes it on."""
    if wrong := modules.wrong_sequence(report.sequence):
        raise BadReport("SEQUENCE", wrong)
    for told in report.materials.values():
        if wrong := modules.wrong_generations((number, one.state) for number, one in told.items()):
            raise BadReport("GENERATIONS", wrong)
        if any(one.operations > limits.MAX_OPERATIONS for one in told.values()):
            raise BadReport("OPERATIONS", f"a key makes at most {limits.MAX_OPERATIONS} operations")


def _changes(before: ResourceRow | None, row: ResourceRow) -> str:
    if before is None:
        return "it is new"
    found = [
        name
        for name in ("kind", "owner", "attributes", "module", "module_id", "identity", "obeys", "present")
        if getattr(before, name) != getattr(row, name)
    ]
    return ", ".join(found)
