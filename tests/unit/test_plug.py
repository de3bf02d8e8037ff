"""What a worker does with a device that it is given: whatever is wrong with it, no descriptor stays and no second thread begins."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
from hsmvisor_rpc.internal import handover as h
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.canonical import MAX_RECORD, Record
from hsmvisord import limits
from hsmvisord.wire.virtio_vsock import Op
from hsmvisord.worker import succession
from hsmvisord.worker.plug import NoDevice, Plug
from hsmvisord.worker.succession import Arrival, Departure, Stream, SuccessionFailed
from support.fake_frontend import CID, PORT, FakeFrontEnd, key_memory
from support.fake_guest import Guest


class Told:
    """A plug, and what it says."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.socks: list[socket.socket] = []
        self.plug = Plug(lambda sock, peer: self.socks.append(sock), lambda record, descriptors: self.records.append(record))

    def gone(self) -> m.DeviceGone:
        until = time.monotonic() + 5
        while time.monotonic() < until:
            for record in self.records:
                if isinstance(record, m.DeviceGone):
                    return record
            time.sleep(0.01)
        raise AssertionError("the device lives")

    def close(self) -> None:
        self.plug.unplug()
        for sock in self.socks:
            sock.close()


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFrontEnd]:
    monkeypatch.setattr(limits, "VSOCK_PORT", PORT)
    front = FakeFrontEnd(num=1024)
    try:
        yield front
    finally:
        front.close()


def given(front: FakeFrontEnd) -> list[int]:
    return [os.dup(front.device_sock.fileno()), key_memory()]


def booted(front: FakeFrontEnd) -> Guest:
    front.begin()
    front.load_driver(0)
    front.start((0, 0))
    front.settled()
    return Guest(front)


def device_threads() -> int:
    return sum(thread.name == "device" for thread in threading.enumerate())


def opened() -> int:
    return len(os.listdir("/proc/self/fd"))


