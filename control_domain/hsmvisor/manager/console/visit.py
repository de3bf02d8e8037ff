"""One request of somebody who is logged in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hsmvisor.manager.access.callers import FleetCaller
from hsmvisor.manager.access.owners import may_see, sees_only
from hsmvisor.manager.console import limits
from hsmvisor.manager.console.parts import Parts
from hsmvisor.manager.console.sessions import Session
from hsmvisor.manager.roles import TABLE
from hsmvisor.serving.refusals import Refusals
from jinja2 import Environment
from starlette.requests import Request
from starlette.responses import HTMLResponse

_FLEET, _REQUESTS = "/hsmvisor.manager.v1.FleetService/", "/hsmvisor.manager.v1.RequestService/"
_POLICIES, _HISTORY = "/hsmvisor.manager.v1.PolicyService/", "/hsmvisor.manager.v1.HistoryService/"

#: Whoever may call these methods of the control API may see those pages.
LIST, GET = f"{_REQUESTS}List", f"{_REQUESTS}Get"
HOSTS, RESOURCES, POLICIES = f"{_FLEET}ListHosts", f"{_FLEET}ListResources", f"{_POLICIES}List"
EVENTS, STREAM = f"{_HISTORY}ListEvents", f"{_HISTORY}StreamEvents"

_PAGES = (
    ("/", "Overview", LIST),
    ("/timeline", "Expiry", LIST),
    ("/materials", "Materials", LIST),
    ("/denials", "Denials", LIST),
    ("/resources", "Resources", RESOURCES),
    ("/hosts", "Hosts", HOSTS),
    ("/policies", "Policies", POLICIES),
    ("/events", "Events", EVENTS),
)


def method(name: str) -> str:
    """Of RequestService."""
    return f"{_REQUESTS}{name}"


@dataclass(frozen=True)
class Visit:
    request: Request
    who: FleetCaller
    session: Session
    parts: Parts
    templates: Environment
    refusals: Refusals

    @property
    def owner(self) -> str:
        """Whose things are shown; empty: everybody's."""
        return sees_only(self.who)

    @property
    def sees_all(self) -> bool:
        return may_see(self.who, "")

    def may(self, called: str) -> bool:
        return TABLE.may(called, self.who)

    def demand(self, called: str) -> None:
        """Raises Forbidden unless whoever asks may call this method of the control API."""
        if not self.may(called):
            raise TABLE.denied(called, self.who)

    def asked(self, name: str, most: int = 256) -> str:
        """A field of the query, cut."""
        return self.request.query_params.get(name, "")[:most]

    def page(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        said, self.session.said = self.session.said, ""
        here = self.request.url.path
        shown = {
            "who": self.who,
            "sees_all": self.sees_all,
            "csrf": self.session.csrf,
            "said": said,
            "here": here,
            "pages": [
                (href, title, here == href or (href != "/" and here.startswith(href + "/")))
                for href, title, called in _PAGES
                if self.may(called)
            ],
            "manager": self.parts.manager,
            "version": self.parts.version,
            "now": self.parts.clock(),
            "may_read_fleet": self.may(HOSTS),
        }
        return HTMLResponse(self.templates.get_template(template).render(shown | values), status)


def cut(rows: list[Any], size: int = limits.PAGE) -> tuple[list[Any], bool]:
    """`rows` are one more than `size` where there are more.  Returns the page, and whether there are."""
    return rows[:size], len(rows) > size
