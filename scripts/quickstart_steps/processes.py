"""The processes of a tour: started apart from the terminal, waited for, and all of them ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from steps import StepFailed

AGAIN = "mend what it says, then run the quickstart again"


def system_file(pattern: str, package: str) -> Path:
    found = sorted(Path("/usr/lib").glob(pattern))
    if not found:
        raise StepFailed(f"/usr/lib/{pattern} is missing", f"apt install {package}")
    return found[-1]


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes], logs: list[Path], what: str, seconds: float = 40) -> None:
    """`ready`: of a service that was started; its last words are told if it does not come to that."""
    end = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            words = "".join(log.read_text(errors="replace")[-1500:] for log in logs if log.exists())
            raise StepFailed(f"{what} did not start:\n{words}", AGAIN)
        time.sleep(0.02)


def wait_until(holds: Callable[[], bool], what: str, do: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise StepFailed(f"waited {seconds:.0f} s in vain until {what}", do)
        time.sleep(0.1)


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Processes:
    """Those of one tour; what they print is in files of `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._started: list[tuple[subprocess.Popen[bytes], signal.Signals]] = []

    def start(
        self,
        *command: str | Path,
        log: str,
        more: dict[str, str] | None = None,
        user: str | None = None,
        end: signal.Signals = signal.SIGTERM,
    ) -> subprocess.Popen[bytes]:
        """`user`: whom it becomes; `end`: the signal that ends it."""
        with (self.place / log).open("ab") as file:
            process = subprocess.Popen(
                [str(w) for w in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=os.environ | (more or {}),
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=None if user is None else (),
            )
        self._started.append((process, end))
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        self._started = [(one, number) for one, number in self._started if one is not process]
        process.terminate()
        _wait(process)

    def stop(self) -> None:
        """The last one first."""
        started, self._started = self._started[::-1], []
        for process, number in started:
            process.send_signal(number)
        for process, _ in started:
            _wait(process)


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