def file(size: int) -> int:
    """Memory that anybody may shorten."""
    descriptor = os.memfd_create("unsealed", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor


@pytest.mark.parametrize(
    ("state", "make"),
    [
        (b"", lambda front: []),
        (b"", lambda front: [os.dup(front.device_sock.fileno())]),
        (b"", lambda front: [key_memory(), key_memory()]),
        (b"", lambda front: [os.dup(front.device_sock.fileno()), os.open("/dev/null", os.O_RDWR)]),
        (b"", lambda front: [os.dup(front.device_sock.fileno()), file(1 << 16)]),
        (b"", lambda front: [*given(front), key_memory()]),
        (b"{}", lambda front: [*given(front), key_memory()]),
        (b"[" * 100_000, given),
        (b"\xff", given),
    ],
    ids=["nothing", "no keys", "no socket", "no memory", "unsealed", "too many", "no state", "nested", "no text"],
)
def test_a_device_that_cannot_be_leaves_no_descriptor(front: FakeFrontEnd, state: bytes, make: Any) -> None:
    told = Told()
    before = opened()
    with pytest.raises(NoDevice):
        told.plug.plug(1, CID, state, make(front))
    assert opened() <= before
    assert told.plug.query() == (m.DeviceState(0, b"", 0), [])
    assert told.plug.suspend() is None


def test_duplicates_are_made_whole_or_not_at_all(front: FakeFrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    told.plug.plug(1, CID, b"", given(front))
    booted(front)
    before = opened()
    real, left = os.dup, [3]

    def dup(descriptor: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(24, "Too many open files")
        return real(descriptor)

    monkeypatch.setattr(os, "dup", dup)
    with pytest.raises(OSError, match="Too many"):
        told.plug.query()
    monkeypatch.undo()
    assert opened() <= before
    told.close()


def test_nothing_but_a_suspended_device_is_resumed(front: FakeFrontEnd) -> None:
    told = Told()
    told.plug.plug(1, CID, b"", given(front))
    guest = booted(front)
    running = device_threads()
    told.plug.resume()
    assert device_threads() == running
    assert told.plug.suspend() is not None
    told.plug.resume()
    told.plug.resume()
    assert guest.connect().state == "open"
    assert device_threads() == running
    told.close()


def test_one_that_has_ended_is_told_and_leaves_nothing(front: FakeFrontEnd) -> None:
    before = opened()
    told = Told()
    told.plug.plug(7, CID, b"", given(front))
    booted(front)
    front.device_sock.close()
    front.sock.close()
    assert told.gone().plug == 7
    assert told.plug.suspend() is None
    told.plug.resume()
    told.plug.unplug()
    assert opened() <= before - 2


# ---- to a successor ---------------------------------------------------------------------------------------------------


class Nothing:
    epoch = slot_events = 0


def departing(told: Told) -> tuple[Departure, Stream]:
    old, new = socket.socketpair()
    return Departure(cast(Any, Nothing), cast(Any, None), Stream(old), told.plug, 0), Stream(new)


def arriving(told: Told, stream: Stream) -> Arrival:
    return Arrival(cast(Any, Nothing()), cast(Any, None), stream, cast(Any, None), told.plug)


def in_thread(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_all_that_streams_may_hold_is_handed_over(front: FakeFrontEnd) -> None:
    """More than a record bears; and the successor's device stands still until the old worker can fail no more."""
    old, new = Told(), Told()
    old.plug.plug(3, CID, b"", given(front))
    guest = booted(front)
    streams = [guest.connect() for _ in range(limits.LARGE_STREAMS)]
    for stream in streams:
        for _ in range(4):  # what the socket takes gives credit for more
            stream.say(Op.CREDIT_REQUEST)
            while guest.step(0.005):
                pass
            while stream.room >= 4096:
                stream.write(b"d" * 4096)
    departure, stream = departing(old)
    failures: list[BaseException] = []

    def give() -> None:
        try:
            departure.give_device()
            departure.stream.send(h.Pause(0))
        except BaseException as error:
            failures.append(error)

    before = device_threads()
    giving = in_thread(give)
    arrival = arriving(new, stream)
    assert not arrival.take()
    giving.join(10)
    assert not failures
    state = new.plug.query()[0]
    assert state.plug == 3
    assert device_threads() == before
    assert guest.connect().state == "open"
    left = old.plug.suspend()
    assert left is not None
    assert len(left[2]) > 2 * MAX_RECORD
    stream.close()
    departure.stream.close()
    new.close()
    old.close()


def test_a_successor_that_takes_no_pause_runs_no_device(front: FakeFrontEnd) -> None:
    old, new = Told(), Told()
    old.plug.plug(3, CID, b"", given(front))
    guest = booted(front)
    departure, stream = departing(old)
    departure.give_device()
    departure.stream.close()
    assert not arriving(new, stream).take()
    old.plug.resume()  # as when the rest could not be given
    assert guest.connect().state == "open"
    assert not new.socks
    new.close()
    old.close()


def test_what_cannot_be_encoded_fails_the_succession() -> None:
    old, _ = socket.socketpair()
    with pytest.raises(SuccessionFailed, match="cannot be handed over"):
        Stream(old).send(h.DevicePart(b"x" * (9 << 20)))


@pytest.mark.parametrize("size", [0, succession.MAX_DEVICE + 1])
def test_a_state_of_a_size_that_cannot_be(size: int) -> None:
    old, new = socket.socketpair()
    sending = Stream(old)
    sending.send(h.SavedDevice(1, CID, size, 0))
    sending.send(h.DevicePart(b"x"))
    with pytest.raises(SuccessionFailed, match="state of"):
        arriving(Told(), Stream(new)).take()


def test_a_state_of_more_than_its_size() -> None:
    old, new = socket.socketpair()
    sending = Stream(old)
    sending.send(h.SavedDevice(1, CID, 4, 0))
    sending.send(h.DevicePart(b"xxxxx"))
    with pytest.raises(SuccessionFailed, match="all of its state"):
        arriving(Told(), Stream(new)).take()
