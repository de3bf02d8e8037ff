"""The `hsmvisor` command, run as a person or a program runs it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.host_process import SOURCES


@dataclass
class Command:
    """`authority` is its directory of keys; `errors` what it said last."""

    address: str
    authority: Path
    module: str = "hsmvisor.cli.main"
    errors: str = field(default="", init=False)

    def __call__(self, *words: str | Path, code: int = 0, stdin: bytes = b"", **more: str) -> str:
        environment = self._environment | more
        done = subprocess.run(self._line(words), capture_output=True, input=stdin, env=environment, timeout=60, check=False)
        self.errors = done.stderr.decode()
        assert done.returncode == code, f"{words} ended with {done.returncode}: {done.stdout.decode()}{self.errors}"
        assert "Traceback" not in self.errors, self.errors
        return done.stdout.decode()

    @property
    def _environment(self) -> dict[str, str]:
        return os.environ | {"HSMVISOR_HOST": self.address, "HSMVISOR_AUTHORITY": str(self.authority), "PYTHONPATH": SOURCES}

    def _line(self, words: Sequence[str | Path]) -> list[str]:
        return [sys.executable, "-m", self.module, *map(str, words)]

    @contextlib.contextmanager
    def start(self, *words: str | Path) -> Iterator[subprocess.Popen[bytes]]:
        """One that goes on; its output is a pipe.  It is ended where it has not."""
        with subprocess.Popen(self._line(words), stdout=subprocess.PIPE, env=self._environment) as process:
            try:
                yield process
            finally:
                process.kill()

    def json(self, *words: str | Path) -> Any:
        return json.loads(self("--json", *words))
