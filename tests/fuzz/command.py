"""scripts/fuzz: coverage-guided fuzzing of everything that takes bytes from somebody who may be hostile.

Each target starts from its seeds (a valid input of everything) and the corpus that is kept in tests/fuzz/corpus.  A finding is
written to --keep, with the command that tries it again, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fuzz import arcs, harness
from fuzz.control import INVARIANT as CONTROL_INVARIANT
from fuzz.control import ControlFuzzer
from support.host import Host

ROOT = Path(__file__).resolve().parents[2]
SHIM = "shim"  #: the library's reader of replies, in C (pkcs11_shim/fuzz/fuzz_reply.c)
SHIM_CORPUS = ROOT / "pkcs11_shim/fuzz/corpus"
CONTROL = "control"  #: the control API of a real host (tests/fuzz/control.py), not guided by coverage
NAMES = (*harness.TARGETS, SHIM, CONTROL)

_STATUS = re.compile(r"#(\d+)\s+\w+\s+cov: (\d+)(?: ft: (\d+))? corp: (\d+)/(\S+)")
_DONE = re.compile(r"Done (\d+) (?:runs )?in (\d+)")


@dataclass
class Outcome:
    target: str
    runs: int = 0
    edges: int = 0
    features: int = 0
    corpus: str = ""
    seconds: float = 0.0
    findings: tuple[Path, ...] = ()
    output: str = ""

    @property
    def sound(self) -> bool:
        return not self.findings and self.runs > 0

    def row(self) -> str:
        found = f"{len(self.findings)} FOUND" if self.findings else "none" if self.runs else "DID NOT RUN"
        return f"{self.target:12}{self.seconds:9.0f} s{self.runs:12,}{self.edges:8}{self.features:10}{self.corpus:>14}   {found}"


HEAD = f"{'target':12}{'time':>11}{'executions':>12}{'edges':>8}{'features':>10}{'corpus':>14}   findings"


def words(target: str) -> tuple[list[str], int]:
    """The program of a target, and how long an input may be."""
    if target == SHIM:
        build = Path(tempfile.gettempdir()) / f"hsmvisor-fuzz-{os.getuid()}"
        command = ["make", "-s", "-C", ROOT / "pkcs11_shim", f"BUILD={build}", "fuzz"]
        made = subprocess.run(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, check=False)
        if made.returncode:
            sys.exit(f"fuzz: the library's fuzzer cannot be built; scripts/setup --dev installs what it needs\n{made.stdout}")
        return [str(build / "fuzz_reply")], 2000
    return [sys.executable, "-m", "fuzz.guided", target], harness.load(target).MAX_LENGTH


def kept_corpus(target: str) -> Path:
    return SHIM_CORPUS if target == SHIM else harness.CORPUS / target


def most_mb() -> int:
    """A GiB more than this process has ever had: libFuzzer asks getrusage(2) for its peak, which outlives fork and exec."""
    return 1024 + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def fuzz(target: str, seconds: int, keep: Path, work: Path, seed: int = 0) -> Outcome:
    """Runs one target for so long; `work` is where its corpus grows."""
    program, longest = words(target)
    corpus = work / target
    corpus.mkdir(parents=True)
    if target != SHIM:
        harness.write_seeds(target, corpus)
    for path in kept_corpus(target).glob("*"):
        shutil.copy(path, corpus)
    keep.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_len={longest}", f"-max_total_time={seconds}", "-timeout=10", f"-rss_limit_mb={most_mb()}", f"-seed={seed}"]
    began = time.monotonic()
    ran = subprocess.run(
        [*program, *limits, "-print_final_stats=1", f"-artifact_prefix={keep}/{target}-", str(corpus)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = ran.stdout.decode(errors="replace")
    outcome = Outcome(target, seconds=time.monotonic() - began, output=output)
    for runs, edges, features, count, size in _STATUS.findall(output):
        outcome.runs, outcome.edges, outcome.features, outcome.corpus = int(runs), int(edges), int(features or 0), f"{count}/{size}"
    if done := _DONE.search(output):
        outcome.runs = int(done[1])
    outcome.findings = tuple(sorted(keep.glob(f"{target}-*"))) if ran.returncode else ()
    if ran.returncode and not outcome.findings:
        outcome.runs = 0
    return outcome


def fuzz_control(seconds: int, keep: Path, seed: int) -> Outcome:
    """Calls a host of its own for so long.  The seed names a finding: it makes the same calls again."""
    seed = seed or time.time_ns() % 2**32
    outcome, began = Outcome(CONTROL), time.monotonic()
    host = Host()
    try:
        fuzzer = ControlFuzzer(host.start(), seed)
        while time.monotonic() < began + seconds:
            fuzzer.run(100)
        fuzzer.clean()
    except AssertionError as error:
        keep.mkdir(parents=True, exist_ok=True)
        (found := keep / f"{CONTROL}-seed-{seed}").write_text(str(error))
        outcome.findings, outcome.output = (found,), str(error)
    finally:
        host.clean()
    outcome.runs, outcome.seconds = fuzzer.codes.total(), time.monotonic() - began
    outcome.corpus = " ".join(f"{code}:{count}" for code, count in fuzzer.codes.most_common(3))
    return outcome


def grow(target: str, work: Path) -> int:
    """Adds to the kept corpus what reaches code that it and the seeds do not; returns how many inputs those were."""
    kept = kept_corpus(target)
    kept.mkdir(parents=True, exist_ok=True)
    if target == SHIM:
        before = len(list(kept.glob("*")))
        command = [*words(target)[0], "-merge=1", str(kept), str(work / target)]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        return len(list(kept.glob("*"))) - before
    grown = [path.read_bytes() for path in (work / target).glob("*")]
    known = [data for _, data in harness.inputs(target)]
    fresh = arcs.worth_keeping(harness.load(target).run, known, grown)
    for data in fresh:
        (kept / hashlib.sha1(data).hexdigest()).write_bytes(data)
    return len(fresh)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--seconds", type=int, default=600, help="for each target (default 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: another one each time)")
    parser.add_argument("--list", action="store_true", help="show the targets with their invariants, and stop")
    parser.add_argument("--keep", type=Path, default=ROOT / ".cache/fuzz", help="where findings go (default .cache/fuzz)")
    parser.add_argument("--grow", action="store_true", help="add to the kept corpus what reaches more than it does")
    parser.add_argument("--try", dest="again", type=Path, metavar="FILE", help="run one input of one target, without guidance")
    return parser.parse_args()


def show() -> None:
    for name in harness.TARGETS:
        print(f"{name}: {harness.load(name).INVARIANT}")
    print(f"{CONTROL}: {CONTROL_INVARIANT}")
    print(f"{SHIM}: no answer of a module makes the library touch what is not its own, overflow, leak or hang")


def main() -> int:
    given = arguments()
    if unknown := [name for name in given.targets if name not in NAMES]:
        print(f"fuzz: no target {unknown[0]}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    if given.list:
        show()
        return 0
    targets = given.targets or list(NAMES)
    if given.again:
        if targets[0] == SHIM:
            return subprocess.run([*words(SHIM)[0], given.again], check=False).returncode
        harness.load(targets[0]).run(given.again.read_bytes())
        print(f"{given.again}: {targets[0]} holds")
        return 0
    print(HEAD)
    outcomes = []
    for target in targets:
        with tempfile.TemporaryDirectory(prefix="hsmf.") as directory:
            keep, work = given.keep.resolve(), Path(directory)
            if target == CONTROL:
                outcome = fuzz_control(given.seconds, keep, given.seed)
            else:
                outcome = fuzz(target, given.seconds, keep, work, given.seed)
            outcomes.append(outcome)
            print(outcome.row(), flush=True)
            if not outcome.sound:
                print("\n".join(outcome.output.splitlines()[-40:]))
            for path in outcome.findings:
                how = f"--seed {path.name.rpartition('-')[2]}" if target == CONTROL else f"--try {path}"
                print(f"  again: scripts/fuzz {target} {how}")
            if given.grow and outcome.sound and target != CONTROL:
                print(f"  {grow(target, work)} inputs added to {kept_corpus(target)}")
    return 0 if all(outcome.sound for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
