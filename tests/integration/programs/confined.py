"""Confines itself as a worker does, or a TPM's process, then tries one forbidden thing.  Prints `done` when it was allowed.
Arguments: "worker" or "tpm", and its name.

What was prepared before the confinement (descriptors, libraries) stays usable, as in a worker.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hsmvisord.confined import sandbox, seccomp

UID = 460_999
libc = ctypes.CDLL(None, use_errno=True)
parent = os.getppid()


def call(number: int, *arguments: int) -> None:
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")


FORBIDDEN: dict[str, Callable[[], object]] = {
    "read a file": lambda: Path("/etc/hostname").read_text(),
    "read a secret of the host": lambda: Path("/etc/shadow").read_bytes(),
    "write a file": lambda: Path("/tmp/hsmvisor-escaped").write_text("x"),
    "list a directory": lambda: os.listdir("/"),
    "make a TCP socket": lambda: socket.socket(socket.AF_INET),
    "make a unix socket": lambda: socket.socket(socket.AF_UNIX),
    "make a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "run a program": lambda: subprocess.run(["/bin/true"], check=True),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "fork": lambda: os._exit(0) if os.fork() == 0 else None,
    "trace its parent": lambda: call(101, 16, parent, 0, 0),  # ptrace(PTRACE_ATTACH)
    "read its parent's memory": lambda: call(310, parent, 0, 0, 0, 0, 0),  # process_vm_readv
    "signal its parent": lambda: os.kill(parent, 0),
    "become root": lambda: os.setuid(0),
    "mount": lambda: call(165, 0, 0, 0, 0, 0),
    "load a module": lambda: call(175, 0, 0, 0),
    "use bpf": lambda: call(321, 0, 0, 0),
    "make a namespace": lambda: call(272, 0x10000000),  # unshare(CLONE_NEWUSER)
    "use io_uring": lambda: call(425, 8, 0),
    "use a key ring": lambda: call(250, 0, 0, 0),
    "set the clock": lambda: call(227, 0, 0),
    "be dumpable again": lambda: call(157, 4, 1),
}

#: What a worker must still be able to do.
ALLOWED: dict[str, Callable[[], object]] = {
    "sign": lambda: __import__("hsmvisord.crypto.software"),
    "draw randomness": lambda: os.urandom(32),
    "start a thread": lambda: __import__("threading").Thread(target=int).start(),
}


#: What a worker may, and a TPM's process may not.
TPM_FORBIDDEN: dict[str, Callable[[], object]] = {
    "make a pipe": os.pipe,
    "connect a socket": lambda: socket.socketpair(),
}

pair = socket.socketpair()
answered = ctypes.create_string_buffer(64)  # struct mmsghdr, of nothing


def answer() -> None:
    """What a TPM's process answers by, and notes so (plain.c)."""
    if libc.sendmmsg(pair[0].fileno(), answered, 1, 0) != 1:
        raise OSError(ctypes.get_errno(), "refused")


#: What a TPM's process must still be able to do, and a worker must not.
TPM_ALLOWED: dict[str, Callable[[], object]] = {"answer": answer}

FILTERS = {"worker": seccomp.load, "tpm": seccomp.load_for_tpm}


def main(who: str, name: str) -> None:
    seccomp.load_for_launcher()  # which forks them
    measures = sandbox.enter(UID if os.geteuid() == 0 else 0, calls=FILTERS[who])
    missing = [m["name"] for m in measures if not m["applied"]]
    print("missing:", ",".join(missing), flush=True)
    (FORBIDDEN | TPM_FORBIDDEN | ALLOWED | TPM_ALLOWED)[name]()
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
