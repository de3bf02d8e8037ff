"""The control API of a real host service, over its control socket."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hsmvisor.client import WrongHost, enrol
from hsmvisor.serving.audit_verify import verify
from hsmvisor_rpc.sealed.commands import Action, Command, Signer, fingerprint
from hsmvisor_rpc.sealed.identity import enrol_proof, verify_identity
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.host_process import HostProcess, gone, new_id, reason, wait_for

C = grpc.StatusCode


@pytest.fixture(scope="module")
def host() -> Iterator[HostProcess]:
    with HostProcess() as host:
        yield host


def refusal(call: object, *arguments: object) -> tuple[grpc.StatusCode, str]:
    assert callable(call)
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, timeout=10)
    return reason(caught.value)


# ---- modules --------------------------------------------------------------------------------------------------------


def test_a_module_is_created_shown_and_destroyed(host: HostProcess) -> None:
    made = host.create("life")
    assert (made.state, made.name, len(made.module_id)) == ("serving", "life", 16)
    assert made.root == fingerprint(host.root_public)
    path = made.address.removeprefix("unix:path=")
    assert os.path.exists(path)
    assert not gone(made.pid)
    host.modules.DestroyModule(pb.DestroyModuleRequest(request_id=new_id(), name="life"))
    assert gone(made.pid)
    assert not os.path.exists(path)
    assert refusal(host.modules.GetModule, pb.GetModuleRequest(name="life")) == (C.NOT_FOUND, "MODULE")


def test_its_identity_is_signed_by_the_host(host: HostProcess) -> None:
    made = host.create("identity")
    answer = host.modules.GetIdentity(pb.GetIdentityRequest(name="identity"))
    key = host.host.GetHost(pb.GetHostRequest()).host_key
    identity = verify_identity(answer.signed_identity, key)
    assert (identity.module_id, identity.name, identity.root) == (made.module_id, "identity", fingerprint(host.root_public))
    assert answer.sequence == 0


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "A", "-a", "a" * 65, "a b", "ä"])
def test_a_name_that_cannot_be_is_refused(host: HostProcess, name: str) -> None:
    request = pb.CreateModuleRequest(request_id=new_id(), name=name, root=host.root_public)
    assert refusal(host.modules.CreateModule, request) == (C.INVALID_ARGUMENT, "NAME")


def test_wrong_arguments_are_refused_with_their_reason(host: HostProcess) -> None:
    create = host.modules.CreateModule
    assert refusal(create, pb.CreateModuleRequest(name="x", root=bytes(32))) == (C.INVALID_ARGUMENT, "REQUEST_ID")
    assert refusal(create, pb.CreateModuleRequest(request_id="1", name="x", root=bytes(31))) == (C.INVALID_ARGUMENT, "ROOT")
    large = pb.CreateModuleRequest(request_id="1", name="x", root=bytes(32), settings=pb.ModuleSettings(max_sessions=70000))
    assert refusal(create, large) == (C.INVALID_ARGUMENT, "SETTINGS")
    assert refusal(host.modules.ListModules, pb.ListModulesRequest(page_token="%")) == (C.INVALID_ARGUMENT, "PAGE_TOKEN")
    assert refusal(host.modules.ListModules, pb.ListModulesRequest(page_size=-1)) == (C.INVALID_ARGUMENT, "PAGE_SIZE")


def test_settings_are_replaced_whole_and_survive_the_worker(host: HostProcess) -> None:
    made = host.create("settings", max_sessions=7)
    settings = pb.ModuleSettings(log_signatures=True, max_connections=9)
    host.modules.UpdateModule(pb.UpdateModuleRequest(request_id=new_id(), name="settings", settings=settings))
    os.kill(made.pid, 9)
    assert host.serving("settings", not_pid=made.pid).settings == settings


def test_the_token_can_be_detached_and_a_pin_set(host: HostProcess) -> None:
    host.create("present")
    answer = host.modules.SetTokenPresent(pb.SetTokenPresentRequest(request_id=new_id(), name="present", present=False))
    assert not answer.token_present
    answer = host.modules.SetPin(pb.SetPinRequest(request_id=new_id(), name="present", pin=b"482913"))
    assert answer.pin_set
    assert not any("482913" in line for line in host.audit_lines())


def test_lists_come_in_pages(host: HostProcess) -> None:
    names = {f"page-{i}" for i in range(5)}
    for name in names:
        host.create(name)
    seen, token, pages = [], "", 0
    while True:
        answer = host.modules.ListModules(pb.ListModulesRequest(page_size=2, page_token=token))
        assert len(answer.modules) <= 2
        seen += [m.name for m in answer.modules]
        token, pages = answer.next_page_token, pages + 1
        if not token:
            break
    assert pages > 2
    assert seen == sorted(seen) and names <= set(seen)


def test_watching_tells_the_present_and_what_changes(host: HostProcess) -> None:
    host.create("watched")
    stream = host.modules.WatchModules(pb.WatchModulesRequest(name="watched"))
    assert next(stream).kind == "present"
    host.modules.SetPin(pb.SetPinRequest(request_id=new_id(), name="watched", pin=b"1234"))
    change = next(stream)
    assert (change.kind, change.module.pin_set) == ("changed", True)
    host.modules.DestroyModule(pb.DestroyModuleRequest(request_id=new_id(), name="watched"))
    assert wait_for(lambda: next(stream).kind == "destroyed")
    stream.cancel()


def test_of_two_who_destroy_one_finds_none(host: HostProcess) -> None:
    host.create("twice")
    calls = [host.modules.DestroyModule.future(pb.DestroyModuleRequest(request_id=new_id(), name="twice")) for _ in range(2)]
    errors = [error for call in calls if (error := call.exception())]
    assert [reason(error) for error in errors] == [(C.NOT_FOUND, "MODULE")]


# ---- request ids ----------------------------------------------------------------------------------------------------


def test_a_repeated_request_is_answered_the_same_and_done_once(host: HostProcess) -> None:
    first = host.create("once", request_id="once-1")
    again = host.create("once", request_id="once-1")
    assert again.module_id == first.module_id and again.pid == first.pid
    other = pb.CreateModuleRequest(request_id="once-1", name="other", root=host.root_public)
    assert refusal(host.modules.CreateModule, other) == (C.ABORTED, "REQUEST_ID_REUSED")
    assert refusal(host.modules.DestroyModule, pb.DestroyModuleRequest(request_id="once-1", name="once")) == (
        C.ABORTED,
        "REQUEST_ID_REUSED",
    )


def test_a_new_request_for_a_name_that_exists_is_refused(host: HostProcess) -> None:
    host.create("taken")
    request = pb.CreateModuleRequest(request_id=new_id(), name="taken", root=host.root_public)
    assert refusal(host.modules.CreateModule, request) == (C.ALREADY_EXISTS, "MODULE")


def test_equal_requests_at_the_same_time_are_one(host: HostProcess) -> None:
    request = pb.CreateModuleRequest(request_id="race", name="race", root=host.root_public)
    calls = [host.modules.CreateModule.future(request) for _ in range(8)]
    assert len({c.result().module_id for c in calls}) == 1


def test_a_cancelled_call_is_done_whole_and_its_answer_is_kept(host: HostProcess) -> None:
    request = pb.CreateModuleRequest(request_id="cancelled", name="cancelled", root=host.root_public)
    call = host.modules.CreateModule.future(request)
    time.sleep(0.005)
    call.cancel()
    again = host.modules.CreateModule(request)
    assert again.state == "serving"
    assert len([line for line in host.audit_lines() if '"request_id":"cancelled"' in line]) <= 2


def test_answers_survive_a_restart_of_the_service() -> None:
    with HostProcess() as host:
        made = host.create("kept", request_id="kept-1")
        secret = host.host.CreateEnrolment(pb.CreateEnrolmentRequest(request_id="kept-2"))
        pin = pb.SetPinRequest(request_id="kept-3", name="kept", pin=b"55667788")
        host.modules.SetPin(pin)
        host.restart()
        assert host.create("kept", request_id="kept-1").module_id == made.module_id
        assert host.host.CreateEnrolment(pb.CreateEnrolmentRequest(request_id="kept-2")) == secret
        assert host.modules.SetPin(pin).pin_set
        pin.pin = b"55667789"
        assert refusal(host.modules.SetPin, pin) == (C.ABORTED, "REQUEST_ID_REUSED")
        state = b"".join(p.read_bytes() for p in host.state.glob("state.db*"))
        assert secret.secret.encode() not in state and b"55667788" not in state


# ---- signed commands ------------------------------------------------------------------------------------------------


def command(host: HostProcess, module: pb.Module, action: str, body: bytes = b"", **more: int) -> bytes:
    host_id = fingerprint(host.host.GetHost(pb.GetHostRequest()).host_key)
    now = int(time.time())
    made = Command(
        action, host_id, module.module_id, more.get("sequence", 1), now, now + 600, "web", more.get("generation", 1), body
    )
    return Signer(host.root).sign(made)


def test_a_refused_command_has_the_modules_reason_and_is_audited(host: HostProcess) -> None:
    module = host.create("refusing")
    other = host.create("refusing-2")
    good = command(host, module, Action.ACTIVATE)

    def execute(name: str, data: bytes) -> tuple[grpc.StatusCode, str]:
        return refusal(host.material.Execute, pb.ExecuteRequest(request_id=new_id(), module=name, signed_command=data))

    assert execute(other.name, good) == (C.PERMISSION_DENIED, "WRONG_MODULE")
    altered = bytearray(good)
    altered[-1] ^= 1
    assert execute(module.name, bytes(altered)) == (C.PERMISSION_DENIED, "UNKNOWN_MANAGER")
    assert execute(module.name, b"nonsense") == (C.INVALID_ARGUMENT, "MALFORMED")
    assert execute(module.name, bytes(1024 * 1024 + 1)) == (C.INVALID_ARGUMENT, "TOO_LARGE")
    code, _ = execute(module.name, good)
    assert code in (C.FAILED_PRECONDITION, C.INVALID_ARGUMENT)  # there is nothing staged
    lines = [json.loads(line) for line in host.audit_lines()]
    reasons = [v["reason"] for v in lines if v["kind"] == "material.execute" and v["result"] == "refused"]
    assert {"WRONG_MODULE", "UNKNOWN_MANAGER", "MALFORMED", "TOO_LARGE"} <= set(reasons)


# ---- who may --------------------------------------------------------------------------------------------------------


def test_the_host_says_who_you_are(host: HostProcess) -> None:
    answer = host.host.GetHost(pb.GetHostRequest())
    assert answer.caller == f"uid:{os.geteuid()} pid:{os.getpid()}"
    assert list(answer.roles) == ["auditor", "manager", "operator"]
    assert answer.key_provider.startswith("file ")
    assert {m.name for m in answer.measures} >= {"core-dumps", "not-dumpable", "no-new-privileges"}


def test_enrolment_works_once_and_only_with_the_secret(host: HostProcess) -> None:
    secret = host.host.CreateEnrolment(pb.CreateEnrolmentRequest(request_id=new_id())).secret
    key = host.host.GetHost(pb.GetHostRequest()).host_key
    wrong = pb.EnrolRequest(
        request_id=new_id(), nonce=bytes(32), proof=enrol_proof(b"guess", "manager", bytes(32)), manager="thief"
    )
    assert refusal(host.host.Enrol, wrong) == (C.PERMISSION_DENIED, "ENROLMENT")
    assert enrol(host.channel, secret, "fleet") == key
    with pytest.raises(grpc.RpcError) as caught:
        enrol(host.channel, secret, "fleet")
    assert reason(caught.value) == (C.PERMISSION_DENIED, "ENROLMENT")
    assert not any(secret in line for line in host.audit_lines())
    kinds = [json.loads(line) for line in host.audit_lines()]
    assert [v["result"] for v in kinds if v["kind"] == "host.enrol"][-3:] == ["refused", "ok", "refused"]


def test_an_enrolment_is_void_after_ten_wrong_proofs(host: HostProcess) -> None:
    secret = host.host.CreateEnrolment(pb.CreateEnrolmentRequest(request_id=new_id())).secret
    for _ in range(10):
        wrong = pb.EnrolRequest(request_id=new_id(), nonce=bytes(32), proof=bytes(32), manager="thief")
        assert refusal(host.host.Enrol, wrong) == (C.PERMISSION_DENIED, "ENROLMENT")
    with pytest.raises(grpc.RpcError):
        enrol(host.channel, secret, "fleet")


def test_another_host_cannot_answer_an_enrolment() -> None:
    class Liar:
        def unary_unary(self, method: str, *_: object, **__: object) -> object:
            return lambda request, timeout: pb.EnrolResponse(host_key=bytes(32), proof=bytes(32))

    class Anything:
        def __getattr__(self, name: str) -> object:
            return Liar().unary_unary

    with pytest.raises(WrongHost):
        enrol(Anything(), "secret", "fleet")  # type: ignore[arg-type]


# ---- health, reflection, metrics, events, audit ---------------------------------------------------------------------


def test_health(host: HostProcess) -> None:
    stub = health_pb2_grpc.HealthStub(host.channel)
    for service in ("", "hsmvisor.v1.ModuleService", "hsmvisor.v1.AuditService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=""))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


def test_reflection(host: HostProcess) -> None:
    database = ProtoReflectionDescriptorDatabase(host.channel)
    assert "hsmvisor.v1.ModuleService" in database.get_services()
    service = DescriptorPool(database).FindServiceByName("hsmvisor.v1.MaterialService")
    assert service.FindMethodByName("Execute").input_type.full_name == "hsmvisor.v1.ExecuteRequest"


def test_metrics(host: HostProcess) -> None:
    host.create("measured")
    text = host.host.GetMetrics(pb.GetMetricsRequest()).text
    assert 'hsmvisor_module_up{module="measured"} 1.0' in text
    assert "hsmvisor_host_audit_lines_total" in text


def test_statistics(host: HostProcess) -> None:
    host.create("statistics")
    answer = host.modules.GetStatistics(pb.GetStatisticsRequest(name="statistics"))
    assert answer.uptime_seconds > 0
    assert answer.resident_bytes > 1_000_000


def test_events_are_streamed_and_resumed() -> None:
    with HostProcess() as host:
        stream = host.events.StreamEvents(pb.StreamEventsRequest())
        seen: list[pb.Event] = []
        reader = threading.Thread(target=lambda: _collect(stream, seen))
        reader.start()
        time.sleep(0.2)
        host.create("first")
        wait_for(lambda: any(e.kind == "module-created" for e in seen))
        last = seen[-1].id
        stream.cancel()
        reader.join()
        host.create("second")
        host.restart()
        resumed = host.events.StreamEvents(pb.StreamEventsRequest(after_id=last, module="second"))
        event = next(resumed)
        assert (event.kind, event.module) == ("module-created", "second")
        assert event.id > last
        resumed.cancel()


def _collect(stream: object, seen: list[pb.Event]) -> None:
    try:
        for event in stream:  # type: ignore[attr-defined]
            seen.append(event)
    except grpc.RpcError:
        pass


def test_the_audit_log_is_exported_and_sound(host: HostProcess) -> None:
    host.create("audited")
    lines = list(host.audit.ExportAudit(pb.ExportAuditRequest()))
    assert [line.sequence for line in lines] == list(range(1, len(lines) + 1))
    created = [json.loads(line.line) for line in lines if '"module.create"' in line.line]
    assert any(v["module"] == "audited" and v["result"] == "ok" and v["who"].startswith("uid:") for v in created)
    only = list(host.audit.ExportAudit(pb.ExportAuditRequest(module="audited")))
    assert only and all(json.loads(line.line)["module"] == "audited" for line in only)
    part = list(host.audit.ExportAudit(pb.ExportAuditRequest(after_sequence=1, limit=2)))
    assert [line.sequence for line in part] == [2, 3]
    verdict = verify(host.state / "audit.log", host.host.GetHost(pb.GetHostRequest()).host_key)
    assert verdict.sound, verdict.findings


def test_the_callers_reason_stands_in_the_audit_log(host: HostProcess) -> None:
    request = pb.CreateModuleRequest(request_id=new_id(), name="why", root=host.root_public)
    host.modules.CreateModule(request, metadata=[("hsmvisor-why", "ticket 4711")])
    assert any('"why":"ticket 4711"' in line for line in host.audit_lines())
