"""What a host service writes, syncs and sends, in order, as strace(1) sees it; and what would be lost if power went at some moment.

A file's bytes are safe after an fsync or fdatasync of it, a name in a directory after an fsync of that directory (fsync(2)): this
is all that POSIX promises, and all that is counted here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from support.host_process import SOURCES, HostProcess

WRITES = frozenset({"write", "pwrite64", "writev", "pwritev", "ftruncate"})
SYNCS = frozenset({"fsync", "fdatasync"})
SENDS = frozenset({"sendto", "sendmsg"})
_TRACED = ",".join(sorted(WRITES | SYNCS | SENDS | {"openat", "rename", "renameat2", "unlink", "recvmsg", "recvfrom", "connect"}))

_LINE = re.compile(r"(\d+) +([\d.]+) (.*)")
_BEGUN = re.compile(r"(\w+)\((.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>(.*)$")
_DESCRIPTOR = re.compile(r"\d+<(.*?)>(?:, |\)|$)")
_RESULT = re.compile(r"\) += (-?\d+)[^\"]*$")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_INODE = re.compile(r"UNIX-STREAM:\[(\d+)")


@dataclass(frozen=True)
class Call:
    """One system call; `began` and `ended` are places in the trace, `at` is when it began (seconds since 1970)."""

    pid: int
    name: str
    arguments: str
    result: int
    began: int
    ended: int
    at: float

    @property
    def target(self) -> str:
        """The path, or what strace says of the socket, that its descriptor stands for."""
        match = _DESCRIPTOR.match(self.arguments)
        return match[1] if match else ""

    @property
    def socket(self) -> str:
        match = _INODE.match(self.target)
        return match[1] if match else ""

    @property
    def paths(self) -> list[str]:
        return _QUOTED.findall(self.arguments)


class TracedHost(HostProcess):
    """A host service under strace from its first moment; `calls` when it has ended."""

    def __init__(self, settings: str = "", environment: dict[str, str] | None = None) -> None:
        super().__init__(settings, "support.traced_host", environment)
        self.trace = self.directory / "trace"

    def launch(self, arguments: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        if arguments:  # the end of its workers
            return super().launch(arguments)
        options = ["-D", "-f", "-ttt", "-yy", "-s", "600", "-e", f"trace={_TRACED}", "-o", str(self.trace)]  # -D: the pid is ours
        command = ["strace", *options, sys.executable, "-m", self.module, "--config", str(self.config)]
        environment = {**os.environ, "PYTHONPATH": SOURCES, **self.environment}
        with open(self.log, "ab") as log:
            return subprocess.Popen(command, env=environment, stderr=log, stdout=log, stdin=subprocess.DEVNULL)

    def calls(self) -> list[Call]:
        return parse(self.trace.read_text(errors="replace").splitlines())


def parse(lines: Iterable[str]) -> list[Call]:
    """Returns the calls that succeeded, in the order of their beginnings."""
    calls: list[Call] = []
    begun: dict[int, tuple[str, str, int, float]] = {}
    for place, line in enumerate(lines):
        if (match := _LINE.fullmatch(line)) is None:
            continue
        pid, at, text = int(match[1]), float(match[2]), match[3]
        if half := _BEGUN.match(text):
            begun[pid] = half[1], half[2], place, at
            continue
        if rest := _RESUMED.match(text):
            if pid not in begun:
                continue
            name, arguments, began, at = begun.pop(pid)
            arguments += rest[2]
        else:
            name, _, arguments = text.partition("(")
            began = place
        result = _RESULT.search(arguments)
        if result and int(result[1]) >= 0:
            calls.append(Call(pid, name, arguments, int(result[1]), began, place, at))
    return sorted(calls, key=lambda call: call.began)


@dataclass
class Disk:
    """What of the files in and below a directory would not outlive a loss of power."""

    root: Path
    unsynced: dict[str, list[Call]] = field(default_factory=dict)  #: writes, by file
    unsynced_names: dict[str, Call] = field(default_factory=dict)  #: files that were made or renamed
    known: set[str] = field(default_factory=set)

    def take(self, call: Call) -> list[str]:
        """Follows one call; returns what is wrong with it by itself."""
        directory = f"{self.root}/"
        if call.name == "ftruncate" and call.target.endswith("-wal"):
            return self._empty_journal(call.target)
        if call.name in WRITES and call.target.startswith(directory):
            self.unsynced.setdefault(call.target, []).append(call)
        elif call.name in SYNCS:
            self.unsynced[call.target] = [w for w in self.unsynced.get(call.target, []) if w.ended >= call.began]
            for path, made in list(self.unsynced_names.items()):
                if os.path.dirname(path) == call.target and made.ended < call.began:
                    del self.unsynced_names[path]
        elif call.name == "openat" and "O_CREAT" in call.arguments and (path := call.paths[0]).startswith(directory):
            if path not in self.known:
                self.unsynced_names[path] = call
                self.known.add(path)
        elif call.name == "unlink":
            self._forget(call.paths[0])
        elif call.name.startswith("rename") and call.paths[0].startswith(directory):
            return self._rename(call)
        return []

    def _empty_journal(self, path: str) -> list[str]:
        """What it held is in the state file by now, or it is lost; that it is empty need not be on the disk."""
        self.unsynced.pop(path, None)
        state = path.removesuffix("-wal")
        return [f"{path} is emptied before {state} is synced"] if self.unsynced.get(state) else []

    def _forget(self, path: str) -> None:
        self.known.discard(path)
        self.unsynced.pop(path, None)
        self.unsynced_names.pop(path, None)

    def _rename(self, call: Call) -> list[str]:
        old, new = call.paths[:2]
        wrong = [f"{new} gets its name before its bytes are synced"] if self.unsynced.get(old) else []
        writes = [replace(w, arguments=w.arguments.replace(old, new)) for w in self.unsynced.get(old, [])]
        self._forget(old)
        self.unsynced[new] = writes
        self.unsynced_names[new] = call
        self.known.add(new)
        return wrong

    def lost(self, files: Callable[[str], bool], counts: Callable[[Call], bool] = lambda write: True) -> list[str]:
        """Says what a loss of power would take now of these files, and of the writes to them that count."""
        writes = [f"a write to {path} is not synced" for path, w in self.unsynced.items() if files(path) and any(map(counts, w))]
        return writes + [f"the name {path} is not synced" for path in self.unsynced_names if files(path)]


def replay(calls: list[Call], disk: Disk) -> Iterator[tuple[Call, list[str]]]:
    """Yields each call after the disk has followed it.  A sync counts when it has ended, all else when it begins."""
    for call in sorted(calls, key=lambda c: c.ended if c.name in SYNCS else c.began):
        yield call, disk.take(call)
