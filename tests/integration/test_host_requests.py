"""Every call of the control API, walked: request ids, roles, deadlines, cancellation, pages."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from hsmvisor.client import SigningKey, connect
from hsmvisor.host.roles import CHANGING, METHODS, Role
from hsmvisor.serving.access import Access
from hsmvisor_rpc.sealed.commands import Action
from hsmvisor_rpc.sealed.identity import enrol_proof
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc
from support.certificates import new_key
from support.fake_manager import FakeManager
from support.host_process import HostProcess, new_id, reason, wait_for
from support.paused_qemu import NATIVE, PORT, SHARED, PausedQemu, paused_qemu
from support.plane import Plane

C = grpc.StatusCode
SECRET = hashlib.sha256(b"of this test").digest()


class Walked(HostProcess):
    """A host with a key for each role, and one for nobody."""

    def __init__(self, more: str) -> None:
        super().__init__()
        rows = ""
        for name in ("", *Role):
            path = self.directory / f"key-{name or 'nobody'}"
            path.write_text(SECRET.hex())
            path.chmod(0o600)
            roles = json.dumps([name] if name else [])
            rows += f'[[signed.keys]]\nname = "{path.name}"\nkind = "hmac"\nfile = "{path}"\nroles = {roles}\n'
        self.configure(f'[signed]\naddress = "unix:{self.run}/signed.sock"\n{rows}{more}')

    def as_(self, role: str) -> grpc.Channel:
        return connect(f"unix:{self.run}/signed.sock", signing=SigningKey(f"key-{role or 'nobody'}", SECRET))


@pytest.fixture(scope="module")
def manager() -> Iterator[FakeManager]:
    with FakeManager() as manager:
        yield manager


@pytest.fixture(scope="module")
def host(manager: FakeManager) -> Iterator[Walked]:
    with Walked(manager.settings) as host:
        yield host


def methods() -> list[tuple[str, str, type[Message], bool]]:
    """Full name, service, request type, whether it streams."""
    return [
        (f"/{service.full_name}/{method.name}", service.name, getattr(pb, method.input_type.name), method.server_streaming)
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


# ---- request ids ----------------------------------------------------------------------------------------------------


def test_every_method_either_reads_or_has_a_request_id() -> None:
    """By the names alone: what is neither in CHANGING nor named like a reader is a method that somebody forgot."""
    for name, _, kind, _ in methods():
        reads = name.rpartition("/")[2].startswith(("Get", "List", "Watch", "Stream", "Export", "Describe", "Backup", "Attest"))
        assert reads is not (name in CHANGING), name
        assert reads is not ("request_id" in kind.DESCRIPTOR.fields_by_name), name


def changing(host: HostProcess, guest: PausedQemu, token: str) -> dict[str, Callable[[str], Message]]:
    """For each changing method a call that succeeds, by request id."""
    name = f"id-{new_id()[:8]}"
    plane: list[Plane] = []
    nonce, proof = bytes(32), b""

    def execute(ident: str) -> Message:
        if not plane:
            plane.append(Plane(host, name, host.host.GetHost(pb.GetHostRequest()).host_key))
            commands[ident] = plane[0].command(plane[0].body(_KEY))
        return host.material.Execute(pb.ExecuteRequest(request_id=ident, module=name, signed_command=commands[ident]))

    def enrol(ident: str) -> Message:
        nonlocal proof
        if not proof:
            secret = host.host.CreateEnrolment(pb.CreateEnrolmentRequest(request_id=new_id())).secret
            proof = enrol_proof(secret.encode(), "manager", nonce)
        return host.host.Enrol(pb.EnrolRequest(request_id=ident, nonce=nonce, proof=proof, manager="fleet"))

    commands: dict[str, bytes] = {}
    settings = pb.ModuleSettings(max_sessions=11)
    m, g = host.modules, rpc.GuestServiceStub(host.channel)
    return {
        "JoinManager": lambda i: host.host.JoinManager(pb.JoinManagerRequest(request_id=i, token=token, name="host-1")),
        "RegisterGuest": lambda i: g.RegisterGuest(pb.RegisterGuestRequest(request_id=i, name="guest-1", owner="alice")),
        "UpdateGuest": lambda i: g.UpdateGuest(pb.UpdateGuestRequest(request_id=i, name="guest-1", owner="bob")),
        "RemoveGuest": lambda i: g.RemoveGuest(pb.RemoveGuestRequest(request_id=i, name="guest-1")),
        "LeaveManager": lambda i: host.host.LeaveManager(pb.LeaveManagerRequest(request_id=i)),
        "CreateModule": lambda i: m.CreateModule(pb.CreateModuleRequest(request_id=i, name=name, root=host.root_public)),
        "UpdateModule": lambda i: m.UpdateModule(pb.UpdateModuleRequest(request_id=i, name=name, settings=settings)),
        "SetPin": lambda i: m.SetPin(pb.SetPinRequest(request_id=i, name=name, pin=b"123456")),
        "SetTokenPresent": lambda i: m.SetTokenPresent(pb.SetTokenPresentRequest(request_id=i, name=name, present=False)),
        "UpgradeModule": lambda i: m.UpgradeModule(pb.UpgradeModuleRequest(request_id=i, name=name)),
        "Execute": execute,
        "CreateEnrolment": lambda i: host.host.CreateEnrolment(pb.CreateEnrolmentRequest(request_id=i)),
        "Enrol": enrol,
        "AttachModule": lambda i: m.AttachModule(pb.AttachModuleRequest(request_id=i, name=name, qmp_path=str(guest.qmp))),
        "DetachModule": lambda i: m.DetachModule(pb.DetachModuleRequest(request_id=i, name=name)),
        "BreakGlass": lambda i: m.BreakGlass(
            pb.BreakGlassRequest(request_id=i, name=name, new_root=host.root_public, empty_it=True),
            metadata=(("hsmvisor-why", "lost"),),
        ),
        "DestroyModule": lambda i: m.DestroyModule(pb.DestroyModuleRequest(request_id=i, name=name)),
    }


_KEY = new_key("p256")


def results(host: HostProcess, ident: str) -> list[str]:
    return [json.loads(line)["result"] for line in host.audit_lines() if f'"request_id":"{ident}"' in line]


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[PausedQemu]:
    with paused_qemu(tmp_path, *SHARED, *PORT, *NATIVE) as guest:
        yield guest


def test_each_changing_call_is_carried_out_once_and_answered_again(host: Walked, guest: PausedQemu, manager: FakeManager) -> None:
    calls = changing(host, guest, manager.token())
    assert {name.rpartition("/")[2] for name in CHANGING} == set(calls)
    for name, call in calls.items():
        ident = f"{name}-{new_id()[:8]}"
        first = call(ident)
        again = call(ident)
        for answer in (first, again):
            if isinstance(answer, pb.Module):  # shown as it is now
                del answer.measures[:]
            if isinstance(answer, pb.ManagerLink):  # as well
                for field in ("address", "connected", "failure", "since", "heard_at"):
                    answer.ClearField(field)  # type: ignore[arg-type]
        assert again == first, name
        assert results(host, ident) == ["ok", "repeated"], name


def test_each_changing_call_without_an_id_or_with_a_used_one_is_refused(host: Walked, manager: FakeManager) -> None:
    host.create("used", request_id="used-1")
    for name, _, kind, _ in methods():
        if name not in CHANGING:
            continue
        fields = {f.name for f in kind.DESCRIPTOR.fields}
        values: dict[str, object] = {"name": "used"} if "name" in fields else {}
        values |= {"module": "used"} if "module" in fields else {}
        values |= dict.fromkeys(fields & {"root", "new_root"}, host.root_public)
        values |= {"manager": "fleet"} if "manager" in fields else {}
        values |= {"qmp_path": "/nowhere"} if "qmp_path" in fields else {}
        values |= {"owner": "alice"} if "owner" in fields else {}
        values |= {"token": manager.token()} if "token" in fields else {}
        call = host.channel.unary_unary(name)
        for ident, word in (("", "REQUEST_ID"), ("x" * 65, "REQUEST_ID"), ("used-1", "REQUEST_ID_REUSED")):
            if name.endswith("CreateModule") and word == "REQUEST_ID_REUSED":
                values["name"] = "other"
            with pytest.raises(grpc.RpcError) as caught:
                call(kind(request_id=ident, **values).SerializeToString(), timeout=10)
            assert reason(caught.value)[1] == word, name
            wait_for(lambda word=word: json.loads(host.audit_lines()[-1]).get("reason") == word)


# ---- roles ----------------------------------------------------------------------------------------------------------


def test_the_servers_gate_is_the_table(host: Walked) -> None:
    """Each role calls each method: the refusal for the role comes exactly where the table has none."""
    for role in ("", *Role):
        with host.as_(role) as channel:
            for name, _, kind, streams in methods():
                row = METHODS[name]
                wanted = isinstance(row, Access) or (bool(role) and Role(role) in row)
                assert _admitted(channel, name, kind, streams) is wanted, (role, name)


def _admitted(channel: grpc.Channel, name: str, kind: type[Message], streams: bool) -> bool:
    """Says whether an empty request came past the gate."""
    body = kind().SerializeToString()
    try:
        if streams:
            call = channel.unary_stream(name)(body, timeout=0.3)
            next(call, None)
            call.cancel()
        else:
            channel.unary_unary(name)(body, timeout=10)
    except grpc.RpcError as error:
        if error.code() is C.DEADLINE_EXCEEDED:
            return True  # a stream on which nothing happens
        return reason(error) != (C.PERMISSION_DENIED, "ROLE")
    return True


# ---- deadlines, cancellation, pages ---------------------------------------------------------------------------------


def test_a_deadline_ends_the_waiting_and_not_the_work(host: Walked) -> None:
    """The worker is stopped, so it cannot answer; what was asked is carried out once it goes on."""
    pid = host.create("slow").pid
    request = pb.SetPinRequest(request_id=new_id(), name="slow", pin=b"123456")
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            host.modules.SetPin(request, timeout=0.5)
        assert caught.value.code() is C.DEADLINE_EXCEEDED and time.monotonic() - began < 5
        assert host.modules.GetStatistics.future(pb.GetStatisticsRequest(name="slow"), timeout=0.3).code() is C.DEADLINE_EXCEEDED
        assert "slow" in {m.name for m in host.modules.ListModules(pb.ListModulesRequest(), timeout=10).modules}, (
            "others are served"
        )
    finally:
        os.kill(pid, signal.SIGCONT)
    assert host.modules.SetPin(request, timeout=10).pin_set
    assert results(host, request.request_id)[0] == "ok"


def test_streams_end_when_they_are_cancelled(host: Walked) -> None:
    def files() -> int:
        assert host.process is not None
        return len(list(Path(f"/proc/{host.process.pid}/fd").iterdir()))

    before = files()
    for _ in range(20):
        channel = connect(f"unix:{host.socket}")
        streams = [
            rpc.EventServiceStub(channel).StreamEvents(pb.StreamEventsRequest(after_id=1)),
            rpc.ModuleServiceStub(channel).WatchModules(pb.WatchModulesRequest()),
        ]
        for stream in streams:
            next(stream)
            stream.cancel()
        channel.close()
    wait_for(lambda: files() <= before + 4)


def test_materials_come_in_pages(host: Walked) -> None:
    host.create("paged")
    plane = Plane(host, "paged", host.host.GetHost(pb.GetHostRequest()).host_key)
    for number in range(5):
        body = plane.body(new_key("p256"), material=f"m{number}")
        plane.send(plane.command(body, material=f"m{number}"))
    seen: list[str] = []
    token = ""
    for page in range(3):
        answer = host.material.ListMaterials(pb.ListMaterialsRequest(module="paged", page_size=2, page_token=token), timeout=10)
        seen += [m.name for m in answer.materials]
        token = answer.next_page_token
        assert bool(token) is (page < 2)
    assert seen == [f"m{number}" for number in range(5)]


def test_a_host_that_is_busy_is_waited_for(host: Walked) -> None:
    """A connection that is not answered at once is no absent host."""
    assert host.process is not None
    os.kill(host.process.pid, signal.SIGSTOP)
    threading.Timer(0.7, os.kill, (host.process.pid, signal.SIGCONT)).start()
    with connect(f"unix:{host.socket}") as channel:
        assert rpc.HostServiceStub(channel).GetHost(pb.GetHostRequest(), timeout=20).version


# ---- what the log and the metrics hold ------------------------------------------------------------------------------


def test_a_generation_is_seen_in_the_metrics(host: Walked) -> None:
    host.create("metered")
    plane = Plane(host, "metered", host.host.GetHost(pb.GetHostRequest()).host_key)
    key = new_key("p256")
    plane.send(plane.command(plane.body(key, plane.authority.chain(key))))
    plane.send(plane.command(action=Action.ACTIVATE))
    text = host.host.GetMetrics(pb.GetMetricsRequest(), timeout=10).text
    labels = 'generation="1",material="tls",module="metered",state="current"'
    for name in ("hsmvisor_generation_age_seconds", "hsmvisor_certificate_not_after_seconds"):
        assert f"{name}{{{labels}}}" in text
    for name in ("hsmvisor_module_connections", "hsmvisor_module_sessions"):
        assert f'{name}{{module="metered"}} 0.0' in text
