"""The console as a web application: which page is where, who may open it, and how refusals look."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from hsmvisor.manager.access.callers import FleetCaller
from hsmvisor.manager.console import guard
from hsmvisor.manager.console.door import Door, shown_certificate
from hsmvisor.manager.console.guard import Guard, demand_own_page, demand_token, read_form
from hsmvisor.manager.console.pages import changing, events, inventory, materials, overview
from hsmvisor.manager.console.pages.events import Streams
from hsmvisor.manager.console.parts import Parts
from hsmvisor.manager.console.rendering import environment, query, told
from hsmvisor.manager.console.statuses import status_of
from hsmvisor.manager.console.visit import EVENTS, GET, HOSTS, LIST, POLICIES, RESOURCES, STREAM, Visit
from hsmvisor.serving.errors import Exhausted, Forbidden, Invalid, ServiceError, Unauthenticated
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

Handler = Callable[[Visit], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]

_TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}


class Application:
    def __init__(self, parts: Parts, door: Door, hosts: frozenset[str] = frozenset()) -> None:
        """`hosts`: as Guard has it."""
        self._parts, self._door = parts, door
        self._templates = environment()
        self._templates.globals |= {"told": told, "csrf_field": guard.CSRF}
        self._streams = Streams(door)
        handlers = {HTTPException: self._on_http, Exception: self._on_error}
        self.asgi: ASGIApp = Guard(Starlette(routes=self._routes(), exception_handlers=handlers), hosts)  # type: ignore[arg-type]

    def close(self) -> None:
        """Ends what is open."""
        self._streams.close()

    def _routes(self) -> list[Route]:
        page, change = self._page, self._change
        return [
            Route("/", page(LIST, overview.first)),
            Route("/timeline", page(LIST, overview.timeline)),
            Route("/materials", page(LIST, materials.listed)),
            Route("/materials/{id}", page(GET, materials.one)),
            Route("/materials/{id}/{action}", page(GET, changing.asked)),
            Route("/materials/{id}/{action}", change(changing.confirmed), methods=["POST"]),
            Route("/denials", page(LIST, materials.denials)),
            Route("/hosts", page(HOSTS, inventory.hosts)),
            Route("/hosts/{name}", page(HOSTS, inventory.host)),
            Route("/resources", page(RESOURCES, inventory.resources)),
            Route("/resources/{host}/{name}", page(RESOURCES, inventory.resource)),
            Route("/policies", page(POLICIES, inventory.policy_versions)),
            Route("/policies/{version:int}", page(POLICIES, inventory.policy)),
            Route("/events", page(EVENTS, events.listed)),
            Route("/events/stream", page(STREAM, self._streams.open)),
            Route("/you", page(LIST, self._you)),
            Route("/login", self._refusing(self._login_page)),
            Route("/login", self._refusing(self._log_in), methods=["POST"]),
            Route("/logout", self._refusing(self._log_out), methods=["POST"]),
            *(Route(f"/static/{name}", _file(name)) for name in ("console.css", "console.js", "icon.svg")),
        ]

    # ---- what is around a page --------------------------------------------------------------------------------------

    def _page(self, needs: str, handler: Handler) -> Endpoint:
        """`needs`: the control API's method of which the caller may learn the same."""

        async def endpoint(request: Request) -> Response:
            visit = await self._visit(request)
            try:
                visit.demand(needs)
            except ServiceError as error:
                visit.refusals.note(visit.who.name, needs, error)
                raise
            return await handler(visit)

        return self._refusing(endpoint)

    def _change(self, handler: Handler) -> Endpoint:
        """The handler demands that it comes from a page of this session, and says by which method it is allowed."""

        async def endpoint(request: Request) -> Response:
            return await handler(await self._visit(request))

        return self._refusing(endpoint)

    async def _visit(self, request: Request) -> Visit:
        session, who = await self._door.enter(request)
        return Visit(request, who, session, self._parts, self._templates, self._door.refusals)

    def _refusing(self, endpoint: Endpoint) -> Endpoint:
        async def safe(request: Request) -> Response:
            try:
                return await endpoint(request)
            except Unauthenticated as error:
                if request.method == "GET" and request.headers.get("sec-fetch-dest", "document") == "document":
                    return RedirectResponse("/login" + query(next=_local(request.url.path)), 303)
                return self._refusal(error)
            except ServiceError as error:
                return self._refusal(error)

        return safe

    def _refusal(self, error: ServiceError) -> Response:
        status = status_of(error)
        response = self._shown_error(status, error.detail, error.hint)
        if status == 429:
            response.headers["retry-after"] = "60"
        return response

    def _shown_error(self, status: int, detail: str, hint: str = "") -> Response:
        shown = {"status": status, "detail": detail, "hint": hint}
        return HTMLResponse(self._templates.get_template("error.html").render(shown), status)

    async def _on_http(self, request: Request, error: HTTPException) -> Response:
        detail = "there is no such page" if error.status_code == 404 else str(error.detail)
        return self._shown_error(error.status_code, detail)

    async def _on_error(self, request: Request, error: Exception) -> Response:
        return self._shown_error(500, "an error inside the manager", "see the manager's log")  # Starlette logs it

    # ---- coming and going -------------------------------------------------------------------------------------------

    async def _login_page(self, request: Request) -> Response:
        return self._login_form(request, request.query_params.get("next", ""))

    def _login_form(self, request: Request, untrusted_next: str, error: ServiceError | None = None) -> Response:
        shown = {
            "certificate": bool(shown_certificate(request)),
            "next": _local(untrusted_next),
            "error": error,
            "manager": self._parts.manager,
        }
        return HTMLResponse(self._templates.get_template("login.html").render(shown), status_of(error))

    async def _log_in(self, request: Request) -> Response:
        """There is no session yet whose token the form could hold: that it comes from our own page the browser says."""
        demand_own_page(request)
        form = await read_form(request)
        token = form.get("token", "") if form.get("how") != "certificate" else ""
        try:
            if form.get("how") != "certificate" and not token.strip():
                raise Invalid("TOKEN", "an access token is missing")
            name = await self._door.log_in(request, token)
        except (Invalid, Unauthenticated, Forbidden, Exhausted) as error:
            return self._login_form(request, form.get("next", ""), error)
        response = RedirectResponse(_local(form.get("next", "")) or "/", 303)
        self._door.give(response, name)
        return response

    async def _log_out(self, request: Request) -> Response:
        demand_own_page(request)
        session, who = await self._door.enter(request)
        demand_token(session, await read_form(request))
        await self._door.log_out(request, who)
        response = RedirectResponse("/login", 303)
        self._door.give(response, "")
        return response

    async def _you(self, visit: Visit) -> Response:
        who: FleetCaller = visit.who
        left = self._door.sessions.left(visit.session)
        return visit.page("you.html", left=left, groups=sorted(who.groups), roles=sorted(who.roles))


def _local(untrusted_path: str) -> str:
    """Returns a path of this console, or nothing: nobody is sent elsewhere."""
    good = untrusted_path.startswith("/") and not untrusted_path.startswith(("//", "/\\", "/login", "/logout", "/events/stream"))
    return untrusted_path[:300] if good and untrusted_path.isprintable() and "\\" not in untrusted_path else ""


def _file(name: str) -> Endpoint:
    content = resources.files("hsmvisor.manager.console").joinpath("static", name).read_bytes()
    headers = {"cache-control": "no-cache", "content-type": _TYPES[name.rpartition(".")[2]]}

    async def endpoint(request: Request) -> Response:
        return Response(content, headers=headers)

    return endpoint
