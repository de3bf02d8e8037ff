"""A module's TPM beside swtpm, each as QEMU drives it: commands over the connection that comes with the control connection."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, Attributes, Code, sized
from support import tpm_host
from support.host import Host
from support.tpm_guest import ECDSA, OWNER, RSASSA, Guest
from support.tpm_qemu import Qemu
from support.tpm_rig import TpmProcess

from benchlib import report

PROGRAMS = ("ours", "swtpm")
GET_RANDOM, PCR_READ = 0x17B, 0x17E
ECC_KEY, RSA_KEY = 0x81000001, 0x81000002
DIGEST = bytes(range(32))
TPMS = 8  #: whose memory is measured
NOISE = 1.05  #: times: what two runs of one program differ in
PATIENCE = 10.0  #: seconds until a TPM's process takes a connection
SLICES = 8  #: of a round and call, for each program in turn and on each processor: what else the machine does meets both
#: Where a TPM runs: on another processor than who asks, as beside a guest that waits for it, or on the same one.
APART, TOGETHER = "apart", "together"

_MADE_TO_SIGN = (
    Attributes.FIXED_TPM | Attributes.FIXED_PARENT | Attributes.SENSITIVE_DATA_ORIGIN | Attributes.USER_WITH_AUTH | Attributes.SIGN
)
_NULL = tpm2.NULL_ALGORITHM
#: Of the keys that are signed with, by handle.
TEMPLATES = {
    ECC_KEY: tpm2.template(tpm2.ECC, _MADE_TO_SIGN, struct.pack(">4H", _NULL, _NULL, tpm2.CURVES["secp256r1"], _NULL), bytes(4)),
    RSA_KEY: tpm2.template(tpm2.RSA, _MADE_TO_SIGN, struct.pack(">3HI", _NULL, _NULL, 2048, 0), bytes(2)),
}

#: What is timed, by its title; each is one command.
CALLS: dict[str, Callable[[Guest], object]] = {
    "GetRandom, 16 bytes": lambda guest: guest.good(GET_RANDOM, (), struct.pack(">H", 16)),
    "PCR_Read": lambda guest: guest.good(PCR_READ, (), struct.pack(">IHB3s", 1, tpm2.SHA256, 3, b"\1\0\0")),
    "ReadPublic": lambda guest: guest.public(ECC_KEY),
    "Sign, P-256": lambda guest: guest.sign(ECC_KEY, DIGEST, ECDSA),
    "Sign, RSA-2048": lambda guest: guest.sign(RSA_KEY, DIGEST, RSASSA),
    "CreatePrimary, P-256, and FlushContext": lambda guest: guest.flush(guest.primary()),
}


@contextlib.contextmanager
def _ours() -> Iterator[Callable[[], tuple[socket.socket, int]]]:
    """Gives what makes a TPM, each a module's of one host: QEMU's connection to it, and its process."""
    with Host() as host:
        numbers = itertools.count()

        def make() -> tuple[socket.socket, int]:
            module = tpm_host.create(host, f"tpm-{next(numbers)}")
            state = module.status().tpm
            return _connected(state.socket), state.pid

        yield make


@contextlib.contextmanager
def _swtpm() -> Iterator[Callable[[], tuple[socket.socket, int]]]:
    with tempfile.TemporaryDirectory(prefix="hsmt.") as name, contextlib.ExitStack() as stack:
        numbers = itertools.count()

        def make() -> tuple[socket.socket, int]:
            tpm = stack.enter_context(contextlib.closing(TpmProcess(Path(name) / str(next(numbers)), "swtpm", for_qemu=True)))
            return _connected(str(tpm.control)), tpm.process.pid

        yield make


def _connected(path: str) -> socket.socket:
    end = time.monotonic() + PATIENCE
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
            return sock
        except ConnectionRefusedError:  # it is there, and nobody listens yet
            sock.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


@contextlib.contextmanager
def _machine(sock: socket.socket) -> Iterator[Guest]:
    """A guest that has started its TPM, and has a signing key of each kind in it."""
    qemu = Qemu(sock)
    try:
        guest = qemu.connect()
        qemu.start()
        assert guest.startup() == 0
        for handle, template in TEMPLATES.items():
            parameters = sized(sized(b"") + sized(b"")) + sized(template) + sized(b"") + bytes(4)
            loaded = int.from_bytes(guest.good(Code.CREATE_PRIMARY, (OWNER,), parameters, EMPTY_PASSWORD)[:4], "big")
            guest.good(Code.EVICT_CONTROL, (OWNER, loaded), struct.pack(">I", handle), EMPTY_PASSWORD)
            guest.flush(loaded)
        yield guest
    finally:
        qemu.close()


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """`calls`: microseconds a call, by call, place and program, and swtpm's by ours, medians of all slices; `memory`: bytes a
    TPM, of so many."""
    found: dict[tuple[str, str, str], list[float]] = {}
    memory = {}
    with contextlib.ExitStack() as stack:
        makers = {"ours": stack.enter_context(_ours()), "swtpm": stack.enter_context(_swtpm())}
        guests: dict[str, tuple[Guest, int]] = {}
        for program, make in makers.items():
            made = [make() for _ in range(TPMS)]
            machines = [stack.enter_context(_machine(sock)) for sock, _ in made]
            guests[program] = machines[0], made[0][1]
            for guest in machines:
                guest.sign(ECC_KEY, DIGEST, ECDSA)
            memory[program] = statistics.mean(_pss(pid) for _, pid in made)
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        for _, title, place, (turn, asks, answers) in itertools.product(range(rounds), CALLS, (APART, TOGETHER), _turns()):
            os.sched_setaffinity(0, {asks})
            for program in PROGRAMS if turn % 4 < 2 else reversed(PROGRAMS):
                guest, pid = guests[program]
                _pin(pid, asks if place == TOGETHER else answers)
                time_of_one = _timed(CALLS[title], guest, seconds / 4 / SLICES)
                found.setdefault((title, place, program), []).append(time_of_one)
    calls = [{"call": title} | {place: _medians(found, title, place) for place in (APART, TOGETHER)} for title in CALLS]
    return {"calls": calls, "memory": memory, "tpms": TPMS}


def _medians(found: dict[tuple[str, str, str], list[float]], title: str, place: str) -> dict[str, float]:
    """Of each program's slices, and of the ratio of each pair of slices, which met the same machine."""
    ours, theirs = (found[title, place, program] for program in PROGRAMS)
    ratio = statistics.median(other / one for one, other in zip(ours, theirs, strict=True))
    return {"ours": statistics.median(ours), "swtpm": statistics.median(theirs), "ratio": ratio}


