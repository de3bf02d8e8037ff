"""Death at every step: a process of a host counts its steps and dies before the one that a test has chosen.

A step is what another process or a disk can notice: a message sent or taken, a transaction, a write to the audit log, a change in
the file system, a fork.  All of them pass a few places that are instrumented here, so a new message, transaction or file is a step
by itself, without a list that somebody must keep.  The count lives in memory that all processes share: a worker may open no file.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROLES = ("supervisor", "launcher", "key provider", "worker", "hsm helper", "tpm")
VARIABLE = "HSMVISOR_STEPS"  #: names the file behind the shared memory

_COUNTS = struct.Struct(f"<{len(ROLES)}q")  #: steps that each role may still take; 0: it is dead; below 0: nobody counts
_NOBODY = _COUNTS.pack(*[-1] * len(ROLES))
_NAME = 128  #: bytes for what each role was about to do when it died
_SIZE = 4096

#: Audit events (sys.addaudithook) of changes in the file system and of processes that are made.
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.truncate", "os.fork", "socket.bind")
#: Messages that change nothing.
_QUESTIONS = ("hsmvisor/1:query-status", "hsmvisor/1:query-statistics", "hsmvisor/1:report")


class Board:
    """The shared memory, for the test and for the processes."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(_NOBODY.ljust(_SIZE, b"\0"))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _SIZE)

    def arm(self, role: str, step: int) -> None:
        """The process of that role dies before its `step`th step from now, counted from 1."""
        counts = [step if r == role else -1 for r in ROLES]
        self._memory[: _COUNTS.size] = _COUNTS.pack(*counts)

    def disarm(self) -> None:
        self._memory[: _COUNTS.size] = _NOBODY

    def died(self, role: str) -> str:
        """What the process of that role was about to do when it died; empty: it took all its steps."""
        if self._left(role) != 0:
            return ""
        at = _COUNTS.size + ROLES.index(role) * _NAME
        return self._memory[at : at + _NAME].rstrip(b"\0").decode()

    def rests(self, role: str, seconds: float) -> None:
        """Returns when the process of that role has taken no step for so long, or is dead."""
        while (before := self._left(role)) > 0:
            time.sleep(seconds)
            if self._left(role) == before:
                return

    def _left(self, role: str) -> int:
        left: int = _COUNTS.unpack_from(self._memory)[ROLES.index(role)]
        return left

    def step(self, role: str, what: str) -> None:
        left = self._left(role)
        if left <= 0:
            return
        number = ROLES.index(role)
        if left <= 1:
            at = _COUNTS.size + number * _NAME
            self._memory[at : at + _NAME] = what.encode()[:_NAME].ljust(_NAME, b"\0")
        struct.pack_into("<q", self._memory, number * 8, left - 1)
        if left <= 1:
            os._exit(9)  # as dead as by SIGKILL, which a worker's filter does not let it send


class Stepper:
    """The steps of this process; `role` changes with a fork."""

    def __init__(self, role: str) -> None:
        self.role, self._board, self._lock = role, Board(Path(os.environ[VARIABLE])), threading.Lock()
        sys.addaudithook(self._audited)

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            path = next((str(a) for a in arguments if isinstance(a, str | Path)), "")
            if not path.startswith("\0"):  # an abstract socket's name is no file
                self.step(f"{event} {path}")

    def step(self, what: str) -> None:
        if not what.endswith(_QUESTIONS):
            with self._lock:
                self._board.step(self.role, what)

    def become(self, role: str) -> None:
        self.role, self._lock = role, threading.Lock()

    def before(self, owner: Any, name: str, title: Callable[..., str], role: str = "") -> None:
        """Makes each call of a function a step (in one role alone, if it says so); `title` names it by its arguments."""
        real = getattr(owner, name)

        @functools.wraps(real)
        def stepping(*arguments: Any, **options: Any) -> Any:
            if role in ("", self.role):
                self.step(title(*arguments))
            return real(*arguments, **options)

        setattr(owner, name, stepping)

    def after(self, owner: Any, name: str, what: str) -> None:
        """Makes each return of a function a step."""
        real = getattr(owner, name)

        @functools.wraps(real)
        def stepping(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            self.step(what)
            return result

        setattr(owner, name, stepping)


def type_of(payload: bytes) -> str:
    return payload[: payload.find(b"\0")].decode(errors="replace")
