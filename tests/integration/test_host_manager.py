"""A real host service and a management plane that the test plays."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import PublicFormat
from hsmvisor_rpc.sealed.commands import Action, fingerprint
from hsmvisor_rpc.sealed.identity import verify_identity
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc
from hsmvisor_rpc.v1 import manager_pb2
from support.certificates import DER, PEM
from support.delivery import Delivery
from support.fake_manager import FakeManager
from support.host_process import SOURCES, HostProcess, new_id, refused, wait_for

C = grpc.StatusCode
NAME = "rack1-host7"


class Member(HostProcess):
    """A host for a manager; `guests` is its API's stub."""

    def __init__(self, manager: FakeManager, more: str = "") -> None:
        super().__init__(manager.settings + more)
        self.root, self.root_public = manager.root, manager.root_public

    @property
    def guests(self) -> rpc.GuestServiceStub:
        return rpc.GuestServiceStub(self.channel)

    def join(self, token: str, **more: object) -> pb.ManagerLink:
        values = {"request_id": new_id(), "token": token, "name": NAME, **more}
        return self.host.JoinManager(pb.JoinManagerRequest(**values), timeout=20)  # type: ignore[arg-type]

    def link(self) -> pb.ManagerLink:
        return self.host.GetHost(pb.GetHostRequest(), timeout=10).manager

    def connected(self, within: float = 10) -> pb.ManagerLink:
        wait_for(lambda: self.link().connected, within, "the connection with the manager")
        return self.link()

    def register(self, name: str, request_id: str = "", **more: object) -> pb.Guest:
        values = {"owner": "alice", **more}
        request = pb.RegisterGuestRequest(request_id=request_id or new_id(), name=name, **values)  # type: ignore[arg-type]
        return self.guests.RegisterGuest(request, timeout=20)

    def lines(self, kind: str) -> list[dict[str, object]]:
        return [line for line in map(json.loads, self.audit_lines()) if line["kind"] == kind]


@pytest.fixture
def manager() -> Iterator[FakeManager]:
    with FakeManager() as manager:
        yield manager


@pytest.fixture
def host(manager: FakeManager) -> Iterator[Member]:
    with Member(manager) as host:
        yield host


@pytest.fixture
def member(host: Member, manager: FakeManager) -> Member:
    """Has joined."""
    host.join(manager.token())
    host.connected()
    return host


def command(delivery: Delivery, data: bytes, id: str = "") -> manager_pb2.HostCommand:
    return manager_pb2.HostCommand(id=id or new_id(), module=delivery.name, signed_command=data)


# ---- joining ----------------------------------------------------------------------------------------------------------


def test_a_host_joins_and_tells_who_it_is(host: Member, manager: FakeManager) -> None:
    assert not host.host.GetHost(pb.GetHostRequest()).HasField("manager")
    link = host.join(manager.token())
    assert (link.host_name, link.root) == (NAME, fingerprint(manager.root_public))
    assert manager.host_key == host.host.GetHost(pb.GetHostRequest()).host_key
    link = host.connected()
    assert link.address == f"127.0.0.1:{manager.port}" and link.heard_at.seconds and not link.failure
    assert link.certificate_ends_at.seconds > time.time() + 3000
    kept = host.state / "manager" / "membership.json"
    assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert not (kept.parent / "joining.json").exists()


def test_the_secret_is_nowhere(host: Member, manager: FakeManager) -> None:
    token = manager.token()
    host.join(token)
    host.connected()
    everything = [path for path in host.directory.rglob("*") if path.is_file()]
    assert len(everything) > 5
    for path in everything:
        content = path.read_bytes()
        for secret in (manager.secret, manager.secret.hex().encode(), token.removeprefix("hsmvisor-join:").encode()):
            assert secret not in content, path


def test_a_wrong_secret_is_refused_by_the_manager(host: Member, manager: FakeManager) -> None:
    assert refused(host.join, manager.token(bytes(32))) == (C.PERMISSION_DENIED, "MANAGER")
    assert not host.host.GetHost(pb.GetHostRequest()).HasField("manager")
    assert host.lines("host.join")[-1]["result"] == "refused"


