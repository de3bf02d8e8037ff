"""Hosts and resources with what belongs to them, to be shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hsmvisor.manager.store import commands, inventory, lines
from hsmvisor.manager.store.rows import DeliveryRow, HostRow, LineRow, ResourceRow
from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True)
class HostShown:
    row: HostRow
    resources: int
    pending: int  #: commands that it has not carried out


@dataclass(frozen=True)
class ResourceShown:
    row: ResourceRow
    holdings: Sequence[tuple[DeliveryRow, LineRow]]
    away: bool  #: its host is not heard of


async def hosts_shown(connection: AsyncConnection, rows: Sequence[HostRow]) -> list[HostShown]:
    if not rows:
        return []
    ids = [row.id for row in rows]
    there: Mapping[str, int] = await inventory.count_on_hosts(connection, ids)
    queued: Mapping[str, int] = await commands.count_on_hosts(connection, ids)
    return [HostShown(row, there.get(row.id, 0), queued.get(row.id, 0)) for row in rows]


async def resources_shown(connection: AsyncConnection, rows: Sequence[ResourceRow], now: float) -> list[ResourceShown]:
    if not rows:
        return []
    hosts = await inventory.hosts_of(connection, [row.host_id for row in rows])
    held: dict[str, list[tuple[DeliveryRow, LineRow]]] = {}
    for delivery, line in await lines.holdings_on(connection, [row.id for row in rows]):
        held.setdefault(delivery.resource_id, []).append((delivery, line))
    return [ResourceShown(row, held.get(row.id, []), _is_away(hosts.get(row.host_id), now)) for row in rows]


def _is_away(host: HostRow | None, now: float) -> bool:
    return host is None or not host.is_there(now)
