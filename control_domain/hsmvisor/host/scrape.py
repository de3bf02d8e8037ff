"""The HTTP door for Prometheus: one path, loopback only, nothing is read beyond the request's head."""

from __future__ import annotations

import asyncio
import contextlib

from hsmvisor import addresses
from hsmvisor.host.metrics import Metrics
from hsmvisor.serving.errors import Broken

_MAX_HEAD = 8192
_WITHIN = 5.0  #: seconds for the request's head


class ScrapeServer:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._server: asyncio.Server | None = None

    async def start(self, address: str) -> None:
        """Raises Broken when the address cannot be had."""
        host, port = addresses.split(address)
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=_MAX_HEAD)
        except OSError as error:
            raise Broken("METRICS", f"metrics.address {address}: {error}", "choose a free loopback port") from None

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            async with asyncio.timeout(_WITHIN):
                head = await reader.readuntil(b"\r\n\r\n")
            status, body = await self._answer(head.split(b"\r\n", 1)[0])
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                + body
            )
            await writer.drain()
        writer.close()

    async def _answer(self, request_line: bytes) -> tuple[str, bytes]:
        parts = request_line.split(b" ")
        if len(parts) != 3 or parts[0] != b"GET":
            return "405 Method Not Allowed", b"GET only\n"
        if parts[1].split(b"?", 1)[0] != b"/metrics":
            return "404 Not Found", b"/metrics\n"
        return "200 OK", (await self._metrics.text()).encode()
