"""scripts/bench: measures hsmvisor beside SoftHSM2 and p11-kit server + SoftHSM2."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from support.c_programs import build_p11bench
from support.host import Host

from benchlib import allocator, control, fleet, hostile, plot, raw, report, signing, token, tpm, usb, vsock
from benchlib.setups import KEYS, all_setups

FLEET = "fleet"  #: takes long: only when it is asked for
PARTS = ["signing", "allocator", "control", "hostile", "vsock", "usb", "token", "tpm"]
SETUPS = ["softhsm", "p11kit-softhsm", "hsmvisor", "hsmvisor-p11kit"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="P-256 and RSA-2048 at 1 and 8 threads, 3 short rounds, 20 modules")
    parser.add_argument("--rounds", type=int, help="rounds of signing (default 7; 3 with --quick)")
    parser.add_argument("--seconds", type=float, help="length of one run (default 2; 1 with --quick)")
    parser.add_argument("--keys", nargs="+", choices=list(KEYS), help="keys to sign with")
    parser.add_argument("--threads", nargs="+", type=int, help="threads of the application (default 1 2 4 8)")
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=SETUPS)
    parser.add_argument("--modules", type=int, help="modules for the measure of memory (default 200; 20 with --quick)")
    parser.add_argument("part", nargs="?", choices=[*PARTS, FLEET], help="one part alone, as --only")
    parser.add_argument("--hosts", type=int, help="hosts of the large fleet (default 200; 10 with --quick)")
    parser.add_argument(
        "--databases",
        nargs="+",
        choices=list(fleet.KINDS),
        default=list(fleet.KINDS),
        help="of the fleet's manager; of the others stays what the output directory has",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*PARTS, FLEET],
        default=PARTS,
        help="these parts; of the others stays what the output directory has",
    )
    parser.add_argument("--output", type=Path, help="directory for bench.json, bench.md and bench.svg")
    given = parser.parse_args()
    if given.part:
        given.only = [given.part]
    return given


def run_control(quick: bool, modules: int) -> dict[str, Any]:
    host = Host()
    try:
        host.start()
        few = 10 if quick else 50
        return {
            "first_signature": control.first_signature(host, few),
            "swap": control.swap(host, few),
            "recovery": control.recovery(host, few),
            "upgrade": control.upgrade(host, few // 5),
            "memory": control.memory(host, modules),
        }
    finally:
        host.clean()


def begins(results: dict[str, Any], part: str, plan: signing.Plan | None = None) -> None:
    """Notes when and where it is measured; `plan`: in which rounds, where there are any."""
    rounds = f"{plan.rounds} rounds of {plan.seconds:g} s, " if plan else ""
    results["times"][part] = f"{report.now()}, {rounds}on {report.place()}"


def written(results: dict[str, Any]) -> tuple[list[str], bool]:
    """All of it as Markdown, and whether every goal that was measured is met."""
    text, met = ["# Bench", "", "Measured by `scripts/bench`; medians of interleaved rounds.", ""], True

    def section(title: str, part: str, *bodies: str) -> None:
        text.extend([f"## {title}", "", f"Begun {results['times'][part]}.", ""])
        for body in bodies:
            text.extend([body, ""])

    if "signing" in results:
        goals, met = report.goals(results["signing"], results["signatures_alone"])
        table = report.signing_table(results["signing"])
        section("Signing", "signing", "![signatures a second](bench.svg)", table, "### Goals", goals)
    if "allocator" in results:
        section("Freed memory is overwritten", "allocator", allocator.text(results["allocator"]))
    if "control" in results:
        section("Modules", "control", report.facts_table(results["control"]))
    if "hostile" in results:
        met &= hostile.verdict(results["hostile"])
        section("Beside a hostile guest", "hostile", report.hostile_table(results["hostile"], hostile.GOAL))
    if "vsock" in results:
        section("A guest's vsock", "vsock", *vsock.text(results["vsock"]))
    if "usb" in results:
        section("A module as a USB device", "usb", *usb.text(results["usb"]))
    if "token" in results:
        section("A guest's own token", "token", *token.text(results["token"]))
    if "tpm" in results:
        met &= not tpm.judge(results["tpm"])
        section("A TPM", "tpm", *tpm.text(results["tpm"]))
    if FLEET in results:
        met &= not fleet.judge(results[FLEET])
        section("A fleet", FLEET, *fleet.text(results[FLEET]))
    return text, met


def main() -> int:
    given = arguments()
    plan = signing.Plan(
        keys=given.keys or (["p256", "rsa2048"] if given.quick else list(KEYS)),
        threads=given.threads or ([1, 8] if given.quick else [1, 2, 4, 8]),
        rounds=given.rounds or (3 if given.quick else 7),
        seconds=given.seconds or (1 if given.quick else 2),
    )
    results = report.before(given.output, "bench.json") if given.only != PARTS else {"times": {}}
    with tempfile.TemporaryDirectory(prefix="hsmb.") as name:
        directory = Path(name)
        if "signing" in given.only:
            begins(results, "signing", plan)
            before = raw.limits(plan.keys)
            with all_setups(directory, given.setups) as (setups, _):
                results["signing"] = signing.measure(build_p11bench(directory), setups, plan)
            results["signatures_alone"] = {key: max(before[key], after) for key, after in raw.limits(plan.keys).items()}
        if "allocator" in given.only:
            begins(results, "allocator", plan)
            results["allocator"] = allocator.measure(build_p11bench(directory), plan.rounds, plan.seconds)
        if "control" in given.only:
            begins(results, "control")
            results["control"] = run_control(given.quick, given.modules or (20 if given.quick else 200))
        if "hostile" in given.only:
            begins(results, "hostile", plan)
            results["hostile"] = hostile.measure(plan.rounds, plan.seconds)
        if "vsock" in given.only:
            begins(results, "vsock", plan)
            results["vsock"] = vsock.measure(plan.rounds, plan.seconds)
        if "usb" in given.only:
            begins(results, "usb", plan)
            results["usb"] = usb.measure(plan.rounds, plan.seconds)
        if "token" in given.only:
            begins(results, "token", plan)
            results["token"] = token.measure(plan.rounds, plan.seconds, 2000 if given.quick else token.OBJECTS)
        if "tpm" in given.only:
            begins(results, "tpm", plan)
            results["tpm"] = tpm.measure(plan.rounds, plan.seconds)
        if FLEET in given.only:
            begins(results, FLEET)
            hosts, idle = given.hosts or (10 if given.quick else fleet.HOSTS), fleet.IDLE / 3 if given.quick else fleet.IDLE
            results[FLEET] = fleet.measure(results.get(FLEET, []), given.databases, hosts, idle=idle)
    text, met = written(results)
    print("\n".join(text))
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
        (given.output / "bench.md").write_text("\n".join(text))
        if "signing" in results:
            (given.output / "bench.svg").write_text(plot.draw(results["signing"]))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
