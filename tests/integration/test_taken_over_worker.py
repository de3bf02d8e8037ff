"""A worker in the hands of its guest reaches nothing of another module, of the host's files or of the control API.

It is a real one: forked by the launcher, booted, with its key, its user, its sandbox and its descriptors; then its guest sends it
Python, which runs inside (support/taken_over.py).  The same attempts succeed, or fail for another reason, in a process that is
not confined: so each of them is one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.certificates import new_key
from support.guest import Guest, library
from support.host import Host, Module
from support.host_process import SOURCES, wait_for
from support.processes import titled
from support.shell import Shell
from support.taken_over import TAKE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="workers have users of their own where the host is root")
ENDED = "ended by SIGSYS"
DEATHS = 3  #: a module that ended more often in a short time is given a rest


@dataclass
class Scene:
    """A host with an honest module, and as many others as are taken over."""

    host: Host
    honest: Module
    pid: int
    numbers: Iterator[int] = field(default_factory=itertools.count)
    taken: Module | None = None
    deaths: int = 0

    def attempt(self, source: str) -> str:
        """Returns what came of it inside a worker that was taken over."""
        if self.taken is None or self.deaths >= DEATHS:
            self.taken, self.deaths = self.host.create(f"taken-{next(self.numbers)}"), 0
            self.taken.push("own", new_key("p256"))
        worker = self.taken.serving().pid
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(self.taken.address.removeprefix("unix:path="))
            sock.sendall(TAKE + source.encode())
            sock.shutdown(socket.SHUT_WR)
            try:
                said = sock.recv(65536).decode()
            except ConnectionResetError:
                said = ""
        if said:
            return said
        self.deaths += 1
        log = self.host.process.log
        wait_for(lambda: f"worker {worker} ended" in log.read_text(), what="the end of the worker")
        wait_for(lambda: self.taken is not None and self.taken.serving(not_pid=worker))
        return re.findall(rf"worker {worker} (ended .*)", log.read_text())[-1]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    host = Host()
    host.process.module = "support.host_with_taken_over_workers"
    try:
        host.start()
        honest = host.create("honest")
        honest.push("web", new_key("p256"))
        scene = Scene(host, honest, honest.pid)
        yield scene
        assert (honest.pid, honest.status().restarts) == (scene.pid, 0), "the honest worker was disturbed"
        with Shell(Guest(library("ours"), honest.address, tmp_path_factory.mktemp("guest"))) as client:
            client.tell("sign", client.private("web"))
    finally:
        host.clean()


@pytest.fixture
def sleeper() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "100"])
    yield process.pid
    process.kill()
    process.wait()


FORKER = """
import json, os, sys
from support import taken_over
for line in sys.stdin:
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, taken_over.attempt(json.loads(line)).encode())
        os._exit(0)
    os.close(write)
    os.wait()
    print(json.dumps(os.read(read, 65536).decode()), flush=True)
    os.close(read)
"""


@pytest.fixture(scope="module")
def unconfined() -> Iterator[Callable[[str], str]]:
    """Makes an attempt in a process of its own that nothing confines."""
    environment = os.environ | {"PYTHONPATH": SOURCES}
    with subprocess.Popen(
        [sys.executable, "-c", FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as forker:
        assert forker.stdin is not None and forker.stdout is not None
        asks, answers = forker.stdin, forker.stdout

        def attempt(source: str) -> str:
            asks.write(json.dumps(source) + "\n")
            asks.flush()
            return str(json.loads(answers.readline()))

        yield attempt


def refused(outcome: str) -> bool:
    return outcome == ENDED or outcome.startswith("PermissionError")


def test_it_is_taken_over(scene: Scene) -> None:
    """What runs is inside: it has the module's user, its key, and nothing but its own descriptors."""
    uid = int(scene.attempt("said = os.getuid()"))
    assert 460_000 < uid < 470_000
    assert scene.attempt("said = list(owned('Token').index.state.materials)") == "['own']"
    assert scene.attempt("said = owned('Link').phase") == "serving"


