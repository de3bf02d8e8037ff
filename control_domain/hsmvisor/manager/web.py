"""Web servers inside the manager: each has one address, with TLS or without."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hsmvisor.serving.errors import Broken
from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn import Server as Uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

_log = logging.getLogger(__name__)

MAX_HEADERS = 16 * 1024  #: bytes
KEEP_ALIVE = 20  #: seconds that a connection stays open without a request, or with headers that are not all there
MOST_CONNECTIONS = 512
LOOK_EVERY = 60.0  #: seconds after which a renewed certificate is used
_GRACE = 2  #: seconds for what runs when the manager stops


@dataclass(frozen=True)
class Tls:
    """Files in PEM; certificate and key may be one.  `client_ca`: who certifies those who may show a certificate; empty: nobody."""

    certificate: str
    key: str
    client_ca: str = ""

    def context(self, section: str) -> ssl.SSLContext:
        """`section`: of the configuration.  Raises Broken."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        made.set_alpn_protocols(["http/1.1"])
        made.options |= ssl.OP_NO_TICKET  # a client certificate is looked at with each connection
        made.num_tickets = 0
        try:
            made.load_cert_chain(self.certificate, self.key)
            if self.client_ca:
                made.load_verify_locations(self.client_ca)
                made.verify_mode = ssl.CERT_OPTIONAL
        except (OSError, ssl.SSLError) as error:
            why = f"the {section}'s certificate {self.certificate}, its key or tls.client_ca: {error.strerror or error}"
            raise Broken("TLS", why, f"see the {section} and tls sections of the configuration") from None
        return made

    def stamp(self) -> tuple[int, ...]:
        """Changes with the files."""
        found = []
        for path in (self.certificate, self.key):
            with contextlib.suppress(OSError):
                told = Path(path).stat()
                found += [told.st_ino, told.st_mtime_ns, told.st_size]
        return tuple(found)


class _Protocol(H11Protocol):
    """Tells the application which certificate the client showed, and waits for a request for a while only."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        shown = transport.get_extra_info("ssl_object")
        certificate = shown.getpeercert(binary_form=True) if shown is not None else None
        self.app_state = {**self.app_state, "certificate": certificate or b""}
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Between requests a clock runs, also while one comes in."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(KEEP_ALIVE, self.transport.close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Server(Uvicorn):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.listens = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They are the manager's."""
        yield


class Server:
    def __init__(self, app: ASGIApp, address: str, tls: Tls | None, section: str) -> None:
        """`tls` None: without; `section`: of the configuration."""
        self._app, self._address, self._tls, self._section = app, address, tls, section
        self._tasks: list[asyncio.Task[None]] = []
        self.port = 0

    async def start(self) -> None:
        """Returns when it listens.  Raises Broken."""
        logging.getLogger("uvicorn").setLevel(logging.ERROR)  # others' bad requests are no news
        context = self._tls.context(self._section) if self._tls else None
        listening = self._listen()
        self.port = listening.getsockname()[1]
        config = Config(
            self._app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=_GRACE,
            h11_max_incomplete_event_size=MAX_HEADERS,
            ssl_context_factory=(lambda config, usual: context) if context else None,
        )
        self._server = _Server(config)
        serving = asyncio.get_running_loop().create_task(self._server.serve([listening]))
        self._tasks = [serving]
        listens = asyncio.get_running_loop().create_task(self._server.listens.wait())
        await asyncio.wait((serving, listens), return_when=asyncio.FIRST_COMPLETED)
        listens.cancel()
        if serving.done():
            await serving
        if context is not None:
            self._tasks.append(asyncio.get_running_loop().create_task(self._follow_files(context)))
        serving.add_done_callback(self._ended)

    def _listen(self) -> socket.socket:
        host, _, port = self._address.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, where = found[0]
            made = socket.socket(family, kind, protocol)
            try:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind(where)
                made.setblocking(False)
            except OSError:
                made.close()
                raise
        except OSError as error:
            why = f"{self._section}.address {self._address} cannot be had: {error.strerror}"
            raise Broken("LISTEN", why, "choose a free address of this host") from None
        return made

    async def _follow_files(self, context: ssl.SSLContext) -> None:
        """A renewed certificate is shown with the next connection; one that cannot be used leaves the one that is."""
        assert self._tls is not None
        before = self._tls.stamp()
        while True:
            await asyncio.sleep(LOOK_EVERY)
            if (now := self._tls.stamp()) == before:
                continue
            try:
                self._tls.context(self._section)
                context.load_cert_chain(self._tls.certificate, self._tls.key)
                before = now
            except (Broken, OSError, ssl.SSLError) as error:
                _log.error("%s; the certificate in use stays", error)

    async def stop(self) -> None:
        for task in self._tasks[1:]:
            task.cancel()
        self._server.should_exit = True
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the %s has ended: %s", self._section, error, exc_info=error)
