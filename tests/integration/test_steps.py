"""A process of the host dies before every step of every action: nothing half-done, nothing twice, nobody left behind.

The steps are not listed: each walk goes on, further each time (support/counts.py), until the action ends without a death.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import grpc
import pytest
from hsmvisor.serving.audit_verify import verify
from hsmvisor_rpc.sealed.commands import Action
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support import counts
from support.delivery import Delivery
from support.host_hsm import HostHsm
from support.host_process import HostProcess, new_id, reason, wait_for
from support.processes import descendants, unreaped
from support.steps import ROLES, VARIABLE, Board

pytestmark = pytest.mark.slow


class Stepping:
    """A host whose processes can be told to die at a step, and how to go on after it."""

    def __init__(self) -> None:
        self.host = HostProcess(module="support.stepping_host")
        self.host.state.mkdir(mode=0o700)
        path = self.host.state / "steps"  # the helpers open it, and may write nowhere else
        self.board = Board(path)
        self.host.environment = {VARIABLE: str(path)}
        self.hsm = HostHsm(self.host.directory / "hsm")
        self.host.configure(self.hsm.settings())
        self.host.start()

    def again(self) -> None:
        """Starts the service that has died."""
        assert self.host.process is not None
        assert self.host.process.wait(10) == 9
        self.host.start()

    def repeat(self, call: Callable[[], object]) -> object:
        """A caller that tries again while it is told to."""
        for _ in range(100):
            try:
                return call()
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.UNAVAILABLE, error
                time.sleep(0.02)
        raise AssertionError("it stays unavailable")

    def attempt(self, call: Callable[[], object], role: str) -> tuple[object, grpc.RpcError | None]:
        """Until it is answered, or somebody has died; one that is told to try again while nobody has does so."""
        for _ in range(100):
            try:
                answer = call()
                time.sleep(0.02)  # a last step after the answer
                return answer, None
            except grpc.RpcError as error:
                refused = error
                if self.board.died(role) or error.code() != grpc.StatusCode.UNAVAILABLE:
                    break
                time.sleep(0.05)
        return None, refused

    def workers(self, name: str) -> list[int]:
        return [pid for pid, title in descendants(1).items() if title == f"hsmvisord: {name}"]

    def reaped(self) -> None:
        """Returns when nobody is dead whom nobody has waited for."""
        assert self.host.process is not None
        for _ in range(300):  # a library's own child (ldconfig) is waited for when its thread has its turn
            if not (dead := unreaped(self.host.process.pid)):
                return
            time.sleep(0.1)
        raise AssertionError(dead)


@pytest.fixture(scope="module")
def stepping() -> Iterator[Stepping]:
    stepping = Stepping()
    yield stepping
    verdict = verify(stepping.host.state / "audit.log", stepping.host.host.GetHost(pb.GetHostRequest()).host_key)
    stepping.host.clean()
    assert verdict.sound, verdict.findings


@dataclass
class Subject:
    """What an action is done to, made anew for each step."""

    stepping: Stepping
    name: str
    number: int = 0
    settings: ClassVar[dict[str, Any]] = {}

    @property
    def host(self) -> HostProcess:
        return self.stepping.host

    def prepare(self) -> None: ...

    def act(self, request_id: str) -> object:
        raise NotImplementedError

    def halfway(self) -> None:
        """What may be after the death, before the caller repeats it."""

    def done(self) -> None:
        """What must be in the end."""
        assert self.host.serving(self.name).state == "serving"
        wait_for(lambda: len(self.stepping.workers(self.name)) == 1, what="one worker")
        if self.settings:
            wait_for(self.nothing_strange, what="the keys in the HSM that there are to be")

    def keys(self) -> int:
        """How many it has in its HSM."""
        return 0

    def nothing_strange(self) -> bool:
        there = Counter(row["label"].split()[-1] for row in self.stepping.hsm.objects())
        return there == Counter({self.host.get(self.name).module_id.hex(): self.keys()})

    def end(self) -> None:
        request = pb.DestroyModuleRequest(request_id=new_id(), name=self.name)
        self.stepping.repeat(lambda: self.host.modules.DestroyModule(request, timeout=20))


class Creation(Subject):
    def prepare(self) -> None:
        self.name = f"{self.name.partition('-')[0]}-{self.number}"

    def act(self, request_id: str) -> object:
        return self.host.create(self.name, request_id=request_id, **self.settings)

    def halfway(self) -> None:
        listed = [m.name for m in self.host.modules.ListModules(pb.ListModulesRequest(), timeout=10).modules]
        assert listed in ([], [self.name])
        wait_for(lambda: len(self.stepping.workers(self.name)) == len(listed), what="no worker of no module")

    def done(self) -> None:
        super().done()
        super().end()
        assert self.stepping.workers(self.name) == []
        assert not self.settings or self.stepping.hsm.objects() == []

    def end(self) -> None: ...


class Destruction(Creation):
    def prepare(self) -> None:
        super().prepare()
        self.others = set((self.host.run / "workers").iterdir())
        self.host.create(self.name, **self.settings)
        self.deliver()

    def deliver(self) -> None: ...

    def act(self, request_id: str) -> object:
        request = pb.DestroyModuleRequest(request_id=request_id, name=self.name)
        try:
            return self.host.modules.DestroyModule(request, timeout=20)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:  # finished by the next service
                raise
            return reason(error)

    def halfway(self) -> None: ...

    def done(self) -> None:
        assert self.stepping.workers(self.name) == []
        assert not (self.host.run / "modules" / self.name).exists()
        assert set((self.host.run / "workers").iterdir()) == self.others
        wait_for(lambda: not self.settings or self.stepping.hsm.objects() == [], what="the end of its keys")


class Upgrade(Subject):
    def act(self, request_id: str) -> object:
        return self.host.modules.UpgradeModule(pb.UpgradeModuleRequest(request_id=request_id, name=self.name), timeout=20)


class SetPin(Subject):
    def _set(self, pin: bytes, request_id: str) -> object:
        return self.host.modules.SetPin(pb.SetPinRequest(request_id=request_id, name=self.name, pin=pin), timeout=20)

    def prepare(self) -> None:
        self._set(b"", new_id())

    def act(self, request_id: str) -> object:
        return self._set(b"1234", request_id)

    def done(self) -> None:
        super().done()
        assert self.host.get(self.name).pin_set


#: action: generation, what leads up to it, the states before and after it
LIFE: dict[str, tuple[int, list[tuple[str, int]], dict[int, str], dict[int, str]]] = {
    Action.STAGE: (1, [], {}, {1: "staged"}),
    Action.GENERATE: (1, [], {}, {1: "requested"}),
    Action.CERTIFY: (1, [(Action.GENERATE, 1)], {1: "requested"}, {1: "staged"}),
    Action.ACTIVATE: (
        2,
        [(Action.STAGE, 1), (Action.ACTIVATE, 1), (Action.STAGE, 2)],
        {1: "current", 2: "staged"},
        {1: "retiring", 2: "current"},
    ),
    Action.ROLL_BACK: (
        1,
        [(Action.STAGE, 1), (Action.ACTIVATE, 1), (Action.STAGE, 2), (Action.ACTIVATE, 2)],
        {1: "retiring", 2: "current"},
        {1: "current", 2: "retiring"},
    ),
    Action.RETIRE: (1, [(Action.STAGE, 1), (Action.ACTIVATE, 1)], {1: "current"}, {1: "retiring"}),
    Action.DESTROY: (1, [(Action.STAGE, 1)], {1: "staged"}, {1: "destroyed"}),
}


class Step(Subject):
    """A signed command."""

    action = ""

    def prepare(self) -> None:
        self.generation, path, self.before, self.after = LIFE[self.action]
        self.delivery = Delivery(self.host, self.name, f"web-{self.number}")
        for action, generation in path:
            self.delivery.execute(self.delivery.command(action, generation), new_id())
        assert self.delivery.states() == self.before
        self.command = self.delivery.command(self.action, self.generation)

    def act(self, request_id: str) -> object:
        return self.delivery.execute(self.command, request_id)

    def halfway(self) -> None:
        self.host.serving(self.name)
        assert self.delivery.states() in (self.before, self.after)

    def keys(self) -> int:
        listed = self.host.material.ListMaterials(pb.ListMaterialsRequest(module=self.name), timeout=10).materials
        return sum(g.state != "destroyed" for row in listed for g in row.generations)

    def done(self) -> None:
        super().done()
        assert self.delivery.states() == self.after
        with pytest.raises(grpc.RpcError) as caught:
            self.delivery.execute(self.command, new_id())
        assert reason(caught.value)[1] == "REPLAY"


ACTIONS: dict[str, type[Subject]] = {
    "create": Creation,
    "destroy": Destruction,
    "upgrade": Upgrade,
    "set-pin": SetPin,
    **{f"{action}-generation": type(action, (Step,), {"action": action}) for action in LIFE},
}


class WithKey(Destruction):
    """Destroys a module that has a key."""

    def deliver(self) -> None:
        delivery = Delivery(self.host, self.name)
        self.stepping.repeat(lambda: delivery.execute(delivery.command(Action.STAGE, 1), new_id()))


#: The same, of modules whose keys live in an HSM.
IN_HSM: dict[str, type[Subject]] = {
    f"{name}-in-hsm": type(name, (base,), {"settings": {"cryptoprocessor": "rack"}} | more)
    for name, base, more in (
        ("create", Creation, {}),
        ("destroy", WithKey, {}),
        ("upgrade", Upgrade, {}),
        ("stage", Step, {"action": Action.STAGE}),
        ("generate", Step, {"action": Action.GENERATE}),
        ("destroy-generation", Step, {"action": Action.DESTROY}),
    )
}
WALKS = [
    *((role, action) for role in ROLES if role not in ("hsm helper", "tpm") for action in ACTIONS),
    *((role, action) for role in ("supervisor", "worker", "hsm helper") for action in IN_HSM),
]

#: Actions in which a role has no step.
IDLE = {
    "launcher": {"destroy", "set-pin", *(f"{action}-generation" for action in LIFE)},
    "key provider": {"destroy", "set-pin", *(f"{action}-generation" for action in LIFE)},
}


def test_every_step_of_a_generation_is_walked() -> None:
    assert set(LIFE) == set(Action) - {Action.CHANGE_ROOT, Action.MOVE_TPM}  # which no generation is of


@pytest.mark.parametrize(("role", "action"), WALKS)
@pytest.mark.timeout(300)
def test_death_before_every_step(stepping: Stepping, role: str, action: str) -> None:
    subject = (ACTIONS | IN_HSM)[action](stepping, f"{action}-{ROLES.index(role)}")
    if not isinstance(subject, Creation):
        stepping.host.create(subject.name, **subject.settings)
    steps: list[str] = []
    for step in counts.steps(4):
        subject.number = 1000 * ROLES.index(role) + step
        stepping.repeat(subject.prepare)
        stepping.board.arm(role, step)
        request_id = f"{action}-{role}-{step}"
        first, refused = stepping.attempt(lambda r=request_id: subject.act(r), role)  # type: ignore[misc]
        died = stepping.board.died(role)
        if not died:
            stepping.board.disarm()
        assert died or first is not None, f"{action} failed without a death: {refused}; see {stepping.host.log}"
        if died and role == "supervisor":
            stepping.again()
        if died:
            stepping.repeat(subject.halfway)
        answer = stepping.repeat(lambda r=request_id: subject.act(r))  # type: ignore[misc]
        assert first is None or answer == first or action.startswith(("create", "set-pin", "destroy"))
        stepping.repeat(subject.done)
        stepping.reaped()
        if not died:
            break
        steps.append(died)
    subject.end()
    print(f"{action}, {role}: {len(steps)} deaths, before: {'; '.join(steps)}")
    assert bool(steps) == (action not in IDLE.get(role, ())), steps