def test_a_manager_that_does_not_know_the_secret_is_not_obeyed(host: Member, manager: FakeManager) -> None:
    manager.knows_secret = False
    assert refused(host.join, manager.token()) == (C.PERMISSION_DENIED, "MANAGER_PROOF")
    assert not (host.state / "manager" / "membership.json").exists()
    manager.knows_secret = True
    host.join(manager.token())  # the very same attempt, which the manager knows
    assert len({request.csr for request in manager.joins}) == 1


def test_a_used_token_is_the_managers_matter_and_the_same_one_again_is_not(member: Member, manager: FakeManager) -> None:
    member.join(manager.token())
    assert len(manager.joins) == 1, "it has joined with that"
    with Member(manager) as other:
        assert refused(other.join, manager.token()) == (C.PERMISSION_DENIED, "MANAGER")


def test_a_manager_that_is_not_there_is_said(host: Member, manager: FakeManager) -> None:
    manager.stop()
    assert refused(host.join, manager.token()) == (C.UNAVAILABLE, "MANAGER")
    manager.start()
    host.join(manager.token())


def test_another_manager_is_refused_unless_it_replaces_the_first(member: Member, manager: FakeManager) -> None:
    with FakeManager() as other:
        member.configure(f"[manager]\nports = [{other.port}, {other.join_port}]\n")
        member.restart()
        assert refused(member.join, other.token()) == (C.FAILED_PRECONDITION, "MANAGER")
        assert other.joins == []
        member.register("before")
        member.join(other.token(), replace=True)
        wait_for(lambda: "before" in other.guests, what="the report")
        identity = verify_identity(other.guests["before"].signed_identity, other.host_key)
        assert identity.root == fingerprint(manager.root_public), "it obeys the one that it obeys"


def test_a_port_that_the_service_gave_up_is_said_with_what_to_do(manager: FakeManager) -> None:
    with Member(manager) as host:
        host.configure("")
        host.restart()
        assert refused(host.join, manager.token()) == (C.FAILED_PRECONDITION, "MANAGER_PORT")


@pytest.mark.parametrize("token", ["", "nonsense", "hsmvisor-join:AAAA", "hsmvisor-join:" + "A" * 17000])
def test_a_token_that_is_none_is_refused(host: Member, token: str) -> None:
    assert refused(host.join, token) == (C.INVALID_ARGUMENT, "TOKEN")


def test_it_joins_with_a_certificate_in_the_place_of_a_secret(host: Member, manager: FakeManager) -> None:
    key, certificate = manager.ca.pair(x509.DNSName("host7.example.net"))
    where = {"authorities": manager.ca.root.public_bytes(PEM), "addresses": [f"127.0.0.1:{manager.port}"]}
    assert refused(host.join, "", certificate=certificate, **where) == (C.INVALID_ARGUMENT, "TOKEN")
    host.join("", certificate=certificate, key=key, **where)
    assert manager.joins[-1].proof == b""
    host.connected()


def test_a_host_leaves(member: Member, manager: FakeManager) -> None:
    member.register("web")
    manager.heard("web")
    assert member.host.LeaveManager(pb.LeaveManagerRequest(request_id=new_id())).was_joined
    assert not member.host.LeaveManager(pb.LeaveManagerRequest(request_id=new_id())).was_joined
    count = len(manager.exchanges)
    member.guests.UpdateGuest(pb.UpdateGuestRequest(request_id=new_id(), name="web", owner="bob"))
    time.sleep(0.3)
    assert len(manager.exchanges) == count
    assert not member.host.GetHost(pb.GetHostRequest()).HasField("manager")
    assert refused(member.register, "other") == (C.FAILED_PRECONDITION, "NOT_JOINED")
    member.restart()
    assert not member.host.GetHost(pb.GetHostRequest()).HasField("manager")


# ---- guests -----------------------------------------------------------------------------------------------------------


