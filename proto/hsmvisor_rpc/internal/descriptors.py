"""Bytes that come with open files (unix(7), SCM_RIGHTS)."""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Sequence

_READ = 1 << 16


def receive(sock: socket.socket, most: int) -> tuple[bytes, list[int]]:
    """Returns what came, and its descriptors: at most `most`, close-on-exec, the caller's to close.  No bytes: the end.

    Raises OSError.
    Not `socket.recv_fds`, which drops its flags in Python 3.11, so that descriptors would pass to programs that are started.
    """
    data, ancillary, _, _ = sock.recvmsg(_READ, socket.CMSG_SPACE(4 * most), socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return data, list(descriptors)


def close_descriptors(descriptors: Sequence[int]) -> None:
    """Closes those that are there; a negative one is none."""
    for descriptor in descriptors:
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)
