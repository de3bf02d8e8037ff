"""Limits of connections, frames and what waits, on a real worker: each at the limit and one past it."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisord import ck, limits
from hsmvisord.wire.calls import Call, Mechanism
from support.bare_worker import BareWorker
from support.certificates import new_key, pkcs8, spki
from support.guest import wait_for
from support.hostile import connect, key, many, raw
from support.native_client import NativeClient
from support.p11kit_client import P11KitClient
from support.wire_client import HEADER, Refused

NEVER = 2**40  #: a watermark that no test reaches


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareWorker]:
    worker = BareWorker(tmp_path_factory.mktemp("worker"))
    made = new_key("rsa2048")
    worker.push("rsa", 1, pkcs8(made), spki(made), profile="any", self_signed=True)
    yield worker
    worker.stop()


@pytest.fixture
def path(worker: BareWorker) -> Iterator[str]:
    """The module's socket; after the test an honest client is answered."""
    yield str(worker.guest_path)
    with contextlib.closing(eventually(str(worker.guest_path))) as client:
        assert client.open_session()


def eventually(path: str) -> NativeClient:
    """Connections that were closed just now may still count."""
    end = time.monotonic() + 10
    while True:
        try:
            return connect(path)
        except Refused:
            assert time.monotonic() < end
            time.sleep(0.02)


def answered(sock: socket.socket, within: float) -> bool:
    return bool(select.select([sock], [], [], within)[0])


def test_256_connections_and_what_the_next_ones_are_told(path: str) -> None:
    with many(path, limits.MAX_CONNECTIONS) as clients:
        assert len(clients) == limits.MAX_CONNECTIONS
        for _ in range(2):
            with contextlib.closing(NativeClient(raw(path))) as over:
                for _ in range(2):
                    with pytest.raises(Refused) as refused:
                        over.hello()
                    assert refused.value.rv == ck.CKR_HOST_MEMORY
        stock = P11KitClient(raw(path))
        with pytest.raises(Refused) as refused:
            stock.initialize()
        assert refused.value.rv == ck.CKR_HOST_MEMORY
        stock.close()
        assert clients[-1].open_session(), "who was there before is not hurt"
        clients.pop().close()
        clients.append(eventually(path))


def test_64_are_refused_at_a_time_and_those_behind_wait_for_their_turn(path: str) -> None:
    with many(path, limits.MAX_CONNECTIONS):
        over = [NativeClient(raw(path)) for _ in range(limits.MAX_REFUSED)]
        last = raw(path)
        last.sendall(b"\x81")
        assert not answered(last, 0.5), "not accepted yet"
        over.pop().close()
        assert answered(last, 5)
        last.close()
        for client in over:
            with pytest.raises(Refused):
                client.hello()
            client.close()


def test_requests_of_one_connection_that_wait(path: str) -> None:
    with contextlib.closing(connect(path)) as client:
        for _ in range(limits.MAX_PARKED):
            client.send(Call.ROTATION_WAIT, NEVER)
        with pytest.raises(Refused) as refused:
            client.call(Call.ROTATION_WAIT, NEVER)
        assert refused.value.rv == ck.CKR_HOST_MEMORY
        assert client.open_session(), "its other calls go on"


