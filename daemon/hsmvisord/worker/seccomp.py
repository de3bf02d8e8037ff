"""The system calls that a serving worker needs; any other one ends it (seccomp(2), by libseccomp through pyseccomp)."""

from __future__ import annotations

import errno

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
    "memory": ("mmap", "munmap", "mremap", "mprotect", "madvise", "brk", "mlock", "mlock2", "munlock"),
    "threads": (
        "futex", "set_robust_list", "rseq", "gettid", "getpid", "sched_yield", "sched_getaffinity",
        "exit", "exit_group", "tgkill", "membarrier", "prlimit64",
    ),
    "time and signals": (
        "clock_gettime", "clock_nanosleep", "nanosleep", "clock_getres", "gettimeofday", "rt_sigaction", "rt_sigprocmask",
        "rt_sigreturn", "sigaltstack", "restart_syscall",
    ),
    "randomness": ("getrandom",),
    "itself": ("getuid", "geteuid", "getgid", "getegid", "uname", "sysinfo", "getrusage"),
}  # fmt: skip

CLONE_THREAD = 0x10000  #: clone(2): a thread of this process, never another process

#: Asked for by libraries that bear a refusal: answered EPERM instead of the process's end.
REFUSED = ("openat", "open", "readlink", "readlinkat", "access", "faccessat", "faccessat2", "stat", "statx", "getcwd", "socket")


def load() -> str:
    """Loads the filter for this process and all its threads; raises OSError."""
    if pyseccomp is None:
        raise OSError(f"libseccomp cannot be loaded: {_missing}")
    rules = pyseccomp.SyscallFilter(pyseccomp.KILL_PROCESS)
    count = 0
    for names in ALLOWED.values():
        for name in names:
            rules.add_rule(pyseccomp.ALLOW, name)
            count += 1
    rules.add_rule(pyseccomp.ALLOW, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, CLONE_THREAD, CLONE_THREAD))
    # clone3 keeps its flags in memory, where a filter cannot look; libc then takes clone.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    for name in REFUSED:
        rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
    rules.load()
    return f"{count} system calls allowed"
