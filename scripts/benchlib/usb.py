"""What a module costs as a USB device: round trips of APDUs and of channels, and signatures, by usbredir and by USB/IP.

First without a guest: an importer of ours asks, beside the module's unix socket.  Then in an emulated guest, where pcscd, pyusb,
OpenSC's library and ours ask, beside the guest's vsock and QEMU's own smart card.  Three modules are alike, so that all ways are
open at once and take turns in each round.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from support.c_programs import build_p11bench
from support.certificates import Authority, new_key
from support.host import Host, Module
from support.usb_guest import USBIP, USBREDIR

from benchlib import usb_guest, usb_host
from benchlib.report import table
from benchlib.usb_calls import repeated
from benchlib.usb_guest import Asker, Run
from benchlib.usb_ways import GUEST, HOST, PLAIN, QEMU, ROWS, SLOTS, TITLES, WAYS, turned

SIGNATURES = [call for call in ROWS[GUEST] if call not in (*usb_guest.CARD, *usb_guest.CHANNEL)]
#: by where, call and way: what each round has measured
Runs = dict[tuple[str, str, str], dict[int, Run]]


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """Medians of the rounds' medians; ratios are medians of the rounds' own."""
    runs: Runs = defaultdict(dict)
    with tempfile.TemporaryDirectory(prefix="hsmb.") as name, ExitStack() as stack:
        directory = Path(name)
        modules = _modules(stack.enter_context(Host()))
        _measure_host(modules, rounds, seconds, runs)
        program = build_p11bench(directory)
        asker = stack.enter_context(usb_guest.plugged(modules, directory, program, _say))
        _measure_guest(asker, rounds, seconds, runs)
    rows = [_row(where, call, way, runs) for (where, call), ways in WAYS.items() for way in ways]
    return {"rounds": rounds, "rows": rows}


def _say(words: str) -> None:
    """What is being done, on one line; "" takes it away."""
    print(f"\r{f'usb: {words}' if words else '':76}" + "\r" * (not words), end="", file=sys.stderr, flush=True)


def _modules(host: Host) -> dict[str, Module]:
    """By way, with the same keys."""
    keys, authority, modules = {kind: new_key(kind) for kind in SLOTS}, Authority(), {}
    for way in (USBREDIR, USBIP, PLAIN):
        module = modules[way] = host.create(f"bench-{way}", card={"slots": {slot: kind for kind, (slot, _) in SLOTS.items()}})
        for kind, key in keys.items():
            module.push(kind, key, authority.chain(key))
    return modules


def _measure_host(modules: dict[str, Module], rounds: int, seconds: float, runs: Runs) -> None:
    with usb_host.asked(modules) as calls:
        for number in range(rounds):
            for call in ROWS[HOST]:
                _say(f"without a guest, round {number + 1}/{rounds}: {ROWS[HOST][call].title}")
                for way in turned(HOST, call, number):
                    runs[HOST, call, way][number] = repeated(calls[way][call], seconds)
    _say("")


def _measure_guest(asker: Asker, rounds: int, seconds: float, runs: Runs) -> None:
    for number in range(rounds):
        _say(f"in a guest, round {number + 1}/{rounds}: APDUs and channels")
        calls = asker.asked(number, seconds)
        for (call, way), run in calls.items():
            runs[GUEST, call, way][number] = run
        if any("failed" in run for run in calls.values()):
            asker.begin_again()
        for call in SIGNATURES:
            for way in turned(GUEST, call, number):
                _say(f"in a guest, round {number + 1}/{rounds}: {ROWS[GUEST][call].title}, {TITLES[GUEST][way]}")
                run = runs[GUEST, call, way][number] = asker.signed(call, way, seconds)
                if "failed" in run:
                    asker.begin_again()
    _say("")


def _row(where: str, call: str, way: str, runs: Runs) -> dict[str, Any]:
    """`to` has the ratios of the medians to what is plain and to QEMU's card; `failed` says why of each round that failed."""

    def good(at: tuple[str, str, str]) -> dict[int, Run]:
        return {number: run for number, run in runs.get(at, {}).items() if "failed" not in run}

    at, kind = (where, call, way), ROWS[where][call]
    mine = good(at)
    failed = [run["failed"] for run in runs.get(at, {}).values() if "failed" in run]
    row: dict[str, Any] = {"where": where, "call": call, "way": way, "failed": failed, "to": {}}
    row["calls"] = sum(run["calls"] for run in mine.values())
    if mine:
        row |= {figure: round(statistics.median(run[figure] for run in mine.values()), 1) for figure in ("p50_us", "p99_us")}
    for other, beside in ((PLAIN, kind.plain), (QEMU, kind.qemu)):
        theirs = good((where, beside, other))
        ratios = [mine[number]["p50_us"] / theirs[number]["p50_us"] for number in mine if number in theirs]
        if ratios and (where, beside, other) != at:
            row["to"][other] = round(statistics.median(ratios), 4)
    return row


# ---- what is shown


def text(measured: dict[str, Any]) -> list[str]:
    """A table of the host's and one of the guest's, each with its heading; what failed."""
    alone = [
        "Without a guest: asked by an importer of ours in Python, one transfer at a time, two for an APDU or a call.",
        "Ratios say how many times as long it takes as by the unix socket; an APDU is set beside the small call.",
    ]
    within = [
        "In an emulated guest (TCG): ratios count.  A Python program asks by pcsc-lite, pyusb and vsock.  QEMU's card is usb-ccid",
        "with ccid-card-emulated: full speed, RSA alone, and its answer to SELECT has to be fetched by one more APDU, which is not",
        "measured.  Ratios: APDUs are set beside the small call by vsock; they and the small calls beside QEMU's SELECT;",
        "signatures beside those of our library by vsock, and of OpenSC's with QEMU's card.",
    ]
    bodies = [" ".join(alone), _table(measured, HOST), " ".join(within), _table(measured, GUEST)]
    failed = [_failure(row, measured["rounds"]) for row in measured["rows"] if row["failed"]]
    if failed:
        bodies.append("\n".join(["Rounds that failed and do not count, and why the first one did:", "", *failed]))
    return bodies


def _failure(row: dict[str, Any], rounds: int) -> str:
    of = f"{ROWS[row['where']][row['call']].title}, {TITLES[row['where']][row['way']]}"
    return f"- {of}, {len(row['failed'])} of {rounds}: {row['failed'][0].splitlines()[0][:160]}"


def _table(measured: dict[str, Any], where: str) -> str:
    others = (PLAIN,) if where == HOST else (PLAIN, QEMU)
    head = ["call", "by", "p50 µs", "p99 µs", *(f"to {TITLES[where][other]}" for other in others)]
    lines = []
    for row in measured["rows"]:
        if row["where"] == where:
            figures = [f"{row[figure]:,.0f}" if figure in row else "-" for figure in ("p50_us", "p99_us")]
            ratios = [_ratio(row["to"][other]) if other in row["to"] else "" for other in others]
            lines.append([ROWS[where][row["call"]].title, TITLES[where][row["way"]], *figures, *ratios])
    return table(head, lines)


def _ratio(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 2 if value >= 0.1 else 3}f}x"
