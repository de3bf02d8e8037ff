"""Guests of a kernel's own vsock device (vhost_vsock): a host service in a virtual machine whose kernel has it, and its guests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.c_programs import build_p11bench
from support.vm import SHARED, VirtualMachine, command

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(600)]

LABELS = ("web", "db")  #: of the key of each module, by number
STRANGER = 77777


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Any]]]:
    """What the machine tells (programs/vsock_host.py), by the first word of each line."""
    directory = tmp_path_factory.mktemp("vm")
    program = build_p11bench(directory)
    machine = VirtualMachine(directory, ("vsock_loopback", "vhost_vsock"))
    try:
        machine.boot(command("vsock_host.py", SHARED / program.name))
        assert machine.wait_for("ended ", within=550) == ["ended 0"]
    finally:
        lines = machine.cut_off()
    result: dict[str, list[Any]] = {}
    for line in lines:
        what, _, rest = line.partition(" ")
        result.setdefault(what, []).append(json.loads(rest))
    yield result


def test_the_machine_itself_is_a_stranger(told: dict[str, list[Any]]) -> None:
    nowhere = "Cannot assign requested address"  # who is on the host cannot say that it were a guest
    assert told["strangers"] == [{"1": "closed", "2": "closed", "as a guest": [nowhere] * len(LABELS)}]


@pytest.mark.parametrize("number", range(len(LABELS)))
def test_a_guest_signs_with_its_own_module_alone(told: dict[str, list[Any]], number: int) -> None:
    said = {label: said for guest, label, said in told["guest"] if guest == number}
    signed = json.loads(said.pop(LABELS[number]))
    assert signed["ops"] > 0 and signed["errors"] == 0 and signed["verified"] == 1
    assert said and all("no token with that key" in other for other in said.values())


def test_a_guest_with_the_cid_of_no_module_is_refused(told: dict[str, list[Any]]) -> None:
    said = [said for guest, _, said in told["guest"] if guest == len(LABELS)]
    assert len(said) == len(LABELS) and all("no token with that key" in one for one in said)
    assert told["refused"] == [[1, STRANGER]]


def test_a_cid_is_one_guests(told: dict[str, list[Any]]) -> None:
    assert told["taken"] == ["Address already in use"]
