"""The supervisor: all parts of the host put together, started and stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time

from hsmvisor.host import restored
from hsmvisor.host.attachments import Attachments
from hsmvisor.host.auth import Authenticator
from hsmvisor.host.backup import Backups
from hsmvisor.host.commands import Commands
from hsmvisor.host.config import Config
from hsmvisor.host.enrolment import Enrolments
from hsmvisor.host.foundation import Foundation
from hsmvisor.host.guest_rows import GuestRows
from hsmvisor.host.guests import Guests
from hsmvisor.host.hsms import Hsms
from hsmvisor.host.listeners import SERVICES, listeners
from hsmvisor.host.measures import Measure, reachable
from hsmvisor.host.metrics import HostCounts, Metrics
from hsmvisor.host.modules import Modules
from hsmvisor.host.purges import Purges
from hsmvisor.host.replugs import Replugs
from hsmvisor.host.restored import Note
from hsmvisor.host.roles import TABLE
from hsmvisor.host.scrape import ScrapeServer
from hsmvisor.host.services.guests import GuestService
from hsmvisor.host.services.host import About, HostService
from hsmvisor.host.services.material import MaterialService
from hsmvisor.host.services.modules import ModuleService
from hsmvisor.host.services.records import AuditService, EventService
from hsmvisor.host.state import State
from hsmvisor.host.surroundings import Surroundings
from hsmvisor.host.tpm_ca import TpmCa
from hsmvisor.host.uplink.joining import Joining
from hsmvisor.host.uplink.membership import Memory
from hsmvisor.host.uplink.uplink import Uplink
from hsmvisor.host.usb_attachments import UsbAttachments
from hsmvisor.host.vhost_vsock import VhostVsock
from hsmvisor.serving import signatures
from hsmvisor.serving.audit import Audit
from hsmvisor.serving.config import differing
from hsmvisor.serving.errors import ServiceError
from hsmvisor.serving.events import Events
from hsmvisor.serving.gate import Gate
from hsmvisor.serving.requests import Requests
from hsmvisor.serving.server import Server
from hsmvisor.serving.signatures import Signatures
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc

_log = logging.getLogger(__name__)

VERSION = "0.1.0"
_PRUNE_EVERY = 3600.0  #: seconds


class Supervisor:
    """Made inside the running event loop."""

    def __init__(self, foundation: Foundation, measures: tuple[Measure, ...]) -> None:
        self._f, self.config = foundation, foundation.config
        config, self._started_at = foundation.config, time.time()
        self.state = State(foundation.database)
        self.audit = Audit(
            config.audit_file,
            foundation.identity.sign,
            service=TABLE.service,
            rotate_bytes=config.audit.rotate_bytes,
            checkpoint_lines=config.audit.checkpoint_lines,
            checkpoint_seconds=config.audit.checkpoint_seconds,
            begin_after=foundation.restored.place if foundation.restored else None,
        )
        self.events = Events(self.state, TABLE.service, "list the modules, then begin from now")
        self.hsms = Hsms(config.hsms)
        self.purges = Purges(self.hsms, self.state, self.audit, config.workers.command_timeout_seconds)
        surroundings = Surroundings(
            config,
            foundation.places,
            self.state,
            foundation.launcher,
            foundation.tpm_launcher,
            TpmCa(foundation.identity),
            foundation.provider,
            foundation.identity,
            self.audit,
            self.events,
            self.hsms,
            self.purges,
        )
        self.modules = Modules(surroundings)
        self.requests = Requests(self.state, self.audit)
        self.metrics = Metrics(self.modules.all, self._counts, config.metrics.timeout_seconds)
        self._scrape = ScrapeServer(self.metrics)
        self._vsock = VhostVsock(self.modules.all)
        self._attachments = Attachments(self.modules, self.state, self.events)
        self._usb_attachments = UsbAttachments(self.modules, self.state, self.events)
        self._commands = Commands(self.modules, self.requests, self.state, self.events)
        self._guests = Guests(GuestRows(foundation.database), self.modules, self._attachments, self.events, self._root)
        memory, identity = Memory(config.state), foundation.identity
        self._uplink = Uplink(memory, identity, self._guests, self.modules, self._commands, self.events, self.audit, VERSION)
        ports = reachable(config, measures)
        self._joining = Joining(memory, identity, self._uplink, self.state, VERSION, ports)
        self._replugs = Replugs(self.modules, self._attachments, self.audit, self.events)
        self._gate = Gate(TABLE, self._authenticator(config), self.audit)
        self._server = Server(self._gate, SERVICES, foundation.places.private)
        self._measures = measures
        self._add_services(About(VERSION, self._started_at, measures))
        self._tasks: list[asyncio.Task[None]] = []

    def _authenticator(self, config: Config) -> Authenticator:
        keys = signatures.load_keys(config.signed.keys)
        return Authenticator(config, Signatures(keys, config.signed.skew_seconds, self.state, TABLE.service))

    def _add_services(self, about: About) -> None:
        registry, identity = self._server.registry, self._f.identity
        enrolments = Enrolments(self.state, identity)
        backups = Backups(self.config, identity, self._f.provider, lambda: self.audit.place, VERSION)
        host = HostService(
            about,
            self._f,
            self.modules,
            enrolments,
            self.requests,
            self.metrics,
            self.audit,
            backups,
            self.hsms,
            self.purges,
            self._joining,
        )
        modules = ModuleService(self.modules, self._attachments, self._usb_attachments, self.requests, self.state, identity)
        rpc.add_ModuleServiceServicer_to_server(modules, registry)
        rpc.add_MaterialServiceServicer_to_server(MaterialService(self.modules, self._commands), registry)
        rpc.add_GuestServiceServicer_to_server(GuestService(self._guests, self.requests), registry)
        rpc.add_HostServiceServicer_to_server(host, registry)
        rpc.add_EventServiceServicer_to_server(EventService(self.events), registry)
        rpc.add_AuditServiceServicer_to_server(AuditService(self.audit), registry)

    def _root(self) -> bytes:
        return self._uplink.root()

    def _counts(self) -> HostCounts:
        return HostCounts(
            started_at=self._started_at,
            launcher_restarts=self._f.launcher.child.restarts,
            provider_restarts=self._f.provider.child.restarts,
            audit_lines=self.audit.lines,
            audit_failing=bool(self.audit.failure),
            calls_refused=self._gate.refused,
        )

    # ---- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when the control API answers; workers are adopted and started in the background."""
        if not self._f.adopting:
            self._start_helpers()
        self.audit.start()
        await self.events.start()
        if self._f.restored is not None:
            await self._tell_of_restore(self._f.restored)
        schema = self._f.database.migrated_from
        await self.audit.record("host.start", who="host", version=VERSION, schema=schema, result="ok")
        self.events.emit("host-started", detail={"version": VERSION})
        await self.modules.start()
        await self._guests.start()
        self._vsock.start(self.config)
        await self._server.start(listeners(self.config))
        if self._f.adopting:
            self._start_helpers()
        if self.config.metrics.address:
            await self._scrape.start(self.config.metrics.address)
        await self._uplink.start()
        self._tasks = [asyncio.create_task(work) for work in (self._prune(), self._complain(), self._replugs.run())]
        _log.info("ready: %d modules, control API at %s", len(self.modules.all()), self.config.control_socket)

    def _start_helpers(self) -> None:
        self._f.launcher.child.start()
        self._f.provider.child.start()
        self.hsms.start()

    async def _complain(self) -> None:
        """What this kernel or installation lacks is said at start; of workers, when the first one serves (module.py)."""
        _, of_helpers = await self._f.helpers()
        for measure in (*self._measures, *of_helpers):
            if not measure.applied:
                _log.warning("not applied: %s: %s", measure.name, measure.detail)

    async def _tell_of_restore(self, note: Note) -> None:
        age = note.restored_at - note.made_at
        told = {"backup": note.backup, "modules": note.modules, "made_at": note.made_at, "age_seconds": age, "aside": note.aside}
        told |= {"restored_at": note.restored_at, "audit_from": note.audit_sequence}
        await self.audit.record("host.restore", who=note.who, why=note.why, **told, result="ok")
        self.events.emit("host-restored", detail=told)
        _log.warning("the state is that of backup %s, %d s old when it was restored", note.backup, age)
        restored.forget(self.config)

    @property
    def status(self) -> str:
        return f"{len(self.modules.all())} modules"

    async def stop(self) -> None:
        """What runs is carried out, what waits is written; workers go on serving unless they are not to be left."""
        leave_workers = not self.config.workers.stop_with_host
        for task in self._tasks:
            task.cancel()
        await self._scrape.stop()
        await self._uplink.stop()
        self._vsock.stop()
        await self.events.close()
        self.modules.end_watching()
        await self._server.stop()
        await self.requests.finish()
        await self.purges.stop()
        await self.modules.stop(leave_workers=leave_workers)
        self.hsms.abandon()
        with contextlib.suppress(ServiceError):
            await self.audit.record("host.stop", who="host", workers="left" if leave_workers else "stopped", result="ok")
        await self.audit.close()
        children = (self._f.launcher.child, self._f.tpm_launcher.child, self._f.provider.child)
        await asyncio.gather(*(child.stop() for child in children))
        self._f.database.close()
        os.close(self._f.lock)

    async def reload(self, config: Config) -> None:
        """Takes over who may call (roles, keys); certificates are read again at each handshake; the rest waits for a restart."""
        authenticator = self._authenticator(config)
        await self.audit.record("host.reload", who="host", result="ok")
        self._gate.authenticator = authenticator
        if changed := differing(self.config.without_callers(), config.without_callers()):
            _log.warning("configuration: changes in %s take effect when the service is started again", ", ".join(changed))

    async def _prune(self) -> None:
        while True:
            with contextlib.suppress(ServiceError):
                await self.state.prune(time.time())
            await asyncio.sleep(_PRUNE_EVERY)
