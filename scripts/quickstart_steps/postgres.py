"""A PostgreSQL server of the tour's own, from Debian's package: data in the tour's directory, a unix socket and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from processes import Processes, system_file, wait_for
from steps import run

USER = "postgres"  #: Debian's, where we are root: the server does not run as root
NAME = "fleet"


def start(processes: Processes, directory: Path) -> str:
    """Returns the URL of a new database."""
    directory.mkdir()
    user = USER if os.geteuid() == 0 else None
    if user is not None:
        shutil.chown(directory, user, user)
    log, do = directory / "log", f"see what it says, and {directory}"
    data, sockets = directory / "data", ("-c", "listen_addresses=", "-c", f"unix_socket_directories={directory}")
    program = _program("initdb")
    run(program, "-D", data, "-U", USER, "--auth=trust", "-E", "UTF8", "--no-sync", do=do, show=False, user=user, where=directory)
    name = str(log.relative_to(processes.place))
    # SIGINT: it ends without waiting for those who are connected
    server = processes.start(_program("postgres"), "-D", data, *sockets, log=name, user=user, end=signal.SIGINT)
    ready = [str(_program("pg_isready")), "-q", "-h", str(directory), "-U", USER, "-d", "template1"]
    wait_for(lambda: subprocess.run(ready, check=False).returncode == 0, server, [log], "PostgreSQL")
    run(_program("createdb"), "-h", directory, "-U", USER, "--maintenance-db=template1", NAME, do=do, show=False)
    return f"postgresql://{USER}@/{NAME}?host={directory}"


def _program(name: str) -> Path:
    return system_file(f"postgresql/*/bin/{name}", "postgresql")
