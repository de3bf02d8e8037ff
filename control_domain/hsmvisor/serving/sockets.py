"""Listening unix sockets: in the place of what was there, with mode and group."""

from __future__ import annotations

import contextlib
import grp
import os
import socket
from pathlib import Path

from hsmvisor.serving.errors import Broken, Invalid
from hsmvisor.serving.limits import MAX_UNIX_PATH


def listen(path: Path, mode: int, group: str, backlog: int) -> socket.socket:
    """Returns a listening unix socket at `path`, in the place of one that was there.  It blocks: a process that shares
    it waits in accept.  Raises OSError, Invalid, Broken.
    """
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise Invalid("PATH", f"{path} is longer than a unix socket's path may be ({MAX_UNIX_PATH} bytes)")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        sock.bind(str(path))
        path.chmod(mode)
        if group:
            os.chown(path, -1, group_id(group))
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def group_id(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise Broken("CONFIG", f"there is no group {group!r}", f"addgroup --system {group}") from None
