"""One module in its worker: keystore, token, listener and the threads around them; answers the supervisor's requests.

Threads: the main thread reads the control connection (link.py); `commands` carries out requests and ends drains; `clock`
answers parked calls and sends events; up to four are the reactor's, and one waits for the host where guests log in.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections import Counter
from functools import partial
from typing import Any, NoReturn

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.descriptors import close_descriptors
from hsmvisor_rpc.internal.phases import Phase
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record
from hsmvisor_rpc.sealed.commands import Command
from hsmvisor_rpc.sealed.refusal import Refusal

from hsmvisord import ck, memory
from hsmvisord.ck import CkError
from hsmvisord.confined import sandbox
from hsmvisord.confined.link import Incoming, Link, Refused
from hsmvisord.crypto.hardware.channel import Away
from hsmvisord.keystore import persistence
from hsmvisord.keystore.keystore import Cause, Happening, Keystore, StorageError, is_compromised
from hsmvisord.keystore.persistence import SealedChange
from hsmvisord.keystore.state import State
from hsmvisord.keystore.vault import KEY_SIZE, UnsealError, Vault
from hsmvisord.token.application import Application
from hsmvisord.token.token import Settings, Token
from hsmvisord.transport.connection import Connection
from hsmvisord.transport.listener import Listener
from hsmvisord.transport.parking import Parking
from hsmvisord.worker import reports
from hsmvisord.worker.cryptoprocessor import Cryptoprocessor
from hsmvisord.worker.plug import NoDevice, Plug
from hsmvisord.worker.settings import parse_card, parse_settings, parse_tpm
from hsmvisord.worker.succession import Arrival, Departure, Stream, SuccessionFailed, looks
from hsmvisord.worker.tpm_keys import TpmKeys
from hsmvisord.worker.usb_plug import UsbPlug
from hsmvisord.worker.violations import Violations
from hsmvisord.worker.visits import Visits

TICK = 1.0  #: seconds between looks at drains
MAX_STATE = 256 * 1024 * 1024  #: bytes of a stored state
RELEASE = "0.1.0"


class Module:
    def __init__(self, spawn: m.Spawn, link: Link, guest: socket.socket, key_pipe: int, measures: list[dict[str, Any]]) -> None:
        self._spawn, self._link, self._guest, self._key_pipe, self._measures = spawn, link, guest, key_pipe, measures
        self._crypto = Cryptoprocessor()
        self._parking = Parking(time.monotonic)
        self._visits = Visits(self._tell, time.monotonic)
        self._wake = threading.Event()
        self._violations = Violations(self._tell, time.monotonic, self._wake.set)
        self._loaded: dict[str, bytes] = {}
        self._token: Token | None = None
        self._listener: Listener | None = None
        self._began = time.monotonic()
        self._destroyed = False
        self._departure: Departure | None = None
        self._plug = Plug(self._take_connection, link.announce)
        self._usb = UsbPlug(self._take_connection, lambda record: link.announce(record, []))
        self._tpm = TpmKeys(lambda failure: self._tell("tpm-keys", failure=failure))
        self._came: tuple[socket.socket, str] | None = None  #: a connection that is taken once that is answered

    def start(self) -> None:
        self._link.on_hardware = lambda incoming: memory.start_thread("hardware", partial(self._use_next_helper, incoming))
        memory.start_thread("commands", self._commands)
        memory.start_thread("clock", self._clock)

    # ---- the supervisor's requests ------------------------------------------------------------------------------

    def _commands(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                self._answer(self._link.requests.get(timeout=TICK))
            if lacking := memory.follow():
                sandbox.withdraw(self._measures, "memory", lacking)
            if self._token is not None:
                with contextlib.suppress(StorageError):  # tried again at the next tick
                    self._token.keystore.tick()
                self._forget_keys()

    def _answer(self, incoming: Incoming) -> None:
        descriptors: list[int] = []
        reply: Record
        try:
            if isinstance(incoming.message, m.Attach):
                reply = self._attached()
                if self._link.phase is Phase.SERVING:
                    descriptors = [self._guest.fileno()]
            elif isinstance(incoming.message, m.QueryDevice):
                reply, descriptors = self._plug.query()
            else:
                reply = self._carry_out(incoming)
        except Refusal as refusal:
            reply = m.Error(refusal.reason, refusal.detail)
        except StorageError as error:
            reply = m.Error(m.REASON_STORAGE, str(error))
        except SuccessionFailed as error:
            reply = m.Error(m.REASON_SUCCESSION, str(error))
        except Away as error:
            reply = m.Error(m.REASON_HSM, str(error))
        except NoDevice as error:
            reply = m.Error(m.REASON_DEVICE, str(error))
        except (UnsealError, MalformedRecord) as error:
            reply = m.Error(m.REASON_UNSEALED, str(error))
        except ValueError as error:
            reply = m.Error("INVALID", str(error))
        except Exception as error:
            self._fault(type(incoming.message).__name__, error)
            reply = m.Error(m.REASON_INTERNAL, f"{type(error).__name__} in the worker")
        incoming.reply(reply, descriptors)
        if self._came is not None:
            came, self._came = self._came, None
            self._take_connection(*came)
        if isinstance(incoming.message, m.QueryDevice):
            close_descriptors(descriptors)
        if isinstance(incoming.message, m.Shutdown):
            os._exit(0)
        if self._link.phase is Phase.LEAVING and self._departure is not None:
            self._leave(self._departure)

    def _attached(self) -> m.Attached:
        keystore = self._token.keystore if self._token else None
        return m.Attached(
            protocol=m.PROTOCOL,
            phase=str(self._link.phase),
            module_id=self._spawn.module_id,
            name=self._spawn.name,
            pid=os.getpid(),
            recipient=keystore.recipient_public if keystore else b"",
            root=keystore.state.root if keystore else b"",
            report=self._report(),
        )

    def _report(self, **more: Any) -> str:
        return json.dumps({"measures": self._measures, "release": RELEASE, **more})

    def _carry_out(self, incoming: Incoming) -> Record:
        message = incoming.message
        match message:
            case m.LoadState():
                self._loaded.update(zip(message.names, message.blobs, strict=True))
                if sum(map(len, self._loaded.values())) > MAX_STATE:
                    raise ValueError(f"a module's state has at most {MAX_STATE} bytes")
                return m.Done()
            case m.UseHsm():
                self._crypto.use(_connected(incoming.descriptors))
                return m.Done()
            case m.Boot():
                return self._boot(message)
            case m.Succeed():
                return self._succeed(message, Stream(_socket(incoming.descriptors)))
            case m.HandOver():
                return self._hand_over(Stream(_socket(incoming.descriptors)), message.linger_ms / 1000)
            case m.PlugDevice():
                self._plug.plug(message.plug, message.cid, message.state, incoming.descriptors)
                return m.Done()
            case m.PlugUsb():
                assert self._token is not None, "the phase table lets no importer in before"
                self._usb.plug(message, _connected(incoming.descriptors), self._token)
                return m.Done()
            case m.UnplugUsb():
                self._usb.unplug()
                return m.Done()
            case m.QueryUsb():
                return self._usb.query()
            case m.ServeTpm():
                assert self._token is not None, "the phase table lets no TPM in before"
                self._tpm.serve(_connected(incoming.descriptors), self._token)
                return m.Done()
            case m.TakeConnection():
                self._came = _connected(incoming.descriptors), message.peer
                return m.Done()
            case m.DropConnections():
                assert self._listener is not None, "the phase table lets nothing else through"
                self._listener.drop(message.peer)
                return m.Done()
            case m.Shutdown():
                self._link.phase = Phase.CLOSING
                self._drain(message.drain_ms / 1000)
                self._plug.unplug()  # streams are reset: nobody of the guest waits for what does not come
                self._usb.unplug()
                return m.Done()
        assert self._token is not None, "the phase table lets nothing else through"
        return self._serve(self._token, message)

    def _serve(self, token: Token, message: Record) -> Record:
        match message:
            case m.Execute():
                executed = self._execute(token, message)
                self._forget_keys()
                return executed
            case m.QueryStatus():
                connections = self._listener.connections if self._listener else 0
                return m.Report(reports.status_report(token, connections, self._measures))
            case m.QueryStatistics():
                return m.Report(self._statistics(token))
            case m.Configure():
                settings, card = parse_settings(message.settings), parse_card(message.settings)
                by_tpm = parse_tpm(message.settings)
                self._crypto.check(settings.cryptoprocessor)
                token.settings = settings
                self._usb.configure(card)
                self._tpm.configure(by_tpm)
                self._log_signatures(token)
                return m.Done()
            case m.SetPin():
                token.keystore.set_pin(message.pin, Cause(message.request_id, lambda state: m.Done().encode()))
                return m.Done()
            case m.Freeze():
                frozen = m.Frozen(token.keystore.freeze())
                self._crypto.retire(True)
                return frozen
            case m.Thaw():
                token.keystore.thaw()
                self._crypto.retire(False)
                self._wake.set()
                return m.Done()
            case m.SetTokenPresent():
                token.keystore.set_token_present(message.present)
                return m.Done()
        raise ValueError(f"unexpected {message.TYPE}")

    def _execute(self, token: Token, message: m.Execute) -> Record:
        made: list[m.Executed] = []

        def cause(command: Command, signer: str) -> Cause:
            def reply(state: State) -> bytes:
                material = state.materials.get(command.material)
                usage, holders = token.usage(), Counter(token.holders())
                report = reports.material_report(state, material, usage, holders) if material else {}
                made.append(
                    m.Executed(
                        command.action,
                        command.material,
                        command.generation,
                        command.sequence,
                        signer,
                        json.dumps(report),
                        is_compromised(command),
                    )
                )
                return made[-1].encode()

            return Cause(message.request_id, reply)

        token.keystore.execute(message.command, cause)
        return made[-1]

    def _forget_keys(self) -> None:
        destroyed, self._destroyed = self._destroyed, False
        self._crypto.forget(destroyed, self._token.keystore.state.version if self._token else 0)

    def _use_next_helper(self, incoming: Incoming) -> None:
        """A thread of its own: a command may wait for the hardware meanwhile."""
        reply: Record = m.Done()
        try:
            self._crypto.go_on(_connected(incoming.descriptors))
        except Away as error:
            reply = m.Error(m.REASON_HSM, str(error))
        except ValueError as error:
            reply = m.Error("INVALID", str(error))
        incoming.reply(reply, [])

    def _statistics(self, token: Token) -> str:
        listener = self._listener
        return reports.statistics_report(
            token.statistics(),
            connections=listener.connections if listener else 0,
            sessions=token.sessions,
            connections_total=listener.accepted if listener else 0,
            connections_refused=listener.refused if listener else 0,
            lanes=listener.reactor.lanes if listener else 0,
            uptime_seconds=time.monotonic() - self._began,
            resident_bytes=memory.size(),
        )

    # ---- boot and end -------------------------------------------------------------------------------------------

    def _boot(self, boot: m.Boot) -> m.Booted:
        self._link.phase = Phase.BOOTING
        settings = parse_settings(boot.settings)
        self._usb.configure(parse_card(boot.settings))
        self._tpm.configure(parse_tpm(boot.settings))
        self._crypto.check(settings.cryptoprocessor)
        vault = Vault(self._spawn.module_id, self._storage_key())
        keystore = self._load(boot.host_id, boot.version, vault) if boot.version else self._create(boot, vault)
        self._crypto.sweep()
        self._make_token(keystore, settings)[1].start()
        self._link.phase = Phase.SERVING
        return self._booted(keystore)

    def _booted(self, keystore: Keystore, **more: Any) -> m.Booted:
        return m.Booted(keystore.recipient_public, keystore.state.root, self._report(**more))

    def _make_token(self, keystore: Keystore, settings: Settings) -> tuple[Token, Listener]:
        self._loaded.clear()
        token = Token(self._spawn.name, keystore, self._crypto.provider, time.time, time.monotonic)
        token.policing.told = self._violations.refused
        token.settings = settings
        token.on_change = self._token_changed
        token.on_fault = self._fault
        keystore.happened = self._happened
        keystore.move_tpm = self._tpm.move
        keystore.usage = token.usage
        keystore.watch_clock(time.monotonic)
        self._token = token
        self._log_signatures(token)
        self._listener = Listener(self._guest, token, self._parking, self._visits.began, self._visits.ended)
        self._listener.reactor.failed = self._failed
        return token, self._listener

    def _token_changed(self) -> None:
        self._wake.set()
        self._usb.look()
        self._tpm.look()

    def _storage_key(self) -> bytes:
        with open(self._key_pipe, "rb", buffering=0) as pipe:
            key = pipe.read(KEY_SIZE)
        if len(key) != KEY_SIZE:
            raise UnsealError("the key provider gave no storage key")
        return key

    def _load(self, host_id: bytes, version: int, vault: Vault) -> Keystore:
        try:
            state, recipient, manifest = persistence.load(self._loaded, vault, self._crypto.provider, version)
        except CkError as error:
            raise UnsealError(f"a stored key cannot be used: {error}") from None
        if state.module_id != self._spawn.module_id or state.host_id != host_id:
            raise UnsealError("the stored state is of another module or host")
        return Keystore(state, recipient, manifest, vault, self._crypto.provider, time.time, self._persist)

    def _create(self, boot: m.Boot, vault: Vault) -> Keystore:
        if len(boot.root) != 32:
            raise ValueError("a root is a raw Ed25519 public key of 32 bytes")
        return Keystore.create(
            self._spawn.module_id, boot.host_id, boot.root, boot.created_at, vault, self._crypto.provider, time.time, self._persist
        )

    def _persist(self, change: SealedChange, request_id: str, result: bytes) -> None:
        try:
            self._link.store(
                m.StoreState(change.version, request_id, result, tuple(change.put), tuple(change.put.values()), change.delete)
            )
        except Refused as refused:
            raise StorageError(f"the host could not store the change: {refused}") from None

    def _drain(self, seconds: float) -> None:
        """No new connections; gives operations that run the time to end."""
        if self._listener is None:
            return
        self._listener.stop()
        until = time.monotonic() + seconds
        while self._listener.connections and time.monotonic() < until:
            time.sleep(0.005)
        self._link.flush()

    # ---- a successor --------------------------------------------------------------------------------------------

    def _succeed(self, message: m.Succeed, stream: Stream) -> m.Booted:
        """Serves as soon as it has what the old worker could give at once; the rest comes in the background."""
        self._link.phase = Phase.BOOTING
        settings = parse_settings(message.settings)
        self._usb.configure(parse_card(message.settings))
        self._tpm.configure(parse_tpm(message.settings))
        self._crypto.check(settings.cryptoprocessor)
        keystore = self._load(message.host_id, message.version, Vault(self._spawn.module_id, self._storage_key()))
        token, listener = self._make_token(keystore, settings)
        arrival = Arrival(token, listener, stream, self._connection, self._plug)
        stream.say_ready()
        more = arrival.take()
        listener.start()
        self._link.phase = Phase.SERVING
        if more:
            memory.start_thread("arrival", partial(self._take_late, arrival))
        return self._booted(keystore, operations_lost=arrival.operations_lost)

    def _take_connection(self, sock: socket.socket, peer: str) -> None:
        """Of a virtual machine."""
        assert self._listener is not None, "the phase table lets neither device nor connection in before"
        self._listener.take(sock, peer)

    def _connection(self, sock: socket.socket, peer: str, refused: bool) -> Connection:
        assert self._token is not None
        return Connection(sock, peer, self._token, self._parking, refused, self._visits.began)

    def _take_late(self, arrival: Arrival) -> None:
        try:
            arrival.take()
        except SuccessionFailed as error:
            print(f"module {self._spawn.name}: the old worker's last connections are lost: {error}", file=sys.stderr, flush=True)

    def _hand_over(self, stream: Stream, linger: float) -> m.HandedOver:
        assert self._token is not None and self._listener is not None, "the phase table lets nothing else through"
        stream.await_ready()
        departure = Departure(self._token, self._listener, stream, self._plug, linger)
        self._usb.unplug("the worker is replaced")  # its importer connects again, and the successor is its device
        self._listener.end_lanes()
        try:
            departure.give_device()
            lingering = self._listener.reactor.ask(departure.begin)
        except Exception:
            self._listener.go_on()
            self._plug.resume()
            raise
        self._link.phase, self._departure = Phase.LEAVING, departure
        return m.HandedOver(departure.applications, departure.connections, lingering)

    def _leave(self, departure: Departure) -> NoReturn:
        """Serves those that linger until they can be given too, and ends."""
        assert self._listener is not None
        with contextlib.suppress(SuccessionFailed):
            for last in looks(departure.linger):
                if not self._listener.reactor.ask(partial(departure.give, last)) or last:
                    break
        departure.stream.close()
        self._link.flush()
        os._exit(0)

    # ---- events -------------------------------------------------------------------------------------------------

    def _clock(self) -> None:
        while True:
            pause = min(TICK, max(0.0, self._parking.next_deadline - time.monotonic()))
            self._wake.wait(pause)
            self._wake.clear()
            self._parking.serve()
            self._visits.count()
            self._violations.count()
            self._link.flush()

    def _tell(self, kind: str, **report: Any) -> None:
        self._link.tell(m.Event(kind, int(time.time() * 1000), json.dumps(report)))

    def _happened(self, happening: Happening) -> None:
        self._tell(happening.kind, **happening.report)
        self._destroyed |= happening.kind == "generation-destroyed"
        self._wake.set()

    def _log_signatures(self, token: Token) -> None:
        def told(application: Application, operation: str, mechanism: int, generation: tuple[str, int] | None) -> None:
            material, number = generation or ("", 0)
            self._tell(
                "signature",
                operation=operation,
                mechanism=ck.mechanism_name(mechanism),
                material=material,
                generation=number,
                program=application.program,
            )

        token.on_signature = told if token.settings.log_signatures else None

    def _failed(self, error: BaseException) -> None:
        """Without its reactor a module answers nobody: another worker takes its place."""
        try:
            self._fault("the reactor", error)
        finally:
            os._exit(1)

    def _fault(self, what: str, error: BaseException) -> None:
        """A fault of ours: where, never what (the text of an exception may hold a guest's bytes)."""
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        place = f"{os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno}" if frame else "?"
        print(f"module {self._spawn.name}: fault in {what}: {type(error).__name__} at {place}", file=sys.stderr, flush=True)


def _connected(descriptors: list[int]) -> socket.socket:
    """Returns the connection that came; raises ValueError."""
    if len(descriptors) != 1:
        close_descriptors(descriptors)
        raise ValueError("there is no connection to take")
    sock = socket.socket(fileno=descriptors[0])
    if sock.type != socket.SOCK_STREAM:
        sock.close()
        raise ValueError("a connection is a stream")
    return sock


def _socket(descriptors: list[int]) -> socket.socket:
    if len(descriptors) != 1:
        close_descriptors(descriptors)
        raise SuccessionFailed("there is no socket to the other worker")
    return socket.socket(fileno=descriptors[0])