def test_a_guest_is_told_at_once_with_its_module(member: Member, manager: FakeManager) -> None:
    attributes = {"env": "prod", "role": "web"}
    member.register("warm")
    manager.heard("warm")
    time.sleep(0.2)  # it waits at the manager again
    made = member.register("web", attributes=attributes)
    end = time.monotonic()
    report = manager.heard("web", lambda r: bool(r.signed_identity), 10)
    assert manager.seen["web"] - end < 10  # an exchange of which nothing comes takes twice as long
    assert (report.kind, report.owner, dict(report.attributes), report.module) == ("VM", "alice", attributes, "web")
    identity = verify_identity(report.signed_identity, manager.host_key)
    assert (identity.name, identity.root) == ("web", fingerprint(manager.root_public))
    assert made.module == "web" and member.get("web").root == fingerprint(manager.root_public)


def test_what_changes_is_told_at_once(member: Member, manager: FakeManager) -> None:
    member.register("web")
    manager.heard("web", lambda r: bool(r.signed_identity))
    took = []
    for number in range(5):
        time.sleep(0.15)
        value = str(number)
        member.guests.UpdateGuest(
            pb.UpdateGuestRequest(request_id=new_id(), name="web", owner="alice", attributes={"number": value})
        )
        done = time.monotonic()
        manager.heard("web", lambda r, value=value: r.attributes["number"] == value, 10)  # type: ignore[misc]
        took.append(manager.seen["web"] - done)
    assert sorted(took)[2] < 5, took  # an exchange of which nothing comes takes 20 seconds


def test_what_others_do_to_modules_is_told(member: Member, manager: FakeManager) -> None:
    member.register("web")
    delivery = Delivery(member, "web", "tls")
    delivery.execute(delivery.command(Action.STAGE, 1), new_id())
    report = manager.heard("web", lambda r: r.sequence == 1 and len(r.materials) == 1)
    assert [(g.number, g.state) for g in report.materials[0].generations] == [(1, "staged")]
    member.modules.DestroyModule(pb.DestroyModuleRequest(request_id=new_id(), name="web"))
    manager.heard("web", lambda r: not r.module)
    other = hashlib.sha256(b"other root").digest()
    member.modules.CreateModule(pb.CreateModuleRequest(request_id=new_id(), name="web", root=other))
    report = manager.heard("web", lambda r: bool(r.signed_identity))
    assert verify_identity(report.signed_identity, manager.host_key).root == fingerprint(other)


def test_a_guest_is_removed_with_its_module(member: Member, manager: FakeManager) -> None:
    member.register("web")
    member.register("bare", no_module=True, kind="volume")
    manager.heard("web")
    manager.heard("bare")
    done = member.guests.RemoveGuest(pb.RemoveGuestRequest(request_id=new_id(), name="web"), timeout=20)
    assert done.module == "web"
    wait_for(lambda: "web" not in manager.guests, what="the end of web")
    assert refused(member.get, "web") == (C.NOT_FOUND, "MODULE")
    member.guests.RemoveGuest(pb.RemoveGuestRequest(request_id=new_id(), name="bare"))
    wait_for(lambda: not manager.guests, what="the end of both")
    member.register("web")
    manager.heard("web")


def test_the_manager_asks_for_all(member: Member, manager: FakeManager) -> None:
    for number in range(3):
        member.register(f"guest-{number}", no_module=True)
    wait_for(lambda: len(manager.guests) == 3, what="three guests")
    before = len(manager.exchanges)
    manager.ask_for_all()
    wait_for(lambda: any(e.all and len(e.guests) == 3 for e in manager.exchanges[before:]), 5, "all")
    numbers = [e.number for e in manager.exchanges]
    assert len(numbers) == len(set(numbers)) and len({e.session for e in manager.exchanges}) == 1


def test_what_the_manager_does_not_take_is_shown(member: Member, manager: FakeManager) -> None:
    manager.refuse = {"web": "OWNER"}
    member.register("web", no_module=True)
    get = pb.GetGuestRequest(name="web")
    wait_for(lambda: "OWNER" in member.guests.GetGuest(get).refused, what="the refusal")
    manager.refuse = {}
    member.guests.UpdateGuest(pb.UpdateGuestRequest(request_id=new_id(), name="web", owner="bob"))
    wait_for(lambda: not member.guests.GetGuest(get).refused, what="the end of the refusal")


