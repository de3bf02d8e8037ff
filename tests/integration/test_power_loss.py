"""A host in a virtual machine loses its power after acknowledgements: all that was acknowledged is there, and nothing by halves."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from support.power import PROGRAM, found, lost
from support.vm import VirtualMachine, command

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(1200)]


def test_what_was_acknowledged_survives_a_loss_of_power_and_a_host_that_does_not_sync_is_found_out(tmp_path: Path) -> None:
    """The second loss is that of a host without fsync, which has found all that the first one acknowledged."""
    machine = VirtualMachine(tmp_path)
    try:
        machine.boot(command(PROGRAM, "hsmvisor.host.main"))
        machine.wait_for("activated", count=random.randint(1, 3))
        time.sleep(random.random() * 0.2)
        lines = machine.cut_off()
        machine.boot(command(PROGRAM, "support.unsynced_host"))
        report = found(machine)
        assert lost(lines, report) == []
        assert report["signs"] and report["audit"], report

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
