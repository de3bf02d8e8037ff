"""Commands that plain.c answers without the interpreter: which, when, and what a successor of the process would know of them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hsmvisor_rpc.internal.phases import TPM_BUSY_SIZE
from hsmvisord import limits
from hsmvisord.tpm import guard, library
from hsmvisord.tpm.blobs import Blobs
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.tpm.library import ffi
from hsmvisord.tpm.managed import _FOLLOWED, State
from hsmvisord.tpm.plain import MAX_FOLLOWED, Left, Plain
from hsmvisord.tpm.seals import Seals
from hsmvisord.tpm.server import Server
from hsmvisord.tpm.stream import Busy
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, HEAD, LOCKOUT, OWNER, PLATFORM, Code
from support.cryptoki import REPOSITORY
from support.tpm_guest import DIGEST, HANDLE, Guest, Machine, Soon, started, verify
from support.tpm_qemu import exactly

machine = pytest.fixture(started)

GET_RANDOM, PCR_RESET, RC_LOCALITY = 0x17B, 0x13D, 0x907
RANDOM = HEAD.pack(tpm2.NO_SESSIONS, 12, GET_RANDOM) + struct.pack(">H", 16)
WITHIN = 20.0
SOURCES = REPOSITORY / "daemon/hsmvisord/tpm"


class Connection:
    """Of a guest whose commands have come."""

    def __init__(self, machine: Machine) -> None:
        self.managed = machine.managed
        self.ours, self.theirs = socket.socketpair()
        self.page = mmap.mmap(-1, TPM_BUSY_SIZE)

    def serve(self, said: bytes = b"", locality: int = 0) -> Left:
        if said:
            self.ours.sendall(said)
        return self.managed.process_plain(self.theirs, self.page, lambda: locality)

    def answered(self) -> bytes:
        try:
            return self.ours.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""

    def waits(self, said: bytes) -> bool:
        """Says whether that was not taken; it is now."""
        try:
            return self.theirs.recv(1 << 16, socket.MSG_DONTWAIT) == said
        except BlockingIOError:
            return False


@pytest.fixture
def connection(machine: Machine) -> Iterator[Connection]:
    connection = Connection(machine)
    yield connection
    connection.ours.close()
    connection.theirs.close()


def command(code: int, *handles: int, tag: int = tpm2.NO_SESSIONS) -> bytes:
    body = struct.pack(f">{len(handles)}I", *handles)
    return HEAD.pack(tag, HEAD.size + len(body), code) + body


# ---- which -------------------------------------------------------------------------------------------------------------------


def test_what_nobody_has_to_look_at_is_answered(machine: Machine, connection: Connection) -> None:
    assert connection.serve(RANDOM) == Left()
    assert HEAD.unpack_from(answer := connection.answered()) == (tpm2.NO_SESSIONS, 28, 0) and len(answer) == 28
    assert connection.page[:] == bytes(TPM_BUSY_SIZE)
    key, soon = machine.deliver(), Soon(machine.managed)
    verify(key, DIGEST, Guest(soon.process).sign(HANDLE, DIGEST)[1])
    assert soon.plain == 1


@pytest.mark.parametrize("code", sorted(_FOLLOWED), ids=lambda code: Code(code).name)
def test_what_is_followed_is_the_interpreters(connection: Connection, code: int) -> None:
    told = command(code, LOCKOUT, tag=tpm2.SESSIONS)
    assert connection.serve(told) == Left(taken=told)
    assert connection.answered() == b""


def test_so_is_whatever_begins_with_the_platform(connection: Connection) -> None:
    """All that guard.refusal refuses is of these."""
    for code in range(0x11F, 0x1A0):
        told = command(code, PLATFORM)
        assert connection.serve(told) == Left(taken=told)
        assert not guard.refusal(command(code, OWNER, PLATFORM))
    assert connection.answered() == b""


@pytest.mark.parametrize("name", ["SET_PRIMARY_POLICY", "EVICT_CONTROL", "CHANGE_PPS"])
def test_a_code_that_is_refused_there_is_the_tpms_elsewhere(connection: Connection, name: str) -> None:
    assert guard.refusal(command(Code[name], PLATFORM)), "the test before is about these"
    assert connection.serve(command(Code[name], OWNER, 0x80000000)) == Left()
    assert connection.answered()


@pytest.mark.parametrize(
    "said",
    [RANDOM[:1], RANDOM[:9], RANDOM[:-1], RANDOM + b"\0", RANDOM * 2, RANDOM[:2] + bytes(4) + RANDOM[6:], b"\0" * 4096],
    ids=["a byte", "no head", "not whole", "more", "two", "of no bytes", "zeros"],
)
def test_what_does_not_come_alone_and_whole_is_the_interpreters(connection: Connection, said: bytes) -> None:
    assert connection.serve(said) == Left(taken=said)
    assert connection.answered() == b""
    assert connection.page[: len(said)] == b"\1" + bytes(len(said) - 1), "taken, and nothing of it is left there"


@pytest.mark.parametrize("more", [0, 1])
def test_the_largest_one(connection: Connection, more: int) -> None:
    size = limits.MAX_TPM_COMMAND + more
    said = HEAD.pack(tpm2.NO_SESSIONS, size, GET_RANDOM).ljust(size, b"\0")
    left = connection.serve(said)
    assert left.taken == (said[: limits.MAX_TPM_COMMAND] if more else b"")
    assert bool(connection.answered()) != bool(more)


def test_a_head_alone(connection: Connection) -> None:
    assert connection.serve(command(GET_RANDOM)) == Left()
    assert HEAD.unpack_from(connection.answered())[2] != 0


# ---- when --------------------------------------------------------------------------------------------------------------------


def asleep(machine: Machine) -> None:
    machine.guest.shutdown(tpm2.STATE)
    assert machine.managed.state is State.ASLEEP


def late(machine: Machine) -> None:
    machine.managed._late = True


def barred(machine: Machine) -> None:
    machine.managed._barred = guard.Handles()


def handed_over(machine: Machine) -> None:
    machine.managed.freeze()


def off(machine: Machine) -> None:
    machine.managed.switch_off()


def off_without_a_word(machine: Machine) -> None:
    machine.managed.tpm.switch_off()


@pytest.mark.parametrize("but", [asleep, late, barred, handed_over, off, off_without_a_word])
def test_where_there_is_more_to_do_none_is_taken(machine: Machine, connection: Connection, but: Callable[[Machine], None]) -> None:
    but(machine)
    assert connection.serve(RANDOM) == Left()
    assert connection.answered() == b"" and connection.waits(RANDOM)


def test_nor_while_somebody_waits(machine: Machine, connection: Connection) -> None:
    with machine.managed.tpm.held_off(), machine.managed.tpm.held_off():
        assert connection.serve(RANDOM) == Left()
    assert connection.answered() == b"" and connection.waits(RANDOM)
    connection.serve(RANDOM)
    assert connection.answered()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for a next command as long as nobody wants it to stop."""
    monkeypatch.setattr(limits, "SPIN", 3 * WITHIN)


