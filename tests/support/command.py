"""The `hsmvisor` command, run as a person or a program runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
        environment = os.environ | {"HSMVISOR_HOST": self.address, "HSMVISOR_AUTHORITY": str(self.authority), "PYTHONPATH": SOURCES}
        command = [sys.executable, "-m", self.module, *map(str, words)]
        done = subprocess.run(command, capture_output=True, input=stdin, env=environment | more, timeout=60, check=False)
        self.errors = done.stderr.decode()
        assert done.returncode == code, f"{words} ended with {done.returncode}: {done.stdout.decode()}{self.errors}"
        assert "Traceback" not in self.errors, self.errors
        return done.stdout.decode()

    def json(self, *words: str | Path) -> Any:
        return json.loads(self("--json", *words))
