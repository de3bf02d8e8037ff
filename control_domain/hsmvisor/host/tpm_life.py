"""The process of one module's TPM: started, adopted, watched, started again, replaced and ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence

from hsmvisor.host import pauses, places, reports
from hsmvisor.host.adoption import end_stranger
from hsmvisor.host.forked import ProcessFault
from hsmvisor.host.link import LinkClosed, PeerError
from hsmvisor.host.measures import Measure
from hsmvisor.host.refusals import refused
from hsmvisor.host.surroundings import Surroundings
from hsmvisor.host.tpm_process import Plugged, Told, TpmProcess
from hsmvisor.serving import errors
from hsmvisor.serving.sockets import listen
from hsmvisor.serving.text import clean
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.phases import Phase

_log = logging.getLogger(__name__)

OFF, STARTING, SERVING, FAILED = "off", "starting", "serving", "failed"
_FAULTS = (ProcessFault, errors.ServiceError, PeerError, LinkClosed, TimeoutError, OSError, ValueError)  #: of keys that are none


class TpmLife:
    """`serves` is called with each process that serves, `lost` when one has ended; `kept` returns QEMU's connections as an earlier
    process had them, with their plug: they are the caller's."""

    def __init__(
        self,
        surroundings: Surroundings,
        name: str,
        module_id: bytes,
        number: int,
        serves: Callable[[TpmProcess], None],
        lost: Callable[[str], None],
        kept: Callable[[], tuple[int, list[int]]],
        told: Told,
        plugged: Plugged,
    ) -> None:
        self._s, self.name, self._module_id, self._number = surroundings, name, module_id, number
        self._serves, self._lost, self._kept, self._told, self._plugged = serves, lost, kept, told, plugged
        self._places = surroundings.places.of_tpms
        self.process: TpmProcess | None = None
        self._successor: TpmProcess | None = None
        self.state, self.failure, self.restarts = OFF, "", 0
        self.measures: tuple[Measure, ...] = ()
        self.endorsement_keys: tuple[bytes, ...] = ()
        self.attestation_key = b""
        self.certificates: tuple[bytes, ...] = ()  #: of the endorsement keys (RSA, P-256) and of the platform
        self.firmware = True
        self._keeper: asyncio.Task[None] | None = None
        self._follower: asyncio.Task[None] | None = None
        self._failures = 0
        self._replacing = asyncio.Lock()

    @property
    def within(self) -> float:
        return self._s.config.workers.start_timeout_seconds

    @property
    def pids(self) -> set[int]:
        return {process.pid for process in (self.process, self._successor) if process is not None}

    def begin(self, firmware: bool) -> None:
        """Adopts the process that there is or starts one, in the background; nothing where that is under way."""
        self.firmware = firmware
        if self._keeper is None:
            self.state = STARTING
            self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def _keep(self) -> None:
        await end_stranger(self._places, self._module_id, successor=True)
        if not await self._adopt():
            await self._try_start()
        while True:
            process = self.process
            if process is not None:
                await process.ended()
                async with self._replacing:
                    if self.process is not process:
                        continue  # its successor serves
                    self._buried(process)
            await asyncio.sleep(pauses.after(self._failures))
            await self._try_start()

    def _buried(self, process: TpmProcess) -> None:
        self.process = None
        process.leave()
        self.restarts += 1
        self._failures += 1
        self.state = STARTING
        why = process.violation or "it ended"
        _log.warning("module %s: the process %d of its TPM is gone (%s); it is started again", self.name, process.pid, why)
        self._s.audit.note("tpm.ended", who="host", module=self.name, pid=process.pid, result="restarting", detail=clean(why))
        self._s.events.emit("tpm-ended", self.name, {"pid": process.pid, "why": clean(why)})
        self._lost(why)

    async def _try_start(self) -> None:
        try:
            await self._start()
        except _FAULTS as error:
            await self._end_process()
            self._failures += 1
            detail = error.detail if isinstance(error, errors.ServiceError) else str(error) or "no answer"
            if pauses.quick(self._failures) and not isinstance(error, PeerError):
                _log.warning("module %s: its TPM does not start: %s; tried again", self.name, detail)
            elif self.failure != detail:
                _log.error("module %s: its TPM does not start: %s", self.name, detail)
                self._s.events.emit("tpm-failed", self.name, {"detail": clean(detail)})
                self.state, self.failure = FAILED, clean(detail)
            self._lost(detail)

    async def _start(self) -> None:
        version, sealed = await self._s.state.tpm(self._module_id)
        process = await self._spawn()
        await process.attach(version, self.within)
        plug, descriptors = self._kept()
        boot: m.BootTpm | m.SucceedTpm = m.BootTpm(version, sealed, self.firmware)
        if descriptors:
            boot = m.SucceedTpm(version, sealed, self.firmware, b"", plug, len(descriptors))
        await self._boot(process, boot, descriptors)

    async def _boot(self, process: TpmProcess, boot: m.BootTpm | m.SucceedTpm, descriptors: Sequence[int] = ()) -> None:
        booted = await process.boot(boot, self.within, descriptors)
        await self._certified(process, booted.endorsement_keys, booted.attestation_key, booted.certificates)
        self.measures = reports.measures(reports.parse(booted.report))
        self._now_serves(process)

    async def identify(self, process: TpmProcess) -> None:
        """Learns who it is now: a machine that came from another host has brought other keys.  Raises ServiceError."""
        try:
            booted = await process.identify(self.within)
            await self._certified(process, booted.endorsement_keys, booted.attestation_key, booted.certificates)
        except PeerError as error:
            raise refused(error.error) from None
        except (ProcessFault, LinkClosed, TimeoutError, ValueError) as error:
            raise errors.Unavailable("TPM", f"the TPM of module {self.name} does not say who it is: {error}", "try again") from None

    async def _certified(
        self, process: TpmProcess, keys: tuple[bytes, ...], attestation_key: bytes, there: tuple[bytes, ...]
    ) -> None:
        """Has it have this host's certificates for its keys; `there`: those that it has.  A TPM whose guest sleeps, or has left no
        room, serves without them: they are put in when somebody asks who it is."""
        rsa, p256 = keys
        made = self._s.tpm_ca.issue(self.name, self._module_id, rsa, p256)
        certificates = made.rsa, made.p256, made.platform
        if there != certificates:
            try:
                await process.certify(m.CertifyTpm(*certificates), self.within)
            except PeerError as error:
                _log.warning("module %s: its TPM does not take its certificates: %s", self.name, error.error.detail)
        self.endorsement_keys, self.attestation_key, self.certificates = keys, attestation_key, certificates

    def _now_serves(self, process: TpmProcess) -> None:
        self.state, self.failure = SERVING, ""
        asyncio.get_running_loop().call_later(pauses.STEADY, self._steady, process)
        self._serves(process)
        if self._outdated:
            self._go_on_following()

    @property
    def _outdated(self) -> bool:
        """The process that serves was told something else of its guest's firmware than is so."""
        return self.process is not None and self.state == SERVING and self.process.firmware != self.firmware

    async def follow(self) -> None:
        """Has a process that was told otherwise of the guest's firmware replaced.  Raises ServiceError, and tries on."""
        try:
            await self._replace(lambda: self._outdated)
        finally:
            if self._outdated:
                self._go_on_following()

    def _go_on_following(self) -> None:
        if self._follower is None or self._follower.done():
            self._follower = asyncio.get_running_loop().create_task(self._following())

    async def _following(self) -> None:
        failures = 0
        while self._outdated:
            await asyncio.sleep(pauses.after(failures))
            failures += 1
            try:
                await self._replace(lambda: self._outdated)
            except errors.ServiceError as error:
                _log.warning("module %s: %s; tried again", self.name, error.detail)

    def _steady(self, process: TpmProcess) -> None:
        if self.process is process:
            self._failures = 0

    async def _spawn(self, successor: bool = False) -> TpmProcess:
        """Forks a process and has the TPM's key written into its pipe."""
        path = self._places.control(self._module_id, successor)
        uid = self._s.config.workers.tpm_uid_base + self._number if os.geteuid() == 0 else 0
        spawn = m.Spawn(self._module_id, self.name, uid, os.geteuid(), ())
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            with listen(path, 0o600, "", 4) as control:
                await self._s.provider.derive(self._module_id, write_end, self.within, m.TPM)
                forked = await self._s.tpm_launcher.spawn(spawn, [control.fileno(), read_end], self.within)
                process = TpmProcess(self.name, forked.pid, forked.pidfd, Phase.EMPTY)
                if successor:
                    self._successor = process
                else:
                    self.process = process
                places.write_note(self._places.note(self._module_id, successor), forked.pid)
                process.connect(path, self._store, self._told, self._plugged)
        finally:
            os.close(read_end)
            os.close(write_end)
        return process

    async def _adopt(self) -> bool:
        """Takes over a process that an earlier supervisor left; one that is not whole is ended.  Says whether it serves."""
        noted = places.noted_process(self._places.note(self._module_id))
        if noted is None:
            await end_stranger(self._places, self._module_id)
            return False
        process = self.process = TpmProcess(self.name, *noted, None)
        try:
            version, _ = await self._s.state.tpm(self._module_id)
            process.connect(self._places.control(self._module_id), self._store, self._told, self._plugged)
            attached, descriptors = await process.attach(version, self.within)
            for descriptor in descriptors:
                os.close(descriptor)
            if attached.module_id != self._module_id or attached.phase != Phase.SERVING:
                raise ProcessFault(f"it is in phase {attached.phase}")
            report = reports.parse(attached.report)
            keys, attesting = reports.keys(report, "endorsement_keys"), reports.keys(report, "attestation_key")
            if len(keys) != 2 or len(attesting) != 1:
                raise ProcessFault("it does not say its keys")
            await self._certified(process, keys, attesting[0], reports.keys(report, "certificates"))
            self.measures = reports.measures(report)
            process.firmware = report.get("firmware") is True
        except _FAULTS as error:
            _log.warning("module %s: the process %d of its TPM is not adopted but replaced: %s", self.name, process.pid, error)
            await self._end_process()
            return False
        _log.info("module %s: the process %d of its TPM is adopted", self.name, process.pid)
        self._now_serves(process)
        return True

    async def _store(self, change: m.StoreTpm) -> None:
        await self._s.state.store_tpm(self._module_id, change)

    # ---- a successor --------------------------------------------------------------------------------------------

    async def upgrade(self) -> None:
        """Replaces the process by a new one that goes on where it was, with the guest's connections.  Raises ServiceError; where
        the old one had given up already, the TPM is off until its guest resets it."""
        await self._replace(lambda: True)

    async def _replace(self, needed: Callable[[], bool]) -> None:
        """As upgrade; `needed`: asked when nobody else replaces it."""
        async with self._replacing:
            old = self.process
            if old is None or self.state != SERVING or not needed():
                return
            descriptors: list[int] = []
            try:
                new = await self._spawn(successor=True)
                await new.attach(0, self.within)  # it lives, before the old one gives up
                handed, descriptors = await old.hand_over(self.within)
                version, sealed = await self._s.state.tpm(self._module_id)
                await new.attach(version, self.within)
                _, kept = self._kept()
                given = [kept[0], *descriptors] if kept and descriptors else []
                succeed = m.SucceedTpm(version, sealed, self.firmware, handed.state, handed.plug, len(given))
                places.succeed(self._places, self._module_id)
                self.process, self._successor = new, None
                await self._boot(new, succeed, given)
            except _FAULTS as error:
                await self._without_successor()
                if self.process is not old:
                    if self.process is not None:
                        self.process.kill()  # it was not made whole; another one is started
                    await old.out(self.within)
                detail = f"the TPM of module {self.name} is not replaced: {str(error) or 'no answer'}"
                raise errors.Unavailable("TPM", detail, "see the host's log") from None
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            await old.out(self.within)

    async def _without_successor(self) -> None:
        new, self._successor = self._successor, None
        if new is not None:
            new.kill()
            await new.ended()
            new.leave()
        places.forget(self._places, self._module_id, successor=True)
        if self.process is not None and self.process.phase is not Phase.SERVING:
            self.process.kill()

    # ---- the end ------------------------------------------------------------------------------------------------

    async def end(self, *, leave: bool = False) -> None:
        """Ends the watch; the process is left, or ended."""
        keeper, self._keeper = self._keeper, None
        await _cancelled(keeper)
        async with self._replacing:  # so that the follower is replacing nothing
            follower, self._follower = self._follower, None
            await _cancelled(follower)
            if leave and self.process is not None:
                self.process.leave()
                self.process = None
            else:
                await self._end_process(drain=True)
                places.forget(self._places, self._module_id)
        self.state, self.failure = OFF, ""

    async def _end_process(self, drain: bool = False) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        if drain and process.phase is Phase.SERVING:
            await process.shut_down(0)
        process.kill()
        await process.ended()
        process.leave()


async def _cancelled(task: asyncio.Task[None] | None) -> None:
    """Returns when it has ended."""
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
