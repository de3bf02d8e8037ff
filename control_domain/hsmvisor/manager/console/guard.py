"""What every answer says to the browser, and what a changing request has to come with.

A form is taken from our own pages alone.  Three things say so: the cookie is sent from our own site (SameSite=Strict), the browser
names the page that it comes from (Origin, Sec-Fetch-Site), and the form holds the session's own token.
"""

from __future__ import annotations

import asyncio
import hmac
from urllib.parse import parse_qsl

from hsmvisor.manager.console import limits
from hsmvisor.manager.console.sessions import Session
from hsmvisor.manager.web import MAX_HEADERS
from hsmvisor.serving.errors import Forbidden, Invalid
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CSRF = "csrf"  #: the form's field

#: Nothing is loaded but our own script, styles and icon; nothing is evaluated, and text becomes no markup but in one place.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types console",
    )
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # not no-referrer: browsers would send "Origin: null" with our own forms
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}


class Guard:
    """Around the application.  `hosts`: the only ones that a request may name, where others' names could lead here (none: all)."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] = frozenset()) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise AssertionError(scope["type"])  # neither lifespan nor websockets are on

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if "cache-control" not in headers:
                    headers["cache-control"] = "no-store"
            await send(message)

        named = Headers(scope=scope).get("host", "")
        if _size(scope) > MAX_HEADERS:
            await _refuse(answer, 431, "too much is asked for")
        elif self._hosts and _host(named) not in self._hosts:
            await _refuse(answer, 421, "this console is not reached by that name")
        else:
            await self._app(scope, receive, answer)


def _host(named: str) -> str:
    """Without the port."""
    return named.rpartition("]")[0] + "]" if named.startswith("[") else named.partition(":")[0]


def _size(scope: Scope) -> int:
    """Of the request line and the headers."""
    return len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in scope["headers"])


async def _refuse(send: Send, status: int, why: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
    await send({"type": "http.response.body", "body": f"{why}\n".encode()})


def demand_own_page(request: Request) -> None:
    """Raises Forbidden unless the browser says that one of our own pages asks."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    own = f"{request.url.scheme}://{request.headers.get('host', '')}"
    if origin != own or site not in (None, "same-origin"):
        raise Forbidden("ORIGIN", "this form was not sent from a page of this console", "open the page here and send it again")


def demand_token(session: Session, form: dict[str, str]) -> None:
    """Raises Forbidden unless the form is one of this session."""
    if not hmac.compare_digest(form.get(CSRF, "").encode(), session.csrf.encode()):
        raise Forbidden("CSRF", "this form is not of this session", "open the page again: you may have logged in anew since")


async def read_form(request: Request) -> dict[str, str]:
    """Returns the fields of a form, each once.  Raises Invalid."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise Invalid("FORM", "a form comes as application/x-www-form-urlencoded")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.REQUEST_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limits.MAX_FORM:
                    raise Invalid("FORM", f"a form has at most {limits.MAX_FORM} bytes")
    except TimeoutError:
        raise Invalid("FORM", f"a form has come within {limits.REQUEST_SECONDS:.0f} seconds") from None
    try:
        found = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=limits.MAX_FIELDS, errors="strict")
    except ValueError:
        raise Invalid("FORM", f"a form has at most {limits.MAX_FIELDS} fields of UTF-8 text") from None
    form = dict(found)
    if len(form) != len(found) or any(len(value) > limits.MAX_FIELD for value in form.values()):
        raise Invalid("FORM", f"each field stands once, with at most {limits.MAX_FIELD} characters")
    return form
