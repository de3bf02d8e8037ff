"""One module as its host runs it: a worker that is started, adopted, watched, started again, asked and ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hsmvisor.host import pauses, places, reports
from hsmvisor.host.adoption import end_stranger, returned_listener
from hsmvisor.host.child import HelperLost
from hsmvisor.host.cryptoprocessor import Cryptoprocessor
from hsmvisor.host.faces import Faces
from hsmvisor.host.happenings import DeviceHappenings, Happenings
from hsmvisor.host.hsm_helper import HsmFault
from hsmvisor.host.intake import Passing
from hsmvisor.host.link import LinkClosed, PeerError
from hsmvisor.host.measures import Measure
from hsmvisor.host.settings import Settings
from hsmvisor.host.state import ModuleRow
from hsmvisor.host.surroundings import Surroundings
from hsmvisor.host.worker import ProcessFault, WorkerProcess
from hsmvisor.serving import errors
from hsmvisor.serving.requests import Request
from hsmvisor.serving.sockets import listen
from hsmvisor.serving.text import clean
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.phases import Phase
from hsmvisor_rpc.sealed.canonical import Record

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Upgraded:
    """How a worker was replaced; times in seconds."""

    old_pid: int
    new_pid: int
    applications: int
    connections: int
    lingering: int  #: applications that were still in a long operation
    took: float
    paused: float  #: from the last request that the old one answered, at most, to the first of the new one


_log = logging.getLogger(__name__)

STARTING, SERVING, RESTARTING, FAILED, DESTROYED = "starting", "serving", "restarting", "failed", "destroyed"

_DEATHS, _WITHIN = 5, 30.0  #: that many deaths in that many seconds: failed
LINGER = 10.0  #: seconds that a replaced worker serves applications which are in a long operation
_LEAVING_WITHIN = 5.0  #: seconds that it may take to end after that
_MOST_LACKING = 32
_SERVING_WAIT = 5.0  #: seconds that a request waits for a worker that is being started


class Module:
    def __init__(self, row: ModuleRow, surroundings: Surroundings, changed: Callable[[Module], None]) -> None:
        self.row, self._s, self._changed = row, surroundings, changed
        self.settings = Settings.decode(row.settings)
        self.state, self.failure = STARTING, ""
        self.restarts = 0
        self.recipient, self.root = b"", row.root
        self.measures: tuple[Measure, ...] = ()
        self._version = row.version
        self._worker: WorkerProcess | None = None
        self._successor: WorkerProcess | None = None
        self._guest: socket.socket | None = None
        self._deaths: deque[float] = deque(maxlen=_DEATHS)
        self._failures = 0
        self._is_serving = asyncio.Event()
        self._asked, self._tried = asyncio.Event(), asyncio.Event()  #: to be started now; that was tried
        self._replacing = asyncio.Lock()  #: held while a successor takes over
        self._leaving: dict[asyncio.Task[None], WorkerProcess] = {}  #: predecessors on their way out
        self.ending = asyncio.Lock()  #: held by who destroys it
        self._keeper: asyncio.Task[None] | None = None
        self.passing = Passing(row.name, self._give)
        self._happenings = Happenings(row.name, surroundings.audit, surroundings.events)
        self.faces = Faces(surroundings, row, self.passing, lambda: self.settings, self._happened_to_device, self._happenings.told)
        self.cryptoprocessor = Cryptoprocessor(
            surroundings.hsms,
            self.settings.cryptoprocessor,
            row.name,
            row.module_id,
            surroundings.config.workers.start_timeout_seconds,
            lambda: self._worker if self._is_serving.is_set() else None,
            self._told_of_hsm,
        )
        self._device_happenings = DeviceHappenings(row.name, surroundings.audit, surroundings.events)

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def module_id(self) -> bytes:
        return self.row.module_id

    @property
    def pid(self) -> int:
        return self._worker.pid if self._worker else 0

    @property
    def pids(self) -> set[int]:
        """Its worker, with a successor and predecessors while they are there; and those of its TPM."""
        workers = [self._worker, self._successor, *self._leaving.values()]
        return {worker.pid for worker in workers if worker is not None} | self.faces.tpm.life.pids

    @property
    def address(self) -> str:
        return f"unix:path={self._s.places.guest(self.name)}"

    # ---- life ---------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Makes a new module: returns when it serves.  Raises ServiceError; then nothing of it runs."""
        for last in (False, False, True):
            try:
                await self._start_worker()
                break
            except (ProcessFault, OSError) as error:
                await self._end_worker(0)
                raise errors.Unavailable("WORKER", f"the module's worker does not start: {error}", "see the host's log") from None
            except HelperLost:  # it is started again at once; nothing of the module was there yet
                await self._end_worker(0)
                if last:
                    raise
            except BaseException:
                await self._end_worker(0)
                raise
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    def resume(self, gate: asyncio.Semaphore) -> None:
        """Adopts the module's worker or starts one, in the background; `gate` bounds how many start at once."""
        self._keeper = asyncio.get_running_loop().create_task(self._resume(gate))

    async def _resume(self, gate: asyncio.Semaphore) -> None:
        async with gate:
            await end_stranger(self._s.places, self.module_id, successor=True)
            if not await self._adopt():
                await self._try_start()
        await self._keep()

    async def _keep(self) -> None:
        """Watches the worker and starts it again; until cancelled."""
        while True:
            worker = self._worker
            if worker is not None:
                await worker.ended()
                async with self._replacing:
                    if self._worker is not worker:
                        continue  # its successor serves
                    await self._buried()
            if len(self._deaths) == _DEATHS and self._deaths[-1] - self._deaths[0] < _WITHIN:
                self._fail(f"its worker ended {_DEATHS} times within {_WITHIN:.0f} s: {self.failure or 'see the host log'}")
            await self._rest()
            await self._try_start()

    async def _rest(self) -> None:
        """Until the worker is started again: a while, or until somebody asks.  A wrong PIN of its HSM is not tried before that."""
        if self.state != FAILED:
            await asyncio.sleep(pauses.after(self._failures))
        elif self.cryptoprocessor.barred:
            await self.cryptoprocessor.opened()
        else:
            self._deaths.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pauses.lasting(self._failures)):
                    await self._asked.wait()
        self._asked.clear()

    async def _buried(self) -> None:
        """Takes note of a worker's death."""
        worker, self._worker = self._worker, None
        assert worker is not None
        self._is_serving.clear()
        self.faces.lost_worker()
        worker.leave()
        self.restarts += 1
        self._deaths.append(asyncio.get_running_loop().time())
        why = worker.violation or "it ended"
        _log.warning("module %s: worker %d is gone (%s); it is started again", self.name, worker.pid, why)
        kind = "worker.violation" if worker.violation else "worker.ended"
        self._s.audit.note(kind, who="host", module=self.name, pid=worker.pid, result="restarting", detail=clean(why))
        self._s.events.emit("worker-ended", self.name, {"pid": worker.pid, "why": clean(why)})
        self._happenings.cut("its worker ended")
        self._set(RESTARTING)

    async def _try_start(self) -> None:
        try:
            await self._start_worker()
        except (ProcessFault, errors.ServiceError, OSError) as error:
            await self._end_worker(0)
            detail = error.detail if isinstance(error, errors.ServiceError) else str(error)
            if isinstance(error, HsmFault) and error.hint:
                detail = f"{detail}: {error.hint}"
            self._failures += 1
            if pauses.quick(self._failures) and not (isinstance(error, HsmFault) and error.final):
                _log.warning("module %s: its worker does not start: %s; tried again", self.name, detail)
            else:
                self._fail(f"its worker does not start: {detail}")
        finally:
            self._tried.set()

    def _fail(self, failure: str) -> None:
        if self.failure != failure:
            _log.error("module %s failed: %s", self.name, failure)
            self._s.audit.note("module.failed", who="host", module=self.name, result="failed", detail=clean(failure))
            self._s.events.emit("module-failed", self.name, {"detail": clean(failure)})
        self._set(FAILED, failure)

    def _told_of_hsm(self, failure: str) -> None:
        """Of a worker that serves, and cannot use its keys; or can again."""
        if failure:
            self._fail(failure)
        elif self.state == FAILED and self._is_serving.is_set():
            self._set(SERVING)

    def _set(self, state: str, failure: str = "") -> None:
        if (state, failure) != (self.state, self.failure):
            self.state, self.failure = state, failure
            self._changed(self)

    # ---- starting -----------------------------------------------------------------------------------------------

    async def _start_worker(self) -> None:
        """Has a worker forked and booted with the stored state; the guest socket stays, so clients queue meanwhile."""
        within = self._s.config.workers.start_timeout_seconds
        if self._guest is None:
            self._guest = places.listen_for_guests(self._s.places, self.name, self._s.config)
        self.faces.listen()
        self.faces.listen_for_guest()
        version, records = await self._s.state.sealed(self.module_id) if self._version else (0, [])
        try:
            await self.cryptoprocessor.ready()
            worker = await self._spawn(within)
            await worker.attach(version, within)
            await self.cryptoprocessor.give(worker)
            await worker.load(records, within)
            del records
            booted = await worker.boot(self._boot(version), within)
        except PeerError as error:
            raise ProcessFault(f"it refused: {error}") from None
        except LinkClosed:
            raise ProcessFault("it ended while it started") from None
        except TimeoutError:
            raise ProcessFault(f"it did not answer within {within:.0f} s") from None
        self._serves(booted.recipient, booted.root, booted.report)
        self.faces.serve(worker, within)

    def _told_by_worker(self, event: m.Event) -> None:
        self.faces.tpm.heard("worker", event)

    def _happened_to_device(self, kind: str, detail: dict[str, object]) -> None:
        self._device_happenings.told(kind, detail)
        self._changed(self)

    async def _spawn(self, within: float, successor: bool = False) -> WorkerProcess:
        """Forks a worker and has its storage key written into its pipe, at the same time."""
        control_path = self._s.places.control(self.module_id, successor)
        uid = self._s.config.workers.uid_base + self.row.number if os.geteuid() == 0 else 0
        spawn = m.Spawn(self.module_id, self.name, uid, os.geteuid(), ())
        assert self._guest is not None
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            with listen(control_path, 0o600, "", 4) as control:
                derived = asyncio.ensure_future(self._s.provider.derive(self.module_id, write_end, within))
                try:
                    forked = await self._s.launcher.spawn(spawn, [control.fileno(), self._guest.fileno(), read_end], within)
                    worker = WorkerProcess(self.name, forked.pid, forked.pidfd, Phase.EMPTY)
                    if successor:
                        self._successor = worker
                    else:
                        self._worker = worker
                    places.write_note(self._s.places.note(self.module_id, successor), forked.pid)
                    worker.connect(control_path, self._store, self._told_by_worker, self.faces.device.told, self.faces.usb.told)
                except BaseException:  # what becomes of the key is not the reason, and must not take the place of a cancellation
                    derived.cancel()
                    await asyncio.wait([derived])
                    raise
                await derived
        finally:
            os.close(read_end)
            os.close(write_end)
        return worker

    def _boot(self, version: int) -> m.Boot:
        return m.Boot(self._s.identity.host_id, self.row.root, version, self.row.created_at, self.settings.for_worker())

    def _serves(self, recipient: bytes, root: bytes, report: str) -> None:
        self.recipient, self.root = recipient, root
        self.measures = reports.measures(reports.parse(report))
        for measure in self.measures:
            if not measure.applied and measure not in self._s.lacking and len(self._s.lacking) < _MOST_LACKING:
                self._s.lacking.add(measure)
                _log.warning("workers: not applied: %s: %s", measure.name, measure.detail)
        self._failures = 0
        self._is_serving.set()
        self._set(SERVING)
        self.cryptoprocessor.look()

    async def _adopt(self) -> bool:
        """Takes over a worker that an earlier supervisor left; one that is not whole is ended.  Says whether it serves."""
        noted = places.noted_process(self._s.places.note(self.module_id))
        if noted is None:
            await end_stranger(self._s.places, self.module_id)
            return False
        worker = self._worker = WorkerProcess(self.name, *noted, None)
        within = self._s.config.workers.start_timeout_seconds
        try:
            where = self._s.places.control(self.module_id)
            worker.connect(where, self._store, self._told_by_worker, self.faces.device.told, self.faces.usb.told)
            attached, descriptors = await worker.attach(self._version, within)
            self._guest = returned_listener(descriptors, str(self._s.places.guest(self.name)))
            if attached.module_id != self.module_id or attached.phase != Phase.SERVING:
                raise ProcessFault(f"it is in phase {attached.phase}")
            await self.faces.adopt(worker, within)
        except (ProcessFault, LinkClosed, PeerError, TimeoutError, OSError) as error:
            _log.warning("module %s: worker %d is not adopted but replaced: %s", self.name, worker.pid, str(error) or "no answer")
            await self._end_worker(0)
            return False
        _log.info("module %s: worker %d is adopted", self.name, worker.pid)
        try:  # not before: who connects first would take the place of the front-end that there is
            self.faces.listen()
        except (OSError, errors.ServiceError) as error:
            _log.error("module %s: it is no device for others: %s", self.name, error)
        self.faces.listen_for_guest()
        self._s.events.emit("worker-adopted", self.name, {"pid": worker.pid})
        self._serves(attached.recipient, attached.root, attached.report)
        return True

    # ---- a successor --------------------------------------------------------------------------------------------

    async def upgrade(self, linger: float = LINGER) -> Upgraded:
        """Replaces the worker by a new one that takes its state, connections and sessions over; one that failed is tried again now.
        Raises ServiceError; then the old one serves on, or one is started again."""
        self.cryptoprocessor.reopen()
        if self.state == FAILED and self._worker is None:
            return await self._try_now()
        async with self._replacing:
            old = await self._serving_worker()
            within = self._s.config.workers.start_timeout_seconds
            began, helper = time.monotonic(), None
            try:
                helper = await self.cryptoprocessor.fresh()
                new = await self._spawn(within, successor=True)
                await new.attach(self._version, within)
                await self.cryptoprocessor.connect(helper, new)
                self._is_serving.clear()  # who asks now waits for the new one
                frozen = time.monotonic()
                version = await old.freeze(within)
                _, records = await self._s.state.sealed(self.module_id)
                await new.load(records, within)
                booted, handed = await self._succession(old, new, version, linger, within)
            except (ProcessFault, LinkClosed, PeerError, TimeoutError, OSError, errors.ServiceError) as error:
                await self._without_successor(old, within)
                if helper is not None:
                    await helper.end()
                raise errors.Unavailable(
                    "WORKER", f"the worker of module {self.name} is not replaced: {str(error) or 'no answer'}", "see the host's log"
                ) from None
            places.succeed(self._s.places, self.module_id)
            self._worker, self._successor = new, None
            self.cryptoprocessor.succeed(helper, new)
            self._serves(booted.recipient, booted.root, booted.report)
            self.faces.succeeded(new, within)
            self._see_out(old, linger)
            try:
                await self.faces.tpm.life.upgrade()
            except errors.ServiceError as error:
                _log.warning("module %s: %s; its worker is", self.name, error.detail)
            now = time.monotonic()
            return Upgraded(old.pid, new.pid, handed.applications, handed.connections, handed.lingering, now - began, now - frozen)

    async def _try_now(self) -> Upgraded:
        """For one that failed and has no worker: it is started at once.  Raises ServiceError when it fails again."""
        began = time.monotonic()
        self._tried.clear()
        self._asked.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * self._s.config.workers.start_timeout_seconds):
                await self._tried.wait()
        worker, took = await self._serving_worker(), time.monotonic() - began
        return Upgraded(0, worker.pid, 0, 0, 0, took, took)

    async def forget_key(self) -> None:
        """No process that held a destroyed key goes on: the worker is replaced in service, or else ended and started again."""
        try:
            await self.upgrade(linger=0)
        except errors.ServiceError as error:
            _log.warning("module %s: %s; its worker is ended instead", self.name, error.detail)
            if self._worker is not None:
                self._worker.kill()
            self.cryptoprocessor.kill()
        await asyncio.gather(*self._leaving)

    async def _succession(
        self, old: WorkerProcess, new: WorkerProcess, version: int, linger: float, within: float
    ) -> tuple[m.Booted, m.HandedOver]:
        """Both speak with each other over a socket of their own: what a guest has open is nothing for us."""
        mine, theirs = socket.socketpair()
        with mine, theirs:
            succeed = new.succeed(m.Succeed(self._s.identity.host_id, version, self.settings.for_worker()), theirs, within)
            hand_over = old.hand_over(mine, linger, within)
            taken = asyncio.gather(succeed, hand_over)
            await asyncio.sleep(0)  # both have their end by now
        return await taken

    async def _without_successor(self, old: WorkerProcess, within: float) -> None:
        new, self._successor = self._successor, None
        if new is not None:
            new.kill()
            await new.ended()
            new.leave()
        places.forget(self._s.places, self.module_id, successor=True)
        if old.phase is Phase.SERVING:
            await old.thaw(within)
            self._is_serving.set()
            self.cryptoprocessor.look()
        else:
            old.kill()  # it has given its connections away; another one is started

    def _see_out(self, old: WorkerProcess, linger: float) -> None:
        task = asyncio.get_running_loop().create_task(old.out(linger + _LEAVING_WITHIN))
        self._leaving[task] = old
        task.add_done_callback(self._leaving.pop)

    # ---- being asked by the worker ------------------------------------------------------------------------------

    async def _store(self, change: m.StoreState) -> None:
        await self._s.state.store(self.module_id, change, self._request_of(change.request_id))
        self._version = change.version

    def ticket(self, request: Request) -> str:
        """Returns the request id that goes to the worker: it comes back with what is stored, also to the next supervisor."""
        plain = json.dumps([request.request_id, request.method, request.content.hex()])
        return f"{self._s.identity.ticket(self.module_id, plain)}{plain}"

    def _request_of(self, untrusted_ticket: str) -> Request | None:
        """Returns the request that we gave the worker; raises WrongState for one that we did not."""
        if not untrusted_ticket:
            return None
        proof, plain = untrusted_ticket[:64], untrusted_ticket[64:]
        if proof != self._s.identity.ticket(self.module_id, plain):
            raise errors.WrongState("REQUEST", "the change names a request that this host did not make")
        request_id, method, content = json.loads(plain)
        return Request(request_id, method, bytes.fromhex(content))

    # ---- asking the worker --------------------------------------------------------------------------------------

    async def _serving_worker(self) -> WorkerProcess:
        """Returns the worker, waiting a moment for one that is being started; raises ServiceError."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0 if self.state == FAILED else _SERVING_WAIT):
                await self._is_serving.wait()
        if self._worker is None or not self._is_serving.is_set():
            hint = "see hsmvisor module show, and the host's log" if self.state == FAILED else "try again in a moment"
            raise errors.Unavailable("MODULE_STATE", f"module {self.name} is {self.state}: {self.failure or 'no worker yet'}", hint)
        return self._worker

    async def ask(self, request: Record, expected: type[R]) -> R:
        """Asks the serving worker; raises ServiceError."""
        worker = await self._serving_worker()
        return await worker.ask(request, expected, self._s.config.workers.command_timeout_seconds)

    async def _give(self, taken: m.TakeConnection, descriptor: int) -> None:
        worker = await self._serving_worker()
        try:
            await worker.take(taken, descriptor, self._s.config.workers.command_timeout_seconds)
        except LinkClosed:
            if self._worker is worker:
                self._is_serving.clear()  # who asks again waits for the next one
            raise

    async def status(self) -> reports.Status:
        return reports.status((await self.ask(m.QueryStatus(), m.Report)).report)

    async def statistics(self) -> reports.Statistics:
        return reports.statistics((await self.ask(m.QueryStatistics(), m.Report)).report)

    async def configure(self, settings: Settings, request: Request, result: bytes) -> None:
        """The worker says first whether it takes them; then they are stored for its next start too.  Raises ServiceError."""
        settings = settings.beside(self.settings)
        if self.settings.tpm.enabled and not settings.tpm.enabled:
            self.faces.tpm.demand_unplugged()
        await self.ask(m.Configure(settings.for_worker()), m.Done)
        try:
            await self._s.state.update_settings(self.module_id, settings.encode(), request, result)
        except errors.ServiceError:
            with contextlib.suppress(errors.ServiceError):
                await self.ask(m.Configure(self.settings.for_worker()), m.Done)
            raise
        other_ids = settings.card.usb_ids() != self.settings.card.usb_ids()
        self.settings = settings
        self._changed(self)
        await self.faces.tpm.configure()
        if other_ids:
            with contextlib.suppress(errors.ServiceError):  # a worker that has ended is no device
                await self.faces.usb.unplug()  # its importer comes again, and sees the new ones

    async def refresh_root(self) -> None:
        """Learns the root that the module obeys now, after a command that may have changed it."""
        worker = await self._serving_worker()
        try:
            attached, descriptors = await worker.attach(self._version, self._s.config.workers.command_timeout_seconds)
        except (ProcessFault, LinkClosed, PeerError, TimeoutError):
            return  # it is on its way out; the next one says it when it boots
        for descriptor in descriptors:
            os.close(descriptor)
        if attached.root != self.root:
            self.root = attached.root
            self._changed(self)

    def touched(self) -> None:
        """Tells those who watch that something of the module is different."""
        self._changed(self)

    # ---- the end ------------------------------------------------------------------------------------------------

    async def stop(self, *, leave: bool) -> None:
        """Ends the watch; the worker is left serving, or drained and ended."""
        await self._halt()
        await self.faces.end_tpm(leave=leave)
        async with self._replacing:
            if leave and self._worker is not None:
                self._worker.leave()
                self._worker = None
            else:
                await self._end_worker(self._s.config.workers.drain_seconds)
                await self.cryptoprocessor.end()
        if (guest := self._let_go()) is not None:
            guest.close()

    async def destroy(self) -> None:
        """Ends the worker at once and removes what stands in the runtime directory.  The rows are the caller's."""
        if (guest := await self.give_way()) is not None:
            guest.close()
        places.remove(self._s.places, self.module_id, self.name)
        self._set(DESTROYED)

    async def give_way(self) -> socket.socket | None:
        """Ends the worker at once; returns the listening socket, at which guests wait for the one that takes its place."""
        await self._halt()
        await self.faces.end_tpm(leave=False)
        async with self._replacing:
            await self._end_worker(0)
            await self.cryptoprocessor.end()
        return self._let_go()

    def take_place(self, guest: socket.socket | None) -> None:
        """Serves, in the background, where a module gave way."""
        self._guest = guest
        self.resume(asyncio.Semaphore())

    def replaced(self) -> None:
        """Another one has taken its place."""
        places.forget(self._s.places, self.module_id)
        self._set(DESTROYED)

    async def _halt(self) -> None:
        await self.cryptoprocessor.halt()
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        self._is_serving.clear()

    def _let_go(self) -> socket.socket | None:
        self.faces.close()
        guest, self._guest = self._guest, None
        return guest

    async def _end_worker(self, drain: float) -> None:
        for leaving in self._leaving.values():
            leaving.kill()
        await asyncio.gather(*self._leaving)
        worker, self._worker = self._worker, None
        if worker is None:
            return
        if worker.phase is Phase.SERVING:
            await worker.shut_down(drain)
        worker.kill()
        await worker.ended()
        worker.leave()
        self._happenings.cut("the module was ended")
