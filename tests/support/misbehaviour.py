"""Has a guest misbehave for a while, and tells what that cost its module, a neighbour and the host."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import new_key
from support.host import Host, Module, wait_for
from support.host_process import SOURCES, new_id
from support.hostile import ECDSA, connect, key, socket_of
from support.native_client import NativeClient
from support.processes import pss
from support.wire_client import Closed, Refused

PIN = b"123456"


OF_LANES = 2  #: descriptors, from the first one on: an epoll and an eventfd


@dataclass(frozen=True)
class Cost:
    """Memory in MiB (proportional), of the worker under attack."""

    done: dict[str, int]  #: what the hostile guest did and was told
    before_mb: float
    peak_mb: float
    after_mb: float
    supervisor_growth_mb: float
    threads_before: int
    most_threads: int
    descriptors_before: int
    descriptors_after: int
    sessions_after: int
    same_worker: bool
    answered_during: int  #: signatures of an honest client of the same module that came before
    answers_after: bool  #: to a new client of the same module
    neighbour_signatures: int
    neighbour_failures: int
    neighbour_longest_ms: float

    def summary(self) -> dict[str, object]:
        return {name: round(value, 1) if isinstance(value, float) else value for name, value in asdict(self).items()}


class Client:
    """Signs once each time it is told."""

    def __init__(self, module: Module) -> None:
        self.client: NativeClient = connect(socket_of(module.address))
        self.session = self.client.open_session()
        self.key = key(self.client, self.session)

    def sign(self) -> float:
        """Returns the milliseconds that it took."""
        began = time.perf_counter()
        self.client.sign_once(self.session, ECDSA, self.key, bytes(32))
        return (time.perf_counter() - began) * 1000


def _count(pid: int, what: str) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/{what}").iterdir())


def set_pin(module: Module) -> None:
    module.host.process.modules.SetPin(pb.SetPinRequest(request_id=new_id(), name=module.name, pin=PIN), timeout=10)


def misbehave(behaviour: str, attacked: Module, neighbour: Module, seconds: float) -> Cost:
    """Both modules have a key.  The honest client of the attacked module is there from before."""
    host, pid = attacked.host, attacked.pid
    Client(attacked).client.close()  # what a first use takes is not the attack's
    before, supervisor = pss(pid), pss(host.pid())
    threads, descriptors = _count(pid, "task"), _count(pid, "fd")
    inside, beside = Client(attacked), Client(neighbour)
    if behaviour == "PIN guessing":
        set_pin(attacked)
    command = [sys.executable, "-m", "support.hostile", behaviour, socket_of(attacked.address), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={"PYTHONPATH": SOURCES})
    peak, most_threads, failures, answered = before, threads, 0, 0
    times: list[float] = []
    while process.poll() is None:
        peak, most_threads = max(peak, pss(pid)), max(most_threads, _count(pid, "task"))
        try:
            times += [beside.sign() for _ in range(5)]
        except (Refused, Closed, OSError):
            failures += 1
        with contextlib.suppress(Refused):  # a PIN hides its key
            inside.sign()
            answered += 1
        time.sleep(0.01)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.returncode == 0, f"the hostile guest ended with {process.returncode}"
    for client in (inside, beside):
        client.client.close()
    wait_for(lambda: attacked.status().sessions == 0, 10, "sessions given back")
    wait_for(lambda: _count(pid, "fd") <= descriptors + OF_LANES, 10, "descriptors given back")
    return Cost(
        done=json.loads(output)["done"],
        before_mb=before / 2**20,
        peak_mb=peak / 2**20,
        after_mb=pss(pid) / 2**20,
        supervisor_growth_mb=(pss(host.pid()) - supervisor) / 2**20,
        threads_before=threads,
        most_threads=most_threads,
        descriptors_before=descriptors,
        descriptors_after=_count(pid, "fd"),
        sessions_after=attacked.status().sessions,
        same_worker=attacked.pid == pid,
        answered_during=answered,
        answers_after=_answers(attacked),
        neighbour_signatures=len(times),
        neighbour_failures=failures,
        neighbour_longest_ms=max(times, default=0.0),
    )


def _answers(module: Module) -> bool:
    client = connect(socket_of(module.address))
    with contextlib.closing(client):
        return client.open_session() > 0


def misbehave_all(host: Host, behaviours: list[str], seconds: float) -> dict[str, dict[str, object]]:
    """Each on a module of its own, one after the other."""
    neighbour = host.create("neighbour")
    neighbour.push("key", new_key("p256"))
    costs = {}
    for number, behaviour in enumerate(behaviours):
        attacked = host.create(f"attacked-{number}")
        attacked.push("key", new_key("p256"))
        costs[behaviour] = misbehave(behaviour, attacked, neighbour, seconds).summary()
        attacked.destroy()
    neighbour.destroy()
    return costs
