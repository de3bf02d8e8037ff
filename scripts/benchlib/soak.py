"""scripts/soak: the large counts. Rotations under a storm of load, kills at random, losses of power, a search for keys
after many deliveries, hostile guests, a virtual machine that has a module as its device, and managers that die at every step."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import counts
from support.certificates import PrivateKey, new_key
from support.guest import Guest, library
from support.guest_machine import GuestMachine
from support.host import SETTINGS, Host
from support.hostile import BEHAVIOURS
from support.killing import kill_under_load
from support.leaks import Needles
from support.machine_disturbances import NOTICED, disturb
from support.machine_guest import OURS, STOCK, device_socket
from support.machine_rotation import rotate_in_machine
from support.misbehaviour import misbehave_all
from support.power import lose_power
from support.processes import descendants
from support.rotation import rotate_under_load
from support.shell import Shell
from support.vm import VirtualMachine

from benchlib import report

KEPT = 12
PARTS = ["storm", "kills", "power", "leaks", "hostile", "guest", "fleet", "hosts", "ways"]

#: Workers of another host service on this machine would count against the same limits of a user (RLIMIT_NPROC).
USERS = "[workers]\nuid_base = 480000\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--rotations", type=int, default=200, help="rotations under load, with each library (default 200; 0: none)")
    parser.add_argument("--kills", type=int, default=300, help="processes to kill (default 300)")
    parser.add_argument("--deliveries", type=int, default=1000, help="deliveries before memory is searched (default 1000)")
    parser.add_argument("--power-losses", type=int, default=20, help="times that a virtual machine loses its power (default 20)")
    parser.add_argument(
        "--hostile", type=float, default=15, help="seconds of each behaviour of a hostile guest (default 15; 0: none)"
    )
    parser.add_argument(
        "--guest-rotations",
        type=int,
        default=100,
        help="rotations with client and server in a virtual machine (default 100; 0: none)",
    )
    parser.add_argument("--fleet", type=int, default=1, help="rounds in which managers die at every step (default 1; 0: none)")
    parser.add_argument("--hosts", type=int, default=1, help="and processes of a host (default 1)")
    parser.add_argument("--ways", type=int, default=1, help="rounds of tests in the ways that scripts/test leaves out (default 1)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the order of kills")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="these parts; of the others stays what the output directory has"
    )
    parser.add_argument("--output", type=Path, help="directory for soak.json and soak.md")
    return parser.parse_args()


def storm(host: Host, rotations: int) -> dict[str, Any]:
    """Rotations with nginx, ssh, a follower and 50 more signing threads; failures must be 0."""
    results = {}
    for name in ("ours", "p11-kit"):
        with tempfile.TemporaryDirectory(prefix="hsms.") as directory:
            module = host.create(f"storm-{name}")
            results[name] = rotate_under_load(library(name), module, Path(directory), rotations, 1.0, storm=True).summary()
            module.destroy()
    return results


def kills(host: Host, count: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hsms.") as directory:
        return {"seed": seed, **kill_under_load(host, f"kill-{os.getpid()}", Path(directory), count, seed).summary()}


def power(times: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hsms.") as directory:
        machine = VirtualMachine(Path(directory))
        try:
            lost, reports = lose_power(machine, times, "hsmvisor.host.main", random.Random(seed))
        finally:
            machine.cut_off()
    return {
        "losses": times,
        "acknowledged_and_lost": len(lost),
        "newest_key_did_not_sign": sum(1 for report in reports if not report["signs"]),
        "audit_log_not_whole": sum(1 for report in reports if not report["audit"]),
        "generations_acknowledged": max(map(int, reports[-1]["states"])),
    }


def fleet(rounds: int) -> dict[str, Any]:
    """Managers die at every step of their walks, of which the tests do a part (tests/support/counts.py)."""
    passed, failed = _rounds(rounds, {counts.ALL_STEPS: "1"}, "tests/integration/test_fleet_steps.py")
    return {"rounds": rounds, "walks": passed, "failed": failed}


def hosts(rounds: int) -> dict[str, Any]:
    """As `fleet`, of the processes of a host; and the machine that loses its power with a host that does not sync."""
    tests = [f"tests/integration/test_{name}.py" for name in ("steps", "power_loss")]
    passed, failed = _rounds(rounds, {counts.ALL_STEPS: "1"}, *tests)
    return {"rounds": rounds, "walks": passed, "failed": failed}


def ways(rounds: int) -> dict[str, Any]:
    """Tests that know two databases, transports or, slow ones, libraries: in the one in which scripts/test does not run them."""
    passed, failed = _rounds(rounds, {counts.WAYS: counts.OTHERS}, "tests")
    return {"rounds": rounds, "tests": passed, "failed": failed}


def _rounds(rounds: int, variables: dict[str, str], *paths: str) -> tuple[int, int]:
    """Returns how many tests passed in all, and how many did not."""
    found = [_tested(variables, *paths) for _ in range(rounds)]
    return sum(passed for passed, _ in found), sum(failed for _, failed in found)


def _tested(variables: dict[str, str], *paths: str) -> tuple[int, int]:
    """Returns how many tests passed, and how many did not."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "auto", "--dist", "loadfile", *paths]
    done = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
    print(done.stdout[-6000:], file=sys.stderr)
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    return found.get("passed", 0), found.get("failed", 0) + found.get("error", 0) or int(done.returncode != 0)


