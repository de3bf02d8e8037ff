"""Which lines there are: made when a resource is meant by a request, gone with the resource; woken when either changes.

All of it happens in the transaction of the change itself, so a resource that appears is served without anybody searching for it.
"""

from __future__ import annotations

import uuid

from hsmvisor.manager.history.events import Happened, History, Kind
from hsmvisor.manager.store import commands, inventory, lines, measurements, wanted
from hsmvisor.manager.store.rows import HostRow, RequestRow, ResourceRow
from hsmvisor.manager.wanted.spec import Spec, own_of
from sqlalchemy.ext.asyncio import AsyncConnection


async def members(connection: AsyncConnection, spec: Spec) -> list[ResourceRow]:
    """Returns the present resources that a specification means."""
    named = await inventory.resources_of(connection, spec.resources)
    found = {id: row for id, row in named.items() if row.present}
    if spec.selector:
        found |= {row.id: row for row in await inventory.resources_with(connection, spec.selector)}
    return [found[id] for id in sorted(found)]


async def request_changed(connection: AsyncConnection, request: RequestRow, spec: Spec, now: float, again: bool) -> None:
    """Makes the lines of a request that lack, and wakes all.  `again`: it says something else than before."""
    known = await lines.lines_of_request(connection, request.id)
    if request.state == "active":
        wanted_for = [""] if spec.shared else [row.id for row in await members(connection, spec)]
        there = {line.resource_id for line in known}
        new = [lines.new_line(uuid.uuid4().hex, request.id, id, spec.material, now) for id in wanted_for if id not in there]
        await lines.add_lines(connection, new)
    values = {"changed_at": now} if again else {}
    await lines.wake(connection, [line.id for line in known], now, **values)


async def resource_changed(connection: AsyncConnection, resource: ResourceRow, now: float) -> int:
    """A resource came, or is another one than before.  Returns how many lines are looked at because of it."""
    known = await lines.lines_on(connection, resource.id)
    woken = {line.id for line in known}
    if resource.present:
        asked = await wanted.meaning(connection, resource.id, own_of(resource))
        lines_there = await lines.lines_of_requests(connection, [request.id for request in asked], resource.id)
        there = {(line.request_id, line.resource_id): line.id for line in lines_there}
        new = []
        for request in asked:
            of = "" if Spec.of_text(request.spec).shared else resource.id
            if (id := there.get((request.id, of))) is not None:
                woken.add(id)
            else:
                new.append(lines.new_line(uuid.uuid4().hex, request.id, of, request.material, now))
        await lines.add_lines(connection, new)
        await lines.wake(connection, sorted(woken), now)
        return len(woken) + len(new)
    await lines.wake(connection, sorted(woken), now)
    return len(woken)


async def resource_gone(connection: AsyncConnection, history: History, resource: ResourceRow, now: float) -> None:
    """The resource is no more, and its module with it: what it held is nowhere."""
    for line in await lines.lines_on(connection, resource.id):
        if line.resource_id == resource.id:
            await lines.remove_line(connection, line.id)
        else:
            await lines.remove_delivery(connection, line.id, resource.id)
            await lines.wake(connection, [line.id], now)
        request = await wanted.request(connection, line.request_id)
        happened = Happened(
            Kind.TAKEN_AWAY,
            owner=request.owner if request else "",
            request_id=line.request_id,
            material=line.material,
            resource_id=resource.id,
            host_id=resource.host_id,
            detail={"why": "the resource is gone"},
        )
        await history.add(connection, happened)
    await commands.remove_of_resource(connection, resource.id)
    await measurements.remove_of_resource(connection, resource.id)
    await wanted.forget_denials_on(connection, [resource.id])
    await inventory.remove_resource(connection, resource.id)
    gone = Happened(Kind.RESOURCE_GONE, owner=resource.owner, resource_id=resource.id, host_id=resource.host_id)
    await history.add(connection, gone)


async def forget_host(connection: AsyncConnection, history: History, host: HostRow, now: float) -> int:
    """Forgets a host with its resources; returns how many these were."""
    on_it = await inventory.resources_on(connection, host.id)
    for resource in on_it:
        await resource_gone(connection, history, resource, now)
    await inventory.remove_host(connection, host.id)
    await history.add(connection, Happened(Kind.HOST_REMOVED, host_id=host.id, detail={"name": host.name}))
    return len(on_it)