def test_the_same_guest_again_changes_nothing_and_an_unknown_module_needs_a_manager(host: Member) -> None:
    assert refused(host.register, "web") == (C.FAILED_PRECONDITION, "NOT_JOINED")
    first = host.register("web", no_module=True, attributes={"a": "b"})
    assert host.register("web", no_module=True, attributes={"a": "b"}) == first
    assert refused(host.register, "web", no_module=True) == (C.ALREADY_EXISTS, "GUEST")
    host.create("mine")
    assert host.register("db", module="mine").module == "mine"
    assert refused(host.register, "other", module="mine") == (C.FAILED_PRECONDITION, "MODULE_TAKEN")
    assert refused(host.register, "X") == (C.INVALID_ARGUMENT, "NAME")
    host.restart()
    listed = host.guests.ListGuests(pb.ListGuestsRequest(page_size=1))
    assert [g.name for g in listed.guests] == ["db"] and listed.next_page_token
    done = host.guests.RemoveGuest(pb.RemoveGuestRequest(request_id=new_id(), name="db", keep_module=True))
    assert done.module == "" and host.serving("mine").state == "serving"


def test_a_registration_that_was_cut_short_is_finished_when_it_is_repeated(member: Member, manager: FakeManager) -> None:
    """The module is made first: a service that dies between the two is asked again."""
    ident = new_id()
    member.create("web")  # as if the guest had not come to be stored
    first = member.register("web", ident)
    assert member.register("web", ident) == first
    ident = new_id()
    member.modules.DestroyModule(pb.DestroyModuleRequest(request_id=new_id(), name="web"))
    remove = pb.RemoveGuestRequest(request_id=ident, name="web")
    assert member.guests.RemoveGuest(remove) == member.guests.RemoveGuest(remove) == pb.RemoveGuestResponse()


def test_a_module_that_answers_nobody_keeps_no_other_news_back(member: Member, manager: FakeManager) -> None:
    member.register("stuck")
    member.register("web")
    manager.heard("stuck", lambda r: bool(r.signed_identity))
    known = manager.heard("web", lambda r: bool(r.signed_identity))
    pid = member.get("stuck").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        member.guests.UpdateGuest(pb.UpdateGuestRequest(request_id=new_id(), name="stuck", owner="bob"))
        member.guests.UpdateGuest(pb.UpdateGuestRequest(request_id=new_id(), name="web", owner="bob"))
        manager.heard("web", lambda r: r.owner == "bob", 10)
        told = manager.heard("stuck", lambda r: r.owner == "bob", 20)
        assert (told.module, told.signed_identity) == ("stuck", b""), "nothing is told of a module that says nothing"
    finally:
        os.kill(pid, signal.SIGCONT)
    delivery = Delivery(member, "stuck", "tls")
    delivery.execute(delivery.command(Action.STAGE, 1), new_id())
    manager.heard("stuck", lambda r: bool(r.signed_identity) and r.sequence == 1)
    assert manager.guests["web"].signed_identity == known.signed_identity


# ---- commands ---------------------------------------------------------------------------------------------------------


def test_commands_are_carried_out_in_order_and_once(member: Member, manager: FakeManager) -> None:
    member.register("web")
    delivery = Delivery(member, "web", "tls")
    manager.keep_giving = True
    first = command(delivery, delivery.command(Action.STAGE, 1))
    manager.give(first)
    result = manager.result(first.id)
    assert (result.done, result.sequence, result.again, result.material.name) == (True, 1, False, "tls")
    second = command(delivery, delivery.command(Action.ACTIVATE, 1))
    manager.give(second)
    assert manager.result(second.id).done
    again = manager.result(first.id, 1)
    assert again.done and again.sequence == 1, "given again, answered again"
    done = [line for line in member.lines("material.execute") if line["request_id"] == first.id]
    assert [line["result"] for line in done][:2] == ["ok", "repeated"]
    assert str(done[0]["who"]).startswith("manager:")
    assert delivery.states() == {1: "current"}
    assert len(manager.exchanges) < 100, "not in a circle"


