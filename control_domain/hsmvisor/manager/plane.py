"""The management plane: all parts put together, started and stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager import authorities, fleet_keys, limits, policies
from hsmvisor.manager.access.tokens import Tokens
from hsmvisor.manager.answers import Answers, Changes
from hsmvisor.manager.auth import Authenticator
from hsmvisor.manager.ca.interface import CaError
from hsmvisor.manager.ca.names import BadName
from hsmvisor.manager.config import Config
from hsmvisor.manager.config import Issuer as IssuerSection
from hsmvisor.manager.console.console import Console
from hsmvisor.manager.console.parts import Parts as ConsoleParts
from hsmvisor.manager.desk import Desk
from hsmvisor.manager.engine.engine import Engine
from hsmvisor.manager.engine.health import HealthCheck
from hsmvisor.manager.engine.hub import Hub
from hsmvisor.manager.engine.measure_now import MeasureNow
from hsmvisor.manager.engine.parts import Parts
from hsmvisor.manager.engine.results import Results
from hsmvisor.manager.engine.signing import Commands
from hsmvisor.manager.fleet_keys import FleetKeys
from hsmvisor.manager.foundation import Foundation
from hsmvisor.manager.history.events import History
from hsmvisor.manager.importing import Importing
from hsmvisor.manager.inventory.identities import OwnCertificate
from hsmvisor.manager.inventory.joining import Joining
from hsmvisor.manager.inventory.leaving import Leaving
from hsmvisor.manager.inventory.pins import Pins
from hsmvisor.manager.inventory.reports import Reports
from hsmvisor.manager.issuer.client import Issuer, IssuerAway
from hsmvisor.manager.issuer.settings import FileEscrow, Settings, TokenEscrow
from hsmvisor.manager.link.exchange import Exchanges
from hsmvisor.manager.listeners import SERVICES, listeners, server_files
from hsmvisor.manager.metrics import Metrics
from hsmvisor.manager.notify.notifier import Notifier
from hsmvisor.manager.pki import Pki
from hsmvisor.manager.policies import PolicyStore
from hsmvisor.manager.policy.measured import Measured
from hsmvisor.manager.roles import TABLE
from hsmvisor.manager.services.fleet import FleetParts, FleetService
from hsmvisor.manager.services.link import HostLink
from hsmvisor.manager.services.records import AuthorityService, HistoryService, PolicyService
from hsmvisor.manager.services.wanted import RequestService
from hsmvisor.manager.store import fleet
from hsmvisor.manager.store.database import Database, DatabaseError
from hsmvisor.manager.wanted.asking import Asking
from hsmvisor.manager.wanted.judging import Judge
from hsmvisor.manager.web import Tls
from hsmvisor.serving.audit import Audit
from hsmvisor.serving.config import differing
from hsmvisor.serving.errors import BadConfig, Broken, ServiceError
from hsmvisor.serving.gate import Gate
from hsmvisor.serving.measures import Measure
from hsmvisor.serving.requests import Requests
from hsmvisor.serving.server import Server
from hsmvisor_rpc.v1 import manager_pb2_grpc as rpc

_log = logging.getLogger(__name__)

VERSION = "0.1.0"
_PRUNE_EVERY = 3600.0  #: seconds
_TELL_EVERY = 30.0  #: seconds after which a manager says again that it is there
_FORGOTTEN = 86400.0  #: seconds of silence after which a manager is not known any more
_PAUSE = 60.0  #: seconds after which a certificate that could not be renewed is tried again


class Plane:
    """Made inside the running event loop.  `start` makes the parts; whoever plugs in another one does it in `_gather`, `_plug`
    (services of the control API) or `_run` (what works beside it)."""

    def __init__(self, laid: Foundation, measures: tuple[Measure, ...], clock: Callable[[], float] = time.time) -> None:
        self._laid, self.config, self._measures, self.clock = laid, laid.config, measures, clock
        self.measurements: Mapping[str, Measured] = laid.config.measurements
        self._started = AsyncExitStack()
        self._started.callback(laid.close)
        self._tasks: list[asyncio.Task[None]] = []

    # ---- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when the control API answers.  Raises Broken; then nothing is left open."""
        try:
            await self._gather()
            await self.audit.record("manager.start", who=TABLE.service, version=VERSION, name=self.config.manager, result="ok")
            self._plug()
            await self._run()
            await self._server.start(listeners(self.config, self.own_certificate))
            self._started.push_async_callback(self._server.stop)
        except DatabaseError as error:
            await self._started.aclose()
            raise Broken("DATABASE", str(error), "see the database section of the configuration") from None
        except BaseException:
            await self._started.aclose()
            raise
        for measure in self._measures:
            if not measure.applied:
                _log.warning("not applied: %s: %s", measure.name, measure.detail)
        _log.info("ready: %s, control API at %s", self.database.shown, self.config.control_socket)

    @property
    def status(self) -> str:
        return self.config.manager

    async def stop(self) -> None:
        """What runs is carried out, what waits is written; lines that are looked at are left for the next manager."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(DatabaseError):
            async with self.database.transaction() as connection:
                await fleet.forget_manager(connection, self._laid.key.id)
        await self.history.close()  # followers end before the server waits for them
        await self._server.stop()
        await self.requests.finish()
        with contextlib.suppress(ServiceError):
            await self.audit.record("manager.stop", who=TABLE.service, result="ok")
        await self._started.aclose()

    async def reload(self, config: Config) -> None:
        """Takes over who may call, and what guests' boots have to be; certificates are read again at each handshake; the rest waits
        for a restart."""
        known, measurements = self._authenticator(config), config.measurements
        await self.audit.record("manager.reload", who=TABLE.service, result="ok")
        self._gate.authenticator = self._known = known
        if measurements != self.measurements:
            self.measurements = measurements
            with contextlib.suppress(DatabaseError):  # it is looked at by and by
                async with self.database.transaction() as connection:
                    await policies.look_again(connection, self.clock())
            self.hub.lines()
        if changed := differing(self.config.without_callers(), config.without_callers()):
            _log.warning("configuration: changes in %s take effect when the service is started again", ", ".join(changed))

    # ---- the parts ------------------------------------------------------------------------------------------------

    async def _gather(self) -> None:
        config, clock, started = self.config, self.clock, self._started
        self.database = Database(config.database_url)
        started.push_async_callback(self.database.close)
        await self.database.migrate()
        self.keys: FleetKeys = await fleet_keys.settle(config, self.database, self._laid.audited, clock)
        self.audit = Audit(
            config.audit_file,
            self._laid.key.sign,
            service=TABLE.service,
            rotate_bytes=config.audit.rotate_bytes,
            checkpoint_lines=config.audit.checkpoint_lines,
            checkpoint_seconds=config.audit.checkpoint_seconds,
        )
        self.audit.start()
        started.push_async_callback(self.audit.close)
        self.hub = Hub()
        self._channels = config.channels
        self.history = History(self.database, self._channels, clock)
        self.authorities = await authorities.open_all(config, self.database, clock)
        started.push_async_callback(self.authorities.close)
        self.policies = PolicyStore(self.database, self.history, self.hub.lines, clock)
        await self.policies.open()
        self.own_certificate = OwnCertificate(self.keys.identities, config.state, config.served_names, clock)
        await self._certify()
        self.answers = Answers(self.database, clock)
        self.requests = Requests(self.answers, self.audit)
        self.changes = Changes(self.database, self.answers, self.requests)
        self.tokens = Tokens(self.database, self.history, self.keys.token_key, clock)
        self.pins = Pins(self.keys.token_key, self.keys.root)
        self.issuer = Issuer(_issuer_settings(config))
        self.judge = Judge(self.policies.current, self.history, clock, lambda: self.measurements)
        self.health = {row.name: HealthCheck(row.name, row.command, row.seconds) for row in config.health}
        self.joining = Joining(
            self.database,
            self.history,
            self.keys.identities,
            self.pins,
            self.keys.token_key,
            self.keys.root,
            config.tls_addresses,
            clock,
            config.join_addresses,
            _believed(config),
        )

    async def _certify(self) -> None:
        """Raises Broken."""
        try:
            await self.own_certificate.ensure()
        except (CaError, BadName) as error:
            raise Broken("CERTIFICATE", f"the manager's own certificate: {error}", "see tls.names in the configuration") from None

    def _authenticator(self, config: Config) -> Authenticator:
        return Authenticator(config, self.keys.identities, self.database, self.tokens, self.clock)

    # ---- the control API ----------------------------------------------------------------------------------------

    def _metrics(self) -> Metrics:
        database, engine = self.database, self.engine
        counters: dict[str, tuple[str, Callable[[], float]]] = {
            "statements": ("Statements that its database was asked", lambda: database.statements),
            "transactions": ("Transactions of its database", lambda: database.transactions),
            "looks": ("Steps of materials", lambda: engine.looks),
            "exchanges": ("Exchanges with hosts", lambda: self.exchanges.count),
            "issuer_restarts": ("Restarts of its issuer", lambda: self.issuer.restarts),
        }
        return Metrics(self.clock(), counters)

    def _plug(self) -> None:
        self.engine = Engine(self._engine_parts(), self.config.renewal.workers, self._laid.key.id)
        reports = Reports(self.history, self.keys.root, self.clock)
        results = Results(self.history, self.clock)
        self.exchanges = Exchanges(self.database, self.history, reports, results, self.hub, self.clock)
        self._known = self._authenticator(self.config)
        self._gate = Gate(TABLE, self._known, self.audit)
        self._server = Server(self._gate, SERVICES, self.config.runtime / "private", limits.MAX_REPORT)
        registry, database, clock = self._server.registry, self.database, self.clock
        known, usual = tuple(self.authorities), self.authorities.default
        self.asking = Asking(self.history, self.judge, known, usual, tuple(self.health), clock, lambda: self.measurements)
        fleet_parts = FleetParts(
            database=database,
            joining=self.joining,
            leaving=Leaving(database, self.history, self.authorities, clock),
            asking=self.asking,
            measure_now=MeasureNow(database, self.hub, self.pins, clock),
            measurements=lambda: self.measurements,
            tokens=self.tokens,
            authorities=self.authorities,
            policies=self.policies,
            changes=self.changes,
            answers=self.answers,
            hub=self.hub,
            metrics=self._metrics(),
            keys={"root": self.keys.root, "audit_key": self._laid.key.public},
            version=VERSION,
            clock=clock,
        )
        rpc.add_FleetServiceServicer_to_server(FleetService(fleet_parts), registry)
        rpc.add_PolicyServiceServicer_to_server(PolicyService(database, self.policies, self.changes, self.hub), registry)
        rpc.add_AuthorityServiceServicer_to_server(AuthorityService(database, self.authorities), registry)
        rpc.add_HistoryServiceServicer_to_server(HistoryService(self.history, self.audit), registry)
        rpc.add_RequestServiceServicer_to_server(self._request_service(), registry)
        rpc.add_HostLinkServicer_to_server(self._host_link(), registry)

    def _request_service(self) -> RequestService:
        self.desk = Desk(self.database, self.requests, self.answers, self.hub)
        sign = self._sign_as_root
        importing = Importing(self.database, self.history, self.judge, self.issuer, self.pins, sign, random.random, self.clock)
        return RequestService(self.database, self.desk, self.asking, importing, self.changes, self.answers, self.hub, self.clock)

    def _host_link(self) -> HostLink:
        return HostLink(self.joining, self.exchanges, self.changes, self.answers, lambda: self.joining.believed)

    def _sign_as_root(self, statement: bytes) -> bytes:
        """The fleet's root gives its word for what is not a command.  Raises AuthorityError."""
        return self.keys.authority.root().key.sign(statement)

    # ---- what works beside it -----------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Starts what is stopped in the other order, and tasks that are cancelled."""
        self.policies.start()
        self._started.push_async_callback(self.policies.stop)
        try:
            await self.issuer.start()
        except IssuerAway as error:
            _log.error("the issuer cannot be used: %s", error)  # it is tried again
        self._started.push_async_callback(self.issuer.close)
        self.engine.start()
        self._started.push_async_callback(self.engine.stop)
        notifier = Notifier(self.database, self.history, self._channels, self.clock)
        for work in (self.history.run, notifier.run, self._keep_certificate, self._prune, self._tell):
            self._spawn(work)
        if self.config.pki.address:
            await self._started.enter_async_context(Pki(self.authorities.builtin, self.config.pki.address))
        if self.config.console.address:
            self._console = await self._started.enter_async_context(self._make_console())

    def _make_console(self) -> Console:
        settings = self.config.console
        tls = None
        if not settings.plain:
            certificate, key = server_files(self.config, self.own_certificate)
            tls = Tls(settings.certificate or certificate, settings.key or key, self.config.tls.client_ca)
        parts = ConsoleParts(
            database=self.database,
            desk=self.desk,
            asking=self.asking,
            history=self.history,
            authenticator=lambda: self._known,
            audit=self.audit,
            policy_version=lambda: self.policies.current().version,
            manager=self.config.manager,
            version=VERSION,
            clock=self.clock,
        )
        return Console(parts, settings, tls)

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        self._tasks.append(asyncio.ensure_future(work()))

    def _engine_parts(self) -> Parts:
        return Parts(
            database=self.database,
            history=self.history,
            judge=self.judge,
            commands=Commands(self.keys.authority.signer, self.clock),
            issuer=self.issuer,
            pins=self.pins,
            authorities=self.authorities,
            health=self.health,
            hub=self.hub,
            clock=self.clock,
            draw=random.random,
            measurements=lambda: self.measurements,
        )

    async def _keep_certificate(self) -> None:
        while True:
            try:
                await self.own_certificate.keep()
            except (CaError, OSError) as error:
                _log.error("the manager's own certificate is not renewed: %s", error)
                await asyncio.sleep(_PAUSE)

    async def _prune(self) -> None:
        while True:
            with contextlib.suppress(DatabaseError):
                await self.answers.prune()
            await asyncio.sleep(_PRUNE_EVERY)

    async def _tell(self) -> None:
        """Other managers, and people, see that this one is there."""
        while True:
            now = self.clock()
            with contextlib.suppress(DatabaseError):
                async with self.database.transaction() as connection:
                    await fleet.note_manager(connection, self._laid.key.id, self.config.manager, now, now - _FORGOTTEN)
            await asyncio.sleep(_TELL_EVERY)


