"""Who comes in: by an access token or a client certificate, and then by a session, which is asked again each time what its token
or certificate may do."""

from __future__ import annotations

import hashlib
import ssl
from collections import OrderedDict

from hsmvisor.manager.access.callers import FleetCaller
from hsmvisor.manager.auth import AUTHORIZATION
from hsmvisor.manager.console import limits
from hsmvisor.manager.console.parts import Parts
from hsmvisor.manager.console.sessions import Proof, Session, Sessions
from hsmvisor.manager.roles import GIVEN, TABLE
from hsmvisor.serving.access import Call
from hsmvisor.serving.errors import Exhausted, Forbidden, ServiceError, Unauthenticated
from hsmvisor.serving.refusals import Refusals
from hsmvisor.serving.text import clean
from hsmvisor.serving.throttle import Throttle
from starlette.requests import Request
from starlette.responses import Response

_METHOD = "console.login"


class Door:
    def __init__(self, parts: Parts, sessions: Sessions, secure: bool) -> None:
        """`secure`: it is reached over TLS."""
        self._parts, self.sessions, self._secure = parts, sessions, secure
        self.cookie = "__Host-hsmvisor" if secure else "hsmvisor-console"
        self._attempts: OrderedDict[str, Throttle] = OrderedDict()
        logged = Throttle(limits.LOGGED_BURST, limits.LOGGED_RATE)
        self.refusals = Refusals(parts.audit, TABLE.service, logged, via="console")

    # ---- logging in and out -----------------------------------------------------------------------------------------

    async def log_in(self, request: Request, untrusted_token: str) -> str:
        """With that token; empty: with the certificate that the browser shows.

        Returns the session's name, for the browser.  Raises Unauthenticated, Forbidden, Exhausted.
        """
        try:
            self._admit(request)
            if untrusted_token:
                who = await self._identify(request, token=untrusted_token.strip())
                proof = Proof(token=who.token)
            else:
                der = shown_certificate(request)
                if not der:
                    raise Unauthenticated("CERTIFICATE", "your browser shows no certificate", "give an access token")
                who, proof = await self._identify(request, der=der), _proof_of(der)
            _demand_person(who)
        except ServiceError as error:
            self.refusals.note(f"unknown:{address(request)}", _METHOD, error)
            raise
        await self._parts.audit.record(_METHOD, who=who.name, owner=who.owner, address=address(request), result="ok")
        self.sessions.end(request.cookies.get(self.cookie, ""))
        name, _ = self.sessions.begin(proof)
        return name

    async def log_out(self, request: Request, who: FleetCaller) -> None:
        self.sessions.end(request.cookies.get(self.cookie, ""))
        await self._parts.audit.record("console.logout", who=who.name, address=address(request), result="ok")

    def give(self, response: Response, name: str) -> None:
        """The browser gets the session's name; empty: forgets it."""
        rules = {"path": "/", "secure": self._secure, "httponly": True, "samesite": "strict"}
        if name:
            response.set_cookie(self.cookie, name, **rules)  # type: ignore[arg-type]
        else:
            response.delete_cookie(self.cookie, **rules)  # type: ignore[arg-type]

    def _admit(self, request: Request) -> None:
        """Raises Exhausted."""
        came = address(request)
        throttle = self._attempts.setdefault(came, Throttle(limits.BURST, limits.RATE))
        self._attempts.move_to_end(came)
        if len(self._attempts) > limits.MOST_ADDRESSES:
            self._attempts.popitem(last=False)
        if not throttle.admit():
            raise Exhausted("ATTEMPTS", "too many attempts to log in from your address", "wait a minute")

    # ---- coming with a session --------------------------------------------------------------------------------------

    async def enter(self, request: Request) -> tuple[Session, FleetCaller]:
        """Raises Unauthenticated."""
        by_itself = request.headers.get("sec-fetch-dest") == "empty"  # a script of a page that is open
        session = self.sessions.find(request.cookies.get(self.cookie, ""), used=not by_itself)
        if session is None:
            raise Unauthenticated("SESSION", "you are not logged in, or were not here for long", "log in")
        return session, await self.who(request, session)

    async def who(self, request: Request, session: Session) -> FleetCaller:
        """As whom the session asks now: a token may have been revoked, the configuration changed.  Raises Unauthenticated."""
        if not self.sessions.lives(session):
            raise Unauthenticated("SESSION", "your session has ended", "log in")
        proof = session.proof
        try:
            if proof.token:
                who = await self._parts.authenticator().again(proof.token)
            else:
                der = shown_certificate(request)
                if not der or _proof_of(der) != proof:
                    raise Unauthenticated("CERTIFICATE", "your browser does not show the certificate of this session", "log in")
                who = await self._identify(request, der=der)
            _demand_person(who)
        except (Unauthenticated, Forbidden) as error:
            self.sessions.end(request.cookies.get(self.cookie, ""))
            raise Unauthenticated(error.reason, error.detail, error.hint) from None
        return who

    async def _identify(self, request: Request, token: str = "", der: bytes = b"") -> FleetCaller:
        metadata = {AUTHORIZATION: f"Bearer {token}"} if token else {}
        shown = {"x509_pem_cert": [ssl.DER_cert_to_PEM_cert(der).encode()]} if der else {}
        return await self._parts.authenticator().identify(Call(_METHOD, None, metadata, f"console:{address(request)}", shown))


def _demand_person(who: FleetCaller) -> None:
    """Raises Forbidden: hosts, and those whom the configuration does not name, have nothing to do here."""
    if not who.roles & GIVEN:
        raise Forbidden("ROLE", f"{clean(who.name)} has no role here", "[[clients]] in the manager's configuration gives one")


def shown_certificate(request: Request) -> bytes:
    """Returns the client certificate that the connection came with, DER; empty: none."""
    return bytes(getattr(request.state, "certificate", b""))


def address(request: Request) -> str:
    return request.client.host if request.client else "?"


def _proof_of(der: bytes) -> Proof:
    return Proof(certificate=hashlib.sha256(der).hexdigest())