# ---- descriptors that it has ----------------------------------------------------------------------------------------


def descriptors(pid: int) -> set[str]:
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def test_it_shares_no_descriptor_but_the_log(scene: Scene) -> None:
    scene.attempt("")
    assert scene.taken is not None
    worker, host = scene.taken.pid, scene.host
    helpers = [titled(host.pid(), f"hsmvisord: {name}") for name in ("launcher", "key provider")]
    shared = {"/dev/null", str(host.process.log), "anon_inode:[eventpoll]", "anon_inode:[pidfd]"}
    for other in (scene.pid, *helpers):
        assert descriptors(worker) & descriptors(other) <= shared
    own = {link for link in descriptors(worker) & descriptors(host.pid()) if link.startswith("socket:")}
    assert len(own) == 1, "the supervisor keeps its guest listener, and nothing else"


def test_it_can_neither_write_nor_cut_the_log(scene: Scene) -> None:
    log = scene.host.process.log
    size = log.stat().st_size
    assert scene.attempt("fcntl.fcntl(2, fcntl.F_SETFL, 0)\nos.lseek(2, 0, 0)\nos.write(2, b'forged')") == "OSError 27"  # EFBIG
    assert scene.attempt("os.ftruncate(2, 0)") == ENDED
    assert b"forged" not in log.read_bytes() and log.stat().st_size >= size


# ---- files, sockets, the control API --------------------------------------------------------------------------------

FILES = ["state/state.db", "state/master.key", "state/host.key", "state/audit.log", "state/lock", "run/control.sock", "log"]
OPENINGS = {
    "open": "os.open({path!r}, os.O_RDONLY)",
    "write": "os.open({path!r}, os.O_WRONLY)",
    "openat2": "syscall(437, -100, {path!r}.encode(), bytes(24), 24)",
    "stat": "os.stat({path!r})",
    "list": "os.listdir(os.path.dirname({path!r}))",
    "remove": "os.unlink({path!r} + '.not')",
    "name": "syscall(303, -100, {path!r}.encode(), bytes(200), bytes(8), 0)",  # name_to_handle_at
}


def own_path(scene: Scene, file: str) -> str:
    return str(scene.host.process.directory / file)


@pytest.mark.parametrize("file", FILES)
def test_no_file_of_the_host(scene: Scene, file: str) -> None:
    path = own_path(scene, file)
    assert Path(path).exists()
    assert refused(scene.attempt(OPENINGS["open"].format(path=path)))
    assert refused(scene.attempt(OPENINGS["write"].format(path=path)))


@pytest.mark.parametrize("how", OPENINGS)
def test_no_way_to_a_file(scene: Scene, unconfined: Callable[[str], str], how: str) -> None:
    source = OPENINGS[how].format(path=own_path(scene, "state/master.key"))
    assert not refused(unconfined(source)), "no attempt at all"
    assert refused(scene.attempt(source))


REACHING = {
    "the control API": "socket.socket(socket.AF_UNIX).connect({control!r})",
    "another module's guest socket": "socket.socket(socket.AF_UNIX).connect({guest!r})",
    "another worker's control socket": "socket.socket(socket.AF_UNIX).connect({worker!r})",
    "a socket that it has, elsewhere": "owned('Link')._sock.connect({control!r})",
    "a listener that it has, elsewhere": "owned('Listener')._sock.connect({control!r})",
    "a socket that it has, made anew": "syscall(42, owned('Link')._sock.fileno(), bytes(16), 16)",  # connect(AF_UNSPEC)
    "a socket that it has, bound": "owned('Link')._sock.bind('\\0hsmvisor-escaped')",
    "the control API by TCP": "socket.create_connection(('127.0.0.1', {port}))",
    "datagrams to anybody": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '/dev/log')",
    "the hypervisor": "socket.socket(40, socket.SOCK_STREAM)",
    "the kernel": "socket.socket(16, socket.SOCK_RAW, 0)",
}


