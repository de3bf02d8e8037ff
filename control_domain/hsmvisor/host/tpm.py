"""A module as a TPM 2.0: where QEMU and the TSS connect, which of its worker's keys it has, and what its guest's boot was.

The supervisor reads no byte of theirs.  It keeps QEMU's connections beside the process that has them: should that die, the next one
answers, and the TPM is what a reset makes of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
from collections.abc import Callable
from dataclasses import replace

from hsmvisor.host import pauses, places, reports
from hsmvisor.host.intake import Intake
from hsmvisor.host.link import LinkClosed, PeerError
from hsmvisor.host.measures import Measure
from hsmvisor.host.pluggable import Pluggable, unix_peer
from hsmvisor.host.settings import Tpm as TpmSettings
from hsmvisor.host.surroundings import Surroundings
from hsmvisor.host.tpm_life import SERVING, TpmLife
from hsmvisor.host.tpm_process import TpmProcess
from hsmvisor.host.worker import WorkerProcess
from hsmvisor.serving import errors
from hsmvisor.serving.text import clean
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.phases import TPM_BUSY_SIZE
from hsmvisor_rpc.sealed.attestation import Attestation, TpmIdentity

_log = logging.getLogger(__name__)

_HOST = "host"  #: beside "worker" and "process": who says why the keys are not as they should be

Happened = Callable[[str, dict[str, object]], None]


class Tpm(Pluggable):
    """One module's, whether it has one or not (`settings`).  `happened` is told "tpm-plugged", "tpm-unplugged" and "tpm-refused",
    `told` what the TPM's process tells."""

    def __init__(
        self,
        surroundings: Surroundings,
        name: str,
        module_id: bytes,
        number: int,
        settings: Callable[[], TpmSettings],
        happened: Happened,
        told: Callable[[m.Event], None],
    ) -> None:
        super().__init__()
        self._s, self.name, self._module_id = surroundings, name, module_id
        self._settings, self._happened, self._told = settings, happened, told
        self.path, self.tss = surroundings.places.tpm(name), surroundings.places.tss(name)[0]
        self.life = TpmLife(
            surroundings,
            name,
            module_id,
            number,
            self._serves,
            self._lost,
            self._kept_connections,
            lambda event: self.heard("process", event),
            self._process_plugged,
        )
        self._intakes: list[Intake] = []
        self._worker: WorkerProcess | None = None
        self._waiting: socket.socket | None = None  #: a QEMU that no process has taken yet
        self._kept: list[int] = []  #: the connections that a process has, of QEMU
        self._busy = -1  #: and the memory beside them
        self._plug = 0  #: counts QEMUs
        self.peer = ""
        self._failures: dict[str, str] = {}  #: by who says it, why the keys are not as they should be

    @property
    def enabled(self) -> bool:
        return self._settings().enabled

    @property
    def keys_failure(self) -> str:
        """Why the keys are not there as they should be."""
        return "; ".join(dict.fromkeys(filter(None, self._failures.values())))

    @property
    def plugged(self) -> bool:
        """Says whether a QEMU is connected."""
        return bool(self.peer)

    # ---- life ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Is what the settings say: a TPM at its sockets, or none.  Raises OSError, ServiceError."""
        if not self.enabled:
            return
        if not self._intakes:
            qemu, commands, control = places.listen_for_tpm(self._s.places, self.name, self._s.config)
            self._intakes = [
                Intake(qemu, lambda sock, _: self._arrived(sock)),
                Intake(commands, lambda sock, _: self._tss_arrived(sock, m.TSS_COMMANDS)),
                Intake(control, lambda sock, _: self._tss_arrived(sock, m.TSS_CONTROL)),
            ]
        self.life.begin(firmware=not self._settings().no_firmware)

    async def configure(self) -> None:
        """The settings are others.  Raises OSError, ServiceError."""
        if self.enabled:
            self.begin()
            await self.life.follow()
        else:
            await self.end(leave=False)
            places.forget_tpm(self._s.places, self.name)

    def _serves(self, process: TpmProcess) -> None:
        self._join(process)
        self._give()

    def _lost(self, why: str) -> None:
        """Its process ended: QEMU's connections go to the next one, others are gone."""
        if self.plugged and not self._kept and self._waiting is None:
            self._unplug(self._plug, why)

    # ---- the keys -----------------------------------------------------------------------------------------------

    def serve(self, worker: WorkerProcess) -> None:
        """A worker serves: it says which keys are wanted."""
        self._worker = worker
        if self.life.process is not None and self.life.state == SERVING:
            self._join(self.life.process)

    def lost_worker(self) -> None:
        """What is in the TPM stays there."""
        self._worker = None

    def _join(self, process: TpmProcess) -> None:
        if self._worker is not None:
            self._run(self._joined(process, self._worker))

    async def _joined(self, process: TpmProcess, worker: WorkerProcess) -> None:
        """Tries until they are: a guest's command that waits for the disk holds both up."""
        failures = 0
        while self._worker is worker and self.life.process is process:
            mine, theirs = socket.socketpair()
            try:
                with mine, theirs:
                    await process.take_keys(mine, self.life.within)
                    await worker.serve_tpm(theirs, self.life.within)
                self._failures.pop(_HOST, None)
                return
            except (PeerError, LinkClosed, TimeoutError, OSError) as error:
                failures += 1
                why = f"the module's worker does not reach its TPM, and is tried again: {str(error) or 'no answer'}"
                if self._worker is worker and self.life.process is process and self._failures.get(_HOST) != why:
                    _log.warning("module %s: %s", self.name, why)
                    self._failures[_HOST] = clean(why)
            await asyncio.sleep(pauses.after(failures))

    # ---- connections --------------------------------------------------------------------------------------------

    def _arrived(self, sock: socket.socket) -> None:
        peer = unix_peer(sock)
        if self.plugged and self.life.state != SERVING and self._has_gone():
            self._unplug(self._plug, "it closed the connection")  # no process has it, to say so
        if self.plugged:
            sock.close()  # before a byte was read, or told
            self._happened("tpm-refused", {"peer": peer, "why": f"the TPM is {self.peer}'s"})
            return
        self._waiting, self.peer = sock, peer
        self._plug += 1
        self._happened("tpm-plugged", {"peer": peer})
        self._told_change()
        self._give()

    def _has_gone(self) -> bool:
        """Says whether the QEMU that is plugged in has closed its connection."""
        poll = select.poll()
        for descriptor in [self._waiting.fileno()] if self._waiting is not None else self._kept[:1]:
            poll.register(descriptor, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _give(self) -> None:
        process = self.life.process
        if self._waiting is not None and process is not None and self.life.state == SERVING:
            self._run(self._plug_in(process, self._waiting))

    async def _plug_in(self, process: TpmProcess, sock: socket.socket) -> None:
        plug = self._plug
        try:
            self._forget_kept()
            self._busy = _busy_memory()
            await process.plug(plug, m.QEMU, [sock.fileno(), self._busy], self.life.within)
        except PeerError as error:
            if error.error.reason != m.REASON_PHASE:  # else its successor takes it
                self._drop_waiting(sock)
                self._unplug(plug, error.error.detail)
            return
        except (LinkClosed, TimeoutError, OSError):
            _log.warning("module %s: the process of its TPM did not take QEMU; the next one will", self.name)
            return
        self._drop_waiting(sock)

    def _drop_waiting(self, sock: socket.socket) -> None:
        if self._waiting is sock:
            self._waiting = None
        sock.close()

    def _tss_arrived(self, sock: socket.socket, kind: str) -> None:
        process = self.life.process
        if process is None or self.life.state != SERVING or self.plugged:
            sock.close()  # a machine's TPM is the machine's alone
            return
        self._run(self._plug_tss(process, sock, kind))

    async def _plug_tss(self, process: TpmProcess, sock: socket.socket, kind: str) -> None:
        with sock:
            try:
                await process.plug(0, kind, [sock.fileno()], self.life.within)
            except (PeerError, LinkClosed, TimeoutError, OSError) as error:
                _log.warning("module %s: a connection to its TPM is closed: %s", self.name, str(error) or "no answer")

    def _process_plugged(self, record: m.TpmPlugged | m.TpmGone, descriptors: list[int]) -> None:
        """What the process says of QEMU; the descriptors are ours."""
        if isinstance(record, m.TpmGone):
            self._unplug(record.plug, record.why)
            return
        if self._plug and record.plug != self._plug and self.plugged:
            _close(descriptors)
            return
        if not self.plugged:  # an earlier supervisor plugged it in
            self._plug, self.peer = record.plug, "whoever was plugged in before"
            self._told_change()
        if record.busy and descriptors:
            memory, *descriptors = descriptors
            if self._busy < 0:  # an earlier supervisor made it
                self._busy = memory
            else:
                _close([memory])
        _close(self._kept)
        self._kept = descriptors

    def _kept_connections(self) -> tuple[int, list[int]]:
        """Where the memory beside them is not known, nobody knows whether an answer is owed."""
        if not self.plugged or not (self._kept or self._busy >= 0):
            return 0, []
        if self._busy < 0:
            self._busy = _busy_memory()
        return self._plug, [self._busy, *self._kept]

    def _forget_kept(self) -> None:
        _close(self._kept)
        _close([self._busy] if self._busy >= 0 else [])
        self._kept, self._busy = [], -1

    def heard(self, who: str, event: m.Event) -> None:
        """What the worker or the TPM's process tells, of the keys too."""
        if event.kind == "tpm-keys":
            self._failures[who] = clean(str(reports.plain(event.report).get("failure", "")))
        self._told(event)

    def _unplug(self, plug: int, why: str) -> None:
        if plug == self._plug and self.plugged:
            self._drop()
            self._happened("tpm-unplugged", {"why": why})
            self._told_change()

    # ---- what the guest's boot was --------------------------------------------------------------------------------

    async def attest(self, nonce: bytes, pcrs: tuple[int, ...]) -> bytes:
        """Returns an encoded Attestation of the guest's PCRs.  Raises ServiceError."""
        process, identity = self.serving(), await self.identity()
        quoted = await process.ask(m.QuoteTpm(nonce, pcrs), m.TpmQuoted, self._s.config.workers.command_timeout_seconds)
        return Attestation(identity, quoted.attest, quoted.signature, pcrs, quoted.values).encode()

    async def identity(self) -> bytes:
        """Returns the signed TpmIdentity.  Raises ServiceError."""
        await self.life.identify(self.serving())
        identity, attesting, keys = self._s.identity, self.life.attestation_key, self.life.endorsement_keys
        of = TpmIdentity(identity.host_id, self._module_id, self.name, attesting, keys, self._s.tpm_ca.public)
        return identity.certify_tpm(of)

    @property
    def ca_certificate(self) -> bytes:
        """DER, of the host's CA for endorsement certificates."""
        return self._s.tpm_ca.certificate

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What its process has given up, under its name."""
        return tuple(replace(measure, name=f"tpm: {measure.name}") for measure in self.life.measures)

    def demand_enabled(self) -> None:
        """Raises WrongState."""
        if not self.enabled:
            hint = f"hsmvisor module settings {self.name} --tpm (with its other settings), and start the guest with it"
            raise errors.WrongState("TPM", f"module {self.name} is no TPM", hint)

    def demand_unplugged(self) -> None:
        """A machine that runs would lose what it has sealed to its TPM.  Raises WrongState."""
        if self.plugged:
            hint = "keep --tpm and --tpm-key among the settings, which are all given anew; or end the machine first"
            raise errors.WrongState("TPM", f"the TPM of module {self.name} is that of a machine that runs ({self.peer})", hint)

    def serving(self) -> TpmProcess:
        """Returns the process.  Raises ServiceError where there is none."""
        self.demand_enabled()
        if self.life.process is None or self.life.state != SERVING:
            why = self.life.failure or "it is being started"
            raise errors.Unavailable("TPM", f"the TPM of module {self.name} does not run: {why}", "see hsmvisor module show")
        return self.life.process

    # ---- the end ------------------------------------------------------------------------------------------------

    async def end(self, *, leave: bool) -> None:
        """Lets go of everything; the process is left to the next service, with who is connected, or ended."""
        self.close()
        await self.life.end(leave=leave)

    def close(self) -> None:
        """Takes nobody any more."""
        for intake in self._intakes:
            intake.close()
        self._intakes = []
        self._drop()
        self._told_change()

    def _drop(self) -> None:
        if self._waiting is not None:
            self._waiting.close()
        self._forget_kept()
        self._waiting, self.peer = None, ""


def _busy_memory() -> int:
    """Returns the descriptor of memory for PlugTpm.  Raises OSError."""
    descriptor = os.memfd_create("tpm-busy", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, TPM_BUSY_SIZE)
    return descriptor


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
