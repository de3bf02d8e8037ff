"""A host in a virtual machine loses its power after acknowledgements: all that was acknowledged is there, and nothing by halves."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from support import counts
from support.power import PROGRAM, found, lost
from support.vm import VirtualMachine, command

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(1200)]


def test_what_was_acknowledged_survives_a_loss_of_power(tmp_path: Path) -> None:
    """The soak goes on with a host that does not sync, which is found out; test_write_order.py always finds such a one."""
    machine = VirtualMachine(tmp_path)
    next_one = "support.unsynced_host" if counts.all_counts() else "hsmvisor.host.main"
    try:
        machine.boot(command(PROGRAM, "hsmvisor.host.main"))
        machine.wait_for("activated", count=random.randint(1, 3))
        time.sleep(random.random() * 0.2)
        lines = machine.cut_off()
        machine.boot(command(PROGRAM, next_one))
        report = found(machine)
        assert lost(lines, report) == []
        assert report["signs"] and report["audit"], report
        if counts.all_counts():
            assert lost_without_sync(machine)
    finally:
        machine.cut_off()


def lost_without_sync(machine: VirtualMachine) -> list[str]:
    """What the host that runs acknowledges and loses."""
    machine.wait_for("activated")
    lines = machine.cut_off()
    machine.boot(command(PROGRAM, "hsmvisor.host.main"))
    try:
        return lost(lines, found(machine))
    except AssertionError as error:  # the host may refuse to start with what is left, and says so
        assert "hsmvisor-host: " in str(error), error
        return [str(error)]
