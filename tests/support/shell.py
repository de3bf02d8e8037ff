"""A guest's application that a test tells step by step what to do (tests/integration/programs/guest_shell.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.certificates import PrivateKey
from support.guest import REPOSITORY, Guest
from support.load import Made, fits

PROGRAM = REPOSITORY / "tests/integration/programs/guest_shell.py"


class CkFailure(Exception):
    """What the application was answered: the function's name and the CK_RV in hexadecimal."""


class Shell:
    """Starts with the first thing it is told, so that a test can deliver material before."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._errors = (guest.directory / "shell.log").open("wb")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(self._guest.library.path)],
                env=self._guest.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        return self._process

    def tell(self, *words: object) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(words).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the application has ended: {Path(self._errors.name).read_text()}"
        answer = json.loads(line)
        if "error" in answer:
            raise CkFailure(answer["error"])
        return answer["ok"]

    def find(self, **template: str) -> list[tuple[int, str, str]]:
        return [(i, label, ident) for i, label, ident in self.tell("find", template)]

    def one(self, **template: str) -> int:
        """Finds exactly one object and returns its handle."""
        found = self.find(**template)
        assert len(found) == 1, found
        return found[0][0]

    def private(self, label: str) -> int:
        return self.one(**{"class": "PRIVATE_KEY", "label": label})

    def signs_with(self, index: int, key: PrivateKey) -> bool:
        """Signs, and says whether it was with `key`."""
        return fits(key, Made(0, 0, b"message", bytes.fromhex(self.tell("sign", index))))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._errors.close()
        if self._process is None:
            return
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
