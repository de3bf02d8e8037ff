"""SIGKILL for worker, launcher, key provider and supervisor at random under load: what was lost (nothing), and for how long."""

from __future__ import annotations

import bisect
import math
import os
import random
import signal
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from support.certificates import Authority, new_key
from support.guest import Guest, library
from support.host import Host, Module, wait_for
from support.load import Made, Signer, fits
from support.processes import descendants, titled, unreaped
from support.rotation import Activation, owner_of

ROLES = ("worker", "launcher", "supervisor", "key provider")
ALL_OF_IT = "supervisor, with new helpers"  #: it serves without; what needs them (a new module) waits for them
KEPT = 12


@dataclass
class Report:
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    signatures: int = 0
    failed_signatures: list[str] = field(default_factory=list)
    wrong_signatures: int = 0
    deliveries: int = 0
    deliveries_cut: int = 0
    lost: list[str] = field(default_factory=list)  #: what was acknowledged and is not there
    left_behind: list[str] = field(default_factory=list)  #: workers of no module, and the dead that nobody reaped
    #: for a worker: how long no signature came; for the others: until the killed one serves again
    recovery_s: dict[str, list[float]] = field(default_factory=lambda: {role: [] for role in (*ROLES, ALL_OF_IT)})

    def summary(self) -> dict[str, object]:
        spread = {
            role: {
                "median": round(statistics.median(values), 3),
                "p90": round(sorted(values)[int(0.9 * (len(values) - 1))], 3),
                "p99": round(sorted(values)[int(0.99 * (len(values) - 1))], 3),
                "max": round(max(values), 3),
                "within_1_s": f"{sum(value < 1 for value in values)} of {len(values)}",
            }
            for role, values in self.recovery_s.items()
            if values
        }
        return {
            "kills": self.kills,
            "signatures": self.signatures,
            "failed_signatures": len(self.failed_signatures),
            "wrong_signatures": self.wrong_signatures,
            "deliveries": self.deliveries,
            "deliveries_cut_by_a_kill": self.deliveries_cut,
            "acknowledged_and_lost": len(self.lost),
            "left_behind": len(self.left_behind),
            "recovery_s": spread,
        }


class Deliverer:
    """Delivers one generation after another to a following material, whatever is being killed."""

    def __init__(self, module: Module, report: Report) -> None:
        self.module, self.report = module, report
        self.activations: list[Activation] = []
        self.acknowledged = 0  #: the newest generation whose activation was acknowledged
        self.deliver()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def deliver(self) -> None:
        key = new_key("p256")
        generation = self.module.stage("requests", key, mode="follow", profile="request-signing")
        self.activations.append(activation := Activation(key, b"", time.monotonic(), math.inf))
        self.module.activate("requests", generation)
        activation.acknowledged = time.monotonic()
        self.acknowledged = generation
        self.report.deliveries += 1
        states = self.module.states("requests")
        for old in sorted(number for number, state in states.items() if state in ("retiring", "staged"))[:-KEPT]:
            self.module.destroy_generation("requests", old)

    def _run(self) -> None:
        while not self._ended.wait(0.1):
            try:
                self.deliver()
            except (grpc.RpcError, ValueError):  # ValueError: a channel that was closed meanwhile
                self.report.deliveries_cut += 1

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(30)

    def check(self) -> None:
        """What was acknowledged before this call is there."""
        newest = self.acknowledged
        states = self.module.states("requests")
        current = [number for number, state in states.items() if state == "current"]
        if len(current) != 1 or current[0] < newest:
            self.report.lost.append(f"generation {newest} was acknowledged, the module has {states}")


#: a module whose worker ends more often within a minute is not started again at once: the next victim takes its place
DEATHS_A_MODULE = 4


def kill_under_load(host: Host, name: str, directory: Path, kills: int, seed: int = 0, pause: float = 0.6) -> Report:
    """Kills `kills` processes; the modules `name`-0, `name`-1 ... are loaded one after the other."""
    report, choose = Report(), random.Random(seed)
    roles = [ROLES[n] if n < len(ROLES) else choose.choice(ROLES) for n in range(kills)]
    number = 0
    while roles:
        part: list[str] = []
        while roles and part.count("worker") + (roles[0] == "worker") <= DEATHS_A_MODULE and len(part) < 30:
            part.append(roles.pop(0))
        _kill_part(host, f"{name}-{number}", directory, part, choose, pause, report)
        number += 1
    return report


def _kill_part(
    host: Host, name: str, directory: Path, roles: list[str], choose: random.Random, pause: float, report: Report
) -> None:
    module, authority = host.create(name), Authority()
    pinned = new_key("p256")
    module.push("web", pinned, authority.chain(pinned))
    deliverer = Deliverer(module, report)
    guest = Guest(library("ours"), module.address, directory)
    signers = {label: Signer(guest, label, name=label) for label in ("web", "requests")}
    killed: list[float] = []
    time.sleep(0.5)
    try:
        for role in roles:
            time.sleep(pause * (0.5 + choose.random()))
            began = time.monotonic()
            _kill(host, module, role)
            report.kills[role] += 1
            if role == "worker":
                killed.append(began)
            else:
                report.recovery_s[role].append(time.monotonic() - began)
            if role == "supervisor":
                host.meet()
                report.recovery_s[ALL_OF_IT].append(time.monotonic() - began)
            deliverer.check()
    finally:
        deliverer.stop()
        made = {label: signer.stop() for label, signer in signers.items()}
    deliverer.check()
    for one in (*made["web"], *made["requests"]):
        report.signatures += 1
        if one.error:
            report.failed_signatures.append(f"{one.ended:.3f} {one.error}")
    report.wrong_signatures += sum(1 for one in made["web"] if not one.error and not fits(pinned, one))
    report.wrong_signatures += sum(1 for one in made["requests"] if not one.error and owner_of(one, deliverer.activations) is None)
    report.recovery_s["worker"] += [silence(made["web"], moment) for moment in killed]
    module.destroy()
    report.left_behind += [title for title in descendants(1).values() if title == f"hsmvisord: {name}"]
    report.left_behind += unreaped(host.pid())


def _kill(host: Host, module: Module, role: str) -> None:
    """Kills and returns once what was killed serves again."""
    if role == "worker":
        pid = module.pid
        os.kill(pid, signal.SIGKILL)
        module.serving(not_pid=pid)
    elif role in ("launcher", "key provider"):
        pid = titled(host.pid(), f"hsmvisord: {role}")
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: titled(host.pid(), f"hsmvisord: {role}") not in (0, pid), what=f"a new {role}")
    else:
        host.stop(signal.SIGKILL)
        host.process.start()
        module.serving()


def silence(made: list[Made], moment: float) -> float:
    """How long after `moment` no signature came: the longest pause that touches the 5 s from then on."""
    ends = sorted(one.ended for one in made if not one.error)
    first = bisect.bisect_right(ends, moment)
    last = bisect.bisect_right(ends, moment + 5)
    pauses = [ends[n] - max(ends[n - 1], moment) for n in range(max(first, 1), min(last + 1, len(ends)))]
    return max(pauses, default=5.0)