def test_who_manages_it_has_its_turn(machine: Machine, connection: Connection, patient: None) -> None:
    serving = threading.Thread(target=connection.serve, daemon=True)
    began = time.monotonic()
    serving.start()
    connection.ours.sendall(RANDOM)
    connection.ours.settimeout(WITHIN)
    assert connection.ours.recv(4096), "it serves"
    assert machine.managed.names() == {}
    serving.join(WITHIN)
    assert not serving.is_alive() and time.monotonic() < began + WITHIN


def test_so_has_who_parts(machine: Machine, patient: None) -> None:
    server, (ours, theirs) = Server(machine.managed, Seals(Blobs(bytes(32), bytes(16))), print), socket.socketpair()
    ours.settimeout(WITHIN)
    began = time.monotonic()
    server.start_commands(theirs, Busy())
    for _ in range(3):
        ours.sendall(RANDOM)
        assert ours.recv(4096)
    with server.parting():
        ours.sendall(RANDOM)
    assert time.monotonic() < began + WITHIN
    ours.settimeout(0.3)
    with pytest.raises(TimeoutError):
        ours.recv(4096)  # its successor answers it
    theirs.close()
    ours.close()


def test_the_locality_is_read_in_its_turn(machine: Machine, connection: Connection) -> None:
    seen = []

    def locality() -> int:
        seen.append(machine.managed._lock._is_owned())  # type: ignore[attr-defined]
        return 0

    machine.managed.process_plain(connection.theirs, connection.page, locality)
    assert seen == [True]


@pytest.mark.parametrize(("locality", "result"), [(0, RC_LOCALITY), (2, 0)])
def test_the_guests_locality(connection: Connection, locality: int, result: int) -> None:
    reset = tpm2.command(Code.STARTUP, (20,), b"", EMPTY_PASSWORD)
    told = reset[:6] + struct.pack(">I", PCR_RESET) + reset[10:]
    assert connection.serve(told, locality) == Left()
    assert HEAD.unpack_from(connection.answered())[2] == result


def test_one_that_has_gone(connection: Connection) -> None:
    connection.ours.close()
    assert connection.serve() == Left()


@pytest.mark.slow
@pytest.mark.parametrize("place", [(), ("alone",)], ids=["apart", "alone"])
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_with_sanitizers(sanitizer: str, place: tuple[str, ...], tmp_path: Path) -> None:
    program = tmp_path / "stress"
    build = [
        "gcc", "-std=gnu11", "-g", "-O1", f"-fsanitize={sanitizer}", "-Wall", "-Wextra", "-Werror", "-o", program,
        f"-I{SOURCES}", "-Wl,--wrap=poll", REPOSITORY / "tests/support/plain_stress.c", SOURCES / "plain.c", "-pthread",
    ]  # fmt: skip
    for words in (build, [program, "20000", *place]):
        ran = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)
        assert ran.returncode == 0, ran.stdout[-6000:]


# ---- libtpms, as it does not do it -----------------------------------------------------------------------------------------


