"""A device goes on in a successor: after a planned hand-over with all its streams, after a kill with an RST for each."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import threading
import time
from dataclasses import replace

import pytest
from hsmvisord import limits
from hsmvisord.confined import sandbox, seccomp
from hsmvisord.transport.vsock.device import Device
from hsmvisord.transport.vsock.keys import SIZE, StreamKeys
from hsmvisord.transport.vsock.saved import Saved
from hsmvisord.wire.virtio_vsock import HOST_CID, Op, Packet
from support.fake_frontend import CID, PORT, FakeFrontEnd, key_memory
from support.fake_guest import Guest
from support.vsock_rig import Rig, Service, echo


def hand_over(rig: Rig) -> None:
    """As to another process: encoded, with duplicates of all descriptors."""
    saved = rig.device.suspend()
    data, descriptors = saved.encode(), [os.dup(fd) for fd in saved.descriptors()]
    rig.device.close()
    rig.device = rig.make(rig.kept_sock.dup(), Saved.decode(data, descriptors))


def test_planned_in_the_middle_of_transfers() -> None:
    rig = Rig().boot()
    streams = [rig.guest.connect() for _ in range(5)]
    for _ in streams:
        echo(rig.service.next())
    data = os.urandom(400_000)
    for start in range(0, len(data), 20_000):
        for stream in streams:
            stream.write(data[start : start + 20_000])
        hand_over(rig)
    for stream in streams:
        stream.until(lambda stream=stream: len(stream.took) == len(data))  # type: ignore[misc]
        assert stream.took == data
    assert len(rig.keys()) == 5
    streams[0].close()
    assert rig.guest.connect().state == "open"
    rig.front.start(rig.front.stop())
    streams[1].write(b"z")
    streams[1].until(lambda: len(streams[1].took) == len(data) + 1)
    rig.close()


def test_planned_with_data_that_waits_and_answers_that_are_owed() -> None:
    rig = Rig().boot()
    rig.front.refill = False
    full, half = rig.guest.connect(), rig.guest.connect()
    first, second = rig.service.next(), rig.service.next()
    sent = 0
    while full.room >= 4096:  # more than the socket takes
        full.say(Op.RW, b"d" * 4096)
        full.sent += 4096
        sent += 4096
        while rig.guest.step(0):
            pass
    second.shutdown(socket.SHUT_WR)
    half.until(lambda: half.shutdown == 2)
    while rig.guest.step(0.05) or rig.front.rings[0].words_used.load(1) < rig.front.num:
        rig.front.transmit(Packet(CID, HOST_CID, 5, PORT, 0, 1, Op.RW, 0, 0, 0))  # until the guest has no buffers
    for _ in range(10):
        rig.front.transmit(Packet(CID, HOST_CID, 6, PORT, 0, 1, Op.RW, 0, 0, 0))
    time.sleep(0.05)
    hand_over(rig)
    rig.front.refill = True
    strays = len(rig.guest.stray)
    for slot in range(rig.front.num):
        rig.front.add_buffer(slot)
    rig.front.kick(0)
    while rig.guest.step(0.1):
        pass
    assert len([packet for packet in rig.guest.stray[strays:] if packet.dst_port == 6]) == 10
    got = 0
    while got < sent:
        got += len(first.recv(65536))
    half.write(b"still")
    assert second.recv(9) == b"still"
    rig.close()


def test_a_suspended_device_can_go_on() -> None:
    rig = Rig().boot()
    stream = rig.guest.connect()
    echo(rig.service.next())
    for _ in range(3):
        assert len(rig.device.suspend().streams) == 1
        stream.say(Op.RW, b"x")
        stream.sent += 1
        assert not rig.guest.step(0.05)
        rig.device.resume()
        before = len(stream.took)
        stream.until(lambda before=before: len(stream.took) > before)  # type: ignore[misc]
        while rig.guest.step(0.05):
            pass
    assert stream.took == b"xxx"
    rig.close()


def test_dropped_without_a_word() -> None:
    """What is told by `changed` is enough, whenever it was told."""
    rig = Rig().boot()
    lost = rig.guest.connect()
    for _ in range(3):
        rig.device.suspend()  # and never looked at again, as if it were dead
        assert rig.kept is not None
        rig.guest.request()
        saved = rig.kept[0]
        copy = saved.with_descriptors([os.dup(fd) for fd in saved.descriptors()])
        rig.device.close()
        rig.device = rig.make(rig.kept_sock.dup(), copy)
        lost.until(lambda lost=lost: lost.state == "gone")  # type: ignore[misc]
        rig.guest.streams[rig.guest._port, PORT].until(lambda: rig.guest.streams[rig.guest._port, PORT].state == "open")
        assert rig.keys() == {(rig.guest._port, PORT)}
        lost = rig.guest.streams[rig.guest._port, PORT]
    rig.close()


def test_keys_that_cannot_be_are_ignored() -> None:
    fd = key_memory()
    words = [0] * (SIZE // 4)
    words[0:10] = [7, PORT, 7, PORT, 0xFFFFFFFF, PORT, 5, 0, 8, 0xFFFFFFFF]
    words[-2:] = [0, PORT]
    os.pwrite(fd, struct.pack(f"<{len(words)}I", *words), 0)
    keys = StreamKeys(fd)
    assert [key[1:] for key in keys.found()] == [(7, PORT), (0, PORT)]
    slots = [keys.enter(number, 1) for number in range(1024)]
    assert len({slot for slot in slots if slot is not None}) == 1022 and slots[-2:] == [None, None]
    keys.close()
    os.close(fd)


@pytest.mark.parametrize(
    "wrong",
    [
        {"fd": -1}, {"slot": 9}, {"slot": -1}, {"state": "gone"}, {"state": "requested"}, {"state": "?"}, {"buffer": 1 << 20},
        {"received": 1 << 32}, {"forwarded": 1}, {"pending": b"more"}, {"guest_port": 1}, {"owed": 16}, {"shutdown": 4},
    ],
    ids=str,
)  # fmt: skip
def test_streams_of_a_predecessor_that_cannot_be(wrong: dict[str, object]) -> None:
    rig = Rig().boot()
    rig.guest.connect()
    saved = rig.device.suspend()
    saved = saved.with_descriptors([os.dup(fd) for fd in saved.descriptors()])
    rig.device.close()
    if "fd" in wrong:
        os.close(saved.streams[0].fd)
    bad = replace(saved, streams=(replace(saved.streams[0], **wrong),))  # type: ignore[arg-type]
    rig.device = rig.make(rig.kept_sock.dup(), bad)
    assert "predecessor" in rig.ended()
    rig.close()


@pytest.mark.parametrize("data", [b"", b"1", b"{}", b"[]", b'{"features": 1}'])
def test_what_is_no_saved_device(data: bytes) -> None:
    with pytest.raises(ValueError):
        Saved.decode(data, [])
    good = Saved().encode()
    for old, new in ((b": 0", b': "0"'), (b": false", b": 0"), (b": 0", b": -2"), (b": 0", b": 1.5"), (b'"num"', b'"mun"')):
        with pytest.raises(ValueError):
            Saved.decode(good.replace(old, new), [])
    with pytest.raises(ValueError):
        Saved.decode(good, [1])


# ---- killed ---------------------------------------------------------------------------------------------------------------


def child(
    front: FakeFrontEnd, sock: socket.socket, key_fd: int, saved: Saved | None, told: socket.socket, confined: bool = False
) -> int:
    """Forks a process with the device, which echoes, or as confined as a worker holds its streams; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        service = Service()

        def accept(port: int, peer: str) -> socket.socket | None:
            ours = service.accept(port, peer)
            if ours is not None and not confined:
                echo(service.next())
            return ours

        def changed(saved: Saved) -> None:
            data = saved.encode()
            socket.send_fds(told, [struct.pack("<I", len(data)) + data], saved.descriptors())

        over = threading.Event()
        front.sock.close()
        if confined:
            sandbox._limits()
            seccomp.load()
        Device(sock, CID, accept, StreamKeys(key_fd), saved, changed, lambda why: over.set()).start()
        over.wait()
    finally:
        os._exit(0)