def test_large_requests_share_their_room_and_the_next_one_waits(path: str) -> None:
    """They are begun and not ended; who comes behind is read when one of them is gone."""
    size = limits.MAX_MESSAGE
    with many(path, limits.MAX_LARGE_REQUESTS // size + 1) as clients:
        *greedy, honest = clients
        session = honest.open_session()
        for client in greedy:
            client.sock.sendall(HEADER.pack(1, 0, size - HEADER.size) + bytes(1000))
        greedy[0].sock.sendall(bytes(limits.SMALL_FRAME))
        data = bytes(300_000)
        small, large = (
            Mechanism(ck.CKM_SHA256),
            honest.encoding.request(Call.DIGEST_ONCE, session, Mechanism(ck.CKM_SHA256), data, 64),
        )
        assert honest.digest_once(session, small, bytes(limits.SMALL_FRAME - 100), 64), "small ones are always read"
        honest.sock.setblocking(False)
        frame = HEADER.pack(7, 0, len(large)) + large
        sent = honest.sock.send(frame)
        assert not answered(honest.sock, 0.5)
        assert sent < len(frame), "a frame of this size does not fit into the socket"
        greedy.pop().close()
        clients.remove(clients[-2])
        honest.sock.settimeout(10)
        honest.sock.sendall(frame[sent:])
        assert HEADER.unpack(honest.take(HEADER.size))[0] == 7


def test_large_replies_share_their_room_and_small_ones_do_not_need_it(path: str) -> None:
    """One reply is a certificate, asked for often in one call; nobody reads them."""
    readers: list[NativeClient] = []
    refusals = 0
    with contextlib.ExitStack() as stack:
        honest = stack.enter_context(contextlib.closing(connect(path)))
        session = honest.open_session()
        certificate = honest.find(session, (ck.CKA_CLASS, ck.CKO_CERTIFICATE))[0]
        wanted = [(ck.CKA_VALUE, 65536)] * limits.MAX_ATTRIBUTES
        one = len(honest.call(Call.GET_ATTRIBUTE_VALUE, session, certificate, wanted)[0])
        assert one == limits.MAX_ATTRIBUTES
        for _ in range(200):
            client = stack.enter_context(contextlib.closing(connect(path)))
            begun = client.open_session()
            for _ in range(3):  # the socket takes the first
                client.send(Call.GET_ATTRIBUTE_VALUE, begun, certificate, wanted)
            readers.append(client)
        assert honest.value(session, certificate, ck.CKA_LABEL), "small replies are always made"
        with pytest.raises(Refused) as refused:
            for _ in range(2):
                honest.call(Call.GET_ATTRIBUTE_VALUE, session, certificate, wanted)
        assert refused.value.rv == ck.CKR_HOST_MEMORY
        for client in readers:
            for _ in range(3):
                refusals += isinstance(client.receive()[1], Refused)
        assert 0 < refusals < 600, refusals
        wait_for(lambda: honest.call(Call.GET_ATTRIBUTE_VALUE, session, certificate, wanted), "room again")


def test_pipelined_requests_that_take_long_are_all_answered_in_order(path: str) -> None:
    with many(path, 4) as clients:
        for client in clients:
            session = client.open_session()
            handle = key(client, session)
            client.sent = [  # type: ignore[attr-defined]
                client.send(Call.SIGN_ONCE, session, Mechanism(ck.CKM_SHA256_RSA_PKCS), handle, b"%d" % n, 256) for n in range(100)
            ]
        for client in clients:
            assert [client.receive()[0] for _ in range(100)] == client.sent  # type: ignore[attr-defined]


def test_a_client_that_goes_while_its_requests_are_answered(path: str) -> None:
    """Its sockets are hung up with requests in them and one under way, again and again."""
    for _ in range(30):
        with many(path, 4) as clients:
            for client in clients:
                session = client.open_session()
                handle = key(client, session)
                for _ in range(20):
                    client.send(Call.SIGN_ONCE, session, Mechanism(ck.CKM_SHA256_RSA_PKCS), handle, b"data", 256)
    with contextlib.closing(connect(path)) as client:
        session = client.open_session()
        assert client.sign_once(session, Mechanism(ck.CKM_SHA256_RSA_PKCS), key(client, session), b"data")


def test_what_is_overdue_is_closed_after_10_s_and_what_is_idle_is_not(path: str) -> None:
    """Nothing, half a header, half a frame, half a large frame that goes on in single bytes, replies that nobody reads; and one
    that is over the limit of connections, which had its answer."""
    began = time.monotonic()
    beginnings = [
        b"",
        b"\x81\0\0",
        b"\x81" + HEADER.pack(1, 0, 100) + b"x",
        b"\x81" + HEADER.pack(1, 0, limits.MAX_MESSAGE) + bytes(999),
    ]
    late = [raw(path) for _ in beginnings]
    for sock, beginning in zip(late, beginnings, strict=True):
        sock.sendall(beginning)
    idle, slow = connect(path), connect(path)
    session = slow.open_session()
    for _ in range(20):
        slow.send(Call.GENERATE_RANDOM, session, limits.MAX_RANDOM)
    busy = connect(path)
    session = busy.open_session()
    others = [connect(path) for _ in range(limits.MAX_CONNECTIONS - len(late) - 3)]
    over = NativeClient(raw(path))
    with pytest.raises(Refused):
        over.hello()
    while not all(_is_closed(sock) for sock in (*late, slow.sock, over.sock)):
        assert time.monotonic() - began < limits.FRAME_SECONDS + 15
        busy.send(Call.GET_SESSION_INFO, session)  # a frame is always under way, and no frame is late
        with contextlib.suppress(BrokenPipeError):
            late[3].send(b"x")
        time.sleep(0.1)
    assert time.monotonic() - began > limits.FRAME_SECONDS - 1
    assert idle.open_session() and busy.receive(), "an idle one stays"
    for client in (idle, busy, slow, over, *others):
        client.close()


def _is_closed(sock: socket.socket) -> bool:
    """Says whether the module has hung up, without reading."""
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


def test_connections_leave_no_descriptor_and_no_thread_behind(path: str, worker: BareWorker) -> None:
    def counts() -> tuple[int, int]:
        return len(list(Path(f"/proc/{worker.pid}/fd").iterdir())), len(list(Path(f"/proc/{worker.pid}/task").iterdir()))

    before = counts()
    for _ in range(300):
        connect(path).close()
    wait_for(lambda: counts()[0] <= before[0] + 1, "descriptors given back")
    assert counts()[1] <= before[1] + limits.THREADS
