"""A host in a virtual machine loses its power after acknowledgements: all that was acknowledged is there, and nothing by halves."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.power import PROGRAM, found, lose_power, lost
from support.vm import VirtualMachine, command

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(1200)]


def test_what_was_acknowledged_survives_a_loss_of_power(tmp_path: Path) -> None:
    machine = VirtualMachine(tmp_path)
    try:
        wrong, reports = lose_power(machine, 1, "hsmvisor.host.main", random.Random(), most=3)
    finally:
        machine.cut_off()
    assert wrong == []
    assert all(report["signs"] and report["audit"] for report in reports), reports


def test_a_host_that_does_not_sync_is_found_out(tmp_path: Path) -> None:
    machine = VirtualMachine(tmp_path)
    try:
        machine.boot(command(PROGRAM, "support.unsynced_host"))
        machine.wait_for("activated")
        lines = machine.cut_off()
        machine.boot(command(PROGRAM, "hsmvisor.host.main"))
        try:
            wrong = lost(lines, found(machine))
        except AssertionError as error:  # the host may refuse to start with what is left, and says so
            assert "hsmvisor-host: " in str(error), error
            wrong = [str(error)]
    finally:
        machine.cut_off()
    assert wrong
