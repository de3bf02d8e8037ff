"""A PostgreSQL server of a test's own, from Debian's package: data in a temporary directory, a unix socket and nothing else."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

_USER = "postgres"


def _program(name: str) -> str:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    assert found, f"{name} is missing: scripts/setup --dev installs it"
    return str(found[-1])


class Postgres:
    """Runs as Debian's user of that name where the tests are root: it does not run as root."""

    def __init__(self, syncs: bool = False) -> None:
        """`syncs`: as one that may lose its power, which tests kill and never do."""
        self._directory = Path(tempfile.mkdtemp(prefix="hsmp."))
        self._user = {"user": _USER, "group": _USER, "extra_groups": ()} if os.geteuid() == 0 else {}
        if self._user:
            entry = pwd.getpwnam(_USER)
            os.chown(self._directory, entry.pw_uid, entry.pw_gid)
        data = self._directory / "data"
        self._run(_program("initdb"), "-D", str(data), "-U", "postgres", "--auth=trust", "-E", "UTF8", "--no-sync")
        self._options = f"-c listen_addresses='' -c unix_socket_directories={self._directory}"
        if not syncs:
            self._options += " -c fsync=off -c full_page_writes=off"
        self.start()
        self._databases = 0

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, cwd=self._directory, capture_output=True, **self._user)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr.decode()

    @property
    def directory(self) -> Path:
        """Its data, with what it writes ahead, and its log."""
        return self._directory

    @property
    def pid(self) -> int:
        """Of the server's first process, whose children serve the connections."""
        return int((self._directory / "data/postmaster.pid").read_text().split()[0])

    def database(self) -> str:
        """Returns the URL of a new one."""
        self._databases += 1
        name = f"test{self._databases}"
        self._run(_program("createdb"), "-h", str(self._directory), "-U", "postgres", name)
        return f"postgresql://postgres@/{name}?host={self._directory}"

    def stop(self) -> None:
        self._run(_program("pg_ctl"), "-D", str(self._directory / "data"), "-m", "fast", "-w", "stop")

    def start(self) -> None:
        data, log = str(self._directory / "data"), str(self._directory / "log")
        self._run(_program("pg_ctl"), "-D", data, "-w", "-l", log, "-o", self._options, "start")

    def close(self) -> None:
        self._run(_program("pg_ctl"), "-D", str(self._directory / "data"), "-m", "immediate", "-w", "stop")
        shutil.rmtree(self._directory)
