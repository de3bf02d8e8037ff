"""Bytes of a guest's streams: over our device to a process that echoes them, and over the guest kernel's own loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.c_programs import build_stream_echo
from support.echo_device import DAMAGES, ECHO, ENDS, PLACE, EchoDevice
from support.guest_machine import GuestMachine

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]

PROGRAM = "/root/stream_echo"
LOOPBACK = "vsock:1:7"


def device(port: int = ECHO) -> str:
    return f"vsock:2:{port}"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestMachine]:
    directory = tmp_path_factory.mktemp("echo")
    program = build_stream_echo(directory)
    with EchoDevice(directory, program) as echo, GuestMachine(echo.socket) as machine:
        machine.copy_in(program, PROGRAM)
        machine.run("modprobe vsock_loopback")
        machine.start([PROGRAM, "serve", LOOPBACK])
        yield machine


def transfer(machine: GuestMachine, address: str, mebibytes: int, streams: int = 1) -> dict[str, Any]:
    done = machine.run([PROGRAM, "transfer", address, str(mebibytes), str(streams)], timeout=240)
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["bytes"], told["streams"]) == (streams * mebibytes << 20, streams)
    print(f"{address}: {streams} x {mebibytes} MiB there and back in {told['seconds']:.2f} s")
    return told


@pytest.mark.parametrize("mebibytes", [1, 8, 64])
def test_every_byte_comes_back(machine: GuestMachine, mebibytes: int) -> None:
    transfer(machine, device(), mebibytes)


@pytest.mark.parametrize(("mebibytes", "streams"), [(2, 8), (1, 64)])
def test_streams_at_once_keep_their_bytes(machine: GuestMachine, mebibytes: int, streams: int) -> None:
    transfer(machine, device(), mebibytes, streams)


@pytest.mark.parametrize("size", [1, 44, 4096, 65536])
def test_messages_of_any_size_come_back(machine: GuestMachine, size: int) -> None:
    done = json.loads(machine.run([PROGRAM, "ping", device(), str(size), "50"], timeout=60).stdout)
    assert done["count"] == 50 and 0 < done["p50_us"] <= done["p99_us"]


def test_the_kernels_loopback_does_the_same(machine: GuestMachine) -> None:
    """What the bench compares with."""
    transfer(machine, LOOPBACK, 8)
    machine.run([PROGRAM, "ping", LOOPBACK, "64", "50"], timeout=60)


def test_a_byte_that_is_altered_is_found(machine: GuestMachine) -> None:
    done = machine.run([PROGRAM, "transfer", device(DAMAGES), "1", "1"], timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert f"byte {PLACE} is 0x".encode() in done.stderr


def test_an_end_before_the_last_byte_is_found(machine: GuestMachine) -> None:
    done = machine.run([PROGRAM, "transfer", device(ENDS), "1", "1"], timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"it ends at byte " in done.stderr or b"sending from byte " in done.stderr


def test_a_port_where_nobody_listens_is_refused(machine: GuestMachine) -> None:
    done = machine.run([PROGRAM, "ping", device(ECHO - 1), "1", "1"], timeout=60, check=False)
    assert done.returncode == 1 and b"Connection reset" in done.stderr
