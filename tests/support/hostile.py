"""What a guest can do to its module out of malice, each as a function that goes on until it is told to stop.

Also a program, for the bench: `python -m support.hostile BEHAVIOUR SOCKET SECONDS` prints what it did, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import resource
import selectors
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

from hsmvisord import ck
from hsmvisord.wire.calls import Attribute, Call, Mechanism
from support.native_client import NativeClient
from support.wire_client import HEADER, Closed, Refused

Running = Callable[[], bool]
SHA256 = Mechanism(ck.CKM_SHA256)
ECDSA = Mechanism(ck.CKM_ECDSA)


def socket_of(address: str) -> str:
    return address.removeprefix("unix:path=")


def connect(path: str, timeout: float = 20) -> NativeClient:
    """A connection that has said Hello; raises Refused (over a limit), Closed, OSError."""
    client = NativeClient(raw(path, timeout))
    client.hello(program=b"hostile")
    return client


def raw(path: str, timeout: float = 20) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def key(client: NativeClient, session: int) -> int:
    return int(client.find(session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY))[0])


@contextlib.contextmanager
def many(path: str, count: int, begin: Callable[[str], NativeClient] = connect) -> Iterator[list[NativeClient]]:
    """As many as are let in."""
    clients: list[NativeClient] = []
    with contextlib.suppress(Refused, Closed, OSError):
        while len(clients) < count:
            clients.append(begin(path))
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


# ---- connections --------------------------------------------------------------------------------------------------------


def storm(path: str, running: Running, done: Counter[str]) -> None:
    """Connects, begins an application and goes, without pause."""
    while running():
        try:
            connect(path).close()
            done["connections"] += 1
        except (Refused, Closed, OSError):
            done["refused"] += 1


def crowd(path: str, running: Running, done: Counter[str]) -> None:
    """Takes every connection, keeps them, and goes on trying."""
    with many(path, 1000) as clients:
        done["connections"] = len(clients)
        while running():
            try:
                client = connect(path, timeout=2)
                client.close()
                done["let in"] += 1
            except (Refused, Closed, OSError) as error:
                done[f"refused: {ck.rv_name(error.rv)}" if isinstance(error, Refused) else type(error).__name__] += 1


def half_sent(path: str, running: Running, done: Counter[str]) -> None:
    """Nothing at all, half a header, half a frame, half a large frame: on as many connections as there are, again when closed."""
    beginnings = [
        b"",
        b"\x81",
        b"\x81\0\0\0\1",
        b"\x81" + HEADER.pack(1, 0, 100),
        b"\x81" + HEADER.pack(1, 0, 1 << 20) + bytes(50_000),
    ]
    socks: list[socket.socket] = []
    while running():
        socks = [sock for sock in socks if not _closed(sock, done)]
        while len(socks) < 250 and running():
            try:
                sock = raw(path, 2)
                sock.sendall(beginnings[done["begun"] % len(beginnings)])
            except OSError:
                break
            sock.setblocking(False)
            socks.append(sock)
            done["begun"] += 1
        time.sleep(0.05)
    for sock in socks:
        sock.close()


def _closed(sock: socket.socket, done: Counter[str]) -> bool:
    try:
        if sock.recv(4096):
            return False
    except BlockingIOError:
        return False
    except OSError:
        pass
    sock.close()
    done["closed by the module"] += 1
    return True


# ---- bytes --------------------------------------------------------------------------------------------------------------


def giant_lengths(path: str, running: Running, done: Counter[str]) -> None:
    """Lengths and counts of 2^32-1 and templates that nest without end, each on a connection of its own that asks again."""
    deep = b"".join([struct.pack(">QBI", ck.CKA_WRAP_TEMPLATE, 2, 1) for _ in range(10_000)])
    messages = [
        struct.pack(">IQI", Call.FIND_OBJECTS_INIT, 1, 0xFFFFFFFF),
        struct.pack(">IQI", Call.FIND_OBJECTS_INIT, 1, 1) + deep,
        struct.pack(">IQI", Call.FIND_OBJECTS_INIT, 1, 1) + struct.pack(">QBI", ck.CKA_LABEL, 1, 0xFFFFFFFF),
        struct.pack(">IQBI", Call.SIGN, 1, 1, 0xFFFFFFFF) + bytes(100),
        struct.pack(">IBI", Call.RESTORE_SESSIONS, 1, 0xFFFFFFFF),
        struct.pack(">IQQBB", Call.SIGN_INIT, 1, 1, 2, 255),
    ]
    while running():
        with contextlib.suppress(Refused, Closed, OSError):
            client = connect(path)
            session = client.open_session()
            for message in messages:
                client.send_message(Call.FIND_OBJECTS_INIT, message)
                answer = client.receive()[1]
                done["refused"] += isinstance(answer, Refused)
            client.call(Call.GET_SESSION_INFO, session)
            for sizes in ((0xFFFFFFFF, 0), (0, 0xFFFFFFFF)):
                client.sock.sendall(HEADER.pack(1, *sizes))
                with contextlib.suppress(Closed):
                    client.take(1)
                    raise AssertionError("a frame of 4 GiB was answered")
                done["closed"] += 1
                client.close()
                client = connect(path)
            client.close()


def flood(path: str, running: Running, done: Counter[str]) -> None:
    """Signatures in batches of hundreds on eight connections, replies read as they come."""
    selector = selectors.DefaultSelector()
    with many(path, 8) as clients:
        for client in clients:
            session = client.open_session()
            handle = key(client, session)
            request = client.encoding.request(Call.SIGN_ONCE, session, ECDSA, handle, bytes(32), 64)
            client.sock.setblocking(False)
            batch = (HEADER.pack(1, 0, len(request)) + request) * 300
            selector.register(client.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, [batch, 0])
        while running():
            for chosen, mask in selector.select(0.1):
                sock, state = chosen.fileobj, chosen.data
                assert isinstance(sock, socket.socket)
                with contextlib.suppress(BlockingIOError):
                    if mask & selectors.EVENT_READ:
                        done["bytes of replies"] += len(sock.recv(65536))
                    if mask & selectors.EVENT_WRITE:
                        state[1] = (state[1] + sock.send(batch[state[1] :])) % len(batch)


def slow_readers(path: str, running: Running, done: Counter[str]) -> None:
    """Ask for much on every connection and read nothing; connect again when closed."""
    clients: list[NativeClient] = []
    while running():
        while len(clients) < 200 and running():
            try:
                client = connect(path, 2)
                session = client.open_session()
                request = client.encoding.request(Call.GENERATE_RANDOM, session, 65536)
                client.sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    client.sock.send((HEADER.pack(1, 0, len(request)) + request) * 1000)
            except (Refused, Closed, OSError):
                break
            done["begun"] += 1
            clients.append(client)
        time.sleep(0.05)
        for client in clients[:]:
            try:
                client.sock.send(b"")
                if client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise BrokenPipeError
                client.sock.send(HEADER.pack(1, 0, len(request)) + request)
            except BlockingIOError:
                pass
            except OSError:
                client.close()
                clients.remove(client)
                done["closed by the module"] += 1
    for client in clients:
        client.close()


# ---- sessions, operations, objects --------------------------------------------------------------------------------------


def exhaustion(path: str, running: Running, done: Counter[str]) -> None:
    """Every session of the module with a search, a digest and a signature open in each; then all again."""
    while running():
        with contextlib.suppress(Refused, Closed, OSError), contextlib.closing(connect(path)) as client:
            try:
                handle = 0
                while running():
                    session = client.open_session()
                    handle = handle or key(client, session)
                    client.call(Call.DIGEST_INIT, session, SHA256)
                    client.call(Call.DIGEST_UPDATE, session, bytes(400))
                    client.call(Call.SIGN_INIT, session, ECDSA, handle)
                    client.call(Call.FIND_OBJECTS_INIT, session, ())
                    done["sessions"] += 1
            except Refused as refused:
                done[ck.rv_name(refused.rv)] += 1


def large_requests(path: str, running: Running, done: Counter[str]) -> None:
    """Digests of the largest message."""
    data = bytes((1 << 20) - 100)
    with contextlib.closing(connect(path)) as client:
        session = client.open_session()
        while running():
            client.digest_once(session, SHA256, data)
            done["digests"] += 1


def big_templates(path: str, running: Running, done: Counter[str]) -> None:
    """Searches whose values are long and never the same, nested or not: nothing of them is to be kept."""
    with contextlib.closing(connect(path)) as client:
        session = client.open_session()
        while running():
            value = done["searches"].to_bytes(8, "big") * 50_000
            nested = (Attribute(ck.CKA_WRAP_TEMPLATE, (Attribute(ck.CKA_LABEL, value),)),)
            client.find_once(session, *(nested if done["searches"] % 2 else ((ck.CKA_LABEL, value),)))
            done["searches"] += 1


def waiting_calls(path: str, running: Running, done: Counter[str]) -> None:
    """Calls that wait, as many as are taken."""
    with many(path, 80) as clients:
        for client in clients:
            for _ in range(100):
                client.send(Call.ROTATION_WAIT, 2**40)
                done["asked"] += 1
        for client in clients:
            client.sock.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                while True:
                    client.receive()
                    done["refused"] += 1
        while running():
            time.sleep(0.05)


def pin_guessing(path: str, running: Running, done: Counter[str]) -> None:
    """Wrong PINs on sixteen connections at once."""
    with many(path, 16) as clients:
        sessions = [client.open_session() for client in clients]
        while running():
            for client, session in zip(clients, sessions, strict=True):
                client.send(Call.LOGIN, session, ck.CKU_USER, b"guess-%d" % done["guesses"])
                done["guesses"] += 1
            for client in clients:
                answer = client.receive()[1]
                done[ck.rv_name(answer.rv) if isinstance(answer, Refused) else "let in"] += 1


BEHAVIOURS: dict[str, Callable[[str, Running, Counter[str]], None]] = {
    "connection storm": storm,
    "crowd": crowd,
    "half-sent frames": half_sent,
    "giant lengths": giant_lengths,
    "pipelined flood": flood,
    "slow readers": slow_readers,
    "exhaustion": exhaustion,
    "large requests": large_requests,
    "big templates": big_templates,
    "waiting calls": waiting_calls,
    "PIN guessing": pin_guessing,
}


def main(behaviour: str, path: str, seconds: str) -> None:
    end = time.monotonic() + float(seconds)
    done: Counter[str] = Counter()
    BEHAVIOURS[behaviour](path, lambda: time.monotonic() < end, done)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"done": done, "cpu_s": round(used.ru_utime + used.ru_stime, 2)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
