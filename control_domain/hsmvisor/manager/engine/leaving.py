"""Material that a resource is to have no longer is taken away: out of service first, then destroyed."""

from __future__ import annotations

from dataclasses import replace

from hsmvisor.manager.engine.parts import Parts
from hsmvisor.manager.engine.seen import Seen
from hsmvisor.manager.engine.signing import Said
from hsmvisor.manager.history.events import Happened, Kind
from hsmvisor.manager.store import lines
from hsmvisor.manager.store.rows import DeliveryRow, ResourceRow
from hsmvisor_rpc.sealed.commands import Action, Destroy, Retire


def takes_away(delivery: DeliveryRow) -> list[Said]:
    """Returns the commands after which nothing of it is there."""
    said: list[Said] = []
    for number, state in delivery.generations.items():
        if state == "current":
            said.append(Said(Action.RETIRE, number, Retire(1, "refuse")))
        said.append(Said(Action.DESTROY, number, Destroy(False)))
    return said


async def leave(parts: Parts, seen: Seen, now: float) -> bool:
    """Takes the next step for those that are not meant any more.  Returns whether something is still to be done."""
    if seen.request.state == "cancelled" and seen.request.kept:
        return False
    pending, told = False, set()
    async with parts.database.transaction() as connection:
        for id in sorted(set(seen.deliveries) - seen.members):
            delivery, resource = seen.deliveries[id], seen.resources.get(id)
            if seen.queued.get(id):
                pending = True
                continue
            said = takes_away(delivery)
            if resource is None or not resource.present or not said or not resource.module_id:
                await lines.remove_delivery(connection, seen.line.id, id)
                if not delivery.has_nothing:
                    await parts.history.add(connection, _happened(seen, id, resource))
                continue
            pending = True
            if resource.reachable and not seen.is_away(resource, now) and seen.rests_until(id) <= now:
                await parts.commands.queue(connection, resource, seen.line, said)
                told.add(resource.host_id)
            why = "" if resource.reachable else "its module obeys another root"
            await lines.put_delivery(connection, replace(delivery, state="leaving", why=why, changed_at=int(now)))
    parts.hub.commands(told)
    return pending


def _happened(seen: Seen, id: str, resource: ResourceRow | None) -> Happened:
    return Happened(
        Kind.TAKEN_AWAY,
        owner=seen.request.owner,
        request_id=seen.request.id,
        material=seen.line.material,
        resource_id=id,
        host_id=resource.host_id if resource else "",
        detail={"why": "the request was cancelled" if seen.request.state != "active" else "it is not meant any more"},
    )
