"""Loss of power: by the trace of a real host service, nothing is acknowledged before it, and its file's name, is on the disk.

Each rule is shown to be able to fail: by a service whose state file is not synced, and by traces with a sync left out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hsmvisor_rpc.sealed.commands import Action
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.delivery import Delivery
from support.trace import SENDS, SYNCS, Call, Disk, TracedHost, replay

STATE, AUDIT = re.compile(r"state\.db(-wal)?(\.new)?"), re.compile(r"audit\.log(\.\d+)?")
KEYS = re.compile(r"(host|master)\.key(\.new)?")


@dataclass
class Traced:
    host: TracedHost
    calls: list[Call]
    answers: dict[str, float]  #: request id: when its answer was there

    def disk(self) -> Disk:
        return Disk(self.host.state)

    def is_file(self, *kinds: re.Pattern[str]) -> Callable[[str], bool]:
        return lambda path: any(kind.fullmatch(path.rpartition("/")[2]) for kind in kinds)


def live(environment: dict[str, str] | None = None) -> Traced:
    """A module's whole life, one action after the other."""
    answers: dict[str, float] = {}
    host = TracedHost(environment=environment)
    logs = host.state / "logs"  # of its own: no other file's sync puts the log's name on the disk
    logs.mkdir(parents=True)
    host.configure(f'[audit]\nfile = "{logs}/audit.log"\n')
    with host:

        def act(name: str, action: Callable[[str], object]) -> None:
            action(name)
            answers[name] = time.time()

        def command(action: str, generation: int) -> None:
            signed = delivery.command(action, generation)
            act(f"{action}-{generation}", lambda name: delivery.execute(signed, name))

        act("create", lambda name: host.create("web-1", request_id=name))
        delivery = Delivery(host, "web-1")
        for generation in (1, 2):
            command(Action.STAGE, generation)
            command(Action.ACTIVATE, generation)
        command(Action.ROLL_BACK, 1)
        command(Action.RETIRE, 1)
        command(Action.DESTROY, 2)
        pin = pb.SetPinRequest(name="web-1", pin=b"1234")
        act("set-pin", lambda name: host.modules.SetPin(pb.SetPinRequest(request_id=name, name=pin.name, pin=pin.pin)))
        act("upgrade", lambda name: host.modules.UpgradeModule(pb.UpgradeModuleRequest(request_id=name, name="web-1"), timeout=20))
        act("destroy", lambda name: host.modules.DestroyModule(pb.DestroyModuleRequest(request_id=name, name="web-1")))
        host.stop()
        return Traced(host, host.calls(), answers)


@pytest.fixture(scope="module")
def traced() -> Traced:
    return live()


def acknowledgements(traced: Traced) -> dict[int, str]:
    """The sends that carry the answers: for each request, the last one to the control socket before the answer was there."""
    sends = [c for c in traced.calls if c.name in SENDS and c.target.endswith('/run/control.sock"]')]
    return {max((c for c in sends if c.at <= moment), key=lambda c: c.at).began: name for name, moment in traced.answers.items()}


def lost_answers(traced: Traced, calls: list[Call]) -> list[str]:
    """Answers that left before state, audit line and names were on the disk."""
    disk, answers, found = traced.disk(), acknowledgements(traced), []
    told: set[str] = set()  #: requests whose line was written
    for call, _ in replay(calls, disk):
        told |= {name for name in traced.answers if tells_of(call, name)}
        if name := answers.get(call.began):
            lost = disk.lost(traced.is_file(STATE, KEYS)) + disk.lost(traced.is_file(AUDIT), lambda w, n=name: tells_of(w, n))  # type: ignore[misc]
            found += [f"{name}: {what}" for what in lost]
            found += [] if name in told else [f"{name}: no audit line"]
    return found


def tells_of(call: Call, name: str) -> bool:
    """Says whether a call writes the audit line of this request."""
    return call.name == "write" and f'\\"request_id\\":\\"{name}\\"' in call.arguments


def lost_changes(traced: Traced, calls: list[Call]) -> tuple[int, list[str]]:
    """How many changes of a worker were acknowledged to it, and those that were not on the disk then."""
    disk, asking, written, stored, found = traced.disk(), dict[str, int](), 0, 0, list[str]()
    for call, _ in replay(calls, disk):
        if call.name == "pwrite64" and traced.is_file(STATE)(call.target):
            written = call.began
        if call.name == "recvmsg" and "hsmvisor/1:store-state" in call.arguments:
            asking[call.socket] = call.ended
        elif call.name in SENDS and "hsmvisor/1:done" in call.arguments and call.socket in asking:
            asked, stored = asking.pop(call.socket), stored + 1
            found += [f"change {stored}: {what}" for what in disk.lost(traced.is_file(STATE))]
            found += [] if written > asked else [f"change {stored}: nothing was written"]
    return stored, found


def early_names(traced: Traced, calls: list[Call]) -> list[str]:
    """Files that got their names before their bytes were on the disk."""
    disk = traced.disk()
    return [what for _, wrong in replay(calls, disk) for what in wrong]


def without(traced: Traced, name: Callable[[str], bool]) -> list[Call]:
    """The trace as if these files, or the directory, were never synced."""
    return [c for c in traced.calls if not (c.name in SYNCS and name(c.target))]


def test_the_trace_tells_of_everything(traced: Traced) -> None:
    assert len(acknowledgements(traced)) == len(traced.answers) == 11
    assert lost_changes(traced, traced.calls)[0] >= 8
    renamed = {path.rpartition("/")[2] for c in traced.calls if c.name == "rename" for path in c.paths[1:]}
    assert {"host.key", "master.key", "state.db", "audit.log.000000000001"} <= renamed


def test_nothing_is_acknowledged_before_it_is_on_the_disk(traced: Traced) -> None:
    assert lost_answers(traced, traced.calls) == []
    assert lost_changes(traced, traced.calls)[1] == []


def test_no_file_has_its_name_before_its_bytes(traced: Traced) -> None:
    assert early_names(traced, traced.calls) == []


@pytest.mark.parametrize("left_out", ["state.db-wal", "audit.log", "state", "logs"])
def test_a_trace_without_a_files_syncs_is_found(traced: Traced, left_out: str) -> None:
    calls = without(traced, lambda path: path.endswith(f"/{left_out}"))
    found = [*lost_answers(traced, calls), *lost_changes(traced, calls)[1]]
    assert any(left_out in what for what in found)
    lost = {what.partition(":")[0] for what in found} & traced.answers.keys()
    assert len(lost) >= len(traced.answers) - 1  # destroy writes the whole state file and empties the journal


@pytest.mark.parametrize("left_out", [".host.key.new", "master.key.new", "state.db.new", "audit.log"])
def test_a_trace_with_a_name_before_its_bytes_is_found(traced: Traced, left_out: str) -> None:
    assert early_names(traced, without(traced, lambda path: path.endswith(f"/{left_out}"))) != []


def test_a_service_that_does_not_sync_its_state_is_found() -> None:
    unsynced = live({"HSMVISOR_UNSYNCED": "1"})
    stored, found = lost_changes(unsynced, unsynced.calls)
    assert stored >= 8 and len(found) >= stored
    assert any("state.db-wal" in what for what in lost_answers(unsynced, unsynced.calls))
