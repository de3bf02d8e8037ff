"""What a stream of a guest costs: latency and throughput of our vhost-user-vsock device, and signatures through it.

The guest runs in an emulated processor (TCG), so only ratios say something.  Its streams go to the same C echo by three ways: the
guest kernel's own vsock (vsock_loopback: no device at all), TCP over QEMU's own virtio-net and user network (a device in QEMU's
process), and our device in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from support.c_programs import build_p11bench, build_stream_echo
from support.certificates import new_key
from support.echo_device import ECHO, EchoDevice
from support.guest import free_port, library
from support.guest_machine import GuestMachine
from support.host import Host, Module
from support.host_process import wait_for
from support.machine_guest import OURS, STOCK, GuestLibrary, device_socket, tool

from benchlib.report import table
from benchlib.setups import MECHANISMS, Setup
from benchlib.signing import run_once

LOOPBACK, NETWORK, DEVICE = "the guest kernel's loopback", "TCP by QEMU's virtio-net", "our device"
GUEST, HOST = "guest, vsock", "host, unix socket"
MESSAGE, MESSAGES, MEBIBYTES = 64, 1000, 16
KEY = "p256"
_ECHO, _SIGN = "/root/stream_echo", "/root/p11bench"

Progress = Callable[[str], None]


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """Medians of interleaved rounds, all in one guest; ratios are medians of the rounds' own."""
    with tempfile.TemporaryDirectory(prefix="hsmb.") as name, ExitStack() as stack:
        directory = Path(name)
        host = stack.enter_context(Host())
        module = host.create("bench")
        module.push(KEY, new_key(KEY))
        machine = stack.enter_context(GuestMachine())
        streams, signatures = defaultdict(list), defaultdict(list)
        with _echoes(directory, machine) as addresses:
            for number in _rounds(rounds, "streams"):
                for where in _turned(list(addresses), number):
                    streams[where].append(_stream(machine, addresses[where]))
        with _plugged(machine, module):
            program = build_p11bench(directory)
            machine.copy_in(program, _SIGN)
            for number in _rounds(rounds, "signatures"):
                for where, used in _turned([(place, one) for place in (GUEST, HOST) for one in (OURS, STOCK)], number):
                    run = _signed(machine, used, seconds) if where == GUEST else _signed_here(program, module, used, seconds)
                    if run["errors"]:
                        raise RuntimeError(f"{where}, {used.name}: {run['errors']} signatures failed")
                    signatures[where, used.name].append(run)
    return {
        "rounds": rounds,
        "message_bytes": MESSAGE,
        "transfer_mebibytes": MEBIBYTES,
        "streams": [_stream_row(where, streams) for where in (LOOPBACK, NETWORK, DEVICE)],
        "signatures": [_signature_row(*place, runs) for place, runs in sorted(signatures.items())],
    }


def _rounds(rounds: int, what: str) -> Iterator[int]:
    for number in range(rounds):
        print(f"\rvsock, {what}: round {number + 1}/{rounds}    ", end="", file=sys.stderr, flush=True)
        yield number
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)


def _turned(ways: list[Any], number: int) -> list[Any]:
    turn = number % len(ways)
    return ways[turn:] + ways[:turn]


# ---- streams


@contextmanager
def _echoes(directory: Path, machine: GuestMachine) -> Iterator[dict[str, str]]:
    """Addresses at which a guest is echoed, by way."""
    program = build_stream_echo(directory)
    machine.copy_in(program, _ECHO)
    machine.run("modprobe vsock_loopback")
    loopback = f"vsock:1:{ECHO}"
    within = machine.start([_ECHO, "serve", loopback])
    port = free_port()
    with EchoDevice(directory, program) as device:
        network = subprocess.Popen([program, "serve", f"tcp:127.0.0.1:{port}"], stdout=subprocess.DEVNULL)
        try:
            machine.plug(device.socket)
            addresses = {LOOPBACK: loopback, NETWORK: f"tcp:10.0.2.2:{port}", DEVICE: f"vsock:2:{ECHO}"}
            for where, address in addresses.items():
                ping = [_ECHO, "ping", address, "1", "1"]
                wait_for(lambda ping=ping: machine.run(ping, check=False).returncode == 0, 20, f"an echo by {where}")
            yield addresses
            machine.unplug()
        finally:
            network.kill()
            network.wait(10)
    within.kill()


