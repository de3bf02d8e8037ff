"""What a guest's own token costs beside SoftHSM2: searches, sessions, AES-GCM, new keys and other calls, in one thread.

One program of ours (tokenbench.c) asks every module for the same; round by round the set-ups take turns.  Each has two tokens: one
with 10,000 objects, in which is searched, and one with none.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import limits
from support.c_programs import build_tokenbench
from support.guest import library
from support.host import Host, Module
from support.host_process import new_id

from benchlib.report import table
from benchlib.setups import PIN, make_softhsm_token, p11kit_server, softhsm_environment, softhsm_module

OBJECTS = 10_000
FULL, FEW = "full", "few"  #: labels of the tokens
SOFTHSM, REMOTE, OURS = "softhsm", "p11kit-softhsm", "hsmvisor"
TITLES = {SOFTHSM: "SoftHSM2 in the application", REMOTE: "p11-kit server + SoftHSM2", OURS: "hsmvisor"}

_MIB = 1 << 20


@dataclass(frozen=True)
class Measure:
    title: str
    size: int = 0  #: bytes that are worked on
    token: str = FEW
    seconds: float = 1.0  #: of a round's length
    most: int = 0  #: calls of a round; 0: no limit
    trips: int = 1  #: from our library to the module and back


MEASURES = {
    "null": Measure("C_GetSessionInfo: a call that does nothing"),
    "find-one": Measure("search by class and label: one", token=FULL),
    "find-none": Measure("search by label: none", token=FULL),
    "find-all": Measure("search by class: all of them", token=FULL, trips=13),
    "session": Measure("C_OpenSession and C_CloseSession", trips=2),
    "encrypt-1k": Measure("AES-256-GCM, 1 KiB, encrypted", 1024),
    "decrypt-1k": Measure("AES-256-GCM, 1 KiB, decrypted", 1024),
    "encrypt-1m": Measure("AES-256-GCM, 1 MiB, encrypted", _MIB),
    "decrypt-1m": Measure("AES-256-GCM, 1 MiB, decrypted", _MIB),
    "aes": Measure("new AES-256, of the session"),
    "p256": Measure("new P-256 pair, of the session"),
    "ed25519": Measure("new Ed25519 pair, of the session"),
    "rsa2048": Measure("new RSA-2048 pair, of the session", seconds=4.0),
    "token-aes": Measure("new AES-256, of the token", most=30),
    "token-p256": Measure("new P-256 pair, of the token", most=30),
    "token-ed25519": Measure("new Ed25519 pair, of the token", most=30),
    "token-rsa2048": Measure("new RSA-2048 pair, of the token", seconds=4.0, most=30),
    "create": Measure("new data object of the token, beside them", token=FULL, most=30),
    "destroy": Measure("data object of the token destroyed, beside them", token=FULL, most=30),
    "attribute": Measure("C_GetAttributeValue of two attributes of a key"),
    "hmac-1k": Measure("HMAC-SHA-256 of 1 KiB", 1024),
    "digest-1m": Measure("SHA-256 of 1 MiB", _MIB),
    "random-32": Measure("C_GenerateRandom of 32 bytes"),
}


@dataclass(frozen=True)
class Place:
    """A set-up as tokenbench reaches it: by token the environment of its library."""

    name: str
    library: Path
    environments: dict[str, dict[str, str]]


def measure(rounds: int, seconds: float, objects: int = OBJECTS) -> dict[str, Any]:
    """Rows: measure, set-up; medians of the rounds' medians, and the ratios to the others: medians of the rounds' own."""
    with tempfile.TemporaryDirectory(prefix="hsmb.") as name, ExitStack() as stack:
        directory = Path(name)
        program = build_tokenbench(directory)
        places = stack.enter_context(_places(directory, program, objects))
        runs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for number in range(rounds):
            turn = number % len(places)
            for named in MEASURES:
                print(f"\rtoken: round {number + 1}/{rounds}, {named}        ", end="", file=sys.stderr, flush=True)
                for place in places[turn:] + places[:turn]:
                    told = _run(program, place, named, seconds, objects)
                    if "lacks" not in told:
                        runs[named, place.name].append(told)
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    return {"rounds": rounds, "objects": objects, "rows": [_row(*at, runs) for at in runs]}


def _run(program: Path, place: Place, named: str, seconds: float, objects: int) -> dict[str, Any]:
    row = MEASURES[named]
    most = ("--most", str(row.most)) if row.most else ()
    count = ("--count", str(objects)) if row.token == FULL else ()
    return _told(program, place, row.token, named, "--seconds", str(seconds * row.seconds), *most, *count)


def _told(program: Path, place: Place, token: str, measures: str, *more: str) -> dict[str, Any]:
    command = [program, "--module", place.library, "--token", token, "--pin", PIN, "--measures", measures, *more]
    environment = os.environ | place.environments[token]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode:
        raise RuntimeError(f"{measures} on {place.name}: {result.stderr.strip()}")
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def _row(named: str, name: str, runs: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[str, Any]:
    values = runs[named, name]
    row: dict[str, Any] = {"measure": named, "setup": name, "calls": sum(v["calls"] for v in values)}
    for figure in ("p50_us", "p99_us", "mean_us"):
        row[figure] = round(statistics.median(v[figure] for v in values), 2)
    if MEASURES[named].size:
        row["mb_per_s"] = round(MEASURES[named].size / row["p50_us"], 1)
    row["ratio"] = {
        other: round(statistics.median(b["p50_us"] / a["p50_us"] for a, b in zip(values, others, strict=True)), 2)
        for (measured, other), others in runs.items()
        if measured == named and other != name
    }
    return row


# ---- set-ups ------------------------------------------------------------------------------------------------------------


@contextmanager
def _places(directory: Path, program: Path, objects: int) -> Iterator[list[Place]]:
    """The two tokens of SoftHSM2 have a directory and a server each: it reads all objects of all its tokens when it begins."""
    remote: dict[str, dict[str, str]] = {}
    local: dict[str, dict[str, str]] = {}
    with ExitStack() as stack:
        for token in (FULL, FEW):
            own = directory / token
            own.mkdir()
            make_softhsm_token(own, token)
            local[token] = softhsm_environment(own)
        softhsm = Place(SOFTHSM, softhsm_module(), local)
        _told(program, softhsm, FULL, "fill", "--count", str(objects))
        for token in (FULL, FEW):
            remote[token] = stack.enter_context(p11kit_server(directory / token))
        host = stack.enter_context(Host())
        yield [softhsm, Place(REMOTE, library("p11-kit").path, remote), _ours(host, program, objects)]


def _ours(host: Host, program: Path, objects: int) -> Place:
    ours = library("ours")
    modules = {token: host.create(f"bench-{token}", guest_token=True) for token in (FULL, FEW)}
    place = Place(OURS, ours.path, {token: {ours.variable: module.address} for token, module in modules.items()})
    for token in modules:
        _initialize(place, token)
    _fill(place, modules[FULL], program, objects)
    return place


def _initialize(place: Place, token: str) -> None:
    tool = ["pkcs11-tool", "--module", str(place.library), "--slot", "1", "--so-pin", PIN]
    for more in (["--init-token", "--label", token], ["--login", "--login-type", "so", "--init-pin", "--new-pin", PIN]):
        subprocess.run([*tool, *more], env=os.environ | place.environments[token], check=True, capture_output=True)


def _fill(place: Place, module: Module, program: Path, objects: int) -> None:
    """A worker stores STORE_BURST changes at once, and few a second after that: each time that many are made, the operator has it
    replaced."""
    at_once = limits.STORE_BURST - 10
    for first in range(0, objects, at_once):
        _upgrade(module)
        count = min(at_once, objects - first)
        print(f"\rtoken: {first} of {objects} objects       ", end="", file=sys.stderr, flush=True)
        _told(program, place, FULL, "fill", "--first", str(first), "--count", str(count))


def _upgrade(module: Module) -> None:
    request = pb.UpgradeModuleRequest(request_id=new_id(), name=module.name)
    module.host.process.modules.UpgradeModule(request, timeout=60)


# ---- what is shown ------------------------------------------------------------------------------------------------------


def text(measured: dict[str, Any]) -> list[str]:
    """A table of all measures, hsmvisor's ratio to each of the others beside them: above 1 it is faster."""
    head = [
        "call",
        *(f"{title}, µs" for title in TITLES.values()),
        "of them on the way",
        "MB/s",
        "to SoftHSM2",
        "to p11-kit server",
    ]
    rows = {(row["measure"], row["setup"]): row for row in measured["rows"]}
    null = rows["null", OURS]["p50_us"]
    lines = []
    for named, kind in MEASURES.items():
        ours = rows.get((named, OURS), {})
        times = [f"{rows[named, name]['p50_us']:,.1f}" if (named, name) in rows else "-" for name in TITLES]
        ratios = [f"{ours['ratio'][name]:.2f}x" if name in ours.get("ratio", {}) else "-" for name in (SOFTHSM, REMOTE)]
        rate = f"{ours['mb_per_s']:,.0f}" if "mb_per_s" in ours else ""
        lines.append([kind.title, *times, f"{kind.trips * null:,.0f}", rate, *ratios])
    said = [
        f"Medians of one thread's calls, beside {measured['objects']:,} data objects in the token that is searched.",
        "On the way: to the module and back, as often as the call asks it something, by a call that does nothing.",
    ]
    return [" ".join(said), table(head, lines)]
