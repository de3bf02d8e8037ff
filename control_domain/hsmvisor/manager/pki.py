"""What anybody may ask of the built-in authorities, over plain HTTP as clients do: revocation lists and OCSP (RFC 5280, RFC 6960).

    GET  /NAME.crl              the list, DER
    GET  /NAME.cer              the issuing authority's own certificate, DER
    POST /NAME/ocsp             an OCSP request, DER
    GET  /NAME/ocsp/BASE64      the same, in the path

All of it is signed, so nobody gains by standing between; and it is made anew once a minute at most, so nobody by asking often.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Mapping
from urllib.parse import unquote

from hsmvisor.manager.ca.builtin.authority import BuiltinCa
from hsmvisor.manager.ca.builtin.revocation import MAX_OCSP
from hsmvisor.manager.ca.interface import Later
from hsmvisor.manager.web import Server
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

FRESH = 60.0  #: seconds that a list is given out again
AT_ONCE = 8  #: answers that are signed at the same time; more wait
WAIT = 10.0  #: seconds


class Pki:
    """`async with` it: then it answers."""

    def __init__(self, authorities: Mapping[str, BuiltinCa], address: str) -> None:
        self._authorities = authorities
        self._lists: dict[str, tuple[float, bytes]] = {}
        self._making, self._signing = asyncio.Lock(), asyncio.Semaphore(AT_ONCE)
        routes = [
            Route("/{name}.crl", self._list),
            Route("/{name}.cer", self._certificate),
            Route("/{name}/ocsp", self._ocsp, methods=["POST"]),
            Route("/{name}/ocsp/{request:path}", self._ocsp_by_get),
        ]
        self.server = Server(Starlette(routes=routes), address, None, "pki")

    async def __aenter__(self) -> Pki:
        """Raises Broken."""
        await self.server.start()
        return self

    async def __aexit__(self, *ended: object) -> None:
        await self.server.stop()

    async def _list(self, request: Request) -> Response:
        ca = self._authorities.get(request.path_params["name"])
        if ca is None:
            return _none()
        try:
            async with self._making:
                made_at, found = self._lists.get(ca.name, (-FRESH, b""))
                if time.monotonic() - made_at >= FRESH:
                    found = await ca.revocation_list()
                    self._lists[ca.name] = time.monotonic(), found
        except Later:
            return _later()
        return Response(found, media_type="application/pkix-crl", headers={"Cache-Control": f"max-age={FRESH:.0f}"})

    async def _certificate(self, request: Request) -> Response:
        ca = self._authorities.get(request.path_params["name"])
        return Response(ca.intermediate, media_type="application/pkix-cert") if ca is not None else _none()

    async def _ocsp(self, request: Request) -> Response:
        body = bytearray()
        try:
            async with asyncio.timeout(WAIT):
                async for part in request.stream():
                    body += part
                    if len(body) > MAX_OCSP:
                        return PlainTextResponse(f"an OCSP request has at most {MAX_OCSP} bytes", 413)
        except (TimeoutError, ClientDisconnect):
            return PlainTextResponse("the request did not come", 408)
        return await self._answer(request, bytes(body))

    async def _ocsp_by_get(self, request: Request) -> Response:
        try:
            asked = base64.b64decode(unquote(request.path_params["request"]), validate=True)
        except (binascii.Error, ValueError):
            asked = b""  # it is answered as malformed
        return await self._answer(request, asked)

    async def _answer(self, request: Request, asked: bytes) -> Response:
        ca = self._authorities.get(request.path_params["name"])
        if ca is None:
            return _none()
        try:
            async with self._signing:
                return Response(await ca.ocsp(asked), media_type="application/ocsp-response")
        except Later:
            return _later()


def _none() -> Response:
    return PlainTextResponse("there is no such authority here", 404)


def _later() -> Response:
    return PlainTextResponse("not now", 503, headers={"Retry-After": "10"})