def _issuer_settings(config: Config) -> Settings:
    row: IssuerSection = config.issuer
    directory = config.fleet / "issuer"
    directory.mkdir(mode=0o700, exist_ok=True)
    escrow: FileEscrow | TokenEscrow | None = None
    if row.escrow == "file":
        escrow = FileEscrow(Path(row.file) if row.file else directory / "escrow.key")
    elif row.escrow == "pkcs11":
        environment = dict(setting.split("=", 1) for setting in row.environment)
        writes = tuple(map(Path, row.writes))
        escrow = TokenEscrow(Path(row.library), row.token, Path(row.pin_file), row.label, environment, writes, row.network)
    return Settings(directory / "recipient.key", escrow)


def _believed(config: Config) -> tuple[bytes, ...]:
    """Returns whom hosts believe as manager where its certificate is somebody else's, DER.  Raises BadConfig."""
    if not config.tls.authorities:
        return ()
    try:
        found = x509.load_pem_x509_certificates(Path(config.tls.authorities).read_bytes())
    except OSError as error:
        raise BadConfig("tls.authorities", f"{config.tls.authorities}: {error.strerror}") from None
    except ValueError:
        raise BadConfig("tls.authorities", f"{config.tls.authorities}: these are no certificates in PEM") from None
    return tuple(certificate.public_bytes(Encoding.DER) for certificate in found)
