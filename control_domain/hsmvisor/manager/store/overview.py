"""What is to be looked at, over all requests or those of one owner: certificates by their end, what fails, waits, is denied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hsmvisor.manager.store.inventory import parts
from hsmvisor.manager.store.rows import UNMEASURED, DeliveryRow, GenerationRow, LineRow, RequestRow
from hsmvisor.manager.store.tables import deliveries, denials, generations, lines, requests
from sqlalchemy import Select, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection


async def serving(connection: AsyncConnection, owner: str, count: int) -> list[GenerationRow]:
    """Returns generations that serve with a certificate, those first that end first; `owner` empty: everybody's."""
    query = select(generations).where(generations.c.state == "serving", generations.c.not_after > 0)
    if owner:
        query = query.where(generations.c.line_id.in_(_lines_of(owner)))
    return GenerationRow.all((await connection.execute(query.order_by(generations.c.not_after).limit(count))).all())


async def failing(connection: AsyncConnection, owner: str, count: int) -> list[LineRow]:
    """Returns lines whose last attempts failed, the newest failure first; then those that wait for a guest to boot otherwise."""
    query = select(lines).where(or_(lines.c.failures > 0, lines.c.stage == UNMEASURED))
    if owner:
        query = query.where(lines.c.request_id.in_(_requests_of(owner)))
    return LineRow.all((await connection.execute(query.order_by(lines.c.failed_at.desc()).limit(count))).all())


async def pending(connection: AsyncConnection, owner: str, count: int) -> list[DeliveryRow]:
    """Returns deliveries that are not done, those first that wait longest."""
    query = select(deliveries).where(deliveries.c.state.in_(("pending", "staged", UNMEASURED, "leaving")))
    if owner:
        query = query.where(deliveries.c.line_id.in_(_lines_of(owner)))
    return DeliveryRow.all((await connection.execute(query.order_by(deliveries.c.changed_at).limit(count))).all())


async def denied(connection: AsyncConnection, owner: str, count: int) -> list[Any]:
    """Returns denials with their request's owner and material, the newest first."""
    query = select(denials, requests.c.owner, requests.c.material).join(requests, requests.c.id == denials.c.request_id)
    if owner:
        query = query.where(requests.c.owner == owner)
    order = (denials.c.at.desc(), denials.c.request_id, denials.c.resource_id, denials.c.action)
    return list((await connection.execute(query.order_by(*order).limit(count))).all())


async def requests_by_id(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, RequestRow]:
    found: dict[str, RequestRow] = {}
    for some in parts(sorted(set(ids))):
        rows = RequestRow.all((await connection.execute(select(requests).where(requests.c.id.in_(some)))).all())
        found |= {row.id: row for row in rows}
    return found


def _requests_of(owner: str) -> Select[Any]:
    return select(requests.c.id).where(requests.c.owner == owner)


def _lines_of(owner: str) -> Select[Any]:
    return select(lines.c.id).where(lines.c.request_id.in_(_requests_of(owner)))
