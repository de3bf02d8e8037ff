"""The device under a front-end and a driver in this process: streams, their ends, credit, resets, memory; and at each limit."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from hsmvisord import limits
from hsmvisord.wire.vhost_user import Request
from hsmvisord.wire.virtio_vsock import BOTH, HOST_CID, PACKET, Op, Packet
from support.fake_frontend import CID, GUEST_BASE, NEED_REPLY, PORT, USER_BASE, WITHIN, FakeFrontEnd
from support.fake_guest import GuestStream
from support.vsock_rig import Rig, echo, limits_of


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig().boot()
    yield rig
    rig.close()


def mapped() -> int:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum("/memfd:guest" in line for line in maps)


def spent() -> float:
    return sum(os.times()[:2])


# ---- data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 0xFFF0], ids=["fresh", "index-wraps"])
@pytest.mark.parametrize("sizes", [{}, {"num": 4, "rx_size": 64, "tx_size": 33}, {"rx_size": 65580, "tx_size": 65536}], ids=str)
def test_data_is_intact(sizes: dict[str, int], at: int) -> None:
    rig = Rig(**sizes).boot(at)
    count = 1 << 20 if sizes.get("num") != 4 else 1 << 14
    stream, data = rig.guest.connect(), os.urandom(count)
    assert rig.service.peers == [f"vsock cid={CID} port={stream.port}"]
    echo(rig.service.next())
    stream.write(data)
    stream.until(lambda: len(stream.took) == count)
    assert stream.took == data
    stream.close()
    rig.no_keys()
    assert not rig.device.streams
    rig.close()


def test_streams_side_by_side(rig: Rig) -> None:
    streams = [rig.guest.connect() for _ in range(20)]
    parts = [os.urandom(3000) for _ in streams]
    for _ in streams:
        echo(rig.service.next())
    for start in range(0, 3000, 500):
        for stream, part in zip(streams, parts, strict=True):
            stream.write(part[start : start + 500])
    for stream, part in zip(streams, parts, strict=True):
        stream.until(lambda stream=stream: len(stream.took) == 3000)  # type: ignore[misc]
        assert stream.took == part
    assert rig.keys() == {(stream.port, PORT) for stream in streams}


def test_a_port_where_nobody_listens(rig: Rig) -> None:
    assert rig.guest.connect(PORT + 1).state == "refused"
    assert rig.guest.connect(0).state == "refused"
    rig.no_keys()


# ---- credit ---------------------------------------------------------------------------------------------------------------


def test_a_guest_that_does_not_read_is_sent_no_more_than_it_has_room_for(rig: Rig) -> None:
    stream = rig.guest.connect(buffer=10000)
    stream.reads = False
    sock, data = rig.service.next(), os.urandom(100_000)
    sock.sendall(data)
    stream.until(lambda: len(stream.waiting) == 10000)
    before = spent()
    assert not rig.guest.step(0.3) or not rig.guest.step(0.3)  # the CREDIT_REQUEST at most
    assert spent() - before < 0.1, "the device spins"
    while len(stream.took) < len(data):
        stream.read(len(stream.waiting) or 1)
        rig.guest.wait()
        if len(stream.took) + len(stream.waiting) == len(data):
            stream.read(len(stream.waiting))
    assert stream.took == data


def fill(rig: Rig, stream: GuestStream, data: bytes) -> int:
    """Sends until the device's own buffer is full; returns how much."""
    sent = 0
    while True:
        if not stream.room:
            stream.say(Op.CREDIT_REQUEST)
            rig.guest.wait()
        if not stream.room:
            return sent
        part = data[sent : sent + min(4096, stream.room)]
        stream.say(Op.RW, part)
        stream.sent += len(part)
        sent += len(part)
        while rig.guest.step(0):
            pass


