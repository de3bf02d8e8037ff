"""Parts of the host's half of the management plane: commands in lanes, what is kept, what an operator brings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hsmvisor.host import limits
from hsmvisor.host.uplink import carrying
from hsmvisor.host.uplink.carrying import Carrying
from hsmvisor.host.uplink.joining import invitation
from hsmvisor.host.uplink.membership import BadMembership, Membership, Memory, port_of
from hsmvisor.host.uplink.told import Given
from hsmvisor.serving.errors import Invalid, NotFound, ServiceError, Unavailable
from hsmvisor.serving.requests import Origin
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.fleet import HOST_URI, JoinToken
from support.certificates import DER, PEM
from support.fake_manager import Ca

HOST = "ab" * 32


class Executor:
    """In the place of modules: notes what runs, and waits for `go`."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.running = self.most = 0
        self.go = asyncio.Event()
        self.faults: dict[str, list[ServiceError]] = {}

    async def execute(self, origin: Origin, id: str, name: str, command: bytes) -> m.Executed:
        self.begun.append(id)
        self.running += 1
        self.most = max(self.most, self.running)
        await self.go.wait()
        self.running -= 1
        if self.faults.get(id):
            raise self.faults[id].pop(0)
        return m.Executed("activate", "tls", 1, 7, "signer", "{}", False)

    def get(self, name: str) -> Any:
        raise NotFound("MODULE", "none")


def with_carrying(work: Callable[[Carrying, Executor], Awaitable[None]]) -> None:
    async def run() -> None:
        executor = Executor()
        made = Carrying(executor, executor, lambda: Origin("manager"), asyncio.Event())  # type: ignore[arg-type]
        await work(made, executor)
        await made.stop()

    asyncio.run(asyncio.wait_for(run(), 20))


def given(id: str, module: str = "web") -> Given:
    return Given(id, module, b"signed")


async def settled(made: Carrying) -> None:
    while tasks := [lane.task for lane in made._lanes.values() if lane.task is not None]:
        await asyncio.wait(tasks)


def test_in_order_for_one_module_and_eight_modules_at_a_time() -> None:
    async def work(made: Carrying, executor: Executor) -> None:
        ids = [f"{module}-{number}" for number in range(3) for module in range(20)]
        assert made.take(given(id, f"m{id.partition('-')[0]}") for id in ids) == 60
        await asyncio.sleep(0.01)
        assert len(executor.begun) == 8
        executor.go.set()
        await settled(made)
        assert executor.most == 8
        for module in range(20):
            assert [id for id in executor.begun if id.startswith(f"{module}-")] == [f"{module}-{n}" for n in range(3)]
        assert all(result.done and result.sequence == 7 for result in made.results())

    with_carrying(work)


def test_what_is_given_again_is_carried_out_once_until_its_result_is_known() -> None:
    async def work(made: Carrying, executor: Executor) -> None:
        assert made.take([given("a"), given("a"), given("b")]) == 2
        executor.go.set()
        await settled(made)
        assert made.take([given("a"), given("b")]) == 0, "their results were not told"
        made.confirm(made.results())
        assert made.results() == ()
        assert made.take([given("a")]) == 1, "then its request id decides"
        await settled(made)
        assert executor.begun == ["a", "b", "a"]

    with_carrying(work)


def test_as_many_as_wait_and_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_COMMANDS", 3)
    monkeypatch.setattr(limits, "MAX_RESULTS", 2)

    async def work(made: Carrying, executor: Executor) -> None:
        assert made.take(map(given, "abcd")) == 3
        executor.go.set()
        await settled(made)
        assert [result.id for result in made.results()] == ["a", "b"]
        made.confirm(made.results())
        assert [result.id for result in made.results()] == ["c"]
        assert made.take(map(given, ("", "x" * 64, "x" * 65))) == 1, "ids that can be request ids"

    with_carrying(work)


def test_what_is_not_decided_is_told_and_tried_again_with_what_is_behind_it_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrying, "_REST", 0.001)

    async def work(made: Carrying, executor: Executor) -> None:
        executor.go.set()
        executor.faults["a"] = [Unavailable("WORKER", "it is away")] * 3
        made.take([given("a"), given("b"), given("c", "other")])
        await settled(made)
        assert [id for id in executor.begun if id != "c"] == ["a", "a", "a", "a", "b"]
        assert all(result.done and not result.again for result in made.results())

    with_carrying(work)


