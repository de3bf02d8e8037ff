"""A module without a host: launcher, key provider and worker driven by a scripted supervisor, for tests of the daemon alone."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hsmvisor.environment import child_environment
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.sealed import commands, envelope
from hsmvisor_rpc.sealed.canonical import Record, record_type

REPLIES = {
    c.TYPE: c
    for c in (
        m.Done,
        m.Error,
        m.Spawned,
        m.Report,
        m.Attached,
        m.Booted,
        m.Executed,
        m.StoreState,
        m.Event,
        m.DeviceState,
        m.DeviceGone,
    )
}
HOST_ID = b"h" * 32


class Peer:
    """One end of an internal socket, blocking; requests that come meanwhile are answered by `serve`."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self._reader, self._next = sock, FrameReader(), 1
        self.descriptors: list[int] = []
        self.events: list[m.Event] = []
        self.serve = lambda message: m.Done()
        self._frames: list[Frame] = []

    def ask(self, message: Record, descriptors: list[int] = ()) -> Record:  # type: ignore[assignment]
        ident, self._next = self._next, self._next + 1
        self.send(Frame(ident, Kind.REQUEST, message.encode()), list(descriptors))
        while True:
            frame = self.frame()
            record = REPLIES[record_type(frame.payload)].decode(frame.payload)
            if frame.kind is Kind.REQUEST:
                self.send(Frame(frame.id, Kind.REPLY, self.serve(record).encode()), [])
            elif frame.kind is Kind.NOTIFICATION:
                self.events.append(record)
            elif frame.id == ident:
                return record

    def send(self, frame: Frame, descriptors: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        data = encode_frame(frame)
        sent = self.sock.sendmsg([data], rights)
        if rest := data[sent:]:  # a worker that was told to end may be gone by now
            self.sock.sendall(rest)

    def frame(self) -> Frame:
        while not self._frames:
            data, ancillary, _, _ = self.sock.recvmsg(1 << 16, socket.CMSG_SPACE(64))
            if not data:
                raise EOFError("the peer has closed")
            for _, _, content in ancillary:
                self.descriptors += array.array("i", content)
            self._frames += self._reader.feed(data)
        return self._frames.pop(0)


def start(module: str, *arguments: str) -> tuple[subprocess.Popen[bytes], Peer]:
    ours, theirs = socket.socketpair()
    environment = os.environ | child_environment()
    command = [sys.executable, "-m", module, "--control-fd", str(theirs.fileno()), *arguments]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
    theirs.close()
    return process, Peer(ours)


@dataclass
class BareWorker:
    """`store` holds the sealed state as the host would."""

    directory: Path
    name: str = "web-1"
    uid: int = 0
    root: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    module_id: bytes = b"m" * 16
    store: dict[str, bytes] = field(default_factory=dict)
    version: int = 0
    sequence: int = 0
    boots: bool = True  #: else it stays as it was forked

    def __post_init__(self) -> None:
        self.launcher_process, self.launcher = start("hsmvisord.launcher.main")
        provider = ("--uid", str(max(0, self.uid - 1)), "--path", str(self.directory / "master.key"))
        self.provider_process, self.provider = start("hsmvisord.keyprovider.main", *provider)
        self.guest_path = self.directory / "guest.sock"
        self._control_path = self.directory / "control.sock"
        self.boot()

    def _listener(self, path: Path) -> socket.socket:
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(path))
        path.chmod(0o666)
        sock.listen(128)
        return sock

    def boot(self) -> None:
        control, guest = self._listener(self._control_path), self._listener(self.guest_path)
        read, write = os.pipe()
        assert isinstance(self.provider.ask(m.DeriveKey(self.module_id), [write]), m.Done)
        os.close(write)
        spawn = m.Spawn(self.module_id, self.name, self.uid, os.getuid(), ())
        spawned = self.launcher.ask(spawn, [control.fileno(), guest.fileno(), read])
        os.close(read)
        control.close()
        self.guest_listener = guest
        assert isinstance(spawned, m.Spawned)
        self.pid = spawned.pid
        self.attach()
        if not self.boots:
            return
        if self.store:
            self.ask(m.LoadState(tuple(self.store), tuple(self.store.values())))
        root = commands.raw_public(self.root.public_key())
        booted = self.ask(m.Boot(HOST_ID, root, self.version, int(time.time()), "{}"))
        assert isinstance(booted, m.Booted), booted
        self.recipient = booted.recipient
        self.booted = booted

    def attach(self) -> m.Attached:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self._control_path))
        self.worker = Peer(sock)
        self.worker.serve = self._store
        attached = self.ask(m.Attach(m.PROTOCOL, self.version))
        assert isinstance(attached, m.Attached)
        return attached

    def _store(self, message: Record) -> Record:
        assert isinstance(message, m.StoreState)
        if message.version == self.version + 1:
            self.store.update(zip(message.put_names, message.put_blobs, strict=True))
            for name in message.delete_names:
                del self.store[name]
            self.version = message.version
        return m.Done()

    def ask(self, message: Record) -> Record:
        return self.worker.ask(message)

    def command(self, action: str, material: str, generation: int, body: Record | None = None, **changes: object) -> bytes:
        now = int(time.time())
        values = {
            "action": action, "host_id": HOST_ID, "module_id": self.module_id, "sequence": self.sequence + 1, "issued_at": now,
            "expires_at": now + 600, "material": material, "generation": generation, "body": body.encode() if body else b"",
        }  # fmt: skip
        return commands.Signer(self.root).sign(commands.Command(**(values | changes)))  # type: ignore[arg-type]

    def execute(self, *arguments: object, **changes: object) -> Record:
        reply = self.ask(m.Execute("", self.command(*arguments, **changes)))  # type: ignore[arg-type]
        if isinstance(reply, m.Executed):
            self.sequence = reply.sequence
        return reply

    def stage_body(
        self, material: str, generation: int, pkcs8: bytes, spki: bytes, chain: tuple[bytes, ...] = (), **changes: object
    ) -> commands.Stage:
        context = envelope.EnvelopeContext(
            HOST_ID, self.module_id, envelope.recipient_fingerprint(self.recipient), material, generation, int(time.time()) + 600
        )
        sealed = envelope.seal(envelope.KeyMaterial(pkcs8), self.recipient, context)
        values = {
            "public_key": spki, "certificates": chain, "envelope": sealed, "mode": "pin", "profile": "any", "alias_id": b"",
            "drain_seconds": 0, "after_drain": "extend", "on_expiry": "keep", "self_signed": False,
        }  # fmt: skip
        return commands.Stage(**(values | changes))  # type: ignore[arg-type]

    def push(
        self, material: str, generation: int, pkcs8: bytes, spki: bytes, chain: tuple[bytes, ...] = (), **changes: object
    ) -> None:
        body = self.stage_body(material, generation, pkcs8, spki, chain, **changes)
        staged = self.execute("stage", material, generation, body)
        assert isinstance(staged, m.Executed), staged
        activated = self.execute("activate", material, generation)
        assert isinstance(activated, m.Executed), activated

    def stop(self) -> None:
        with contextlib.suppress(EOFError, OSError):  # it has ended
            self.ask(m.Shutdown(0))
        self.launcher.sock.close()
        self.provider.sock.close()
        self.launcher_process.wait(10)
        self.provider_process.wait(10)