_Bytes, _Number = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_uint32)
#: By ctypes: cffi has its callbacks in pages that library.py lets nobody write any more.
_PROCESS = ctypes.CFUNCTYPE(ctypes.c_uint32, _Bytes, _Number, _Number, ctypes.c_void_p, ctypes.c_uint32)


class Made:
    """Plain commands of what is no libtpms."""

    def __init__(self, answer: Callable[[bytes], bytes | int]) -> None:
        lib, libc = library.load().plain, library.load().c

        def process(response: Any, size: Any, room: Any, said: int, length: int) -> int:
            made = answer(ctypes.string_at(said, length))
            if isinstance(made, int):
                return made
            libc.free(ffi.cast("void *", response[0] or 0))
            where = libc.malloc(len(made))
            ffi.memmove(where, made, len(made))
            response[0], size[0] = int(ffi.cast("uintptr_t", where)), len(made)
            return 0

        self._kept = _PROCESS(process)
        self.plain = Plain(lib, ctypes.cast(self._kept, ctypes.c_void_p).value, ())
        self.ours, self.theirs = socket.socketpair()
        self.page = mmap.mmap(-1, TPM_BUSY_SIZE)

    def serve(self) -> Left:
        self.ours.sendall(RANDOM)
        return self.plain.serve(self.theirs, self.page)


def test_a_command_is_known_as_taken_while_it_is_answered() -> None:
    seen = []

    def answer(said: bytes) -> bytes:
        seen.append((said, made.page[: len(RANDOM)]))
        return b"yes"

    made = Made(answer)
    assert made.serve() == Left() and made.ours.recv(100) == b"yes"
    assert seen == [(RANDOM, b"\1" + bytes(len(RANDOM) - 1))] and made.page[0] == 0


@pytest.mark.parametrize("size", [100, 4000])
def test_a_guest_that_does_not_read(size: int) -> None:
    made = Made(lambda said: bytes(size))
    made.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    answers = 0
    while not (left := made.serve()).unsent:
        answers += 1
        assert answers < 10_000
    assert made.page[0] == 1, "it is not answered yet"
    received = 0
    made.ours.setblocking(False)
    try:
        while True:
            received += len(made.ours.recv(1 << 16))
    except BlockingIOError:
        pass
    assert received + len(left.unsent) == (answers + 1) * size


def test_a_fault_is_told() -> None:
    made = Made(lambda said: 9)
    with pytest.raises(TpmFault, match="0x9"):
        made.serve()
    with pytest.raises(TpmFault, match="0x9"):
        made.plain.answer(RANDOM)


@pytest.mark.parametrize("more", [0, 1])
def test_as_many_codes_as_it_follows(more: int) -> None:
    lib, process = library.load().plain, ffi.addressof(library.load().tpms, "TPMLIB_Process")
    codes = range(0x120, 0x120 + MAX_FOLLOWED + more)
    if more:
        with pytest.raises(ValueError, match=f"{MAX_FOLLOWED + 1} codes"):
            Plain(lib, process, codes)
        return
    assert Plain(lib, process, codes)


@pytest.mark.parametrize("soon", [True, False], ids=["soon", "each"])
def test_who_dies_after_its_answer_owes_none(soon: bool) -> None:
    """Killed by whoever has just got it: no moment lies between the answer and the note of it."""
    for turn in range(150):
        memory = os.memfd_create("busy")
        os.ftruncate(memory, TPM_BUSY_SIZE)
        made = Made(lambda said: b"yes")
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                busy = Busy(memory)
                for _ in range(1000):
                    if soon:
                        made.plain.serve(made.theirs, busy.page)
                    else:
                        busy.take(made.theirs)
                        busy.answer(made.theirs, b"yes", False)
            os._exit(0)
        for _ in range(1 + turn % 7):
            made.ours.sendall(RANDOM)
            assert made.ours.recv(100) == b"yes"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not Busy(memory).is_so
        os.close(memory)


def test_what_is_owed() -> None:
    memory = os.memfd_create("busy")
    os.ftruncate(memory, TPM_BUSY_SIZE)
    made, busy, successors = Made(lambda said: b""), Busy(memory), Busy(memory)
    assert not successors.is_so
    for more in (True, False):
        made.ours.sendall(RANDOM)
        assert busy.take(made.theirs) == RANDOM and successors.is_so
        busy.answer(made.theirs, b"yes", more)
        assert made.ours.recv(100) == b"yes" and successors.is_so is more
    made.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    made.ours.sendall(RANDOM)
    busy.take(made.theirs)
    sent = plain_send(made.theirs, busy, bytes(1_000_000))
    assert sent < 1_000_000 and successors.is_so, "a part of it is none"
    reader = threading.Thread(target=lambda: exactly(made.ours, sent + 1_000_000))
    reader.start()
    busy.answer(made.theirs, bytes(1_000_000), False)
    reader.join()
    assert not successors.is_so
    os.close(memory)
    busy.release()
    busy.release()


def plain_send(sock: socket.socket, busy: Busy, response: bytes) -> int:
    return int(library.load().plain.plain_send(sock.fileno(), busy._bytes, response, len(response), False))
