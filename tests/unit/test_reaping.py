"""A process that a launcher forked, and its launcher, die at about the same time: nobody stays dead without being waited for."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, ctypes, os, signal, sys
from hsmvisor.host.forked import reap

PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
after = float(sys.argv[1])
told, tells = os.pipe()
launcher = os.fork()
if launcher == 0:
    worker = os.fork()
    if worker == 0:
        signal.pause()
    os.write(tells, str(worker).encode())
    signal.pause()
worker = int(os.read(told, 20))
pidfd = os.pidfd_open(worker)
before = len(os.listdir("/proc/self/fd"))

async def main():
    os.kill(worker, signal.SIGKILL)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    await ended.wait()
    loop.remove_reader(pidfd)
    if after < 0:
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
    reap(os.dup(pidfd))
    if after >= 0:
        await asyncio.sleep(after)
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
    for _ in range(500):
        if not os.path.exists(f"/proc/{worker}"):
            break
        await asyncio.sleep(0.01)
    else:
        raise SystemExit("it is dead, and nobody waited for it")

asyncio.run(main())
assert len(os.listdir("/proc/self/fd")) == before
"""


@pytest.mark.parametrize("after", [-1, 0, 0.6], ids=["the launcher before", "just after", "after the first try"])
def test_a_worker_whose_launcher_dies(after: float) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(after)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_one_that_its_launcher_waits_for_is_left_to_it() -> None:
    program = """
import asyncio, os
from hsmvisor.host import forked

forked.REAP_PAUSE = 0.01
before = len(os.listdir("/proc/self/fd"))

async def main():
    forked.reap(os.pidfd_open(os.getppid()), tries=3)  # nobody's child here
    await asyncio.sleep(0.3)

asyncio.run(main())
assert len(os.listdir("/proc/self/fd")) == before
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
