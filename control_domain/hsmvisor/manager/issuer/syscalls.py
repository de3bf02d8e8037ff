"""The system calls of the issuer and of its children; any other one is refused with EPERM (seccomp(2), by libseccomp through
pyseccomp)."""

from __future__ import annotations

import errno
import mmap
import socket
from typing import Any, Protocol

from hsmvisor.serving import syscalls

try:  # before it is confined
    import pyseccomp
except (ImportError, RuntimeError, OSError) as error:
    pyseccomp = None
    _missing = str(error)

#: What making, sealing and telling need: a child has nothing else.
WORKING = {
    "descriptors that it has": ("read", "write", "readv", "writev", "close", "fstat", "newfstatat", "lseek", "fcntl", "poll"),
    "memory": ("munmap", "mremap", "madvise", "brk"),
    "itself": (
        "futex", "set_robust_list", "rseq", "gettid", "getpid", "getppid", "sched_yield", "sched_getaffinity", "getuid", "geteuid",
        "getgid", "getegid", "uname", "sysinfo", "getrusage", "exit", "exit_group", "membarrier",
    ),
    "time and signals": (
        "clock_gettime", "clock_nanosleep", "nanosleep", "clock_getres", "gettimeofday", "rt_sigaction", "rt_sigprocmask",
        "rt_sigreturn", "sigaltstack", "restart_syscall",
    ),
    "randomness": ("getrandom",),
}  # fmt: skip

#: What the issuer needs besides: it hears its manager, forks, and a child gives up the rest.
FORKING = (
    "recvfrom", "sendto", "recvmsg", "sendmsg", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "pipe2", "close_range",
    "wait4", "waitid", "kill", "prctl", "prlimit64", "getrlimit", "setrlimit", "mlockall", "seccomp",
)  # fmt: skip

_CLONE_NEW = 0x7E020080  #: any new namespace

#: What nothing here needs, not even a maker's library.
REFUSED = {**syscalls.REFUSED, "programs": ("execve", "execveat")}


class Rules(Protocol):
    def load(self) -> None: ...


def allow_parent() -> str:
    """For an issuer without a token.  Raises OSError."""
    rules, number = _allowing()
    for name in FORKING:
        rules.add_rule(pyseccomp.ALLOW, name)
    rules.add_rule(pyseccomp.ALLOW, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_NEW, 0))
    # clone3 keeps its flags in memory, where a filter cannot look; libc then takes clone.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    rules.load()
    return f"{number + len(FORKING)} system calls allowed"


def for_children() -> Rules | None:
    """To be loaded by a child that asks no token; None: there is no libseccomp, as `allow_parent` and `refuse` say."""
    if pyseccomp is None:
        return None
    rules: Rules = _allowing()[0]
    return rules


def refuse(network: bool) -> str:
    """For an issuer with a token.  Raises OSError."""
    rules, number = syscalls.refusing(_library(), REFUSED)
    if not network:
        rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "socket", pyseccomp.Arg(0, pyseccomp.NE, socket.AF_UNIX))
    rules.load()
    return f"{number} system calls refused{'' if network else ', and all sockets but unix ones'}"


def _allowing() -> tuple[Any, int]:
    """Raises OSError."""
    rules = _library().SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    names = [name for group in WORKING.values() for name in group]
    for name in names:
        rules.add_rule(pyseccomp.ALLOW, name)
    for name in ("mmap", "mprotect"):  # all code is there: nothing becomes code
        rules.add_rule(pyseccomp.ALLOW, name, pyseccomp.Arg(2, pyseccomp.MASKED_EQ, mmap.PROT_EXEC, 0))
    return rules, len(names) + 2


def _library() -> Any:
    if pyseccomp is None:
        raise OSError(f"libseccomp cannot be loaded: {_missing}")
    return pyseccomp
