"""One module's TPM in its process: answers the supervisor's requests; what it keeps, it has the supervisor store.

Threads: the main thread reads the control connection (confined/link.py); `requests` carries out what the supervisor asks; one for
the worker that says which keys are wanted; QEMU's two, and one for each connection of the TSS.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import time
from base64 import b64encode
from typing import Any

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.descriptors import close_descriptors
from hsmvisor_rpc.internal.phases import Phase
from hsmvisor_rpc.sealed.canonical import Record

from hsmvisord import limits, memory
from hsmvisord.budget import Pace
from hsmvisord.confined import sandbox
from hsmvisord.confined.link import Incoming, Link, Refused
from hsmvisord.tpm import stored
from hsmvisord.tpm.blobs import Blobs
from hsmvisord.tpm.connections import Connections
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.tpm.keys import Keys
from hsmvisord.tpm.library import NoLibrary
from hsmvisord.tpm.managed import Asleep, ManagedTpm
from hsmvisord.tpm.seals import Seals
from hsmvisord.tpm.server import Server
from hsmvisord.tpm.stored import NotOpened, Sealer
from hsmvisord.tpm.stream import Busy
from hsmvisord.wire.tpm2 import BadResponse, Tpm2Error

TICK = 1.0  #: seconds between looks at memory and events
_STARTUP_CLEAR = bytes.fromhex("80010000000c000001440000")


class TpmProcess:
    def __init__(self, spawn: m.Spawn, link: Link, key_pipe: int, measures: list[dict[str, Any]]) -> None:
        self._spawn, self._link, self._key_pipe, self._measures = spawn, link, key_pipe, measures
        self._version = 0
        self._failure = ""
        self._firmware = True
        self._public: dict[str, tuple[bytes, ...]] = {}
        self._stores = Pace(limits.TPM_STORE_BURST, limits.TPM_STORE_RATE, time.monotonic)
        self._sealer: Sealer | None = None
        self._to_successor: Sealer | None = None
        self._managed: ManagedTpm | None = None
        self._server: Server | None = None
        self._keys: Keys | None = None
        self._connections: Connections | None = None

    def start(self) -> None:
        memory.start_thread("requests", self._requests)

    # ---- the supervisor's requests ------------------------------------------------------------------------------

    def _requests(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                self._answer(self._link.requests.get(timeout=TICK))
            if lacking := memory.follow():
                sandbox.withdraw(self._measures, "memory", lacking)
            self._link.flush()

    def _answer(self, incoming: Incoming) -> None:
        descriptors: list[int] = []
        reply: Record
        try:
            reply, descriptors = self._carry_out(incoming)
        except NotOpened as error:
            reply = m.Error(m.REASON_UNSEALED, str(error))
        except Refused as error:
            reply = m.Error(m.REASON_STORAGE, str(error))
        except Asleep:
            reply = m.Error(m.REASON_TPM, "the guest has not started its TPM, or sleeps")
        except (NoLibrary, TpmFault, Tpm2Error, BadResponse, OSError) as error:
            reply = m.Error(m.REASON_TPM, str(error))
        except ValueError as error:
            reply = m.Error("INVALID", str(error))
        except Exception as error:
            print(
                f"tpm of {self._spawn.name}: {type(error).__name__} in {type(incoming.message).__name__}",
                file=sys.stderr,
                flush=True,
            )
            reply = m.Error(m.REASON_INTERNAL, f"{type(error).__name__} in the TPM's process")
        incoming.reply(reply, descriptors)
        if isinstance(incoming.message, m.Attach) and self._connections is not None:
            self._connections.tell()  # a supervisor that has just begun knows of no machine
        if isinstance(incoming.message, m.Shutdown) or self._link.phase is Phase.LEAVING:
            os._exit(0)

    def _carry_out(self, incoming: Incoming) -> tuple[Record, list[int]]:
        message = incoming.message
        match message:
            case m.Attach():
                return self._attached(), []
            case m.BootTpm():
                return self._boot(message.version, message.sealed, message.firmware), []
            case m.SucceedTpm():
                return self._succeed(message, incoming.descriptors), []
            case m.Shutdown():
                self._link.phase = Phase.CLOSING
                if self._connections is not None:
                    self._connections.unplug()
                return m.Done(), []
        assert self._managed and self._connections and self._keys, "the phase table lets nothing else through"
        match message:
            case m.IdentifyTpm():
                return self._identified(self._managed), []
            case m.CertifyTpm():
                self._managed.certify(message.rsa, message.p256, message.platform)
                self._public["certificates"] = self._managed.certificates()
            case m.TakeKeys():
                self._keys.take(_connection(incoming.descriptors))
            case m.PlugTpm():
                self._plug(message, incoming.descriptors)
            case m.QuoteTpm():
                quoted = self._managed.quote(message.nonce, message.pcrs)
                return m.TpmQuoted(quoted.attest, quoted.signature, quoted.values), []
            case m.HandOverTpm():
                return self._hand_over()
            case _:
                raise ValueError(f"unexpected {message.TYPE}")
        return m.Done(), []

    def _attached(self) -> m.Attached:
        keys = {name: [b64encode(key).decode() for key in of] for name, of in self._public.items()}
        told = {"measures": self._measures, "resident_bytes": memory.size(), "firmware": self._firmware, **keys}
        report = json.dumps(told)
        phase, spawn = str(self._link.phase), self._spawn
        return m.Attached(m.PROTOCOL, phase, spawn.module_id, spawn.name, os.getpid(), b"", b"", report)

    # ---- boot ---------------------------------------------------------------------------------------------------

    def _boot(self, version: int, sealed: bytes, firmware: bool) -> m.TpmBooted:
        self._link.phase = Phase.BOOTING
        made = stored.keys(self._key())
        module_id = self._spawn.module_id
        self._sealer = Sealer(made.stored, module_id, b"stored")
        self._to_successor = Sealer(made.successor, module_id, b"successor")
        permanent = self._sealer.open(version, sealed) if version else b""
        self._version, self._firmware = version, firmware
        self._managed = ManagedTpm(permanent, self._store, self._said, firmware)
        if not version:
            self._managed.manufacture()
        seals = Seals(Blobs(made.blobs, module_id), self._said)
        self._server = Server(self._managed, seals, self._said)
        self._keys = Keys(self._managed, seals, self._keys_told)
        self._connections = Connections(self._server, self._link.announce)
        booted = self._identified(self._managed)
        self._link.phase = Phase.SERVING
        return booted

    def _identified(self, managed: ManagedTpm) -> m.TpmBooted:
        keys, attesting, certificates = managed.endorsement_keys(), managed.attestation_key(), managed.certificates()
        self._public = {"endorsement_keys": keys, "attestation_key": (attesting,), "certificates": certificates}
        return m.TpmBooted(keys, attesting, certificates, json.dumps({"measures": self._measures}))

    def _succeed(self, asked: m.SucceedTpm, descriptors: list[int]) -> m.TpmBooted:
        try:
            booted = self._boot(asked.version, asked.sealed, asked.firmware)
            assert self._managed and self._server and self._connections and self._to_successor
            if asked.state:
                handed = self._to_successor.open(asked.version, asked.state)
                self._server.locality = handed[0]
                self._managed.resume(handed[3:], bool(handed[1]), bool(handed[2]))
            if len(descriptors) > 1:
                busy, *connected = descriptors
                sockets = [socket.socket(fileno=os.dup(descriptor)) for descriptor in connected[:2]]
                self._connections.plug_in(asked.plug, Busy(busy), *sockets)
            return booted
        finally:
            close_descriptors(descriptors)

    def _key(self) -> bytes:
        with open(self._key_pipe, "rb", buffering=0) as pipe:
            key = pipe.read(stored.KEY_SIZE)
        if len(key) != stored.KEY_SIZE:
            raise NotOpened("the key provider gave no key")
        return key

    def _hand_over(self) -> tuple[Record, list[int]]:
        assert self._managed and self._server and self._connections and self._to_successor
        with self._server.parting():
            volatile, awake, barred = self._managed.freeze()
        self._link.phase = Phase.LEAVING
        state = self._to_successor.seal(self._version, bytes([self._server.locality, awake, barred]) + volatile)
        plug, descriptors = self._connections.hand_over()
        return m.TpmHandedOver(state, plug, len(descriptors)), descriptors

    # ---- the guest's side ---------------------------------------------------------------------------------------

    def _plug(self, asked: m.PlugTpm, descriptors: list[int]) -> None:
        assert self._managed and self._connections
        sock = _connection(descriptors[:1])
        try:
            if asked.kind == m.QEMU and len(descriptors) > 1:
                self._connections.plug_in(asked.plug, Busy(descriptors[1]), sock)
                return
        finally:
            close_descriptors(descriptors[1:])
        if asked.kind not in m.TPM_CONNECTIONS:
            sock.close()
            raise ValueError(f"a connection of kind {asked.kind[:20]!r}")
        if not self._managed.tpm.on and not self._connections.plug:  # no machine switches it on: it is, for the TSS
            self._managed.switch_on(machine=False)
            self._managed.process(_STARTUP_CLEAR)
        self._connections.serve_tss(asked.kind, sock)

    # ---- what is kept and told ----------------------------------------------------------------------------------

    def _store(self, permanent: bytes) -> None:
        """Raises OSError."""
        assert self._sealer is not None
        while not self._stores.may():
            time.sleep(1 / limits.TPM_STORE_RATE)
        self._stores.take()
        change = m.StoreTpm(self._version + 1, self._sealer.seal(self._version + 1, permanent))
        try:
            self._link.store(change)
        except Refused as error:
            raise OSError(str(error)) from None
        self._version += 1

    def _said(self, text: str) -> None:
        self._tell("tpm-said", {"text": text})

    def _keys_told(self, failure: str) -> None:
        if failure != self._failure:
            self._failure = failure
            self._tell("tpm-keys", {"failure": failure})

    def _tell(self, kind: str, report: dict[str, str]) -> None:
        self._link.tell(m.Event(kind, int(time.time() * 1000), json.dumps(report)))


def _connection(descriptors: list[int]) -> socket.socket:
    """Raises ValueError."""
    if len(descriptors) != 1:
        raise ValueError("it comes with a socket")
    try:
        return socket.socket(fileno=descriptors[0])
    except OSError:
        close_descriptors(descriptors)
        raise ValueError("what came is no socket") from None
