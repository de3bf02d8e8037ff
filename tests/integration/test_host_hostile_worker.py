"""A worker in the hands of its guest: whatever is not in its row of the phase table ends it, and the others do not notice."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.host_process import HostProcess, gone, new_id, reason, wait_for

C = grpc.StatusCode


@pytest.fixture(scope="module")
def host() -> Iterator[HostProcess]:
    with HostProcess(
        "[workers]\nstart_timeout_seconds = 2\ncommand_timeout_seconds = 1\n", "support.host_with_fake_launcher"
    ) as host:
        host.create("honest")
        yield host


def audited(host: HostProcess, module: str, kind: str) -> list[dict[str, object]]:
    values = [json.loads(line) for line in host.audit_lines()]
    return [v for v in values if v["kind"] == kind and v.get("module") == module]


def honest_is_untouched(host: HostProcess) -> None:
    module = host.get("honest")
    assert (module.state, module.restarts) == ("serving", 0)


@pytest.mark.parametrize(
    "scenario",
    ["garbage", "asks-to-spawn", "asks-for-a-key", "unknown-event", "answers-nothing", "sends-descriptors", "child-speaks"],
)
def test_a_violation_ends_the_worker_and_is_audited(host: HostProcess, scenario: str) -> None:
    pid = host.create(scenario).pid
    wait_for(lambda: audited(host, scenario, "worker.violation"), what="the violation")
    wait_for(lambda: pid == 0 or gone(pid))
    failed = wait_for(lambda: (m := host.get(scenario)).state == "failed" and m)  # each new one does it again
    assert "5 times" in failed.failure
    destroy(host, scenario)
    honest_is_untouched(host)


@pytest.mark.parametrize("scenario", ["stores-before-boot", "another-pid", "speaks-early"])
def test_one_that_breaks_the_rules_while_it_starts_is_no_module(host: HostProcess, scenario: str) -> None:
    request = pb.CreateModuleRequest(request_id=new_id(), name=scenario, root=host.root_public)
    with pytest.raises(grpc.RpcError) as caught:
        host.modules.CreateModule(request, timeout=10)
    assert reason(caught.value) == (C.UNAVAILABLE, "WORKER")
    with pytest.raises(grpc.RpcError) as caught:
        host.get(scenario)
    assert reason(caught.value) == (C.NOT_FOUND, "MODULE")
    assert not (host.run / "modules" / scenario).exists()
    honest_is_untouched(host)


def test_an_answer_cannot_be_planted_nor_a_version_skipped(host: HostProcess) -> None:
    host.create("forge")
    told = wait_for(lambda: audited(host, "forge", "module.measures"))
    assert told[0]["detail"] == {"forged": "STORAGE", "skipped": "STORAGE"}
    with pytest.raises(grpc.RpcError) as caught:  # the planted answer would say that it is done
        host.modules.DestroyModule(pb.DestroyModuleRequest(request_id="planted", name="nothing"))
    assert reason(caught.value) == (C.NOT_FOUND, "MODULE")


def test_a_flood_of_events_does_not_fill_the_disk(host: HostProcess) -> None:
    host.create("flood")
    time.sleep(1)
    host.create("after-the-flood")
    count = len(audited(host, "flood", "module.connection-opened"))
    assert 1000 < count < 4000
    honest_is_untouched(host)


def test_reports_that_lie_are_read_without_harm(host: HostProcess) -> None:
    assert host.get("honest").sessions == 0
    assert host.modules.GetStatistics(pb.GetStatisticsRequest(name="honest")).connections == 0
    assert 'hsmvisor_module_up{module="honest"} 1.0' in host.host.GetMetrics(pb.GetMetricsRequest()).text


def test_a_reason_of_its_own_making_is_not_passed_on(host: HostProcess) -> None:
    request = pb.ExecuteRequest(request_id=new_id(), module="honest", signed_command=b"x")
    with pytest.raises(grpc.RpcError) as caught:
        host.material.Execute(request)
    assert reason(caught.value) == (C.UNAVAILABLE, "WORKER")


def test_one_that_does_not_answer_holds_up_nobody(host: HostProcess) -> None:
    host.create("silent")
    call = host.material.Execute.future(pb.ExecuteRequest(request_id=new_id(), module="silent", signed_command=b"x"))
    began = time.monotonic()
    honest_is_untouched(host)
    assert time.monotonic() - began < 0.5
    error = call.exception()
    assert isinstance(error, grpc.RpcError)
    assert reason(error) == (C.UNAVAILABLE, "WORKER")


def test_one_that_will_not_end_is_ended(host: HostProcess) -> None:
    pid = host.create("stubborn").pid
    destroy(host, "stubborn")
    assert gone(pid)


def test_one_that_hangs_up_is_replaced(host: HostProcess) -> None:
    host.create("hangs-up")
    wait_for(lambda: audited(host, "hangs-up", "worker.ended"))
    honest_is_untouched(host)


def test_descriptors_do_not_pile_up_in_the_service(host: HostProcess) -> None:
    assert host.process is not None
    if os.geteuid() != 0:
        pytest.skip("the service is not dumpable: only root may look")
    held = Path(f"/proc/{host.process.pid}/fd")
    destroy(host, *(m.name for m in host.modules.ListModules(pb.ListModulesRequest()).modules if m.name != "honest"))
    destroy_some(host)  # whatever a first one leaves open for the next
    before = len(os.listdir(held))  # of the others no worker comes or goes any more
    for _ in range(4):
        destroy_some(host)
    wait_for(lambda: len(os.listdir(held)) <= before + 2, what=f"descriptors as few as {before}")


def destroy_some(host: HostProcess) -> None:
    names = [f"pile-{i}" for i in range(5)]
    for name in names:
        host.create(name)
    destroy(host, *names)


def destroy(host: HostProcess, *names: str) -> None:
    for name in names:
        host.modules.DestroyModule(pb.DestroyModuleRequest(request_id=new_id(), name=name), timeout=20)
