"""Hosts and resources in the database."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hsmvisor.manager.store.rows import HostRow, ResourceRow
from hsmvisor.manager.store.tables import hosts, resource_attributes, resources
from sqlalchemy import delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

_MANY = 500  #: values in one statement


def parts(items: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """Cut so that each fits a statement."""
    return (items[n : n + _MANY] for n in range(0, len(items), _MANY))


async def host(connection: AsyncConnection, id: str) -> HostRow | None:
    row = (await connection.execute(select(hosts).where(hosts.c.id == id))).one_or_none()
    return HostRow.of(row) if row is not None else None


async def host_named(connection: AsyncConnection, name: str) -> HostRow | None:
    row = (await connection.execute(select(hosts).where(hosts.c.name == name))).one_or_none()
    return HostRow.of(row) if row is not None else None


async def hosts_after(connection: AsyncConnection, name: str, count: int) -> list[HostRow]:
    query = select(hosts).where(hosts.c.name > name).order_by(hosts.c.name).limit(count)
    return HostRow.all((await connection.execute(query)).all())


async def hosts_of(connection: AsyncConnection, ids: Iterable[str]) -> dict[str, HostRow]:
    found: dict[str, HostRow] = {}
    for some in parts(sorted(set(ids))):
        rows = (await connection.execute(select(hosts).where(hosts.c.id.in_(some)))).all()
        found |= {row.id: row for row in HostRow.all(rows)}
    return found


async def put_host(connection: AsyncConnection, row: HostRow) -> None:
    """Writes a new host, or all of one that there is."""
    values = vars(row)
    changed = await connection.execute(update(hosts).where(hosts.c.id == row.id).values(values))
    if not changed.rowcount:
        await connection.execute(insert(hosts).values(values))


async def change_host(connection: AsyncConnection, id: str, **values: Any) -> None:
    await connection.execute(update(hosts).where(hosts.c.id == id).values(values))


async def note_exchange(connection: AsyncConnection, id: str, session: str, number: int, **values: Any) -> bool:
    """Returns False where the host is not joined, or a later exchange of the same session was noted."""
    later = or_(hosts.c.session != session, hosts.c.number < number)
    query = update(hosts).where(hosts.c.id == id, hosts.c.state == "joined", later)
    return bool((await connection.execute(query.values(session=session, number=number, **values))).rowcount)


async def forget_certificate_before(connection: AsyncConnection, id: str, certificate: bytes) -> None:
    """`certificate`: the one that the host has to have; where it got another one meanwhile nothing changes."""
    await connection.execute(
        update(hosts).where(hosts.c.id == id, hosts.c.certificate == certificate).values(certificate_before=b"")
    )


async def fallen_silent(connection: AsyncConnection, seen_before: float) -> list[tuple[str, str, int]]:
    """Returns id, name and when it was heard of last, of each host that was not since and of which that was not told yet."""
    where = (hosts.c.away == 0, hosts.c.state == "joined", hosts.c.seen_at > 0, hosts.c.seen_at < seen_before)
    told = update(hosts).where(*where).values(away=1).returning(hosts.c.id, hosts.c.name, hosts.c.seen_at)
    return [(row.id, row.name, int(row.seen_at)) for row in (await connection.execute(told)).all()]


async def remove_host(connection: AsyncConnection, id: str) -> None:
    """Its resources are removed before."""
    await connection.execute(delete(hosts).where(hosts.c.id == id))


# ---- resources ------------------------------------------------------------------------------------------------------------


async def resource(connection: AsyncConnection, id: str) -> ResourceRow | None:
    row = (await connection.execute(select(resources).where(resources.c.id == id))).one_or_none()
    return ResourceRow.of(row) if row is not None else None


async def resources_of(connection: AsyncConnection, ids: Iterable[str]) -> dict[str, ResourceRow]:
    found: dict[str, ResourceRow] = {}
    for some in parts(sorted(set(ids))):
        rows = (await connection.execute(select(resources).where(resources.c.id.in_(some)))).all()
        found |= {row.id: row for row in ResourceRow.all(rows)}
    return found


async def resources_on(connection: AsyncConnection, host_id: str) -> list[ResourceRow]:
    rows = (await connection.execute(select(resources).where(resources.c.host_id == host_id))).all()
    return ResourceRow.all(rows)


async def resources_told(
    connection: AsyncConnection, host_id: str, ids: Iterable[str], modules: Iterable[str]
) -> list[ResourceRow]:
    """Returns those of a host's resources that a report of these is compared with; it may have thousands of others."""
    found: dict[str, ResourceRow] = {}
    for column, values in ((resources.c.id, ids), (resources.c.module, modules)):
        for some in parts(sorted(set(values))):
            query = select(resources).where(resources.c.host_id == host_id, column.in_(some))
            found |= {row.id: row for row in ResourceRow.all((await connection.execute(query)).all())}
    return list(found.values())