def test_what_stays_undecided_is_given_up_with_what_is_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrying, "_REST", 0.0001)

    async def work(made: Carrying, executor: Executor) -> None:
        executor.go.set()
        executor.faults["a"] = [Unavailable("WORKER", "it is away") for _ in range(carrying._ATTEMPTS + 1)]
        made.take([given("a"), given("b")])
        await settled(made)
        (result,) = made.results()
        assert (result.id, result.done, result.again, result.reason) == ("a", False, True, "WORKER")
        assert "b" not in executor.begun
        assert made.take([given("a"), given("b")]) == 2
        await settled(made)
        assert [(result.id, result.done) for result in made.results()] == [("a", True), ("b", True)]

    with_carrying(work)


# ---- what is kept -----------------------------------------------------------------------------------------------------


def membership(memory: Memory, ca: Ca) -> Membership:
    attempt = memory.attempt("joining.json", "asked", HOST)
    public = x509.load_der_x509_csr(attempt.csr).public_key()
    chain = (ca.issue(public, [x509.UniformResourceIdentifier(HOST_URI + HOST)]).public_bytes(DER),)
    root = ca.root.public_bytes(DER)
    return Membership(HOST, "rack1", bytes(32), ("manager:8471",), (root,), chain, attempt.key, 1.5, "token")


def test_a_membership_is_kept_private_and_whole(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    assert memory.membership() is None
    made = membership(memory, Ca())
    memory.keep(made)
    path = tmp_path / "manager" / "membership.json"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert memory.membership() == made and b"PRIVATE" in made.key
    assert "PRIVATE" not in repr(made)
    memory.forget()
    memory.forget()
    assert memory.membership() is None


def test_the_same_attempt_is_found_again_and_another_is_not(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    first = memory.attempt("joining.json", "one", HOST)
    assert memory.attempt("joining.json", "one", HOST) == first
    csr = x509.load_der_x509_csr(first.csr)
    assert csr.is_signature_valid and csr.public_key() == load_pem_private_key(first.key, None).public_key()
    assert not csr.subject and csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical  # RFC 5280, 4.2.1.6
    other = memory.attempt("joining.json", "two", HOST)
    assert other.key != first.key and other.request_id != first.request_id


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("root", "AAAA"),
        ("addresses", []),
        ("addresses", ["nowhere"]),
        ("authorities", []),
        ("chain", ["AAAA"]),
        ("key", "AAAA"),
        ("host_id", "cd" * 32),
        ("issued_at", "x"),
    ],
)
def test_a_membership_that_cannot_be_used_is_said(tmp_path: Path, key: str, value: object) -> None:
    memory = Memory(tmp_path)
    memory.keep(membership(memory, Ca()))
    path = tmp_path / "manager" / "membership.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(BadMembership):
        memory.membership()


@pytest.mark.parametrize("address", ["a:1", "[::1]:65535", "manager.example.net:8471"])
def test_an_address(address: str) -> None:
    assert port_of(address) == int(address.rpartition(":")[2])


@pytest.mark.parametrize("address", ["", "a", ":1", "a:", "a:0", "a:65536", "a:x", "unix:/a:1", "a b\n:1", "a" * 260 + ":1"])
def test_no_address(address: str) -> None:
    with pytest.raises(BadMembership):
        port_of(address)


# ---- what an operator brings ------------------------------------------------------------------------------------------


def test_an_invitation_shows_no_secret_and_its_faults_do_not_either() -> None:
    ca, secret = Ca(), b"s3cret" * 5
    der = ca.root.public_bytes(DER)
    text = JoinToken(("manager:8472",), (der,), secret).text()
    made = invitation(text, "rack1", (), b"", b"", b"", False)
    assert (made.addresses, made.authorities, made.secret) == (("manager:8472",), (der,), secret)
    assert "s3cret" not in repr(made)
    for token, name in ((text[:-9], "rack1"), (JoinToken((), (der,), secret).text(), "rack1"), (text, "No Name")):
        with pytest.raises(Invalid) as caught:
            invitation(token, name, (), b"", b"", b"", False)
        assert secret.decode() not in str(caught.value) and text[20:40] not in str(caught.value)


def test_a_certificate_takes_the_place_of_a_secret() -> None:
    ca = Ca()
    key, certificate = ca.pair(x509.DNSName("host7"))
    made = invitation("", "rack1", ("manager:8471",), ca.root.public_bytes(PEM), certificate, key, False)
    assert (made.secret, made.token) == (b"", "")
    for values in (
        (b"", b"", b""),
        (ca.root.public_bytes(PEM), certificate, b""),
        (b"", certificate, key),
        (b"x", certificate, key),
    ):
        with pytest.raises(Invalid):
            invitation("", "rack1", ("manager:8471",), *values, False)