def _stream(machine: GuestMachine, address: str) -> dict[str, float]:
    pinged = json.loads(machine.run([_ECHO, "ping", address, str(MESSAGE), str(MESSAGES)], timeout=120).stdout)
    sent = json.loads(machine.run([_ECHO, "transfer", address, str(MEBIBYTES), "1"], timeout=240).stdout)
    return {"p50_us": pinged["p50_us"], "p99_us": pinged["p99_us"], "mb_per_s": sent["bytes"] / sent["seconds"] / 1e6}


def _stream_row(where: str, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"way": where}
    for figure in ("p50_us", "p99_us", "mb_per_s"):
        row[figure] = round(statistics.median(run[figure] for run in runs[where]), 1)
        ratios = [run[figure] / other[figure] for run, other in zip(runs[where], runs[LOOPBACK], strict=True)]
        row[f"{figure}_ratio"] = round(statistics.median(ratios), 3)
    return row


# ---- signatures


@contextmanager
def _plugged(machine: GuestMachine, module: Module) -> Iterator[None]:
    machine.plug(device_socket(module))
    wait_for(lambda: module.name.encode() in tool(machine, OURS, "--list-slots", check=False), 30, "the module in the guest")
    yield
    machine.unplug()


def _signed(machine: GuestMachine, used: GuestLibrary, seconds: float) -> dict[str, Any]:
    command = [_SIGN, "--module", used.path, "--label", KEY, "--mech", MECHANISMS[KEY], "--threads", "1"]
    command += ["--seconds", str(seconds), "--warmup", "0.5", "--latency"]
    told: dict[str, Any] = json.loads(machine.run(command, more=used.environment, timeout=seconds + 60).stdout)
    return told


def _signed_here(program: Path, module: Module, used: GuestLibrary, seconds: float) -> dict[str, Any]:
    here = library(used.name)
    return run_once(program, Setup(used.name, used.name, here.path, {here.variable: module.address}), KEY, 1, seconds)


def _signature_row(where: str, name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"where": where, "library": name}
    return row | {figure: round(statistics.median(run[figure] for run in runs), 1) for figure in ("ops_per_s", "p50_us", "p99_us")}


# ---- what is shown


def text(measured: dict[str, Any]) -> list[str]:
    """Tables of streams and of signatures, each with its heading."""
    head = ["a stream by", "p50 µs", "p99 µs", "MB/s each way", "p50 is", "MB/s is"]
    streams = [
        [
            row["way"],
            f"{row['p50_us']:,.0f}",
            f"{row['p99_us']:,.0f}",
            f"{row['mb_per_s']:,.1f}",
            f"{row['p50_us_ratio']:.2f}x",
            f"{row['mb_per_s_ratio']:.2f}x",
        ]
        for row in measured["streams"]
    ]
    signed = [
        [row["where"], row["library"], f"{row['ops_per_s']:,.0f}", f"{row['p50_us']:,.0f}", f"{row['p99_us']:,.0f}"]
        for row in measured["signatures"]
    ]
    sizes = f"Messages of {measured['message_bytes']} bytes, and {measured['transfer_mebibytes']} MiB"
    return [
        f"An emulated guest (TCG): ratios count. {sizes}, to a C program that echoes them; ratios are to the loopback.",
        table(head, streams),
        "P-256, one thread:",
        table(["where", "library", "signatures/s", "p50 µs", "p99 µs"], signed),
    ]