def test_many_commands_keep_their_order(member: Member, manager: FakeManager) -> None:
    given = []
    for name in ("one", "two", "three"):
        member.register(name)
        delivery = Delivery(member, name, "tls")
        identity, sequence = delivery._identity()
        delivery._identity = lambda i=identity, d=delivery: (i, d.counted)  # type: ignore[method-assign,attr-defined,misc]
        for number in range(1, 9):
            delivery.counted = sequence + 2 * number - 2  # type: ignore[attr-defined]
            given.append(command(delivery, delivery.command(Action.STAGE, number)))
            delivery.counted += 1  # type: ignore[attr-defined]
            given.append(command(delivery, delivery.command(Action.ACTIVATE, number)))
    manager.give(*given)
    for one in given:
        assert manager.result(one.id, within=20).done, manager.results[one.id]


def test_a_key_that_a_module_makes_is_told_with_its_request(member: Member, manager: FakeManager) -> None:
    member.register("web")
    delivery = Delivery(member, "web", "tls")
    generate = command(delivery, delivery.command(Action.GENERATE, 1))
    manager.give(generate)
    result = manager.result(generate.id)
    assert result.done, result
    made = x509.load_der_x509_csr(result.csr)
    spki = made.public_key().public_bytes(DER, PublicFormat.SubjectPublicKeyInfo)
    assert made.is_signature_valid and result.public_key == spki


def test_a_refused_command_says_why(member: Member, manager: FakeManager) -> None:
    member.register("web")
    delivery = Delivery(member, "web", "tls")
    staged = delivery.command(Action.STAGE, 1)
    delivery.execute(staged, new_id())
    old, strange = command(delivery, staged), manager_pb2.HostCommand(id=new_id(), module="nowhere", signed_command=b"x")
    broken = manager_pb2.HostCommand(id=new_id(), module="web", signed_command=b"x")
    unnamed = manager_pb2.HostCommand(id=new_id(), module="../x", signed_command=b"x")
    manager.give(old, strange, broken, unnamed)
    told = {one.id: manager.result(one.id) for one in (old, strange, broken, unnamed)}
    assert not any(result.done or result.again for result in told.values())
    assert (told[old.id].reason, told[old.id].sequence) == ("REPLAY", 1)
    assert [(g.number, g.state) for g in told[old.id].material.generations] == [(1, "staged")]  # how it is
    assert [told[one.id].reason for one in (strange, broken, unnamed)] == ["MODULE", "MALFORMED", "NAME"]
    wait_for(lambda: not manager.pending, what="the end")


def test_what_is_not_decided_is_told_so_and_carried_out_later(member: Member, manager: FakeManager) -> None:
    member.register("web")
    delivery = Delivery(member, "web", "tls")
    stage = command(delivery, delivery.command(Action.STAGE, 1))
    pid = member.get("web").pid
    os.kill(pid, signal.SIGSTOP)  # it answers nobody
    manager.give(stage)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    result = manager.result(stage.id)
    assert (result.done, result.again) == (False, True)
    last = wait_for(lambda: next((r for r in manager.results[stage.id] if not r.again), None), 20, "the decision")
    assert last.done, last
    assert delivery.states() == {1: "staged"}


def test_a_command_is_carried_out_once_over_a_kill(member: Member, manager: FakeManager) -> None:
    member.register("web")
    delivery = Delivery(member, "web", "tls")
    stage = command(delivery, delivery.command(Action.STAGE, 1))
    killed: list[bool] = []

    def kill(request: manager_pb2.ExchangeRequest) -> None:
        if any(result.id == stage.id for result in request.results) and not killed:
            killed.append(True)
            assert member.process is not None
            member.process.kill()
            raise RuntimeError("not heard")

    manager.on_exchange = kill
    manager.give(stage)
    wait_for(lambda: killed, what="the kill")
    assert member.process is not None
    member.process.wait(10)
    assert stage.id not in manager.results
    member.start()
    assert manager.result(stage.id, within=20).done
    results = [line["result"] for line in member.lines("material.execute") if line["request_id"] == stage.id]
    assert results == ["ok", "repeated"]
    assert delivery.states() == {1: "staged"}


# ---- a manager that goes ----------------------------------------------------------------------------------------------


