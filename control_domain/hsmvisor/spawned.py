"""A helper process as it is started: with one end of a socketpair, and nothing else of ours."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from hsmvisor.environment import child_environment


class Spawned:
    """A running helper: its process and our end of its socket, before an event loop is there."""

    def __init__(
        self, module: str, arguments: Sequence[str], stderr: int | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """Raises OSError.  `stderr`: a descriptor for what it says; None: it says it where we do.  `environment`: besides ours."""
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            command = [sys.executable, "-m", module, "--control-fd", str(theirs.fileno()), *arguments]
            try:
                self.process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    env={**(environment or {}), **child_environment()},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,
                )
            except OSError:
                self.sock.close()
                raise
