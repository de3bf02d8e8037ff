"""A guest that misbehaves towards its own module on a real host: what that costs, and that nobody else is hurt.

`scripts/soak` does the same for longer, and tells the figures.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import ck, limits
from hsmvisord.wire.calls import Call
from support.certificates import new_key
from support.host import Host, Module, wait_for
from support.hostile import BEHAVIOURS, SHA256, connect, socket_of
from support.misbehaviour import PIN, misbehave, set_pin
from support.wire_client import Refused

MOST_MB = 96  #: of a worker under any attack: what it has anyway, and the room of large frames and replies, sessions, journals
GROWTH_MB = 64  #: that may stay when it is over: the allocator keeps pages


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture(scope="module")
def neighbour(host: Host) -> Module:
    return with_key(host.create("neighbour"))


@pytest.fixture
def attacked(host: Host) -> Iterator[Module]:
    module = with_key(host.create(f"attacked-{time.monotonic_ns()}"))
    yield module
    module.destroy()


def with_key(module: Module) -> Module:
    module.push("key", new_key("p256"))
    return module


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_its_module_stays_bounded_and_serves_on_and_another_is_not_hurt(
    attacked: Module, neighbour: Module, behaviour: str
) -> None:
    cost = misbehave(behaviour, attacked, neighbour, seconds=1.2)
    assert sum(cost.done.values()) > 10, cost
    assert cost.same_worker
    assert cost.peak_mb < MOST_MB and cost.after_mb - cost.before_mb < GROWTH_MB, cost
    assert cost.supervisor_growth_mb < GROWTH_MB, cost
    assert cost.most_threads <= cost.threads_before + limits.THREADS + limits.LANE_THREADS + 1, cost
    assert cost.answers_after, "an honest client is answered when it is over"
    assert cost.answered_during > 0 or behaviour == "PIN guessing", cost
    assert cost.neighbour_signatures > 10 and cost.neighbour_failures == 0, cost


def told(module: Module) -> list[dict[str, Any]]:
    """What the audit log has of the module's own telling."""
    lines = module.host.process.audit.ExportAudit(pb.ExportAuditRequest(module=module.name), timeout=20)
    return [entry for line in lines if (entry := json.loads(line.line))["kind"].startswith("module.")]


def test_a_storm_of_connections_does_not_fill_the_hosts_log(attacked: Module, neighbour: Module) -> None:
    cost = misbehave("connection storm", attacked, neighbour, seconds=1.5)
    assert cost.done["connections"] > 2 * limits.EVENT_BURST
    wait_for(lambda: [e for e in told(attacked) if e["kind"] == "module.connections-suppressed"], 10, "a count of the others")
    assert limits.EVENT_BURST < len(told(attacked)) < 2 * (limits.EVENT_BURST + 30 * limits.EVENT_RATE)


def test_guessed_pins_are_slowed_across_a_restart_and_keep_no_other_call_waiting(attacked: Module) -> None:
    set_pin(attacked)
    path, pid = socket_of(attacked.address), attacked.pid
    assert guesses(path, 20).count(ck.CKR_PIN_INCORRECT) <= 6
    os.kill(pid, signal.SIGKILL)
    attacked.serving(not_pid=pid)
    assert guesses(path, 20).count(ck.CKR_PIN_INCORRECT) <= 4, "the count goes on where it was"
    ended, done = threading.Event(), Counter[str]()
    guesser = threading.Thread(target=BEHAVIOURS["PIN guessing"], args=(path, lambda: not ended.is_set(), done))
    guesser.start()
    honest = connect(path)
    other = honest.open_session()
    longest, end = 0.0, time.monotonic() + 30
    while done["CKR_PIN_LOCKED"] < 300 and time.monotonic() < end:
        began = time.monotonic()
        honest.digest_once(other, SHA256, b"data")
        longest = max(longest, time.monotonic() - began)
    assert longest < 2
    ended.set()
    guesser.join(20)
    assert done["CKR_PIN_LOCKED"] >= 300 and done["CKR_PIN_INCORRECT"] <= 4, done
    wait_for(lambda: right(path), 60, "the right PIN is taken when the time is over")


def guesses(path: str, count: int) -> list[int]:
    client = connect(path)
    session = client.open_session()
    answers = []
    for n in range(count):
        with pytest.raises(Refused) as refused:
            client.login(session, b"guess-%d" % n)
        answers.append(refused.value.rv)
    client.close()
    return answers


def right(path: str) -> bool:
    client = connect(path)
    session = client.open_session()
    try:
        client.login(session, PIN)
    except Refused:
        time.sleep(0.3)
        return False
    finally:
        client.close()
    return True


def test_who_knows_the_pin_cannot_have_the_host_store_without_end(attacked: Module) -> None:
    """A wrong one and then the right one is two changes of the stored state."""
    set_pin(attacked)
    path = socket_of(attacked.address)
    client = connect(path)
    session = client.open_session()
    answers = []
    for _ in range(limits.PIN_BURST):
        with pytest.raises(Refused) as refused:
            client.login(session, b"wrong!")
        answers.append(refused.value.rv)
        if refused.value.rv == ck.CKR_PIN_LOCKED:
            break
        client.login(session, PIN)
        client.call(Call.LOGOUT, session)
    assert ck.CKR_PIN_LOCKED in answers and len(answers) >= limits.PIN_BURST // 2
    wait_for(lambda: right(path), 30, "the right PIN again")
