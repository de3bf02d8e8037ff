"""Between a host and its manager: who answers in its place is told nothing; who stands between them reads and changes nothing."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from cryptography import x509
from hsmvisor_rpc.sealed.fleet import HOST_URI
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc
from support.fake_manager import Ca, FakeManager
from support.host_process import HostProcess, new_id, reason, wait_for

pytestmark = pytest.mark.slow
LOCAL = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
ELSEWHERE = x509.IPAddress(ipaddress.ip_address("127.0.0.2"))
HOST = x509.UniformResourceIdentifier(HOST_URI + "00" * 32)
GUEST = "guest-whose-name-nobody-reads"


class Member(HostProcess):
    def __init__(self, manager: FakeManager) -> None:
        super().__init__(manager.settings)

    def join(self, token: str) -> None:
        self.host.JoinManager(pb.JoinManagerRequest(request_id=new_id(), token=token, name="host7"), timeout=20)

    @property
    def link(self) -> pb.ManagerLink:
        return self.host.GetHost(pb.GetHostRequest(), timeout=10).manager

    def connected(self) -> None:
        wait_for(lambda: self.link.connected, 40, "the connection with the manager")

    def register(self, name: str) -> None:
        request = pb.RegisterGuestRequest(request_id=new_id(), name=name, owner="alice")
        rpc.GuestServiceStub(self.channel).RegisterGuest(request, timeout=20)


class Impostor(FakeManager):
    """At a manager's ports; it believes whom that manager believes, and knows no more of it than the network tells."""

    def __init__(self, manager: FakeManager, pair: tuple[bytes, bytes]) -> None:
        super().__init__()
        self.ca, self.secret = manager.ca, manager.secret  # were it trusted, it could answer
        self.port, self.join_port = manager.port, manager.join_port
        self._key, self._certificate = pair
        self.calls = 0
        self.on_exchange = lambda request: self._called()

    def _called(self) -> None:
        self.calls += 1


#: How a certificate is wrong: not of the fleet's authority; another machine's; a host's, which the fleet's authority did issue.
PAIRS: dict[str, Callable[[FakeManager], tuple[bytes, bytes]]] = {
    "stranger": lambda manager: Ca().pair(LOCAL),
    "elsewhere": lambda manager: manager.ca.pair(ELSEWHERE),
    "host": lambda manager: manager.ca.pair(HOST),
}


@pytest.fixture
def manager() -> Iterator[FakeManager]:
    with FakeManager() as manager:
        yield manager


@pytest.fixture
def host(manager: FakeManager) -> Iterator[Member]:
    with Member(manager) as host:
        yield host


@pytest.mark.parametrize("wrong", PAIRS)
def test_a_host_does_not_join_whoever_answers(host: Member, manager: FakeManager, wrong: str) -> None:
    manager.stop()
    with Impostor(manager, PAIRS[wrong](manager)) as impostor:
        with pytest.raises(grpc.RpcError) as caught:
            host.join(manager.token())
        assert reason(caught.value) == (grpc.StatusCode.UNAVAILABLE, "MANAGER")
        assert impostor.joins == [] and not host.host.GetHost(pb.GetHostRequest(), timeout=10).HasField("manager")
    manager.start()
    host.join(manager.token())
    host.connected()


@pytest.mark.parametrize("wrong", PAIRS)
def test_a_host_that_has_joined_tells_nothing_to_whoever_answers(host: Member, manager: FakeManager, wrong: str) -> None:
    host.join(manager.token())
    host.connected()
    manager.stop()
    with Impostor(manager, PAIRS[wrong](manager)) as impostor:
        wait_for(lambda: not host.link.connected, 20, "that the connection is lost")
        host.register(GUEST)
        host.restart()
        wait_for(lambda: host.link.failure, 20, "an attempt")
        time.sleep(3)  # some more
        assert not host.link.connected and (impostor.calls, impostor.guests) == (0, {})
    manager.start()
    host.connected()
    manager.heard(GUEST)


def test_the_impostor_would_be_heard_with_the_right_certificate(host: Member, manager: FakeManager) -> None:
    """The control of the two tests above."""
    host.join(manager.token())
    host.connected()
    manager.stop()
    with Impostor(manager, manager.ca.pair(LOCAL)) as impostor:
        wait_for(lambda: impostor.calls, 40, "an exchange")


# ---- somebody in between ------------------------------------------------------------------------------------------------


class Between:
    """Passes on what comes to `port`, and remembers it; with `altering` one byte of each piece to the host, or to the manager, is
    another one."""

    def __init__(self, port: int, behind: int) -> None:
        self.seen, self.altering, self.altered = bytearray(), "", 0
        self._behind = behind
        self._listener = socket.create_server(("127.0.0.1", port))
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._behind), 5)
                self._open += [near, far]
                for source, target, towards in ((near, far, "manager"), (far, near, "host")):
                    threading.Thread(target=self._pass, args=(source, target, towards), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, towards: str) -> None:
        with contextlib.suppress(OSError):
            while piece := bytearray(source.recv(65536)):
                self.seen += piece
                if self.altering == towards:
                    piece[-1] ^= 1
                    self.altered += 1
                target.sendall(piece)
        self._end(source, target)

    def _end(self, *sockets: socket.socket) -> None:
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._end(self._listener, *self._open)
        self._listener.close()


def test_who_stands_between_reads_nothing_and_changes_nothing(host: Member, manager: FakeManager) -> None:
    host.join(manager.token())
    host.connected()
    manager.stop()
    front, manager.port = manager.port, 0
    manager.start()
    with contextlib.closing(Between(front, manager.port)) as between:
        host.connected()
        host.register(GUEST)
        manager.heard(GUEST)
        assert len(between.seen) > 2000 and GUEST.encode() not in between.seen
        for towards in ("manager", "host"):
            before, serials = len(manager.exchanges), list(manager.serials)
            between.altering, between.altered = towards, 0
            host.register(f"changed-towards-{towards}")
            wait_for(lambda: between.altered >= 2, 30, "changed bytes")
            time.sleep(1)
            if towards == "manager":
                assert len(manager.exchanges) == before and "changed-towards-manager" not in manager.guests
            assert manager.serials == serials
            between.altering = ""
            host.connected()
            manager.heard(f"changed-towards-{towards}", within=40)
    assert {GUEST, "changed-towards-manager", "changed-towards-host"} == set(manager.guests)
