"""All that is known about one line, gathered in one transaction."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from hsmvisor.manager.inventory.pins import Pins
from hsmvisor.manager.policy.questions import Decision, permits
from hsmvisor.manager.store import commands, inventory, lines, wanted
from hsmvisor.manager.store.rows import CommandRow, DeliveryRow, GenerationRow, HostRow, LineRow, RequestRow, ResourceRow
from hsmvisor.manager.wanted import membership
from hsmvisor.manager.wanted.spec import Spec
from sqlalchemy.ext.asyncio import AsyncConnection

REST, LONGEST_REST = 5.0, 900.0  #: seconds after a module refused, doubling
WORKING = ("keying", "ordered", "issued")


def pause(failures: int) -> float:
    """Seconds before a module is asked again that refused so often in a row, or whose guest's boot was so often another one."""
    return min(REST * 2.0 ** min(failures - 1, 20), LONGEST_REST)


@dataclass
class Seen:
    line: LineRow
    request: RequestRow
    spec: Spec
    generations: dict[int, GenerationRow]
    deliveries: dict[str, DeliveryRow]
    resources: dict[str, ResourceRow]  #: those that are meant, and those that hold something
    hosts: dict[str, HostRow]
    members: frozenset[str]  #: ids of those that are meant now
    queued: dict[str, list[CommandRow]]  #: by resource: what is under way
    denied: dict[tuple[str, str], str] = field(default_factory=dict)  #: (resource, action): why
    taken: frozenset[str] = frozenset()  #: members where another line has a material of this name
    permits: dict[str, Decision] = field(default_factory=dict)  #: by resource: what policy says at this look
    forged: frozenset[str] = frozenset()  #: members whose identity is not what their host has signed
    measured: dict[str, tuple[str, ...]] = field(default_factory=dict)  #: by resource: as what its boot was, if that matters

    def now_has(self, generation: GenerationRow) -> None:
        """What was just stored, so that it need not be gathered again."""
        self.generations[generation.number] = generation
        self.line = replace(self.line, newest=max(self.line.newest, generation.number))

    @property
    def serving(self) -> GenerationRow | None:
        return self.generations.get(self.line.serving)

    @property
    def working(self) -> GenerationRow | None:
        """The generation that is being made."""
        newest = self.generations.get(self.line.newest)
        return newest if newest is not None and newest.state in WORKING else None

    def delivery(self, resource_id: str) -> DeliveryRow:
        found = self.deliveries.get(resource_id)
        return found or DeliveryRow(self.line.id, resource_id, 0, 0, "", "pending", "", 0)

    def permitted(self, resource_id: str) -> str:
        """What is kept with a delivery of what policy says."""
        found = self.permits.get(resource_id)
        if found is None:
            return self.delivery(resource_id).permitted
        measured = self.measured.get(resource_id)
        return json.dumps(permits([found]) | ({"measured": ", ".join(measured)} if measured else {}))

    def rests_until(self, resource_id: str) -> float:
        """A module that refuses is asked less and less often, for itself: others that share the key do not wait for it."""
        found, line = self.delivery(resource_id), self.line
        if not found.failures or max(line.changed_at, line.triggered_at) > found.failed_at:
            return 0.0
        return found.failed_at + pause(found.failures)

    def is_away(self, resource: ResourceRow, now: float) -> bool:
        host = self.hosts.get(resource.host_id)
        return host is None or not host.is_there(now)

    def key_is_held(self, resource_id: str, key_of: int) -> bool:
        """Whether the module has the key of generation `key_of`, in that generation or one that shares it."""
        held = self.delivery(resource_id).generations
        return any((g := self.generations.get(n)) is not None and g.key_of == key_of for n in held)

    @property
    def newest_anywhere(self) -> int:
        """The highest generation number that anybody has heard of."""
        held = [n for delivery in self.deliveries.values() for n in delivery.generations]
        return max([self.line.newest, *held, *(d.staged for d in self.deliveries.values())])


async def gather(connection: AsyncConnection, line: LineRow, pins: Pins, now: float) -> Seen | None:
    """Returns None where the line is no more."""
    now_there = await lines.line(connection, line.id)
    if now_there is None:
        return None
    request = await wanted.request(connection, line.request_id)
    if request is None:
        return None
    spec = Spec.of_text(request.spec)
    there = {row.resource_id: row for row in await lines.deliveries_of(connection, [line.id])}
    found: dict[str, ResourceRow] = {}
    if line.resource_id:
        found = await inventory.resources_of(connection, [line.resource_id])
        members = {id for id, row in found.items() if row.present and spec.matches(row)}
    else:
        found = {row.id: row for row in await membership.members(connection, spec)}
        members = set(found)
        found |= await inventory.resources_of(connection, set(there) - members)
    if request.state != "active" or spec.shared == bool(line.resource_id):  # it was asked for in the other way before
        members = set()
    queued: dict[str, list[CommandRow]] = {}
    for command in await commands.of_line(connection, line.id):
        if command.expires_at > now:
            queued.setdefault(command.resource_id, []).append(command)
    hosts = await inventory.hosts_of(connection, [row.host_id for row in found.values()])
    reachable = (found[id] for id in members if found[id].reachable)
    return Seen(
        line=now_there,
        request=request,
        spec=spec,
        generations={row.number: row for row in await lines.generations_of(connection, [line.id])},
        deliveries=there,
        resources=found,
        hosts=hosts,
        members=frozenset(members),
        queued=queued,
        denied=_denials(await wanted.denied(connection, request.id, line.resource_id)),
        taken=await _taken(connection, now_there, members, there),
        forged=frozenset(row.id for row in reachable if not pins.vouch(row, hosts.get(row.host_id))),
    )


async def _taken(connection: AsyncConnection, line: LineRow, members: set[str], there: dict[str, DeliveryRow]) -> frozenset[str]:
    """A module knows a material by its name alone, and two that share it would destroy each other's keys: the first one has it."""
    others = await lines.holders(connection, line.id, line.material, sorted(members))
    mine = {id for id, row in there.items() if not row.has_nothing}
    return frozenset(id for id, other in others.items() if id not in mine or other < line.id)


def _denials(rows: list[Any]) -> dict[tuple[str, str], str]:
    return {(row.resource_id, row.action): row.why for row in rows}
