"""A process that has everything imported and forks another one for each module; it holds no secret.

Started by hsmvisor-host with one end of a socketpair; ends when that reaches end of file.  What it forked outlives it.
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
from collections.abc import Callable
from typing import Any

from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.descriptors import receive
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.internal.phases import LAUNCHER_MAY_BE_ASKED, MAX_DESCRIPTORS, by_type
from hsmvisor_rpc.sealed.canonical import MalformedRecord, record_type

from hsmvisord import memory
from hsmvisord.confined import process, sandbox

ROOM = 4 << 20  #: bytes into which a child's heap may grow before it asks the kernel


class Launcher:
    def __init__(self, control: socket.socket, measures: list[dict[str, Any]], run: Callable[..., None], descriptors: int) -> None:
        """`run` is what a child does: it gets a Spawn and its descriptors, so many, and ends the process itself."""
        self._control, self._measures = control, measures
        self._run, self._count = run, descriptors
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
        if kind is None or len(self._descriptors) < self._count:
            raise MalformedRecord(f"a launcher takes LauncherStatus, and Spawn with {self._count} descriptors")
        spawn = m.Spawn.decode(frame.payload)
        handed, self._descriptors = self._descriptors[: self._count], self._descriptors[self._count :]
        pid = os.fork()
        if pid == 0:
            try:
                self._run(spawn, *handed)
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


def launch(prog: str, title: str, what: str, load: Callable[[], None], run: Callable[..., None], descriptors: int) -> None:
    """The whole program of a launcher, started by hsmvisor-host: `load` what children are to have, give up rights, then fork.

    `prog`: its name; `title`: in ps; `what`: it forks; `run`, `descriptors`: as Launcher has them.
    """
    parser = argparse.ArgumentParser(prog=prog, description=f"Forks {what}; started by hsmvisor-host, not by hand.")
    parser.add_argument("--control-fd", type=int, required=True, help="descriptor of the socket to hsmvisor-host")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.set_title(f"hsmvisord: {title}")
    sandbox.prepare()
    load()
    measures = sandbox.enter_launcher()
    _settle()
    Launcher(socket.socket(fileno=arguments.control_fd), measures, run, descriptors).run()


def _settle() -> None:
    """Everything that lives now lives in every child: the collector is kept from touching (and so copying) those pages."""
    gc.collect()
    gc.freeze()
    gc.disable()
    memory.fill_holes()
    memory.make_room(ROOM)