@pytest.mark.parametrize("what", REACHING)
def test_nobody_to_talk_to(scene: Scene, unconfined: Callable[[str], str], what: str) -> None:
    run = scene.host.process.run
    worker = next(path for path in (run / "workers").glob("*.sock"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        values = {
            "control": str(run / "control.sock"),
            "guest": scene.honest.address.removeprefix("unix:path="),
            "worker": str(worker),
            "port": listening.getsockname()[1],
        }
        source = REACHING[what].format(**values)
        if "owned" not in source:
            assert not refused(unconfined(source)), "no attempt at all"
            with contextlib.suppress(TimeoutError):
                listening.accept()[0].close()
        assert refused(scene.attempt(source))
        with pytest.raises(TimeoutError):
            listening.accept()


def test_a_datagram_has_no_other_address(scene: Scene) -> None:
    control = own_path(scene, "run/control.sock")
    assert scene.attempt(f"owned('Link')._sock.sendto(b'x', {control!r})") in ("OSError 106", "OSError 95")  # EISCONN, EOPNOTSUPP


# ---- other processes ------------------------------------------------------------------------------------------------

TOUCHING = {
    "trace": "syscall(101, 0x4206, {pid}, 0, 0)",  # PTRACE_SEIZE
    "read memory": "syscall(310, {pid}, bytes(16), 0, bytes(16), 0, 0)",  # process_vm_readv
    "write memory": "syscall(311, {pid}, bytes(16), 0, bytes(16), 0, 0)",  # process_vm_writev
    "open its memory": "os.open('/proc/{pid}/mem', os.O_RDONLY)",
    "list its descriptors": "os.listdir('/proc/{pid}/fd')",
    "read its command line": "os.open('/proc/{pid}/cmdline', os.O_RDONLY)",
    "hold it": "os.pidfd_open({pid})",
    "take a descriptor": "syscall(438, os.pidfd_open({pid}), 0, 0)",  # pidfd_getfd
    "signal": "os.kill({pid}, 0)",
    "signal a thread": "syscall(234, {pid}, {pid}, 0)",  # tgkill
    "queue a signal": "syscall(129, {pid}, 0, bytes(8) + bytes([255]) * 4 + bytes(116))",  # rt_sigqueueinfo
    "limits": "syscall(302, {pid}, 7, 0, bytes(16))",  # prlimit64(RLIMIT_NOFILE)
    "priority": "os.setpriority(os.PRIO_PROCESS, {pid}, 5)",
    "processors": "os.sched_setaffinity({pid}, {{0}})",
    "compare": "syscall(312, {pid}, {pid}, 2, 0, 0)",  # kcmp
    "advise": "syscall(440, os.pidfd_open({pid}), bytes(16), 0, 21, 0)",  # process_madvise
}


@pytest.mark.parametrize("how", TOUCHING)
def test_no_hand_on_another_process(scene: Scene, unconfined: Callable[[str], str], sleeper: int, how: str) -> None:
    assert not refused(unconfined(TOUCHING[how].format(pid=sleeper))), "no attempt at all"
    supervisor = scene.host.pid()
    helpers = [titled(supervisor, f"hsmvisord: {name}") for name in ("launcher", "key provider")]
    by_argument = how in ("signal a thread", "limits")  # calls that the filter lets pass for the process itself
    for pid in (scene.pid, supervisor, *(helpers if by_argument else [])):
        assert refused(scene.attempt(TOUCHING[how].format(pid=pid))), pid


def test_no_signal_by_way_of_a_descriptor(scene: Scene) -> None:
    """A descriptor that is asynchronous signals its owner, and the owner may be named: the kernel looks at the user again."""
    for pid in (scene.pid, scene.host.pid()):
        source = f"""
a, b = os.pipe()
for f in (a, b): fcntl.fcntl(f, fcntl.F_SETOWN, {pid}); fcntl.fcntl(f, 10, 9); fcntl.fcntl(f, fcntl.F_SETFL, os.O_ASYNC)
os.write(b, b"x"); os.read(a, 1)
"""
        assert scene.attempt(source) in ("done", "PermissionError 1")
    time.sleep(0.1)
    assert scene.honest.pid == scene.pid and scene.host.process.process is not None
    assert scene.host.process.process.poll() is None


# ---- itself ---------------------------------------------------------------------------------------------------------

BECOMING = {
    "root": "os.setuid(0)",
    "another user": "os.setresuid(460000, 460000, 460000)",
    "another program": "os.execv('/bin/true', ['true'])",
    "two processes": "os._exit(0) if os.fork() == 0 else None",
    "dumpable": "syscall(157, 4, 1)",
    "capable": "syscall(126, bytes(8), bytes(24))",
    "in a name space": "syscall(272, 0x10000000)",
    "new code": "mmap.mmap(-1, 4096, prot=7)",
    "changed code": "syscall(10, ctypes.addressof(ctypes.c_char.from_buffer(mmap.mmap(-1, 4096))), 4096, 5)",
    "without limits": "syscall(302, 0, 1, bytes([255]) * 16, 0)",
    "io_uring": "syscall(425, 8, bytes(120))",
    "bpf": "syscall(321, 0, bytes(64), 64)",
    "a key ring": "syscall(250, 0, -3, 0, 0, 0)",
    "shared memory": "syscall(29, 0, 4096, 0o1600)",
    "a file in memory": "os.memfd_create('x')",
}


@pytest.mark.parametrize("what", BECOMING)
def test_it_stays_what_it_is(scene: Scene, what: str) -> None:
    assert refused(scene.attempt(BECOMING[what])), what


# ---- the internal protocol ------------------------------------------------------------------------------------------

LIES = {
    "another's storage key": "messages.DeriveKey(bytes(16))",
    "a process": "messages.Spawn(b'', 'x', 0, 0, ())",
    "a command to itself": "messages.Execute('', b'')",
    "a shutdown": "messages.Shutdown(0)",
    "a state of its own, as a notification": "messages.StoreState(9, '', b'', (), (), ())",
}


@pytest.mark.parametrize("what", LIES)
def test_what_it_may_not_say_ends_it(scene: Scene, what: str) -> None:
    source = f"""
import sys
messages, frames = sys.modules["hsmvisor_rpc.internal.messages"], sys.modules["hsmvisor_rpc.internal.frames"]
link, record = owned("Link"), {LIES[what]}
kind = frames.Kind.NOTIFICATION if record.TYPE == "store-state" else frames.Kind.REQUEST
link._send(link._sock, frames.Frame(0, kind, record.encode()), [])
import time; time.sleep(5)
"""
    assert scene.attempt(source) == "ended by SIGKILL"
    assert scene.taken is not None
    name = scene.taken.name
    wait_for(lambda: [line for line in scene.host.process.audit_lines() if "worker.violation" in line and name in line])


def test_its_state_is_its_own(scene: Scene) -> None:
    """What it stores is stored under its own module; another's name in it changes nothing of that one."""
    before = scene.honest.material("web")
    source = """
import sys
messages = sys.modules["hsmvisor_rpc.internal.messages"]
link = owned("Link")
version = link._stored_version + 1
link.store(messages.StoreState(version, "", b"", ("state", "../honest", "manifest"), (b"x", b"x", b"x"), ("root",)))
"""
    assert scene.attempt(source) == "done"
    scene.host.process.restart()
    scene.honest.serving()
    assert scene.honest.material("web") == before and scene.honest.pid == scene.pid
    scene.taken = None  # its own state is lost: it harmed itself