def test_a_reader_here_that_does_not_read_bounds_what_waits(rig: Rig) -> None:
    stream = rig.guest.connect()
    sock = rig.service.next()
    data, room = os.urandom(2_000_000), limits.STREAM_BUFFER
    sent = fill(rig, stream, data)
    assert room <= sent < room + 1_000_000  # what the socket's own buffer takes
    got = b""
    while len(got) < sent:
        got += sock.recv(65536)
    assert got == data[:sent]
    stream.until(lambda: stream.room > room * 3 // 4)


def test_one_byte_past_the_credit(rig: Rig) -> None:
    for extra in (0, 1):
        stream = rig.guest.connect()
        sock = rig.service.next()
        fill(rig, stream, bytes(2_000_000))
        stream.say(Op.RW, bytes(extra)) if extra else stream.say(Op.CREDIT_REQUEST)
        rig.guest.wait()
        assert stream.state == ("gone" if extra else "open")
        sock.close()


def test_a_fwd_cnt_that_goes_back_or_ahead_is_not_believed(rig: Rig) -> None:
    stream = rig.guest.connect(buffer=1000)
    stream.reads = False
    sock = rig.service.next()
    sock.sendall(bytes(3000))
    stream.until(lambda: len(stream.waiting) == 1000)
    for lie in (2000, 0xFFFFFFFF, 1001):
        stream.say(Op.CREDIT_UPDATE, fwd_cnt=lie)
    while rig.guest.step(0.1):
        pass
    assert len(stream.waiting) == 1000
    stream.say(Op.CREDIT_UPDATE, fwd_cnt=400)
    stream.forwarded = 400
    stream.until(lambda: stream.received == 1400)


# ---- how streams end ------------------------------------------------------------------------------------------------------


def test_the_guest_sends_no_more_and_still_receives(rig: Rig) -> None:
    stream = rig.guest.connect()
    sock = rig.service.next()
    stream.write(b"question")
    stream.say(Op.SHUTDOWN, flags=2)
    assert (sock.recv(99), sock.recv(99)) == (b"question", b"")
    sock.sendall(b"answer")
    stream.until(lambda: stream.took == b"answer")
    sock.close()
    stream.until(lambda: stream.state == "gone")
    rig.no_keys()


def test_the_reader_here_sends_no_more_and_still_receives(rig: Rig) -> None:
    stream = rig.guest.connect()
    sock = rig.service.next()
    sock.sendall(b"last")
    sock.shutdown(socket.SHUT_WR)
    stream.until(lambda: bool(stream.shutdown))
    assert (stream.shutdown, stream.took) == (2, b"last")
    stream.write(b"more")
    assert sock.recv(99) == b"more"
    stream.close()
    assert sock.recv(99) == b""
    assert stream.state == "gone"
    rig.no_keys()


def test_the_reader_here_receives_no_more(rig: Rig) -> None:
    stream = rig.guest.connect()
    sock = rig.service.next()
    sock.shutdown(socket.SHUT_RD)
    stream.write(b"in vain")
    stream.until(lambda: bool(stream.shutdown))
    assert stream.shutdown == 1
    stream.say(Op.RW, b"was under way")
    stream.sent += 13
    sock.sendall(b"still")
    stream.until(lambda: stream.took == b"still")
    sock.close()
    stream.until(lambda: stream.state == "gone")


def test_the_guest_receives_no_more(rig: Rig) -> None:
    stream = rig.guest.connect()
    sock = rig.service.next()
    stream.say(Op.SHUTDOWN, flags=1)
    time.sleep(0.1)
    with pytest.raises(BrokenPipeError):
        sock.sendall(b"x")
    stream.write(b"to the end")
    assert sock.recv(99) == b"to the end"
    sock.close()  # is noticed, though there is nothing to be read
    stream.until(lambda: stream.state == "gone")


def test_the_guest_closes_and_all_it_sent_arrives(rig: Rig) -> None:
    stream = rig.guest.connect()
    sock, data = rig.service.next(), os.urandom(200_000)
    stream.write(data)
    stream.say(Op.SHUTDOWN, flags=BOTH)
    got = b""
    while part := sock.recv(65536):
        got += part
    assert got == data
    stream.until(lambda: stream.state == "gone")
    rig.no_keys()


def test_a_guest_that_does_not_answer_an_end_is_reset(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STREAM_END_SECONDS", 0.3)
    first, second = rig.guest.connect(), rig.guest.connect()
    for stream, sock in ((first, rig.service.next()), (second, rig.service.next())):
        del rig.guest.streams[stream.port, PORT]  # nobody answers
        sock.close()
    ops = []
    while rig.guest.step(0.6):
        ops.append(rig.guest.stray[-1].op)
    assert ops == [Op.SHUTDOWN, Op.SHUTDOWN, Op.RST, Op.RST]
    rig.no_keys()
    assert not rig.device.streams


def test_rst_of_the_guest_ends_at_once(rig: Rig) -> None:
    stream = rig.guest.connect()
    sock = rig.service.next()
    stream.say(Op.RST)
    assert sock.recv(99) == b""
    assert not rig.guest.step(0.1)
    rig.no_keys()


# ---- what answers RST -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [Op.RESPONSE, Op.SHUTDOWN, Op.RW, Op.CREDIT_UPDATE, Op.CREDIT_REQUEST, 0, 8, 99])
def test_packets_of_no_stream(rig: Rig, op: int) -> None:
    rig.front.transmit(Packet(CID, HOST_CID, 5, PORT, 0, 1, op, 0, 0, 0))
    rig.guest.wait()
    assert rig.guest.stray == [Packet(HOST_CID, CID, PORT, 5, 0, 1, Op.RST, 0, 0, 0)]


@pytest.mark.parametrize(
    "what", [{"op": Op.REQUEST}, {"op": Op.RESPONSE}, {"op": 0}, {"op": 8}, {"op": Op.SHUTDOWN}, {"op": Op.RW, "len": 1}], ids=str
)
def test_packets_that_a_stream_must_not_send(rig: Rig, what: dict[str, int]) -> None:
    bad, good = rig.guest.connect(), rig.guest.connect()
    rig.front.transmit(bad.packet(**({"op": 0} | what))) if "len" not in what else rig.front.transmit(bad.packet(Op.RW, 1))
    bad.until(lambda: bad.state == "gone")
    assert rig.service.next().recv(9) == b""
    echo(rig.service.next())
    good.write(b"lives")
    good.until(lambda: good.took == b"lives")


def test_forged_addresses_and_types(rig: Rig) -> None:
    stream = rig.guest.connect()
    for forged in ({"src_cid": CID + 1}, {"src_cid": 0}, {"dst_cid": CID}, {"dst_cid": 1 << 32 | 2}):
        for op in (Op.RST, Op.RW, Op.REQUEST):
            stream.say(op, **forged)
    rig.front.transmit(stream.packet(Op.RST, type=2))
    rig.front.transmit(stream.packet(Op.RW, type=2))
    rig.guest.wait()
    assert [(packet.type, packet.op) for packet in rig.guest.stray] == [(2, Op.RST)]
    echo(rig.service.next())
    stream.write(b"lives")
    stream.until(lambda: stream.took == b"lives")


# ---- how many -------------------------------------------------------------------------------------------------------------


def test_as_many_streams_as_there_may_be_and_one_more(rig: Rig) -> None:
    streams = [rig.guest.connect() for _ in range(limits.MAX_STREAMS)]
    assert {stream.state for stream in streams} == {"open"}
    assert [stream.peer_buffer for stream in streams] == [limits_of(number) for number in range(limits.MAX_STREAMS)]
    assert len(rig.keys()) == rig.device.streams == limits.MAX_STREAMS
    assert rig.guest.connect().state == "refused"
    for number in (0, 500, -1):
        echo(rig.service._all[number])
        streams[number].write(b"lives")
        streams[number].until(lambda number=number: streams[number].took == b"lives")  # type: ignore[misc]
    streams[0].close()
    assert rig.guest.connect().state == "open"


def test_a_flood_of_packets_waits_for_the_guest_to_take_its_answers(rig: Rig) -> None:
    rig.front.refill = False
    stray = Packet(CID, HOST_CID, 5, PORT, 0, 1, Op.RW, 0, 0, 0)
    sent = 0
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline and rig.front.reclaim():
        rig.front.transmit(stray)
        sent += 1
        if not rig.front.reclaim():
            time.sleep(0.1)
    assert limits.MAX_RESETS + rig.front.num < sent <= limits.MAX_RESETS + 2 * rig.front.num
    before = spent()
    time.sleep(0.3)
    assert spent() - before < 0.1, "the device spins"
    rig.front.refill = True
    for slot in range(rig.front.num):  # those that are used have not been looked at
        assert rig.front.receive() is not None, slot
    for _ in range(sent - rig.front.num):
        assert rig.front.receive() is not None
    assert rig.guest.connect().state == "open"


# ---- the front-end --------------------------------------------------------------------------------------------------------


def test_stop_and_go_on_keeps_streams(rig: Rig) -> None:
    stream = rig.guest.connect()
    sock = rig.service.next()
    for round_ in range(3):
        bases = rig.front.stop()
        assert bases == (rig.front.rings[0].seen, rig.front.rings[1].added)
        sock.sendall(b"while it stood")
        assert not rig.guest.step(0.05)
        rig.front.start(bases)
        stream.until(lambda round_=round_: stream.took == b"while it stood" * (round_ + 1))  # type: ignore[misc]
        stream.write(b"go on")
        assert sock.recv(99) == b"go on"
    assert mapped() == 2


def test_a_driver_that_begins_anew_has_no_streams(rig: Rig) -> None:
    for _ in range(3):
        rig.guest.connect()
        sock = rig.service.next()
        rig.front.stop()
        rig.front.load_driver()
        rig.guest.streams.clear()
        rig.front.start()
        assert sock.recv(99) == b""
        rig.front.settled()
        rig.no_keys()
    assert not rig.device.streams
    assert not rig.guest.stray
    assert mapped() == 2


def test_memory_that_is_remapped_while_rings_run(rig: Rig) -> None:
    stream = rig.guest.connect()
    echo(rig.service.next())
    first, far = rig.front.regions[0], 1 << 32
    more = (GUEST_BASE + far, 4096, USER_BASE + far, 0)
    for number in range(6):
        rig.front.regions = (first,) if number & 1 else (more, first)
        rig.front.set_memory()
        stream.write(b"12345")
    stream.until(lambda: stream.took == b"12345" * 6)
    assert mapped() == 2


def test_another_memory_after_a_stop(rig: Rig) -> None:
    stream = rig.guest.connect()
    echo(rig.service.next())
    bases = rig.front.stop()
    rig.front.remap()
    rig.front.start(bases)
    stream.write(b"12345")
    stream.until(lambda: stream.took == b"12345")
    assert mapped() == 2


def test_two_regions_and_a_file_offset() -> None:
    rig = Rig()
    half = rig.front.size // 2 // 4096 * 4096
    rig.front.regions = (
        (GUEST_BASE + half, rig.front.size - half, USER_BASE + half, half),
        (GUEST_BASE, half, USER_BASE, 0),
    )
    rig.boot()
    stream = rig.guest.connect()
    echo(rig.service.next())
    data = os.urandom(300_000)
    stream.write(data)
    stream.until(lambda: len(stream.took) == len(data))
    assert stream.took == data
    rig.close()


def test_calls_are_swapped_while_rings_run(rig: Rig) -> None:
    stream = rig.guest.connect()
    echo(rig.service.next())
    for _ in range(10):
        old = rig.front.calls[0]
        rig.front.calls[0] = os.eventfd(0, os.EFD_NONBLOCK)
        rig.front.send(Request.SET_VRING_CALL, struct.pack("<Q", 0), [rig.front.calls[0]])
        os.close(old)
        before = len(stream.took)
        stream.write(b"x")
        stream.until(lambda before=before: len(stream.took) > before)  # type: ignore[misc]


def test_a_driver_that_wants_no_interrupts_gets_none(rig: Rig) -> None:
    rig.front.rings[0].words_avail.store(0, 1)
    rig.front.settled()
    time.sleep(0.05)
    os.eventfd_read(rig.front.calls[0])  # of the start
    rig.guest.request()
    until = time.monotonic() + 5
    while rig.front.rings[0].words_used.load(1) == 0 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(rig.front.calls[0])


@pytest.mark.parametrize(
    ("front", "size", "turn"),
    [({}, 400_000, limits.MAX_PACKET), ({"num": 256, "rx_size": PACKET.size + 20}, 4000, limits.PACKETS_AT_ONCE * 20)],
    ids=["bytes", "packets"],
)
def test_several_buffers_are_told_of_at_once(front: dict[str, int], size: int, turn: int) -> None:
    """Not each by an interrupt of its own; but no more of them than one stream may have before others."""
    rig = Rig(**front).boot()
    try:
        stream = rig.guest.connect(buffer=2 * size)
        sock, used = rig.service.next(), rig.front.rings[0].words_used
        rig.front.refill = False
        before, data = used.load(1), os.urandom(size)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * size)
        sock.sendall(data)
        packets = -(-size // (front.get("rx_size", 4096) - PACKET.size))
        until = time.monotonic() + WITHIN
        while used.load(1) - before < packets and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        signals = os.eventfd_read(rig.front.calls[0])
        while rig.guest.step(0):
            pass
        assert stream.took == data
        assert size // turn <= signals < packets // 4
    finally:
        rig.close()


def test_answers_to_need_reply_without_reply_ack() -> None:
    rig = Rig()
    for request, payload in ((Request.SET_OWNER, b""), (Request.SET_STATUS, struct.pack("<Q", 8))):
        rig.front.sure(request, payload)
    rig.close()


def test_messages_that_come_in_pieces() -> None:
    rig = Rig()
    rig.front.begin()
    text = struct.pack("<III", Request.SET_OWNER, 1 | NEED_REPLY, 0)
    for at in range(len(text)):
        rig.front.sock.send(text[at : at + 1])
        time.sleep(0.01)
    assert rig.front.answer() == bytes(8)
    payload, fds = rig.front.table()
    socket.send_fds(rig.front.sock, [struct.pack("<III", Request.SET_MEM_TABLE, 1 | NEED_REPLY, len(payload))], fds)
    time.sleep(0.05)
    rig.front.sock.send(payload)
    assert rig.front.answer() == bytes(8)
    rig.front.load_driver()
    rig.front.start()
    assert rig.guest.connect().state == "open"
    rig.close()


def test_the_front_end_goes(rig: Rig) -> None:
    rig.guest.connect()
    sock = rig.service.next()
    rig.front.sock.close()
    rig.kept_sock.close()
    assert rig.ended() == "the front-end has closed the connection"
    assert sock.recv(99) == b""
    rig.no_keys()
    assert mapped() == 1
    with pytest.raises(OSError, match="ended"):
        rig.device.suspend()
    rig.device.close()
    rig.kept_sock = socket.socket()


def test_close_resets_streams() -> None:
    rig = Rig().boot()
    stream = rig.guest.connect()
    rig.device.close()
    stream.until(lambda: stream.state == "gone")
    rig.no_keys()
    assert rig.why is None
    rig.close()


def test_all_descriptors_are_given_back() -> None:
    def one() -> None:
        rig = Rig().boot()
        for _ in range(3):
            echo(rig.service.next()) if rig.guest.connect().state == "open" else None
        rig.front.stop()
        rig.front.load_driver()
        rig.front.start()
        rig.front.settled()
        rig.close()

    one()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        one()
    time.sleep(0.1)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert mapped() == 0


def test_the_fake_itself_sees_an_answer_that_is_missing() -> None:
    front = FakeFrontEnd()
    front.sock.settimeout(0.05)
    with pytest.raises(Exception, match="no answer"):
        front.ask(Request.GET_FEATURES)
    front.device_sock.close()
    front.close()
