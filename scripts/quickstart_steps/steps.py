"""How the quickstart tells what it does: numbered steps, and one clear end when one fails."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv/bin"


class StepFailed(Exception):
    """`why` in one sentence or a program's own words, `do`: what to do."""

    def __init__(self, why: str, do: str) -> None:
        super().__init__(why)
        self.why, self.do = why, do


_number = 0


@contextmanager
def step(title: str) -> Iterator[None]:
    global _number
    _number += 1
    began = time.monotonic()
    print(f"\n{_number}. {title}", flush=True)
    try:
        yield
    except (StepFailed, OSError) as failed:
        failure = failed if isinstance(failed, StepFailed) else StepFailed(str(failed), "mend that, then run the quickstart again")
        print(f"\nquickstart: step {_number} ({title}) failed:", file=sys.stderr)
        print("  " + failure.why.strip().replace("\n", "\n  "), file=sys.stderr)
        print(f"what to do: {failure.do}", file=sys.stderr)
        raise failure from None
    seconds = time.monotonic() - began
    if seconds > 2:
        print(f"   ({seconds:.1f} s)", flush=True)


def say(text: str) -> None:
    print("   " + text, flush=True)


def shown(words: Sequence[str], who: str = "") -> str:
    """Returns a command line as people type it; `who`: its prompt."""
    return f"{who}$ {shlex.join([Path(words[0]).name, *words[1:]])}".replace(str(ROOT) + "/", "")


def run(
    *command: str | Path,
    do: str,
    show: bool = True,
    more: dict[str, str] | None = None,
    timeout: float = 60,
    who: str = "",
    where: Path | None = None,
    user: str | None = None,
) -> str:
    """Runs a program of the tour, showing its command line; returns what it printed.

    `who`: typed it; `where`: in that directory; `user`: as whom.
    """
    words = [str(word) for word in command]
    if show:
        say(shown(words, who))
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=os.environ | (more or {}),
            timeout=timeout,
            check=False,
            cwd=where,
            user=user,
            group=user,
            extra_groups=None if user is None else (),
        )
    except FileNotFoundError:
        raise StepFailed(f"{words[0]} is not installed", "run scripts/setup") from None
    except subprocess.TimeoutExpired:
        raise StepFailed(f"{words[0]} did not end within {timeout:.0f} s", do) from None
    said = (done.stdout + done.stderr).decode(errors="replace")
    if done.returncode:
        raise StepFailed(f"{' '.join(words)} ended with {done.returncode}:\n{said}", do)
    return said
