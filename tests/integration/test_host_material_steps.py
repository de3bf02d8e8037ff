"""The service killed at every step of a material's life: never half-done, never done twice; the caller who repeats is answered."""

from __future__ import annotations

import os
import signal

import grpc
import pytest
from hsmvisor_rpc.sealed.commands import Action
from support.delivery import Delivery
from support.host_process import HostProcess, reason

STEPS = [
    ("hsmvisor.host.worker:WorkerProcess.ask", "before"),
    ("hsmvisor.host.state:State.store", "before"),
    ("hsmvisor.host.state:State.store", "after"),
    ("hsmvisor.host.worker:WorkerProcess.ask", "after"),
    ("hsmvisor.host.state:State.record", "before"),
    ("hsmvisor.host.state:State.record", "after"),
    ("hsmvisor.host.audit:Audit._write", "before"),
    ("hsmvisor.host.audit:Audit._write", "after"),
]


#: action, generation, what leads up to it, the states before and after it
LIFE: dict[str, tuple[int, list[tuple[str, int]], dict[int, str], dict[int, str]]] = {
    Action.STAGE: (1, [], {}, {1: "staged"}),
    Action.ACTIVATE: (1, [(Action.STAGE, 1)], {1: "staged"}, {1: "current"}),
    Action.RETIRE: (1, [(Action.STAGE, 1), (Action.ACTIVATE, 1)], {1: "current"}, {1: "retiring"}),
    Action.DESTROY: (1, [(Action.STAGE, 1)], {1: "staged"}, {1: "destroyed"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("step", "moment"), STEPS)
@pytest.mark.parametrize("action", LIFE)
def test_a_step_killed_anywhere_is_whole_and_repeatable(action: str, step: str, moment: str) -> None:
    generation, path, before, after = LIFE[action]
    with HostProcess(module="support.crashing_host") as host:
        host.create("web-1")
        delivery = Delivery(host, "web-1")
        for i, (earlier, number) in enumerate(path):
            delivery.execute(delivery.command(earlier, number), f"path-{i}")
        assert delivery.states() == before
        command = delivery.command(action, generation)
        # a service that dies at that step; the worker lives on and is adopted
        host.stop()
        host.environment = {"HSMVISOR_CRASH": f"{step}:{moment}", "HSMVISOR_CRASH_ARMED_BY": str(host.directory / "armed")}
        host.start()
        host.serving("web-1")
        (host.directory / "armed").touch()
        with pytest.raises(grpc.RpcError):
            delivery.execute(command, "the-one")
        assert host.process is not None and host.process.wait(10) == -signal.SIGKILL
        host.environment = {}
        host.start()
        assert host.serving("web-1").restarts == 0
        assert delivery.states() in (before, after)
        answer = delivery.execute(command, "the-one")  # the caller repeats it
        assert (answer.action, answer.generation) == (action, generation)
        assert delivery.states() == after
        assert delivery.execute(command, "the-one") == answer
        with pytest.raises(grpc.RpcError) as caught:
            delivery.execute(command, "another")
        assert reason(caught.value)[1] == "REPLAY"
        # and the worker's own restart finds the same state
        pid = host.get("web-1").pid
        os.kill(pid, signal.SIGKILL)
        host.serving("web-1", not_pid=pid)
        assert delivery.states() == after