def test_a_manager_goes_and_comes_back(member: Member, manager: FakeManager) -> None:
    member.register("before", no_module=True)
    manager.heard("before")
    manager.stop()
    wait_for(lambda: not member.link().connected, what="the loss")
    assert member.link().failure
    made = member.register("meanwhile")
    assert made.module == "meanwhile" and member.get("meanwhile").state == "serving"
    manager.start()
    manager.heard("meanwhile", within=15)
    link = member.connected()
    assert not link.failure
    kinds = [line for line in member.log.read_text().splitlines() if "the manager at" in line]
    assert len(kinds) < 5, "it does not fill the log"


def test_a_restarted_host_tells_all_again(member: Member, manager: FakeManager) -> None:
    member.register("web", attributes={"a": "b"})
    report = manager.heard("web", lambda r: bool(r.signed_identity))
    session = manager.exchanges[-1].session
    member.stop(signal.SIGKILL)
    manager.guests.clear()
    member.start()
    assert manager.heard("web", lambda r: bool(r.signed_identity)).signed_identity == report.signed_identity
    assert manager.exchanges[-1].session != session
    assert member.connected().host_name == NAME


def stop_until_renewal_is_due(host: Member) -> None:
    path = host.state / "manager" / "membership.json"
    host.stop()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"issued_at": time.time() - 3600}))  # longer than it lives


def test_the_identity_is_renewed_at_half_of_its_life(manager: FakeManager) -> None:
    manager.lifetime, manager.one_certificate = 300.0, True
    with Member(manager) as host:
        host.join(manager.token())
        host.connected()
        manager.lifetime = 3600.0
        host.restart()
        host.connected()
        assert not manager.renewals and len(manager.serials) == 1, "it is young"
        stop_until_renewal_is_due(host)
        host.start()
        host.register("web", no_module=True)
        wait_for(lambda: manager.renewals, 20, "the renewal")
        wait_for(lambda: host.link().certificate_ends_at.seconds > time.time() + 600, 20, "the new certificate")
        wait_for(lambda: len(manager.serials) == 2, 20, "its use")  # from now on the old one counts no more
        assert not (host.state / "manager" / "renewing.json").exists()
        host.register("later", no_module=True)
        manager.heard("later")
        host.restart()
        host.connected()
        assert len(manager.serials) == 2


def test_a_renewal_that_is_cut_short_asks_for_the_same_key(manager: FakeManager) -> None:
    manager.lifetime = 60.0  # of what is left of it, a tenth is waited before it is tried again
    with Member(manager) as host:
        host.join(manager.token())
        stop_until_renewal_is_due(host)
        renew = manager.RenewIdentity
        refused: list[bytes] = []

        def refuse(request: manager_pb2.RenewIdentityRequest, context: grpc.ServicerContext) -> object:
            if not refused:
                refused.append(request.csr)
                context.abort(C.INTERNAL, "not now")
            return renew(request, context)

        manager.stop()
        manager.RenewIdentity = refuse  # type: ignore[method-assign,assignment]
        manager.start()
        host.start()
        wait_for(lambda: "not now" in host.link().renewal_failure, 20, "the failure")
        assert host.link().connected
        wait_for(lambda: manager.renewals, 30, "the renewal")
        assert manager.renewals[0] == refused[0]
        wait_for(lambda: not host.link().renewal_failure, 10, "the end of the failure")


def test_a_kill_when_the_renewed_certificate_was_used_first_locks_nobody_out(manager: FakeManager) -> None:
    manager.lifetime, manager.one_certificate = 300.0, True
    with Member(manager) as host:
        host.join(manager.token())
        host.connected()
        manager.lifetime = 3600.0
        stop_until_renewal_is_due(host)

        def kill(request: manager_pb2.ExchangeRequest) -> None:
            if len(manager.serials) == 2:
                assert host.process is not None
                host.process.kill()
                manager.on_exchange = lambda request: None

        manager.on_exchange = kill
        host.start()
        assert host.process is not None
        host.process.wait(30)
        assert (host.state / "manager" / "renewed.json").exists()
        host.start()
        host.connected()
        assert len(manager.serials) == 2
        wait_for(lambda: not (host.state / "manager" / "renewed.json").exists(), what="the end of the renewal")
        assert host.link().certificate_ends_at.seconds > time.time() + 600