class Keeper:
    """The supervisor's part: keeps what the device told last."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.saved: Saved | None = None

    def drain(self) -> None:
        while True:
            try:
                head, fds, _, _ = socket.recv_fds(self.ours, 4, 32)
            except BlockingIOError:
                return
            (size,) = struct.unpack("<I", head)
            self.close()
            self.saved = Saved.decode(self.ours.recv(size), fds)

    def close(self) -> None:
        if self.saved is not None:
            for fd in self.saved.descriptors():
                os.close(fd)


def test_confined_as_a_worker_is() -> None:
    """A guest of 16 GiB and as many streams as there may be, within a worker's limits and system calls."""
    front, keeper, key_fd = FakeFrontEnd(size=16 << 30), Keeper(), key_memory()
    guest = Guest(front)
    pid = child(front, front.device_sock, key_fd, None, keeper.theirs, confined=True)
    front.device_sock.close()
    front.begin()
    front.load_driver()
    for _ in range(2):  # it is unmapped as well
        front.start(front.stop())
    streams = [guest.connect() for _ in range(limits.MAX_STREAMS)]
    assert {stream.state for stream in streams} == {"open"}
    assert guest.connect().state == "refused"
    streams[7].write(b"x" * 1000)
    streams[7].close()
    assert guest.connect().state == "open"
    front.close()
    assert os.waitpid(pid, 0)[1] == 0, "ended by a signal"
    keeper.drain()
    keeper.close()
    os.close(key_fd)


