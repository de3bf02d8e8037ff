"""Requests and denials in the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hsmvisor.manager.store.inventory import parts
from hsmvisor.manager.store.rows import RequestRow
from hsmvisor.manager.store.tables import denials, lines, request_resources, request_selectors, requests
from sqlalchemy import and_, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection


async def request(connection: AsyncConnection, id: str) -> RequestRow | None:
    row = (await connection.execute(select(requests).where(requests.c.id == id))).one_or_none()
    return RequestRow.of(row) if row is not None else None


async def request_of(connection: AsyncConnection, owner: str, material: str) -> RequestRow | None:
    where = (requests.c.owner == owner, requests.c.material == material)
    row = (await connection.execute(select(requests).where(*where))).one_or_none()
    return RequestRow.of(row) if row is not None else None


async def count_active(connection: AsyncConnection, owner: str) -> int:
    query = select(func.count()).select_from(requests).where(requests.c.owner == owner, requests.c.state == "active")
    return int((await connection.execute(query)).scalar_one())


async def requests_after(connection: AsyncConnection, id: str, count: int, owner: str = "", state: str = "") -> list[RequestRow]:
    query = select(requests).where(requests.c.id > id)
    if owner:
        query = query.where(requests.c.owner == owner)
    if state:
        query = query.where(requests.c.state == state)
    return RequestRow.all((await connection.execute(query.order_by(requests.c.id).limit(count))).all())


async def put_request(connection: AsyncConnection, row: RequestRow, resources: Sequence[str], selector: Mapping[str, str]) -> None:
    values = vars(row)
    changed = await connection.execute(update(requests).where(requests.c.id == row.id).values(values))
    if not changed.rowcount:
        await connection.execute(insert(requests).values(values))
    await connection.execute(delete(request_resources).where(request_resources.c.request_id == row.id))
    await connection.execute(delete(request_selectors).where(request_selectors.c.request_id == row.id))
    if resources:
        await connection.execute(insert(request_resources), [{"request_id": row.id, "resource_id": r} for r in resources])
    if selector:
        found = [{"request_id": row.id, "key": k, "value": v} for k, v in selector.items()]
        await connection.execute(insert(request_selectors), found)


async def change_request(connection: AsyncConnection, id: str, **values: Any) -> None:
    await connection.execute(update(requests).where(requests.c.id == id).values(values))


async def meaning(connection: AsyncConnection, resource_id: str, keys: Mapping[str, str]) -> list[RequestRow]:
    """Returns the active requests that mean this resource; `keys`: what selectors find it by."""
    named = select(request_resources.c.request_id).where(request_resources.c.resource_id == resource_id)
    pairs = or_(*(and_(request_selectors.c.key == k, request_selectors.c.value == v) for k, v in keys.items()))
    hits = (
        select(request_selectors.c.request_id, func.count().label("hits"))
        .where(pairs)
        .group_by(request_selectors.c.request_id)
        .subquery()
    )
    asked = (
        select(request_selectors.c.request_id, func.count().label("asked"))
        .where(request_selectors.c.request_id.in_(select(hits.c.request_id)))
        .group_by(request_selectors.c.request_id)
        .subquery()
    )
    selected = select(hits.c.request_id).join(asked, and_(asked.c.request_id == hits.c.request_id, asked.c.asked == hits.c.hits))
    query = select(requests).where(requests.c.state == "active", or_(requests.c.id.in_(named), requests.c.id.in_(selected)))
    return RequestRow.all((await connection.execute(query)).all())


async def prune(connection: AsyncConnection, before: float) -> None:
    """Forgets requests that were cancelled before then, and of which nothing is left."""
    left = select(lines.c.request_id).where(lines.c.request_id == requests.c.id).exists()
    where = (requests.c.state == "cancelled", requests.c.changed_at < int(before), ~left)
    await connection.execute(delete(requests).where(*where))


# ---- denials --------------------------------------------------------------------------------------------------------------


async def denied(connection: AsyncConnection, request_id: str, resource_id: str = "") -> list[Any]:
    """`resource_id`: on this one alone."""
    query = select(denials).where(denials.c.request_id == request_id).order_by(denials.c.resource_id, denials.c.action)
    if resource_id:
        query = query.where(denials.c.resource_id == resource_id)
    return list((await connection.execute(query)).all())


async def deny(
    connection: AsyncConnection, request_id: str, resource_id: str, action: str, why: str, version: int, at: int
) -> bool:
    """Returns False where the same is known already."""
    where = (denials.c.request_id == request_id, denials.c.resource_id == resource_id, denials.c.action == action)
    known = (await connection.execute(select(denials.c.why).where(*where))).scalar_one_or_none()
    if known == why:
        return False
    values = {"request_id": request_id, "resource_id": resource_id, "action": action, "why": why, "version": version, "at": at}
    if known is None:
        await connection.execute(insert(denials).values(values))
    else:
        await connection.execute(update(denials).where(*where).values(values))
    return True


async def permit(connection: AsyncConnection, request_id: str, resource_ids: Sequence[str], action: str) -> None:
    """What was denied is not any more."""
    where = (denials.c.request_id == request_id, denials.c.action == action, denials.c.resource_id.in_(resource_ids))
    await connection.execute(delete(denials).where(*where))


async def forget_denials(connection: AsyncConnection, request_id: str) -> None:
    await connection.execute(delete(denials).where(denials.c.request_id == request_id))


async def forget_denials_on(connection: AsyncConnection, resource_ids: Sequence[str], request_id: str = "") -> None:
    """`request_id`: of this one alone."""
    for some in parts(resource_ids):
        statement = delete(denials).where(denials.c.resource_id.in_(some))
        await connection.execute(statement.where(denials.c.request_id == request_id) if request_id else statement)


async def denied_requests(connection: AsyncConnection, request_ids: Sequence[str]) -> set[str]:
    query = select(denials.c.request_id).where(denials.c.request_id.in_(request_ids)).distinct()
    return set((await connection.execute(query)).scalars())