def guest(host: Host, rotations: int) -> dict[str, Any]:
    """A virtual machine whose device is the module: rotations with client and server in it, and disturbances of both sides."""
    module, key = host.create("guest"), new_key("p256")
    module.push("steady", key)
    with GuestMachine() as machine:
        machine.plug(device_socket(module))
        results: dict[str, Any] = {"boot_s": round(machine.boot_seconds, 1)}
        results["disturbances"] = disturb(machine, module, "steady", key, max(1, rotations // 20))
        results["rotations"] = {
            library.name: rotate_in_machine(library, machine, module, rotations, 1.0).summary() for library in (OURS, STOCK)
        }
    return results


def others(owner: int) -> dict[int, str]:
    """All processes of this run but the owning worker and this one, which made the keys."""
    workers = {pid: title for pid, title in descendants(1).items() if title.startswith("hsmvisord: leak-")}
    return {pid: title for pid, title in (descendants(os.getpid()) | workers).items() if pid != owner}


def leaks(host: Host, deliveries: int) -> dict[str, Any]:
    """Delivers, uses, rotates and destroys; then searches all its processes and files for every key that there ever was."""
    owner, other = host.create("leak-owner"), host.create("leak-other")
    other.push("web", new_key("p256"))
    kinds = ["p256", "p384", "p256", "ed25519", "p256", "mldsa65", "p256", "p521", "p256", "rsa2048"]
    delivered: list[PrivateKey] = []
    live: dict[str, list[tuple[int, PrivateKey]]] = {}
    with tempfile.TemporaryDirectory(prefix="hsms.") as directory:
        with Shell(Guest(library("ours"), owner.address, Path(directory))) as client:
            for n in range(deliveries):
                kind = kinds[n % len(kinds)]
                key = new_key(kind)
                generation = owner.push(kind, key)
                delivered.append(key)
                live.setdefault(kind, []).append((generation, key))
                if kind in ("p256", "p384", "p521"):
                    client.tell("open")
                    client.tell("sign", client.private(kind))
                if len(live[kind]) > KEPT:
                    old, _ = live[kind].pop(0)
                    owner.destroy_generation(kind, old)
            held = {id(key) for generations in live.values() for _, key in generations}
            needles = Needles(delivered)
            found = {title: hits for pid, title in others(owner.pid).items() if (hits := needles.in_process(pid))}
            searched = len(others(owner.pid))
        files = needles.in_files(host.process.state, host.process.run, Path(directory))
        log_hits = needles.found_in(host.process.log.read_bytes())
    gone = Needles(key for key in delivered if id(key) not in held)
    present = Needles(key for key in delivered if id(key) in held)
    result = {
        "deliveries": deliveries,
        "processes_searched": searched,
        "keys_found_outside_the_worker": len(found),
        "files_with_keys": len(files) + bool(log_hits),
        "destroyed_keys_found_in_the_worker": len(gone.in_process(owner.pid)),
        "live_keys_found_in_the_worker": len(present.in_process(owner.pid)) > 0,
    }
    owner.destroy()
    other.destroy()
    return result


def judge(results: dict[str, Any]) -> list[str]:
    """What must be nothing and is not."""
    wrong = []
    for part in results.get("storm", {}).values():
        wrong += [name for name in ("failed_handshakes", "failed_signatures", "wrong_signatures", "failed_logins") if part[name]]
    if killed := results.get("kills"):
        names = ("failed_signatures", "wrong_signatures", "acknowledged_and_lost", "left_behind")
        wrong += [name for name in names if killed[name]]
    if cut := results.get("power"):
        wrong += [name for name in ("acknowledged_and_lost", "newest_key_did_not_sign", "audit_log_not_whole") if cut[name]]
    if leaked := results.get("leaks"):
        names = ("keys_found_outside_the_worker", "files_with_keys", "destroyed_keys_found_in_the_worker")
        wrong += [name for name in names if leaked[name]]
        wrong += [] if leaked["live_keys_found_in_the_worker"] else ["the search finds nothing at all"]
    if guest := results.get("guest"):
        for part in guest["rotations"].values():
            names = ("failed_handshakes", "failed_signatures", "wrong_signatures", "foreign_certificates")
            wrong += [f"guest: {name}" for name in names if part[name]]
        for name, told in guest["disturbances"].items():
            wrong += [f"guest, {name}"] if told.get("wrong") or (told.get("failed") and name not in NOTICED) else []
    for behaviour, cost in results.get("hostile", {}).items():
        if cost["neighbour_failures"] or not cost["same_worker"] or not cost["answers_after"]:
            wrong.append(f"hostile guest: {behaviour}")
    for name, who in (("fleet", "a manager"), ("hosts", "a host's process")):
        if walked := results.get(name):
            wrong += [f"{name}: {who} that died left something half done"] if walked["failed"] or not walked["walks"] else []
    if tested := results.get("ways"):
        wrong += ["ways: a test failed in its other way"] if tested["failed"] or not tested["tests"] else []
    return wrong


def written(results: dict[str, Any], output: Path | None) -> tuple[str, list[str]]:
    """Returns all of it as Markdown, and what is wrong; `output` has both, as far as it has come."""
    wrong = judge(results)
    text = ["# Soak", "", f"Run by `scripts/soak`: {'all is well' if not wrong else 'WRONG: ' + ', '.join(wrong)}.", ""]
    for name in PARTS:
        if name in results:
            text += [f"## {name.capitalize()}", "", f"Begun {results['times'][name]}.", "", report.facts_table(results[name]), ""]
    text += ["## Machine", "", report.facts_table(results["machine"]), ""]
    if output:
        output.mkdir(parents=True, exist_ok=True)
        (output / "soak.json").write_text(json.dumps(results, indent=1) + "\n")
        (output / "soak.md").write_text("\n".join(text))
    return "\n".join(text), wrong


def on_a_host(run: Callable[[Host], dict[str, Any]]) -> dict[str, Any]:
    host = Host(SETTINGS + USERS)
    try:
        return run(host.start())
    finally:
        host.clean()


def main() -> int:
    given = arguments()
    results = report.before(given.output, "soak.json") if given.output else {"times": {}}
    results["machine"] = report.machine()
    parts: dict[str, tuple[float, Callable[[], dict[str, Any]]]] = {
        "storm": (given.rotations, lambda: on_a_host(lambda host: storm(host, given.rotations))),
        "kills": (given.kills, lambda: on_a_host(lambda host: kills(host, given.kills, given.seed))),
        "leaks": (given.deliveries, lambda: on_a_host(lambda host: leaks(host, given.deliveries))),
        "guest": (given.guest_rotations, lambda: on_a_host(lambda host: guest(host, given.guest_rotations))),
        "hostile": (given.hostile, lambda: on_a_host(lambda host: misbehave_all(host, list(BEHAVIOURS), given.hostile))),
        "fleet": (given.fleet, lambda: fleet(given.fleet)),
        "hosts": (given.hosts, lambda: hosts(given.hosts)),
        "ways": (given.ways, lambda: ways(given.ways)),
        "power": (given.power_losses, lambda: power(given.power_losses, given.seed)),
    }
    for name, (count, run) in parts.items():
        if count and name in given.only:
            print(f"soak: {name}", file=sys.stderr, flush=True)
            began = report.now()
            results[name], results["times"][name] = run(), began
            written(results, given.output)
    text, wrong = written(results, given.output)
    print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
