"""Every target holds for its seeds, its kept corpus, and some seconds of changes to them; the long run is `scripts/fuzz`."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fuzz import harness
from fuzz.command import fuzz, kept_corpus

SECONDS = 1.2
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)


def changed(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Some of what a fuzzer does to an input."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(made))
        match rng.randrange(5):
            case 0:
                del made[at : at + rng.randint(1, 8)]
            case 1:
                made[at:at] = rng.randbytes(rng.randint(1, 8))
            case 2:
                made[at : at + 1] = rng.randbytes(1)
            case 3:
                number = rng.choice(INTERESTING)
                size = rng.choice([size for size in (1, 2, 4, 8) if number < 1 << 8 * size])
                made[at : at + size] = number.to_bytes(size, "big")
            case 4:
                start = rng.randint(0, len(other))
                made[at:] = other[start : start + 200]
    return bytes(made)


@pytest.mark.parametrize("name", harness.TARGETS)
def test_a_target_holds(name: str) -> None:
    target, rng = harness.load(name), random.Random(1)
    known = list(harness.inputs(name))
    for label, data in known:
        tried(target, label, data)
    inputs = [data for _, data in known]
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        tried(target, "changed", changed(rng.choice(inputs), rng.choice(inputs), rng)[: target.MAX_LENGTH])


def tried(target: harness.Target, label: str, data: bytes) -> None:
    try:
        target.run(data)
    except Exception as error:
        error.add_note(f"input {label}: {data.hex()}")
        raise


def test_the_kept_corpus_is_small() -> None:
    names = [*harness.TARGETS, "shim"]
    assert sum(path.stat().st_size for name in names for path in kept_corpus(name).glob("*")) < 1_000_000


@pytest.mark.slow
def test_a_guided_run_finds_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself: a sound target ends well, and of a broken one the reproducer is kept."""
    pytest.importorskip("atheris", reason="atheris has no package for this machine")
    outcome = fuzz("wire", 2, tmp_path / "kept", tmp_path / "work", seed=1)
    assert outcome.sound, outcome.output[-3000:]
    assert outcome.edges > 100
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "from hsmvisord.wire import fields\nfields.Reader.finish = lambda self: 1 // (self.end - self.offset == 0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(broken), str(Path(__file__).parents[1])]))
    outcome = fuzz("wire", 20, tmp_path / "kept", tmp_path / "work2", seed=1)
    assert not outcome.sound
    assert len(outcome.findings) == 1
    again = "from pathlib import Path; from fuzz.targets import wire; import sys; wire.run(Path(sys.argv[1]).read_bytes())"
    ran = subprocess.run([sys.executable, "-c", again, outcome.findings[0]], capture_output=True, text=True, check=False)
    assert "ZeroDivisionError" in ran.stderr
