"""hsmvisord: the launcher.  It has everything imported and forks a worker for each module; it holds no secret.

Started by hsmvisor-host with one end of a socketpair; ends when that reaches end of file.  Its workers outlive it.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.descriptors import receive
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.internal.phases import LAUNCHER_MAY_BE_ASKED, MAX_DESCRIPTORS, by_type
from hsmvisor_rpc.sealed.canonical import MalformedRecord, record_type

from hsmvisord import memory
from hsmvisord.crypto import eddsa, libcrypto
from hsmvisord.lanes import lanes
from hsmvisord.rings import rings
from hsmvisord.transport.rehearsal import Rehearsal
from hsmvisord.worker import main as worker
from hsmvisord.worker import process, rehearsal, sandbox

ROOM = 4 << 20  #: bytes into which a worker's heap may grow before it asks the kernel
SPAWN_DESCRIPTORS = 3  #: control listener, guest listener, read end of the key pipe


class Launcher:
    def __init__(self, control: socket.socket, measures: list[dict[str, Any]]) -> None:
        self._control, self._measures = control, measures
        self._reader = FrameReader()
        self._descriptors: list[int] = []
        self._asked = by_type(LAUNCHER_MAY_BE_ASKED)

    def run(self) -> None:
        """Serves until the supervisor closes its end."""
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(woken, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == woken:
                    os.read(woken, 512)
                    self._reap()
                elif not self._receive():
                    return

    def _receive(self) -> bool:
        data, descriptors = receive(self._control, MAX_DESCRIPTORS)
        self._descriptors += descriptors
        for frame in self._reader.feed(data):
            self._serve(frame)
        return bool(data)

    def _serve(self, frame: Frame) -> None:
        kind = self._asked.get(record_type(frame.payload)) if frame.kind is Kind.REQUEST else None
        if kind is m.LauncherStatus:
            report = m.Report(json.dumps({"measures": self._measures}))
            self._control.sendall(encode_frame(Frame(frame.id, Kind.REPLY, report.encode())))
            return
        if kind is None or len(self._descriptors) < SPAWN_DESCRIPTORS:
            raise MalformedRecord("the launcher takes LauncherStatus, and Spawn with three descriptors")
        spawn = m.Spawn.decode(frame.payload)
        handed, self._descriptors = self._descriptors[:SPAWN_DESCRIPTORS], self._descriptors[SPAWN_DESCRIPTORS:]
        pid = os.fork()
        if pid == 0:
            try:
                worker.run(spawn, *handed)
            except BaseException:
                traceback.print_exc()  # before any key is there: `run` ends the process itself once it serves
            os._exit(1)
        pidfd = os.pidfd_open(pid)
        for descriptor in handed:
            os.close(descriptor)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))]
        self._control.sendmsg([encode_frame(Frame(frame.id, Kind.REPLY, m.Spawned(pid).encode()))], rights)
        os.close(pidfd)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                how = (
                    f"by {signal.Signals(os.WTERMSIG(status)).name}"
                    if os.WIFSIGNALED(status)
                    else f"with code {os.WEXITSTATUS(status)}"
                )
                print(f"worker {pid} ended {how}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="hsmvisord", description="Forks module workers; started by hsmvisor-host, not by hand.")
    parser.add_argument("--control-fd", type=int, required=True, help="descriptor of the socket to hsmvisor-host")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.set_title("hsmvisord: launcher")
    sandbox.prepare()
    libcrypto.preload()
    eddsa.preload()
    lanes.preload()
    rings.preload()
    Rehearsal().run()
    rehearsal.run()
    measures = sandbox.enter_launcher()
    # Everything that lives now lives in every worker: keep the collector from touching (and so copying) those pages.
    gc.collect()
    gc.freeze()
    gc.disable()
    memory.fill_holes()
    memory.make_room(ROOM)
    Launcher(socket.socket(fileno=arguments.control_fd), measures).run()


if __name__ == "__main__":
    main()
