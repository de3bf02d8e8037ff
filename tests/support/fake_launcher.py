"""A launcher whose workers do what no honest one does; a module's name says what.  Speaks the internal protocol."""

from __future__ import annotations

import argparse
import array
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.sealed.canonical import record_type


class FakeWorker:
    """`misbehave` is called when the phase of its scenario is reached."""

    def __init__(self, spawn: m.Spawn, control: int, guest: int) -> None:
        self.spawn, self.guest = spawn, guest
        self.phase = "empty"
        self.scenario = spawn.name
        self.sock, _ = socket.socket(fileno=control).accept()
        self.reader = FrameReader()
        self.replies: list[Frame] = []

    def send(self, kind: Kind, ident: int, record: m.Record, descriptors: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.sock.sendmsg([encode_frame(Frame(ident, kind, record.encode()))], rights)

    def store(self, version: int, request_id: str = "", result: bytes = b"") -> str:
        """Returns the type of the answer, or its reason."""
        self.send(Kind.REQUEST, 1, m.StoreState(version, request_id, result, ("a",), (b"x",), ()))
        waiting = []
        while (frame := self.next()).kind is Kind.REQUEST:
            waiting.append(frame)
        self.replies[:0] = waiting
        return m.Error.decode(frame.payload).reason if frame.kind is Kind.ERROR else record_type(frame.payload)

    def next(self) -> Frame:
        while not self.replies:
            data = self.sock.recv(65536)
            if not data:
                os._exit(0)
            self.replies += self.reader.feed(data)
        return self.replies.pop(0)

    def run(self) -> None:
        while True:
            frame = self.next()
            name = record_type(frame.payload)
            if name == "attach":
                if self.scenario == "speaks-early":
                    self.send(Kind.REQUEST, 1, m.StoreState(1, "", b"", (), (), ()))
                pid = 1 if self.scenario == "another-pid" else os.getpid()
                module_id, phase = self.spawn.module_id, self.phase
                attached = m.Attached(1, phase, module_id, self.spawn.name, pid, b"", b"", "{}")
                data = encode_frame(Frame(frame.id, Kind.REPLY, attached.encode()))
                if self.scenario == "stores-before-boot":
                    data += encode_frame(Frame(1, Kind.REQUEST, m.StoreState(1, "", b"", (), (), ()).encode()))
                self.sock.sendall(data)
            elif name in ("load-state", "use-hsm"):
                self.send(Kind.REPLY, frame.id, m.Done())
            elif name == "boot":
                boot = m.Boot.decode(frame.payload)
                if not boot.version:
                    self.store(1)
                self.phase = "serving"
                self.send(Kind.REPLY, frame.id, m.Booted(b"r", boot.root, "[[["))
                time.sleep(0.1)  # the module serves first
                SCENARIOS.get(self.scenario, lambda w: None)(self)
            elif name == "query-status":
                self.send(Kind.REPLY, frame.id, m.Report('{"materials": 7, "sequence": -1, "sessions": "many"}'))
            elif name == "query-statistics":
                self.send(Kind.REPLY, frame.id, m.Report("not json"))
            elif name == "execute" and self.scenario == "silent":
                pass
            elif name == "execute":
                self.send(Kind.ERROR, frame.id, m.Error("\n<b>", "x" * 5000))
            elif name == "shutdown" and self.scenario != "stubborn":
                self.send(Kind.REPLY, frame.id, m.Done())
                os._exit(0)


def flood(worker: FakeWorker) -> None:
    for i in range(20_000):
        worker.send(Kind.NOTIFICATION, 0, m.Event("connection-opened", 0, f'{{"connection": {i}, "self": 1, "kind": "x"}}'))


def child_speaks(worker: FakeWorker) -> None:
    if os.fork() == 0:
        worker.send(Kind.NOTIFICATION, 0, m.Event("measures", 0, "{}"))
        time.sleep(1)
        os._exit(0)


def forge(worker: FakeWorker) -> None:
    """Plants an answer for a request that it was never given."""
    plain = '["planted", "DestroyModule", ""]'
    forged = worker.store(2, "0" * 64 + plain, b"")
    worker.send(Kind.NOTIFICATION, 0, m.Event("measures", 0, f'{{"forged": "{forged}", "skipped": "{worker.store(9)}"}}'))


SCENARIOS: dict[str, Callable[[FakeWorker], None]] = {
    "garbage": lambda w: w.sock.sendall(b"\xff" * 100),
    "asks-to-spawn": lambda w: w.send(Kind.REQUEST, 1, m.Spawn(b"", "x", 0, 0, ())),
    "asks-for-a-key": lambda w: w.send(Kind.REQUEST, 1, m.DeriveKey(bytes(16))),
    "unknown-event": lambda w: w.send(Kind.NOTIFICATION, 0, m.Event("root-shell", 0, "{}")),
    "answers-nothing": lambda w: w.send(Kind.REPLY, 99, m.Done()),
    "sends-descriptors": lambda w: (
        [w.send(Kind.NOTIFICATION, 0, m.Event("measures", 0, "{}"), [w.guest] * 9) for _ in range(3)] and None
    ),
    "child-speaks": child_speaks,
    "flood": flood,
    "forge": forge,
    "hangs-up": lambda w: w.sock.close(),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int, required=True)
    sock = socket.socket(fileno=parser.parse_args().control_fd)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    reader, handed = FrameReader(), []
    while True:
        data, ancillary, _, _ = sock.recvmsg(65536, socket.CMSG_SPACE(64))
        if not data:
            return
        for _, _, content in ancillary:
            handed += array.array("i", content)
        for frame in reader.feed(data):
            if record_type(frame.payload) == "launcher-status":
                sock.sendall(encode_frame(Frame(frame.id, Kind.REPLY, m.Report("{}").encode())))
                continue
            spawn = m.Spawn.decode(frame.payload)
            control, guest, pipe = handed[:3]
            del handed[:3]
            pid = os.fork()
            if pid == 0:
                sock.close()
                with contextlib.suppress(OSError):
                    FakeWorker(spawn, control, guest).run()
                os._exit(0)
            for descriptor in (control, guest, pipe):
                os.close(descriptor)
            pidfd = os.pidfd_open(pid)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))]
            sock.sendmsg([encode_frame(Frame(frame.id, Kind.REPLY, m.Spawned(pid).encode()))], rights)
            os.close(pidfd)


if __name__ == "__main__":
    main()