async def count_on(connection: AsyncConnection, host_id: str) -> int:
    query = select(func.count()).select_from(resources).where(resources.c.host_id == host_id)
    return int((await connection.execute(query)).scalar_one())


async def resources_named(connection: AsyncConnection, name: str, owner: str = "") -> list[ResourceRow]:
    query = select(resources).where(resources.c.name == name, resources.c.present == 1)
    if owner:
        query = query.where(resources.c.owner == owner)
    return ResourceRow.all((await connection.execute(query.order_by(resources.c.id).limit(10))).all())


async def resources_with(connection: AsyncConnection, selector: Mapping[str, str]) -> list[ResourceRow]:
    """Returns the present resources that have all of these attributes; `kind`, `owner`, `host`, `name` are their own."""
    query = select(resources).where(resources.c.present == 1)
    for key, value in selector.items():
        query = query.where(_has(key, value))
    return ResourceRow.all((await connection.execute(query.order_by(resources.c.id))).all())


async def resources_after(
    connection: AsyncConnection, id: str, count: int, selector: Mapping[str, str], host_id: str = "", owner: str = ""
) -> list[ResourceRow]:
    query = select(resources).where(resources.c.id > id)
    for key, value in selector.items():
        query = query.where(_has(key, value))
    if host_id:
        query = query.where(resources.c.host_id == host_id)
    if owner:
        query = query.where(resources.c.owner == owner)
    rows = (await connection.execute(query.order_by(resources.c.id).limit(count))).all()
    return ResourceRow.all(rows)


def _has(key: str, value: str) -> Any:
    match key:
        case "kind" | "owner" | "name":
            return resources.c[key] == value
        case "host":
            return resources.c.host_id.in_(select(hosts.c.id).where(hosts.c.name == value))
    found = select(resource_attributes.c.resource_id).where(resource_attributes.c.key == key, resource_attributes.c.value == value)
    return resources.c.id.in_(found)


async def put_resource(connection: AsyncConnection, row: ResourceRow, before: ResourceRow | None) -> None:
    values = vars(row).copy()
    values.pop("tags", None)
    if before is None:
        await connection.execute(insert(resources).values(values))
    else:
        await connection.execute(update(resources).where(resources.c.id == row.id).values(values))
    if before is None or before.attributes != row.attributes:
        if before is not None:
            await connection.execute(delete(resource_attributes).where(resource_attributes.c.resource_id == row.id))
        found = [{"resource_id": row.id, "key": k, "value": v} for k, v in json.loads(row.attributes).items()]
        if found:
            await connection.execute(insert(resource_attributes), found)


async def remove_resource(connection: AsyncConnection, id: str) -> None:
    await connection.execute(delete(resource_attributes).where(resource_attributes.c.resource_id == id))
    await connection.execute(delete(resources).where(resources.c.id == id))


async def take_sequences(connection: AsyncConnection, id: str, count: int) -> int:
    """Returns the first of `count` sequence numbers that no command for this module had before."""
    change = update(resources).where(resources.c.id == id).values(sequence=resources.c.sequence + count)
    await connection.execute(change)
    last = (await connection.execute(select(resources.c.sequence).where(resources.c.id == id))).scalar_one()
    return int(last) - count + 1


async def raise_sequence(connection: AsyncConnection, id: str, seen: int) -> None:
    """The module carried out a command of this number: none below is given out."""
    where = (resources.c.id == id, resources.c.sequence < seen)
    await connection.execute(update(resources).where(*where).values(sequence=seen))


async def count_resources(connection: AsyncConnection, owner: str) -> int:
    """Those of this owner that are present."""
    query = select(func.count()).select_from(resources).where(resources.c.present == 1, resources.c.owner == owner)
    return int((await connection.execute(query)).scalar_one())


async def counts(connection: AsyncConnection, seen_before: float) -> dict[str, int]:
    one = (
        select(func.count()).select_from(hosts),
        select(func.count()).select_from(hosts).where(hosts.c.seen_at < seen_before, hosts.c.state == "joined"),
        select(func.count()).select_from(resources).where(resources.c.present == 1),
    )
    found = (await connection.execute(select(*(query.scalar_subquery() for query in one)))).one()
    return dict(zip(("hosts", "hosts_away", "resources"), map(int, found), strict=True))


async def count_on_hosts(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, int]:
    query = (
        select(resources.c.host_id, func.count())
        .where(resources.c.host_id.in_(ids), resources.c.present == 1)
        .group_by(resources.c.host_id)
    )
    return {id: int(count) for id, count in (await connection.execute(query)).all()}
