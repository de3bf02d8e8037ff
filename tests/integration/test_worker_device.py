"""A real worker is a device: what its supervisor asks of it leaves the guest neither waiting nor cut off."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisor_rpc.internal import handover as h
from hsmvisor_rpc.internal import messages as m
from hsmvisord import limits
from support.bare_worker import BareWorker
from support.fake_frontend import CID, FakeFrontEnd, key_memory
from support.fake_guest import Guest


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[BareWorker]:
    worker = BareWorker(tmp_path)
    yield worker
    worker.stop()


@pytest.fixture
def front() -> Iterator[FakeFrontEnd]:
    front = FakeFrontEnd()
    yield front
    front.close()


def plugged(worker: BareWorker, front: FakeFrontEnd) -> Guest:
    keys = key_memory()
    assert worker.worker.ask(m.PlugDevice(1, CID, b"", 2), [front.device_sock.fileno(), keys]) == m.Done()
    os.close(keys)
    front.begin()
    front.load_driver(0)
    front.start((0, 0))
    front.settled()
    return Guest(front)


def test_one_that_cannot_hand_over_goes_on(worker: BareWorker, front: FakeFrontEnd) -> None:
    guest = plugged(worker, front)
    stream = guest.connect(limits.VSOCK_PORT)
    assert stream.state == "open"
    for _ in range(2):
        ours, theirs = socket.socketpair()
        ours.sendall(h.READY)
        ours.shutdown(socket.SHUT_RD)  # nothing can be given
        answer = worker.worker.ask(m.HandOver(0), [theirs.fileno()])
        assert isinstance(answer, m.Error)
        assert answer.reason == m.REASON_SUCCESSION
        ours.close()
        theirs.close()
        assert guest.connect(limits.VSOCK_PORT).state == "open"
    assert stream.state == "open"


def test_one_that_is_shut_down_resets_its_streams(worker: BareWorker, front: FakeFrontEnd) -> None:
    guest = plugged(worker, front)
    stream = guest.connect(limits.VSOCK_PORT)
    assert worker.worker.ask(m.Shutdown(0)) == m.Done()
    stream.until(lambda: stream.state == "gone")


def test_what_cannot_be_a_device_leaves_the_worker_serving(worker: BareWorker, front: FakeFrontEnd) -> None:
    before = len(os.listdir(f"/proc/{worker.pid}/fd"))
    for _ in range(3):
        answer = worker.worker.ask(m.PlugDevice(1, CID, b"", 2), [front.sock.fileno()] * 2)
        assert isinstance(answer, m.Error)
        assert answer.reason == m.REASON_DEVICE
    assert len(os.listdir(f"/proc/{worker.pid}/fd")) == before
    assert plugged(worker, front).connect(limits.VSOCK_PORT).state == "open"
