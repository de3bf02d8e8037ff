"""What attacks on a fleet do, and look at."""

from __future__ import annotations

from hsmvisor.manager.store.rows import RequestRow
from support.fleet import Fleet
from support.light_host import LightGuest
from support.scenarios import leaf


def common_name(guest: LightGuest) -> str:
    return leaf(guest).subject.rfc4514_string()


async def cancel(fleet: Fleet, request: RequestRow) -> None:
    async with fleet.database.transaction() as connection:
        await fleet.asking.cancel(connection, request, False, "", request.owner)
    fleet.hub.lines()
    await fleet.settle()


async def rotate(fleet: Fleet, request: RequestRow) -> None:
    fleet.clock.pass_(1)
    async with fleet.database.transaction() as connection:
        await fleet.asking.rotate(connection, request, "", False, False, "", "a test", "")
    fleet.hub.lines()
    await fleet.settle()