def _turns() -> list[tuple[int, int, int]]:
    """Numbers, and pairs of processors that are two where there are two, each in each place."""
    processors = sorted(os.sched_getaffinity(0))[:2]
    return [(turn, processors[turn % len(processors)], processors[(turn + 1) % len(processors)]) for turn in range(SLICES)]


def _pin(pid: int, processor: int) -> None:
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {processor})


def _pss(pid: int) -> int:
    """Bytes: the proportional set size (proc(5), smaps_rollup)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def _timed(call: Callable[[Guest], object], guest: Guest, seconds: float) -> float:
    """Microseconds a call."""
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        call(guest)
        count += 1
    return spent / count * 1e6


def judge(found: dict[str, Any]) -> list[str]:
    """The commands for which ours is slower."""
    return [row["call"] for row in found["calls"] if row[APART]["ratio"] * NOISE < 1]


def text(found: dict[str, Any]) -> list[str]:
    rows = found["calls"]
    lines = [
        [
            row["call"],
            *(f"{row[APART][program]:,.1f}" for program in PROGRAMS),
            *(f"{1e6 / row[APART][program]:,.0f}" for program in PROGRAMS),
            *(f"{row[place]['ratio']:.2f}x" for place in (APART, TOGETHER)),
        ]
        for row in rows
    ]
    slow = judge(found)
    missed = f"MISSED: {', '.join(slow)}." if slow else "met."
    goal = f"Goal: with a processor each, no command takes more than {NOISE} times as long as swtpm's: {missed}"
    ours, theirs = (found["memory"][program] / (1 << 20) for program in PROGRAMS)
    memory = f"Memory a TPM, of {found['tpms']} beside each other (proportional set size): {ours:.2f} MiB, swtpm {theirs:.2f} MiB."
    head = ["command", "hsmvisor, µs", "swtpm, µs", "hsmvisor, 1/s", "swtpm, 1/s", "hsmvisor is", "on one processor"]
    where = "Who asks and the TPM have a processor each, as a guest that waits and its TPM; in the last column they share one."
    return [report.table(head, lines), where, goal, memory]
