"""Asking once more, and carrying it out."""

from __future__ import annotations

import uuid

from hsmvisor.manager import limits as manager_limits
from hsmvisor.manager.access.owners import demand_owner
from hsmvisor.manager.console.actions import ACTIONS, REASONS, Action, offered, revocable, work
from hsmvisor.manager.console.guard import demand_own_page, demand_token, read_form
from hsmvisor.manager.console.rendering import path
from hsmvisor.manager.console.statuses import status_of
from hsmvisor.manager.console.visit import Visit, method
from hsmvisor.serving.errors import Forbidden, Invalid, NotFound, ServiceError, WrongState
from hsmvisor.serving.requests import Origin, request
from hsmvisor.serving.text import clean
from starlette.responses import RedirectResponse, Response

REQUEST_ID = "request"  #: the form's field: the same form sent twice is carried out once


def _action(visit: Visit) -> Action:
    """Raises NotFound, Forbidden."""
    action = ACTIONS.get(visit.request.path_params["action"])
    if action is None:
        raise NotFound("PAGE", "there is no such page")
    visit.demand(method(action.method))
    return action


async def asked(visit: Visit) -> Response:
    return await _asked(visit, _action(visit))


async def _asked(visit: Visit, action: Action, error: ServiceError | None = None) -> Response:
    shown = await visit.parts.desk.shown(visit.who, visit.request.path_params["id"])
    demand_owner(visit.who, shown.row.owner)
    return visit.page(
        "confirm.html",
        status_of(error),
        action=action,
        row=shown.row,
        resources=[line.resource_id for line in shown.lines if line.resource_id],
        chosen=visit.asked("resource", 130),
        generations=revocable(shown),
        reasons=REASONS,
        request_id=uuid.uuid4().hex,
        sensible=action in offered(shown),
        error=error,
        most=manager_limits.MAX_WHY,
    )


async def confirmed(visit: Visit) -> Response:
    """Raises Forbidden, Invalid, NotFound."""
    form = await read_form(visit.request)
    try:
        demand_own_page(visit.request)
        demand_token(visit.session, form)
        action = _action(visit)
    except Forbidden as error:
        known = ACTIONS.get(visit.request.path_params["action"])
        visit.refusals.note(visit.who.name, method(known.method if known else "?"), error)
        raise
    id, parts = visit.request.path_params["id"], visit.parts
    why = clean(form.get("why", ""), manager_limits.MAX_WHY)
    if action.severe and not form.get("sure"):
        return await _asked(visit, action, Invalid("SURE", "tick that you are sure", ""))
    content = [form.get(name, "") for name in ("resource", "why", "reason", "generation", "keep", "revoke")]
    call = request(form.get(REQUEST_ID, ""), f"console.{action.name}", *_bytes(visit.who.scope, id, *content))
    try:
        carried_out, fields = work(action, parts.asking, form, why, visit.who, parts.clock())
        told = {"request": clean(id), "via": "console", **fields}
        kind = f"request.{action.method.lower()}"
        await parts.desk.change(visit.who, Origin(visit.who.name, why), call, id, kind, told, carried_out)
    except (Invalid, WrongState) as error:
        return await _asked(visit, action, error)
    visit.session.said = action.done
    return RedirectResponse(path("materials", id), 303)


def _bytes(*texts: str) -> list[bytes]:
    return [text.encode() for text in texts]
