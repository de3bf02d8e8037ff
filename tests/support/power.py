"""A host in a virtual machine that loses its power; what it had acknowledged and what is there afterwards."""

from __future__ import annotations

import json
import random
import time
from typing import Any

from support.vm import VirtualMachine, command

PROGRAM = "power_loss.py"


def found(machine: VirtualMachine) -> dict[str, Any]:
    (line,) = machine.wait_for("found ")
    report: dict[str, Any] = json.loads(line.removeprefix("found "))
    return report


def lost(lines: list[str], report: dict[str, Any]) -> list[str]:
    """What was acknowledged and is not there."""
    if not report["module"]:
        return [line for line in lines if line == "created"]
    states: dict[str, list[str]] = report["states"]
    wrong = []
    current = [int(n) for n, (state, _) in states.items() if state == "current"]
    for line in lines:
        if not line.startswith(("activated", "destroyed")):
            continue
        action, *words = line.split()
        if action == "activated" and (words[0] not in states or states[words[0]][1] not in (words[1], "")):
            wrong.append(line)
        if {"activated": f"activate {words[0]}", "destroyed": f"destroy {words[0]}"}[action] not in report["audited"]:
            wrong.append(f"{line}: not in the audit log")
        if action == "destroyed" and states.get(words[0], ["destroyed"])[0] != "destroyed":
            wrong.append(line)
    newest = max((int(line.split()[1]) for line in lines if line.startswith("activated")), default=0)
    if len(current) != 1 or current[0] < newest:
        wrong.append(f"current is {current}, {newest} was acknowledged")
    return wrong


def lose_power(machine: VirtualMachine, times: int, program: str, choose: random.Random) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns what was lost in all, and what was found after each loss of power."""
    wrong: list[str] = []
    reports: list[dict[str, Any]] = []
    machine.boot(command(PROGRAM, program))
    for _ in range(times):
        machine.wait_for("activated", count=choose.randrange(1, 8))
        time.sleep(choose.random() * 0.2)
        lines = machine.cut_off()
        machine.boot(command(PROGRAM, program))
        reports.append(found(machine))
        wrong += lost(lines, reports[-1])
    return wrong, reports
