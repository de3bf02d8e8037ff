"""Connections on their way to workers: which module gets them, and what a guest can have the supervisor hold."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hsmvisor.host import limits, vhost_vsock
from hsmvisor.host.config import Config, Guests
from hsmvisor.host.intake import Intake, Passing
from hsmvisor.host.link import LinkClosed, PeerError
from hsmvisor.host.module import Module
from hsmvisor.host.vhost_vsock import VhostVsock
from hsmvisor.serving.errors import Unavailable
from hsmvisor_rpc.internal import messages as m


class Worker:
    """Answers as it is told to, and keeps what it took."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers, self.taken = list(answers), list[tuple[str, socket.socket]]()
        self.free = asyncio.Event()
        self.free.set()
        self.asked = 0

    async def give(self, taken: m.TakeConnection, descriptor: int) -> None:
        self.asked += 1
        await self.free.wait()
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer
        self.taken.append((taken.peer, socket.socket(fileno=os.dup(descriptor))))


class ScriptedListener:
    """In the place of an AF_VSOCK socket: readable as long as somebody waits."""

    def __init__(self, *waiting: tuple[socket.socket, Any] | OSError) -> None:
        self.waiting = list(waiting)
        self._bell, self._ring = socket.socketpair()
        self._ring.send(b"x")

    def setblocking(self, flag: bool) -> None: ...

    def fileno(self) -> int:
        return self._bell.fileno()

    def accept(self) -> tuple[socket.socket, Any]:
        if not self.waiting:
            self._bell.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                self._bell.recv(1)
            raise BlockingIOError
        first = self.waiting.pop(0)
        if isinstance(first, OSError):
            raise first
        return first

    def close(self) -> None:
        self._bell.close()
        self._ring.close()


def run(work: Callable[[], Any]) -> None:
    asyncio.run(work())


async def settled(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it did not happen")


def ended(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


def test_a_cid_selects_its_module_and_strangers_are_closed() -> None:
    async def work() -> None:
        workers = {number: Worker() for number in (0, 1, 7)}
        modules = [
            SimpleNamespace(
                faces=SimpleNamespace(device=SimpleNamespace(cid=limits.FIRST_CID + n)), passing=Passing(f"m{n}", worker.give)
            )
            for n, worker in workers.items()
        ]
        cids = [1024, 1025, 1031, 1026, 1023, 3, 2, 1, 0, 2**32 - 1, 1024]
        pairs = [socket.socketpair() for _ in cids]
        door = VhostVsock(lambda: cast(list[Module], modules))
        listener = ScriptedListener(*((ours, (cid, 5000)) for cid, (ours, _) in zip(cids, pairs, strict=True)))
        door.serve(cast(socket.socket, listener))
        await settled(lambda: sum(len(w.taken) for w in workers.values()) == 4)
        for number, count in ((0, 2), (1, 1), (7, 1)):
            peers = [peer for peer, _ in workers[number].taken]
            assert peers == [f"vhost-vsock cid={limits.FIRST_CID + number} port=5000"] * count
        for cid, (_, theirs) in zip(cids, pairs, strict=True):
            assert ended(theirs) == (cid not in (1024, 1025, 1031)), cid
        theirs = pairs[1][1]
        theirs.send(b"to module 1")
        assert workers[1].taken[0][1].recv(64) == b"to module 1"
        door.stop()
        for worker in workers.values():
            for _, sock in worker.taken:
                sock.close()
        for _, sock in pairs:
            sock.close()

    run(work)


def test_vsock_is_off_unless_it_is_switched_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def lacking(backlog: int) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(vhost_vsock, "listen", lacking)
    VhostVsock(list).start(Config())
    assert not caplog.records
    VhostVsock(list).start(Config(guests=Guests(vsock=True)))
    assert "guests.vsock: no AF_VSOCK socket on port 9111: Address family" in caplog.text


def test_at_the_limit_and_one_past() -> None:
    async def work() -> None:
        worker = Worker()
        worker.free.clear()
        passing = Passing("web", worker.give)
        pairs = [socket.socketpair() for _ in range(limits.MAX_PASSING + 1)]
        for ours, _ in pairs:
            passing.pass_on(ours, "hybrid path=/v")
        assert [ended(theirs) for _, theirs in pairs] == [False] * limits.MAX_PASSING + [True]
        worker.free.set()
        await settled(lambda: len(worker.taken) == limits.MAX_PASSING)
        await asyncio.sleep(0)
        ours, theirs = socket.socketpair()
        passing.pass_on(ours, "hybrid path=/v")  # there is room again
        await settled(lambda: len(worker.taken) == limits.MAX_PASSING + 1)
        for sock in (theirs, *(t for _, t in pairs), *(s for _, s in worker.taken)):
            sock.close()

    run(work)


PHASE = PeerError(m.Error(m.REASON_PHASE, "not in phase leaving"))
GONE = LinkClosed("the other end is gone")


@pytest.mark.parametrize(
    ("answers", "taken", "asked"),
    [
        ([PHASE], True, 2),
        ([GONE, PHASE], True, 3),
        ([GONE, GONE, GONE], False, 3),
        ([TimeoutError()], False, 1),
        ([Unavailable("MODULE_STATE", "module web is failed")], False, 1),
        ([PeerError(m.Error(m.REASON_INTERNAL, "KeyError in the worker"))], False, 1),
    ],
)
def test_a_connection_waits_for_the_next_worker_or_is_closed(answers: list[Exception], taken: bool, asked: int) -> None:
    async def work() -> None:
        worker = Worker(*answers)
        ours, theirs = socket.socketpair()
        Passing("web", worker.give).pass_on(ours, "hybrid path=/v")
        await settled(lambda: bool(worker.taken) or ended(theirs))
        assert (bool(worker.taken), worker.asked) == (taken, asked)
        for sock in (theirs, *(s for _, s in worker.taken)):
            sock.close()

    run(work)


def test_without_descriptors_it_accepts_again_later() -> None:
    async def work() -> None:
        arrived: list[Any] = []
        ours, theirs = socket.socketpair()
        listener = ScriptedListener(OSError(errno.EMFILE, "Too many open files"), (ours, "address"))
        intake = Intake(cast(socket.socket, listener), lambda sock, address: arrived.append((sock, address)))
        await settled(lambda: bool(arrived))
        assert arrived == [(ours, "address")]
        intake.close()
        ours.close()
        theirs.close()

    run(work)