def test_a_renewed_certificate_that_does_not_work_leaves_the_old_one(manager: FakeManager) -> None:
    manager.lifetime = 60.0  # of what is left of it, a tenth is waited before it is tried again
    with Member(manager) as host:
        host.join(manager.token())
        host.connected()
        stop_until_renewal_is_due(host)
        issue, strange = manager._issue, FakeManager()
        made: list[bytes] = []

        def once(csr: bytes) -> bytes:
            made.append(csr)
            return strange._issue(csr) if len(made) == 1 else issue(csr)

        manager._issue = once  # type: ignore[method-assign]
        host.start()
        wait_for(lambda: "does not work" in host.link().renewal_failure, 20, "the failure")
        host.connected()
        wait_for(lambda: len(manager.serials) == 2 and not host.link().renewal_failure, 30, "another attempt")
        assert made[0] == made[1]


def test_a_damaged_membership_stops_nothing_else(member: Member) -> None:
    member.register("web")
    member.stop()
    (member.state / "manager" / "membership.json").write_text("{}")
    member.start()
    assert member.serving("web").state == "serving"
    assert not member.host.GetHost(pb.GetHostRequest()).HasField("manager")
    assert "join it again" in member.log.read_text()


# ---- the command line -------------------------------------------------------------------------------------------------


def run(host: Member, *words: str, code: int = 0, stdin: str = "") -> str:
    environment = os.environ | {"PYTHONPATH": SOURCES, "HSMVISOR_HOST": f"unix:{host.socket}"}
    command = [sys.executable, "-m", "hsmvisor.cli.main", *words]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return done.stdout or done.stderr


def test_the_command_joins_registers_and_leaves(host: Member, manager: FakeManager, tmp_path: Path) -> None:
    assert "none joined" in run(host, "host", "show")
    assert "hsmvisor host join" in run(host, "guest", "add", "web-1", "--owner", "alice", code=4)
    assert "TOKEN_FILE" in run(host, "host", "join", code=2)
    assert f"joined as {NAME}" in run(host, "host", "join", "--name", NAME, str(manager.write_token(tmp_path / "token")))
    again = json.loads(run(host, "--json", "host", "join", "--name", NAME, "-", stdin=manager.token()))
    assert again["host_name"] == NAME and len(manager.joins) == 1
    host.connected()
    shown = run(host, "host", "show")
    assert f"127.0.0.1:{manager.port}, connected" in shown and NAME in shown

    words = ("guest", "add", "web-1", "--owner", "alice", "--attribute", "env=prod", "--attribute", "role=web=1")
    assert "module web-1" in run(host, *words)
    assert "module web-1" in run(host, *words), "idempotent"
    assert run(host, *words[:-2], code=4).startswith("hsmvisor: GUEST: guest web-1 is registered otherwise")
    assert "no module" in run(host, "guest", "add", "disk-1", "--owner", "bob", "--kind", "volume", "--no-module")
    assert manager.heard("web-1").attributes == {"env": "prod", "role": "web=1"}
    run(host, "guest", "set", "web-1", "--owner", "carol")
    report = manager.heard("web-1", lambda r: r.owner == "carol")
    assert dict(report.attributes) == {"env": "prod", "role": "web=1"}, "they stay where none are given"
    assert "env=test" in run(host, "guest", "set", "web-1", "--attribute", "env=test")
    assert dict(manager.heard("web-1", lambda r: len(r.attributes) == 1).attributes) == {"env": "test"}
    run(host, "guest", "set", "web-1", code=2)
    listed = json.loads(run(host, "guest", "list", "--json"))["guests"]
    assert [(g["name"], g["kind"], g["owner"], g["module"]) for g in listed] == [
        ("disk-1", "volume", "bob", ""),
        ("web-1", "VM", "carol", "web-1"),
    ]
    assert "carol" in run(host, "guest", "show", "web-1") and "disk-1" in run(host, "guest", "list")
    assert json.loads(run(host, "guest", "remove", "web-1", "--yes", "--json"))["module"] == "web-1"
    assert "there is no guest web-1" in run(host, "guest", "remove", "web-1", "--yes")
    run(host, "guest", "show", "web-1", code=3)
    assert "has left" in run(host, "host", "leave")
    assert "had joined no" in run(host, "host", "leave")
