"""The system calls that a worker and a TPM's process need; any other ends them (seccomp(2), by libseccomp through pyseccomp)."""

from __future__ import annotations

import errno
import mmap
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

try:  # before the fork: a confined worker opens no file
    import pyseccomp
except (ImportError, RuntimeError, OSError) as error:
    pyseccomp = None
    _missing = str(error)

#: By purpose.  No open, no exec, no socket, no connect, no ptrace: what it needs, it has been handed.
ALLOWED = {
    "descriptors that it has": (
        "read", "write", "readv", "writev", "recvfrom", "sendto", "recvmsg", "sendmsg", "close", "fstat", "newfstatat", "lseek",
        "fcntl", "dup", "poll", "ppoll", "select", "pselect6", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait",
        "accept4", "accept", "shutdown", "getsockopt", "setsockopt", "getsockname", "getpeername", "ioctl", "eventfd2", "pipe2",
    ),
    "memory": ("munmap", "mremap", "madvise", "brk", "mlock", "mlock2", "munlock"),
    "threads": (
        "futex", "set_robust_list", "rseq", "gettid", "getpid", "sched_yield", "sched_getaffinity",
        "exit", "exit_group", "membarrier",
    ),
    "time and signals": (
        "clock_gettime", "clock_nanosleep", "nanosleep", "clock_getres", "gettimeofday", "rt_sigaction", "rt_sigprocmask",
        "rt_sigreturn", "sigaltstack", "restart_syscall",
    ),
    "randomness": ("getrandom",),
    "itself": ("getuid", "geteuid", "getgid", "getegid", "uname", "sysinfo", "getrusage"),
}  # fmt: skip

OF_TPM_ALONE = ("sendmmsg",)  #: which notes in memory what it has sent (plain.c)
#: What a TPM's process needs: libtpms parses a guest's bytes in C, and computes; connections come to it as descriptors.
ALLOWED_TPM = {
    "descriptors that it has": (
        "read", "write", "recvfrom", "sendto", "recvmsg", "sendmsg", *OF_TPM_ALONE, "close", "fstat", "newfstatat", "lseek",
        "fcntl", "dup", "poll", "ppoll", "accept4", "shutdown", "getsockopt", "setsockopt", "getsockname", "eventfd2",
    ),
    "memory": ALLOWED["memory"],
    "threads": (*ALLOWED["threads"], "getrusage"),
    "time and signals": ALLOWED["time and signals"],
    "randomness": ALLOWED["randomness"],
    "itself": ("getuid", "geteuid", "getgid", "getegid"),
}  # fmt: skip

FIONBIO = 0x5421  #: ioctl(2): a socket that waits, or not (asm-generic/ioctls.h)
CLONE_THREAD = 0x10000  #: clone(2): a thread of this process, never another process
CLONE_NEW = 0x7E020080  #: any new namespace

#: What the launcher needs besides: it forks, and a child makes itself a worker.
LAUNCHING = (
    "openat", "getdents64", "close_range", "wait4", "waitid", "pidfd_open", "getppid", "setgroups", "setresgid", "setresuid",
    "capset", "capget", "prctl", "prlimit64", "setrlimit", "getrlimit", "seccomp", "mmap", "mprotect", "tgkill",
    "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self",
    "sched_setattr", "sched_getattr", "setpriority", "getpriority",
)  # fmt: skip

#: Asked for by libraries that bear a refusal: answered EPERM instead of the process's end.
REFUSED = ("openat", "open", "readlink", "readlinkat", "access", "faccessat", "faccessat2", "stat", "statx", "getcwd", "socket")


def load() -> str:
    """Loads the worker's filter for this process and all its threads; raises OSError."""
    rules, count = _allowing(_library().KILL_PROCESS, ALLOWED)
    _allow_streams(rules)
    _confine(rules)
    return f"{count} system calls allowed"


def load_for_tpm() -> str:
    """The filter of a TPM's process; raises OSError."""
    rules, count = _allowing(_library().KILL_PROCESS, ALLOWED_TPM)
    rules.add_rule(pyseccomp.ALLOW, "ioctl", pyseccomp.Arg(1, pyseccomp.EQ, FIONBIO))
    _confine(rules)
    return f"{count} system calls allowed"


def _confine(rules: Any) -> None:
    """Threads and memory without code; what libraries try and can do without is refused."""
    of, masked, equal = pyseccomp.Arg, pyseccomp.MASKED_EQ, pyseccomp.EQ
    rules.add_rule(pyseccomp.ALLOW, "clone", of(0, masked, CLONE_THREAD, CLONE_THREAD))
    for name in ("mmap", "mprotect"):  # all code is there: nothing becomes code
        rules.add_rule(pyseccomp.ALLOW, name, of(2, masked, mmap.PROT_EXEC, 0))
    rules.add_rule(pyseccomp.ALLOW, "prlimit64", of(0, equal, 0))  # its own limits, its own threads
    rules.add_rule(pyseccomp.ALLOW, "tgkill", of(0, equal, os.getpid()))
    for name in REFUSED:
        rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
    rules.load()


def load_for_launcher() -> str:
    """What is not allowed is refused: its children have this filter too, beside their own stricter ones.  Raises OSError."""
    rules, count = _allowing(_library().ERRNO(errno.EPERM), ALLOWED | {"of a TPM's process": OF_TPM_ALONE})
    for name in LAUNCHING:
        rules.add_rule(pyseccomp.ALLOW, name)
    _allow_streams(rules)
    rules.add_rule(pyseccomp.ALLOW, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, CLONE_NEW, 0))
    rules.load()
    return f"{count + len(LAUNCHING)} system calls allowed"


def _allowing(otherwise: Any, allowed: Mapping[str, Sequence[str]]) -> tuple[Any, int]:
    rules = pyseccomp.SyscallFilter(otherwise)
    names = [name for group in allowed.values() for name in group]
    for name in names:
        rules.add_rule(pyseccomp.ALLOW, name)
    # clone3 keeps its flags in memory, where a filter cannot look; libc then takes clone.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    return rules, len(names)


def _allow_streams(rules: Any) -> None:
    """A stream of a device: both ends are the worker's, and unlike a datagram socket it sends to nobody else (sendto)."""
    stream = socket.SOCK_STREAM | socket.SOCK_CLOEXEC
    of = pyseccomp.Arg
    rules.add_rule(pyseccomp.ALLOW, "socketpair", of(0, pyseccomp.EQ, socket.AF_UNIX), of(1, pyseccomp.EQ, stream))


def _library() -> Any:
    if pyseccomp is None:
        raise OSError(f"libseccomp cannot be loaded: {_missing}")
    return pyseccomp
