"""Hosts, resources and what they hold, policies."""

from __future__ import annotations

import re

from hsmvisor.manager import limits as manager_limits
from hsmvisor.manager.access.owners import may_see
from hsmvisor.manager.console import limits
from hsmvisor.manager.console.visit import Visit, cut
from hsmvisor.manager.inventory import listing
from hsmvisor.manager.store import inventory, policies
from hsmvisor.manager.store.rows import HostRow, ResourceRow, lines_of
from hsmvisor.serving.errors import NotFound
from hsmvisor.serving.text import clean
from starlette.responses import Response

_PAIR = re.compile(r"\s*([A-Za-z0-9._-]{1,64})\s*=\s*(.{0,256}?)\s*")


async def hosts(visit: Visit) -> Response:
    after = visit.asked("after", 64)
    async with visit.parts.database.reading() as connection:
        rows, more = cut(await inventory.hosts_after(connection, after, limits.PAGE + 1))
        shown = await listing.hosts_shown(connection, rows)
    now = visit.parts.clock()
    return visit.page("hosts.html", hosts=[(one, _host_state(one.row, now)) for one in shown], more=rows[-1].name if more else "")


async def host(visit: Visit) -> Response:
    name = visit.request.path_params["name"]
    after = visit.asked("after", 130)
    async with visit.parts.database.reading() as connection:
        row = await inventory.host_named(connection, name)
        if row is None:
            raise NotFound("HOST", f"there is no host {clean(name, 64)}")
        (shown,) = await listing.hosts_shown(connection, [row])
        found, more = cut(await inventory.resources_after(connection, after, limits.PAGE + 1, {}, row.id))
        resources = await listing.resources_shown(connection, found, visit.parts.clock())
    return visit.page(
        "host.html",
        shown=shown,
        state=_host_state(row, visit.parts.clock()),
        owners=lines_of(row.owners),
        resources=resources,
        more=found[-1].id if more else "",
    )


def _host_state(row: HostRow, now: float) -> str:
    if row.state != "joined":
        return row.state
    return "away" if row.is_silent(now) else "there"


async def resources(visit: Visit) -> Response:
    """`with`: attributes as KEY=VALUE, separated by commas."""
    after, wanted = visit.asked("after", 130), visit.asked("with", 600)
    pairs = [_PAIR.fullmatch(part) for part in wanted.split(",") if part.strip()][: manager_limits.MAX_SELECTOR]
    selector = {match[1]: match[2] for match in pairs if match is not None}
    async with visit.parts.database.reading() as connection:
        found = await inventory.resources_after(connection, after, limits.PAGE + 1, selector, owner=visit.owner)
        rows, more = cut(found)
        shown = await listing.resources_shown(connection, rows, visit.parts.clock())
    wrong = any(match is None for match in pairs)
    return visit.page("resources.html", resources=shown, wanted=wanted, wrong=wrong, more=rows[-1].id if more else "")


async def resource(visit: Visit) -> Response:
    params = visit.request.path_params
    id = f"{params['host']}/{params['name']}"
    async with visit.parts.database.reading() as connection:
        row: ResourceRow | None = await inventory.resource(connection, id)
        if row is None or not may_see(visit.who, row.owner):
            raise NotFound("RESOURCE", f"there is no resource {clean(id, 130)}")
        (shown,) = await listing.resources_shown(connection, [row], visit.parts.clock())
    events, _ = await visit.parts.history.page(size=limits.SHOWN_EVENTS, resource_id=id, owner=visit.owner)
    return visit.page("resource.html", shown=shown, events=events)


async def policy_versions(visit: Visit) -> Response:
    text = visit.asked("before", 9)
    before = int(text) if text.isascii() and text.isdigit() else 0
    async with visit.parts.database.reading() as connection:
        rows, more = cut(await policies.before(connection, before, limits.PAGE + 1))
        current = await policies.version(connection, visit.parts.policy_version())
    return visit.page("policies.html", rows=rows, current=current, more=rows[-1].version if more else "")


async def policy(visit: Visit) -> Response:
    number = min(visit.request.path_params["version"], 2**31 - 1)
    async with visit.parts.database.reading() as connection:
        row = await policies.version(connection, number)
    if row is None:
        raise NotFound("POLICY_VERSION", f"there are no policies of version {number}")
    return visit.page("policy.html", row=row, counts=number == visit.parts.policy_version())
