"""A TPM of ours beside swtpm, each as QEMU drives it: commands over the connection that comes with the control connection."""

from __future__ import annotations

import contextlib
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
from support.tpm_guest import ECDSA, OWNER, RSASSA, Guest
from support.tpm_qemu import Qemu
from support.tpm_rig import TpmProcess

from benchlib import report

PROGRAMS = ("ours", "swtpm")
GET_RANDOM, PCR_READ = 0x17B, 0x17E
ECC_KEY, RSA_KEY = 0x81000001, 0x81000002
DIGEST = bytes(range(32))
NOISE = 1.05  #: times: what two runs of one program differ in

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
def _guest(directory: Path, program: str) -> Iterator[Guest]:
    """Started, with a signing key of each kind."""
    tpm = TpmProcess(directory, program, for_qemu=True)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(tpm.control))
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
        tpm.close()


def measure(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Microseconds a call, by call and program: the median of the rounds."""
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="hsmt.") as name, contextlib.ExitStack() as stack:
        guests = {program: stack.enter_context(_guest(Path(name) / program, program)) for program in PROGRAMS}
        for _ in range(rounds):
            for title, call in CALLS.items():
                for program, guest in guests.items():
                    found.setdefault((title, program), []).append(_timed(lambda guest=guest, call=call: call(guest), seconds / 4))  # type: ignore[misc]
    return [{"call": title, **{program: statistics.median(found[title, program]) for program in PROGRAMS}} for title in CALLS]


def _timed(call: Callable[[], object], seconds: float) -> float:
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        call()
        count += 1
    return spent / count * 1e6


def text(rows: list[dict[str, Any]]) -> list[str]:
    lines = [[row["call"], f"{row['ours']:,.1f}", f"{row['swtpm']:,.1f}", f"{row['swtpm'] / row['ours']:.2f}x"] for row in rows]
    slow = [row["call"] for row in rows if row["ours"] > NOISE * row["swtpm"]]
    goal = f"Goal: no command takes more than {NOISE} times as long as swtpm's: " + (
        f"MISSED: {', '.join(slow)}." if slow else "met."
    )
    return [report.table(["command, µs", "hsmvisor", "swtpm", "hsmvisor is"], lines), goal]