def test_killed_at_any_time() -> None:
    """By SIGKILL, in the middle of transfers: each stream goes on or is reset, what it carried until then is intact, and new ones
    work at once."""
    rng, front, keeper, key_fd = random.Random(3), FakeFrontEnd(), Keeper(), key_memory()
    guest, killed, carried = Guest(front), 0, 0
    pid = child(front, front.device_sock.dup(), key_fd, None, keeper.theirs)
    front.begin()
    front.load_driver()
    front.start()
    front.settled()
    data = os.urandom(60_000)
    for _ in range(25):
        streams = [guest.connect() for _ in range(3)]
        for stream in streams:
            stream.reads = False  # nor tells credit, which would wait for room in the ring of a device that is dead
        timer = threading.Timer(rng.random() * 0.02, os.kill, (pid, signal.SIGKILL))
        timer.start()
        while timer.is_alive() and streams[0].sent < len(data):
            for stream in streams:
                if stream.room >= 1000 and front.reclaim():
                    stream.say(Op.RW, data[stream.sent : stream.sent + 1000])
                    stream.sent += 1000
            while guest.step(0):
                pass
        timer.join()
        os.waitpid(pid, 0)
        killed += 1
        keeper.drain()
        assert keeper.saved is not None
        copy = keeper.saved.with_descriptors([os.dup(fd) for fd in keeper.saved.descriptors()])
        pid = child(front, front.device_sock.dup(), key_fd, copy, keeper.theirs)
        for fd in copy.descriptors():
            os.close(fd)
        for stream in streams:
            stream.until(lambda stream=stream: stream.state == "gone")  # type: ignore[misc]
            assert data.startswith(bytes(stream.waiting))
            carried += len(stream.waiting)
        again = guest.connect()
        again.write(b"again")
        again.until(lambda again=again: again.took == b"again")  # type: ignore[misc]
        again.close()
    assert killed == 25 and carried > 0
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    keeper.drain()
    keeper.close()
    front.device_sock.close()
    front.close()
    os.close(key_fd)
