"""Lanes: equal signatures that no interpreter sees, on a real worker.  Whatever ends a right to sign ends it for them too."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import NoDigestInfo, Prehashed, encode_dss_signature
from hsmvisord import ck, limits
from hsmvisord.wire.calls import Call, Mechanism, Needed
from support.bare_worker import BareWorker, m
from support.certificates import new_key, pkcs8, spki
from support.native_client import JOIN, NativeClient
from support.wire_client import Refused

KEYS: dict[str, Any] = {"p256": new_key("p256"), "rsa2048": new_key("rsa2048"), "ed25519": new_key("ed25519")}
MECHANISMS = {"p256": ck.CKM_ECDSA, "rsa2048": ck.CKM_RSA_PKCS, "ed25519": ck.CKM_EDDSA}
MANY = 3 * limits.LANE_AFTER


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareWorker]:
    worker = BareWorker(tmp_path_factory.mktemp("worker"))
    for name, key in KEYS.items():
        worker.push(name, 1, pkcs8(key), spki(key))
    yield worker
    worker.stop()


class Signer:
    """One connection that signs with one key in one session, until `fast` says that it has a lane."""

    def __init__(self, worker: BareWorker, name: str = "p256", ticket: bytes | None = None, session: int = 0) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(worker.guest_path))
        self.client, self.name, self.worker = NativeClient(sock), name, worker
        self.ticket = self.client.hello(JOIN if ticket else 0, ticket).ticket
        self.session = session or self.client.open_session()
        (self.key,) = self.client.find(self.session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, name.encode()))
        self.mechanism = Mechanism(MECHANISMS[name])

    def sign(self, data: bytes = b"d" * 32, room: int | None = 65536) -> Any:
        return self.client.sign_once(self.session, self.mechanism, self.key, data, room)

    def check(self, data: bytes) -> None:
        verify(self.name, data, self.sign(data))

    def fast(self) -> Signer:
        for number in range(MANY):
            self.check(number.to_bytes(32, "big"))
        return self

    def close(self) -> None:
        self.client.close()


def verify(name: str, data: bytes, signature: bytes) -> None:
    """Raises InvalidSignature."""
    public = KEYS[name].public_key()
    match public:
        case ec.EllipticCurvePublicKey():
            r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
            assert len(signature) == 64
            public.verify(encode_dss_signature(r, s), data, ec.ECDSA(Prehashed(hashes.SHA256())))
        case rsa.RSAPublicKey():
            public.verify(signature, data, padding.PKCS1v15(), NoDigestInfo())
        case _:
            public.verify(signature, data)


@contextlib.contextmanager
def refused(rv: int) -> Iterator[None]:
    with pytest.raises(Refused) as caught:
        yield
    assert caught.value.rv == rv, ck.rv_name(caught.value.rv)


def statistics(worker: BareWorker) -> dict[str, Any]:
    report = worker.ask(m.QueryStatistics())
    assert isinstance(report, m.Report)
    values: dict[str, Any] = json.loads(report.report)
    return values


def counted(worker: BareWorker, name: str) -> tuple[int, int]:
    """Returns signatures and errors so far."""
    cells = [c for c in statistics(worker)["operations"] if c["mechanism"] == ck.mechanism_name(MECHANISMS[name])]
    assert all(sum(c["counts"]) == c["count"] for c in cells)
    return sum(c["count"] for c in cells), sum(c["errors"] for c in cells)


@pytest.fixture
def make(worker: BareWorker) -> Iterator[Callable[[str], Signer]]:
    """Makes signers that have a lane: without it what follows would be no test of lanes."""
    made: list[Signer] = []

    def make(name: str) -> Signer:
        made.append(Signer(worker, name))
        for number in range(MANY):
            made[0].check(number.to_bytes(32, "big"))
        assert statistics(worker)["lanes"] == 1
        return made[0]

    yield make
    for signer in made:
        signer.close()
    end = time.monotonic() + 10
    while statistics(worker)["connections"] and time.monotonic() < end:
        time.sleep(0.01)


@pytest.fixture
def signer(make: Callable[[str], Signer]) -> Signer:
    return make("p256")


@pytest.mark.parametrize("name", KEYS)
def test_every_signature_verifies_and_is_counted(worker: BareWorker, make: Callable[[str], Signer], name: str) -> None:
    count, errors = counted(worker, name)
    signer = make(name)
    for length in (32, 20, 32, 31) if name != "p256" else (32,) * 4:
        for number in range(MANY):
            signer.check(number.to_bytes(length, "big"))
    assert counted(worker, name) == (count + 5 * MANY, errors)
    signer.close()
    assert counted(worker, name) == (count + 5 * MANY, errors)


def test_other_requests_come_between(signer: Signer) -> None:
    assert signer.sign(room=None) == Needed(64)
    with refused(ck.CKR_OPERATION_ACTIVE):  # the question has left it open
        signer.sign()
    signer.client.call(Call.SIGN, signer.session, b"d" * 32, 64)
    assert len(signer.client.call(Call.GENERATE_RANDOM, signer.session, 8)[0]) == 8
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        signer.client.sign_once(signer.session, signer.mechanism, 77777, b"d" * 32)
    with refused(ck.CKR_DATA_LEN_RANGE):
        signer.sign(b"")
    signer.fast()


def test_a_closed_session_signs_nothing(worker: BareWorker, signer: Signer) -> None:
    other = Signer(worker, ticket=signer.ticket)
    other.client.call(Call.CLOSE_SESSION, signer.session)
    with refused(ck.CKR_SESSION_HANDLE_INVALID):
        signer.sign()
    signer.session = signer.client.open_session()
    signer.fast()
    other.client.call(Call.CLOSE_ALL_SESSIONS, 0)
    with refused(ck.CKR_SESSION_HANDLE_INVALID):
        signer.sign()
    other.close()


def test_an_open_operation_is_in_the_way(worker: BareWorker, signer: Signer) -> None:
    other = Signer(worker, ticket=signer.ticket, session=signer.session)
    other.client.call(Call.SIGN_INIT, signer.session, signer.mechanism, signer.key)
    with refused(ck.CKR_OPERATION_ACTIVE):
        signer.sign()
    other.client.call(Call.SIGN, signer.session, b"d" * 32, 64)
    signer.fast()
    other.close()


def test_an_application_that_has_ended_signs_nothing(worker: BareWorker, signer: Signer) -> None:
    other = Signer(worker, ticket=signer.ticket)
    other.client.call(Call.FINALIZE)
    with pytest.raises(Refused):
        signer.sign()
    other.close()


def test_a_detached_token_signs_nothing(worker: BareWorker, signer: Signer) -> None:
    worker.ask(m.SetTokenPresent(False))
    end = time.monotonic() + 10
    while statistics(worker)["lanes"] and time.monotonic() < end:
        time.sleep(0.01)
    assert statistics(worker)["lanes"] == 0, "an idle lane holds on to what it was given"
    with refused(ck.CKR_SESSION_HANDLE_INVALID):
        signer.sign()
    worker.ask(m.SetTokenPresent(True))


def test_a_signature_is_logged_once_the_module_logs(worker: BareWorker, signer: Signer) -> None:
    worker.ask(m.Configure(json.dumps({"log_signatures": True})))
    worker.worker.events.clear()
    for _ in range(MANY):
        signer.sign()
    end = time.monotonic() + 10
    while sum(e.kind == "signature" for e in worker.worker.events) < MANY and time.monotonic() < end:
        worker.ask(m.QueryStatus())
    worker.ask(m.Configure("{}"))
    assert sum(e.kind == "signature" for e in worker.worker.events) == MANY


def test_a_pin_hides_the_key_at_once(tmp_path: Path) -> None:
    worker = BareWorker(tmp_path)
    worker.push("p256", 1, pkcs8(KEYS["p256"]), spki(KEYS["p256"]))
    signer = Signer(worker).fast()
    assert isinstance(worker.ask(m.SetPin("pin", b"482913")), m.Done)
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        signer.sign()
    signer.client.call(Call.LOGIN, signer.session, ck.CKU_USER, b"482913")
    signer.fast()
    assert statistics(worker)["lanes"] == 1
    other = Signer(worker, ticket=signer.ticket, session=signer.session)
    other.client.call(Call.LOGOUT, signer.session)
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        signer.sign()
    signer.close()
    other.close()
    worker.stop()


def test_a_destroyed_generation_signs_nothing(
    worker: BareWorker, make: Callable[[str], Signer], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_key("p256")
    worker.push("gone", 1, pkcs8(key), spki(key))
    monkeypatch.setitem(KEYS, "gone", key)
    monkeypatch.setitem(MECHANISMS, "gone", ck.CKM_ECDSA)
    signer = make("gone")
    worker.push("gone", 2, pkcs8(KEYS["p256"]), spki(KEYS["p256"]))
    signer.sign()  # the drain
    destroyed = worker.execute("destroy", "gone", 1)
    assert isinstance(destroyed, m.Executed), destroyed
    with refused(ck.CKR_KEY_HANDLE_INVALID):
        signer.sign()


def test_a_slow_reader_gets_every_reply_whole(signer: Signer) -> None:
    """Its replies fill the socket: what does not fit comes back to the interpreter, and follows when there is room."""
    count = 330
    for _ in range(count):
        signer.client.send(Call.SIGN_ONCE, signer.session, signer.mechanism, signer.key, b"d" * 32, 64)
        time.sleep(0.0003)
    for _ in range(count):
        _, values = signer.client.receive()
        assert not isinstance(values, Refused)
        verify("p256", b"d" * 32, values[0])
    signer.fast()


def test_many_connections_that_sign_and_vanish(worker: BareWorker) -> None:
    count, _ = counted(worker, "p256")
    failures: list[BaseException] = []

    def use(number: int) -> None:
        try:
            for turn in range(3):
                signer = Signer(worker, "p256").fast()
                if turn == 1:  # in the middle of a request
                    signer.client.sock.sendall(b"\0\0\0\1\0\0")
                elif turn == 2:
                    signer.client.send(Call.SIGN_ONCE, signer.session, signer.mechanism, signer.key, b"d" * 32, 64)
                signer.client.sock.close()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    end = time.monotonic() + 10
    while (left := statistics(worker))["connections"] and time.monotonic() < end:
        time.sleep(0.02)
    assert (left["connections"], left["sessions"], left["lanes"]) == (0, 0, 0)
    assert counted(worker, "p256")[0] - count in range(36 * MANY, 36 * MANY + 13)
