"""A worker is given connections by its supervisor: what it takes, what it refuses, and that nothing of a refused one stays."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisor_rpc.internal import messages as m
from support.bare_worker import BareWorker
from support.native_client import NativeClient


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[BareWorker]:
    worker = BareWorker(tmp_path)
    yield worker
    worker.stop()


def give(worker: BareWorker, peer: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> tuple[m.Record, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with theirs:
        return worker.worker.ask(m.TakeConnection(peer), [theirs.fileno()]), ours


def descriptors(worker: BareWorker) -> int:
    return len(os.listdir(f"/proc/{worker.pid}/fd"))


def test_a_given_connection_is_served_and_dropped_by_its_name(worker: BareWorker) -> None:
    clients = []
    for peer in ("hybrid path=/a", "hybrid path=/b"):
        reply, sock = give(worker, peer)
        assert reply == m.Done()
        clients.append(NativeClient(sock))
        clients[-1].hello()
    assert worker.ask(m.DropConnections("hybrid path=/a")) == m.Done()
    assert clients[0].sock.recv(1) == b""
    clients[1].open_session()
    assert worker.ask(m.DropConnections("hybrid path=/none")) == m.Done()
    clients[1].close()


def test_what_is_no_connection_is_refused_and_closed(worker: BareWorker) -> None:
    before = descriptors(worker)
    reply, sock = give(worker, "x", socket.SOCK_DGRAM)
    assert isinstance(reply, m.Error)
    reply = worker.worker.ask(m.TakeConnection("none"))
    assert isinstance(reply, m.Error)
    sock.close()
    assert descriptors(worker) == before
    reply, sock = give(worker, "hybrid path=/a")
    assert reply == m.Done()
    NativeClient(sock).hello()


def test_in_another_phase_it_is_closed_and_nobody_elses(tmp_path: Path) -> None:
    """What comes with a refused message is not taken for the next one's."""
    worker = BareWorker(tmp_path, boots=False)
    before = descriptors(worker)
    reply, sock = give(worker, "too early")
    assert isinstance(reply, m.Error) and reply.reason == m.REASON_PHASE
    assert sock.recv(1) == b""
    assert descriptors(worker) == before
    worker.stop()
