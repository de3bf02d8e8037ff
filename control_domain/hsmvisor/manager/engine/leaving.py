"""Material that a resource is to have no longer is taken away: out of service first, then destroyed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hsmvisor.manager.engine.obtaining import NO_WORD
from hsmvisor.manager.engine.parts import Parts
from hsmvisor.manager.engine.seen import Seen
from hsmvisor.manager.engine.signing import Said
from hsmvisor.manager.history.events import Happened, Kind
from hsmvisor.manager.store import lines
from hsmvisor.manager.store.lines import FAR
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


async def leave(parts: Parts, seen: Seen, now: float) -> float | None:
    """Takes the next step for those that are not meant any more.

    Returns when to look again: FAR where that waits for a host, which wakes the line when it is back.  None: nothing is left.
    """
    if seen.request.state == "cancelled" and seen.request.kept:
        return None
    steps = [_step(seen, id, now) for id in sorted(set(seen.deliveries) - seen.members)]
    if not steps:
        return None
    async with parts.database.transaction() as connection:
        for step in steps:
            if step.gone:
                await lines.remove_delivery(connection, seen.line.id, step.delivery.resource_id)
                if not step.delivery.has_nothing:
                    await parts.history.add(connection, _happened(seen, step.delivery.resource_id, step.resource))
            elif step.said and step.resource is not None:
                await parts.commands.queue(connection, step.resource, seen.line, step.said)
        await lines.mark(connection, [step.delivery for step in steps if not step.gone], seen.deliveries, now)
    parts.hub.commands({step.resource.host_id for step in steps if step.said and step.resource is not None})
    return min((step.again_at for step in steps if not step.gone), default=None)


@dataclass(frozen=True)
class _Step:
    delivery: DeliveryRow  #: as it is from now on
    resource: ResourceRow | None
    gone: bool = False  #: the module has nothing of it
    said: tuple[Said, ...] = ()
    again_at: float = FAR


def _step(seen: Seen, id: str, now: float) -> _Step:
    delivery, resource = seen.deliveries[id], seen.resources.get(id)
    if seen.queued.get(id):
        return _Step(delivery, resource, again_at=now + NO_WORD)
    said = takes_away(delivery)
    if resource is None or not said or not resource.module_id:
        return _Step(delivery, resource, gone=True)
    leaving = replace(delivery, state="leaving", why="" if resource.reachable else "its module obeys another root")
    if not resource.reachable or seen.is_away(resource, now):
        return _Step(leaving, resource)
    if (rests_until := seen.rests_until(id)) > now:
        return _Step(leaving, resource, again_at=rests_until)
    return _Step(leaving, resource, said=tuple(said), again_at=now + NO_WORD)


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
