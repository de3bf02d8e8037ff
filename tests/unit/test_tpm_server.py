"""A TPM as QEMU drives it: the order that QEMU 7.2 has, migration with sealed state alone, and peers that say what cannot be."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hsmvisor_rpc.internal.phases import TPM_BUSY_SIZE
from hsmvisord import limits
from hsmvisord.tpm.blobs import CAPTURE, OVERHEAD, BadBlob, Blobs
from hsmvisord.tpm.managed import Wanted
from hsmvisord.tpm.seals import Seals
from hsmvisord.tpm.server import CAPABILITIES, Server
from hsmvisord.tpm.stream import Busy
from hsmvisord.wire import tpm2
from hsmvisord.wire import tpm_control as t
from hsmvisord.wire.tpm_control import Blob, Command
from support.tpm_guest import Guest, Machine, the_machine, verify
from support.tpm_qemu import WITHIN, Qemu, exactly

KEY, MODULE = bytes(range(32)), b"m" * 16
HANDLE, DIGEST = 0x81800001, hashlib.sha256(b"what a guest has to sign").digest()


def new_p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


class Stand:
    def __init__(self) -> None:
        self.machine: Machine = the_machine()
        self.machine.anew()
        self.machine.managed.switch_off()
        self.said: list[str] = []
        self.seals = Seals(Blobs(KEY, MODULE))
        self.server = Server(self.machine.managed, self.seals, self.said.append)
        self.before = descriptors()
        self._qemus: list[Qemu] = []
        self._threads: list[threading.Thread] = []

    def qemu(self, padded: bool = True) -> Qemu:
        ours, theirs = socket.socketpair()
        self._threads.append(threading.Thread(target=self.server.serve_control, args=(theirs, padded), daemon=True))
        self._threads[-1].start()
        self._qemus.append(Qemu(ours))
        return self._qemus[-1]

    def running(self) -> tuple[Qemu, Guest]:
        """A machine whose firmware has started its TPM."""
        qemu = self.qemu()
        guest = qemu.connect()
        qemu.start()
        assert guest.startup() == 0
        return qemu, guest

    def close(self) -> None:
        for qemu in self._qemus:
            qemu.close()
        for thread in self._threads:
            thread.join(WITHIN)
            assert not thread.is_alive()
        ends = time.monotonic() + WITHIN
        while descriptors() != self.before and time.monotonic() < ends:
            time.sleep(0.01)
        assert descriptors() == self.before, "all is given back"
        self.machine.managed.switch_off()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def stand() -> Iterator[Stand]:
    stand = Stand()
    yield stand
    stand.close()


# ---- QEMU's order -----------------------------------------------------------------------------------------------------------


def test_a_machine_from_its_start_to_its_end(stand: Stand) -> None:
    qemu = stand.qemu()
    guest = qemu.connect()
    assert qemu.command(bytes.fromhex("8001 0000000c 00000181 0000")) == bytes.fromhex("8001 0000000a 00000101"), "the probe"
    assert qemu.ask(Command.GET_CAPABILITY) == struct.pack(">Q", CAPABILITIES)
    qemu.start()
    assert qemu.good(Command.GET_ESTABLISHED) == bytes(4)
    qemu.good(Command.SET_LOCALITY, bytes(4))
    assert guest.startup() == 0
    for _ in range(2):  # SeaBIOS resets itself; nobody says the locality again
        qemu.start()
        assert guest.startup() == 0
    qemu.good(Command.SHUTDOWN)
    with pytest.raises(EOFError):
        exactly(qemu.control, 1)
    assert qemu.commands is not None and qemu.commands.recv(1) == b""
    assert not stand.said


def test_what_qemu_requires_is_offered() -> None:
    """tpm_emulator.c, tpm_emulator_check_caps; and what its migration needs."""
    required = (0, 1, 2, 3, 7, 10, 12, 13, 8, 9)
    assert all(CAPABILITIES >> bit & 1 for bit in required)


def test_a_buffer_is_as_large_as_the_interface(stand: Stand) -> None:
    qemu = stand.qemu()
    for wanted, expected in ((0, None), (3968, 3968), (1, 2808), (1 << 20, 4096)):
        size, least, most = struct.unpack(">III", qemu.good(Command.SET_BUFFER_SIZE, struct.pack(">I", wanted)))
        assert (least, most) == (2808, 4096) and size == (expected or size)


@pytest.mark.parametrize("locality", range(7))
def test_localities(stand: Stand, locality: int) -> None:
    qemu = stand.qemu()
    answer = qemu.ask(Command.SET_LOCALITY, bytes([locality, 0, 0, 0]))
    assert answer == struct.pack(">I", 0 if locality <= limits.MAX_TPM_LOCALITY else t.BAD_LOCALITY)


def test_the_tss_asks_by_a_connection_for_each_question(stand: Stand) -> None:
    qemu = stand.qemu(padded=False)
    assert qemu.ask(Command.SET_LOCALITY, b"\x03") == bytes(4)
    assert qemu.ask(Command.RESET_ESTABLISHED, b"\x00") == struct.pack(">I", t.FAIL)  # it is off


@pytest.mark.parametrize("command", [Command.GET_INFO, Command.LOCK_STORAGE, Command.SET_DATA_FD])
def test_what_is_not_offered(stand: Stand, command: Command) -> None:
    """Without a descriptor SET_DATA_FD is that too."""
    body = {Command.GET_INFO: bytes(16), Command.LOCK_STORAGE: bytes(4)}.get(command, b"")
    assert stand.qemu().ask(command, body)[:4] == struct.pack(">I", t.BAD_ORDINAL)


def test_a_command_is_cancelled_from_beside(stand: Stand) -> None:
    """The control connection answers while a command runs."""
    qemu, guest = stand.running()
    parameters = tpm2.sized(tpm2.sized(b"") + tpm2.sized(b"")) + tpm2.sized(
        struct.pack(">HHI", tpm2.RSA, tpm2.SHA256, 0x30472) + tpm2.sized(b"")
        + struct.pack(">HHHHHI", tpm2.AES, 128, tpm2.CFB, tpm2.NULL_ALGORITHM, 3072, 0) + tpm2.sized(b"")
    ) + tpm2.sized(b"") + bytes(4)  # fmt: skip
    done = threading.Event()
    results = []

    def create() -> None:
        for _ in range(3):
            results.append(guest.say(tpm2.Code.CREATE_PRIMARY, (0x40000001,), parameters, tpm2.EMPTY_PASSWORD)[0])
            with contextlib.suppress(AssertionError):
                guest.flush(0x80000000)
        done.set()

    threading.Thread(target=create, daemon=True).start()
    while not done.is_set():
        qemu.good(Command.CANCEL)
        time.sleep(0.01)
    assert set(results) <= {0, 0x909} and 0x909 in results, [hex(result) for result in results]


def test_a_root_of_trust_that_begins_late(stand: Stand) -> None:
    qemu, guest = stand.running()
    for command, body in (
        (Command.HASH_START, b""),
        (Command.HASH_DATA, struct.pack(">I", 5) + b"hello"),
        (Command.HASH_END, b""),
    ):
        qemu.good(command, body)
    assert qemu.good(Command.GET_ESTABLISHED)[0] == 1
    assert qemu.ask(Command.HASH_DATA, struct.pack(">I", 1) + b"x") == struct.pack(">I", t.FAIL), "it is over"
    assert qemu.ask(Command.RESET_ESTABLISHED, bytes([1, 0, 0, 0])) != bytes(4)
    qemu.good(Command.RESET_ESTABLISHED, bytes([4, 0, 0, 0]))
    assert qemu.good(Command.GET_ESTABLISHED)[0] == 0
    assert guest.say(tpm2.Code.GET_CAPABILITY, (), struct.pack(">III", 1, 0x81000000, 1))[0] == 0


def test_so_much_is_hashed_and_no_more(stand: Stand) -> None:
    qemu, _ = stand.running()
    piece = struct.pack(">I", limits.MAX_TPM_HASH) + bytes(limits.MAX_TPM_HASH)
    qemu.good(Command.HASH_START)
    for _ in range(limits.MAX_TPM_HASHED // limits.MAX_TPM_HASH):
        qemu.good(Command.HASH_DATA, piece)
    assert qemu.ask(Command.HASH_DATA, struct.pack(">I", 1) + b"x") == struct.pack(">I", t.BAD_PARAMETER)
    assert qemu.ask(Command.HASH_END) == struct.pack(">I", t.FAIL)


# ---- migration ------------------------------------------------------------------------------------------------------------


def test_a_running_machine_goes_on_elsewhere(stand: Stand) -> None:
    key = new_p256()
    source, guest = stand.running()
    stand.machine.managed.want({HANDLE: Wanted(key)})
    primary = guest.primary()
    public = guest.public(primary)
    blobs = {kind: source.blob(kind) for kind in Blob}
    assert blobs[Blob.SAVED] == (0, b"")
    source.good(Command.SHUTDOWN)
    source.close()
    stand.machine.anew()  # the other host's
    stand.machine.managed.switch_off()
    stand.machine.managed._wanted = {HANDLE: Wanted(key)}
    destination = stand.qemu()
    guest = destination.connect()
    destination.good(Command.STOP)
    for kind in (Blob.PERMANENT, Blob.VOLATILE):
        flags, data = blobs[kind]
        assert flags == t.ENCRYPTED and destination.set_blob(kind, flags, data) == 0
    destination.good(Command.INIT, struct.pack(">I", 1))
    assert guest.public(primary) == public
    verify(key, DIGEST, guest.sign(HANDLE, DIGEST)[1])


def test_no_state_leaves_in_the_clear(stand: Stand) -> None:
    key = new_p256()
    qemu, _ = stand.running()
    stand.machine.managed.want({HANDLE: Wanted(key)})
    secret = key.private_numbers().private_value.to_bytes(32, "big")
    assert secret in stand.machine.managed.tpm.state(1), "what is looked for is there"
    for kind in Blob:
        _, data = qemu.blob(kind)
        assert not any(secret[at : at + 16] in data for at in range(17))


def test_no_state_in_the_clear_is_taken(stand: Stand) -> None:
    qemu, _ = stand.running()
    plain = stand.machine.managed.tpm.state(1)
    _, sealed = qemu.blob(Blob.PERMANENT)
    qemu.good(Command.STOP)
    refused = t.BAD_PARAMETER
    assert qemu.set_blob(Blob.PERMANENT, 0, plain) == refused
    assert qemu.set_blob(Blob.PERMANENT, t.ENCRYPTED, plain) == refused
    assert qemu.set_blob(Blob.VOLATILE, t.ENCRYPTED, sealed) == refused, "of another kind"
    assert qemu.set_blob(Blob.PERMANENT, t.ENCRYPTED, Blobs(KEY, b"n" * 16).seal(1, bytes(CAPTURE), plain)) == refused, (
        "another module's"
    )
    for at in (0, 25, 40, len(sealed) - 1):
        broken = bytearray(sealed)
        broken[at] ^= 1
        assert qemu.set_blob(Blob.PERMANENT, t.ENCRYPTED, bytes(broken)) == refused
    assert qemu.set_blob(Blob.PERMANENT, t.ENCRYPTED, sealed) == 0
    assert len(stand.said) == 8 and "in the clear" in stand.said[0]


@pytest.mark.parametrize("kind", [0, 4, 0xFFFFFFFF])
def test_kinds_of_state_that_there_are_not(stand: Stand, kind: int) -> None:
    qemu = stand.qemu()
    assert qemu.ask(Command.GET_STATE_BLOB, struct.pack(">III", 1, kind, 0))[:4] == struct.pack(">I", t.BAD_PARAMETER)
    assert qemu.set_blob(kind, t.ENCRYPTED, b"x") == t.BAD_PARAMETER


@pytest.mark.parametrize("word", [False, True])
@pytest.mark.parametrize("kinds", [(Blob.PERMANENT,), (Blob.PERMANENT, Blob.VOLATILE)])
def test_state_that_was_brought_is_that_machines(stand: Stand, word: bool, kinds: tuple[Blob, ...]) -> None:
    """It ends before it has started: the next one begins with what the TPM has here."""
    source, guest = stand.running()
    key = stand.machine.deliver()
    blobs = {kind: source.blob(kind) for kind in kinds}
    assert guest.nv_define(0x01500000, 8) == 0
    source.good(Command.STOP)
    for kind, (flags, data) in blobs.items():
        assert source.set_blob(kind, flags, data) == 0
    if word:
        source.good(Command.SHUTDOWN)
    else:
        stand.server.machine_gone()
    kept = list(stand.machine.kept)
    _, again = stand.running()
    assert again.nv_attributes(0x01500000)
    verify(key, DIGEST, again.sign(HANDLE, DIGEST)[1])
    assert stand.machine.kept[: len(kept)] == kept


def test_a_running_tpm_takes_no_state(stand: Stand) -> None:
    qemu, guest = stand.running()
    _, sealed = qemu.blob(Blob.PERMANENT)
    assert qemu.set_blob(Blob.PERMANENT, t.ENCRYPTED, sealed) == t.FAIL
    assert guest.startup() == 0x100, "it runs as before"


def test_offsets_of_a_blob(stand: Stand) -> None:
    qemu, _ = stand.running()
    answer = qemu.ask(Command.GET_STATE_BLOB, struct.pack(">III", 1, 1, 100))
    _, _, total, length = struct.unpack(">IIII", answer)
    assert length == total - 100 and len(exactly(qemu.control, length)) == length
    answer = qemu.ask(Command.GET_STATE_BLOB, struct.pack(">III", 1, 1, 1 << 30))
    assert answer[:4] == struct.pack(">I", t.BAD_PARAMETER)


def test_blobs() -> None:
    blobs = Blobs(KEY, MODULE)
    capture = os.urandom(CAPTURE)
    sealed = blobs.seal(1, capture, b"state")
    assert blobs.open(1, sealed) == (capture, b"state") and len(sealed) == 5 + OVERHEAD
    assert blobs.seal(1, capture, b"state") != sealed
    for data in (b"", sealed[:-1], sealed[: OVERHEAD - 1], sealed + b"x"):
        with pytest.raises(BadBlob):
            blobs.open(1, data)


class Ends:
    """Both ends of a move, by their seals alone."""

    def __init__(self) -> None:
        self.now, self.said = 0.0, list[str]()
        self.here, self.there = (Seals(Blobs(key, MODULE), self.said.append, lambda: self.now) for key in (KEY, bytes(32)))
        self.move()

    def move(self) -> None:
        ident, key = os.urandom(16), os.urandom(32)
        self.here.move(True, ident, key)
        self.there.move(False, ident, key)

    def capture(self) -> tuple[bytes, bytes]:
        return self.here.seal(Blob.PERMANENT, True, b"permanent"), self.here.seal(Blob.VOLATILE, False, b"volatile")


def test_one_capture_leaves_in_a_move() -> None:
    """What came before the guest went on is an older state: the same permission seals no second one."""
    ends = Ends()
    permanent, volatile = ends.capture()
    later = ends.capture()
    assert "another attempt needs another hsmvisor module move-tpm" in ends.said[0]
    for kind, sealed in zip((Blob.PERMANENT, Blob.VOLATILE), later, strict=True):
        with pytest.raises(BadBlob):
            ends.there.open(kind, sealed)
    ends.move()
    with pytest.raises(BadBlob):
        ends.there.open(Blob.PERMANENT, permanent)
    again = ends.capture()
    assert ends.there.open(Blob.PERMANENT, again[0]) == b"permanent"
    with pytest.raises(BadBlob):
        ends.there.open(Blob.VOLATILE, volatile)
    assert ends.there.open(Blob.VOLATILE, again[1]) == b"volatile" and len(ends.said) == 1
    ends.there.arrived()
    with pytest.raises(BadBlob):
        ends.there.open(Blob.PERMANENT, again[0])


def test_a_part_that_is_asked_for_again_is_another_moments(stand: Stand) -> None:
    qemu, guest = stand.running()
    ident, key, there = os.urandom(16), os.urandom(32), Seals(Blobs(bytes(32), MODULE))
    stand.seals.move(True, ident, key)
    there.move(False, ident, key)
    permanent, volatile = qemu.blob(Blob.PERMANENT)[1], qemu.blob(Blob.VOLATILE)[1]
    guest.extend(7, bytes(32))
    later = qemu.blob(Blob.VOLATILE)[1]
    there.open(Blob.PERMANENT, permanent)
    with pytest.raises(BadBlob):
        there.open(Blob.VOLATILE, later)
    there.open(Blob.VOLATILE, volatile)
    for after in (lambda: qemu.good(Command.STOP), lambda: qemu.start()):
        first = qemu.blob(Blob.PERMANENT)[1]
        after()
        stand.seals.open(Blob.PERMANENT, first)
        with pytest.raises(BadBlob):
            stand.seals.open(Blob.VOLATILE, qemu.blob(Blob.SAVED)[1] or volatile)


def test_parts_of_two_snapshots_are_none() -> None:
    ends = Ends()
    ends.here.move(True, b"", b"")
    older, newer = ends.capture(), ends.capture()
    with pytest.raises(BadBlob, match="another moment"):
        ends.here.open(Blob.VOLATILE, older[1])
    for permanent, volatile in (older, newer):
        assert ends.here.open(Blob.PERMANENT, permanent) == b"permanent"
        assert ends.here.open(Blob.VOLATILE, volatile) == b"volatile"
        with pytest.raises(BadBlob, match="another moment"):
            ends.here.open(Blob.VOLATILE, (older if volatile == newer[1] else newer)[1])
    assert not ends.said


@pytest.mark.parametrize("late", [False, True])
def test_a_move_has_its_time(late: bool) -> None:
    ends = Ends()
    ends.now += limits.TPM_MOVE_SECONDS + late
    permanent, _ = ends.capture()
    if late:
        with pytest.raises(BadBlob):
            ends.there.open(Blob.PERMANENT, permanent)
    else:
        assert ends.there.open(Blob.PERMANENT, permanent) == b"permanent"


def test_what_a_successor_sees_of_a_command_that_was_taken() -> None:
    """That it was taken, from the moment on in which it was, until it is answered; and not what it is."""
    memory = os.memfd_create("busy")
    os.ftruncate(memory, TPM_BUSY_SIZE)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        busy, successors = Busy(memory), Busy(memory)
        with pytest.raises(BlockingIOError):
            busy.take(ours)
        for command in (b"\x80\1" + os.urandom(30), b"\0 no command", b"\x80" + os.urandom(limits.MAX_TPM_COMMAND - 1)):
            assert not busy.is_so and not successors.is_so
            theirs.sendall(command)
            assert busy.take(ours) == command
            assert successors.is_so and os.pread(memory, TPM_BUSY_SIZE, 0) == b"\1" + bytes(TPM_BUSY_SIZE - 1)
            busy.answer(ours, b"a part", True)
            assert successors.is_so and theirs.recv(100) == b"a part"
            busy.answer(ours, b"answer", False)
            assert theirs.recv(100) == b"answer"
        theirs.close()
        assert busy.take(ours) == b"" and not successors.is_so
        with pytest.raises(BrokenPipeError):
            busy.answer(ours, b"answer", False)
    os.close(memory)


# ---- peers that say what cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"\0\0\0\0", b"\xff" * 4, b"\0\0\0\x07\xff\xff\xff\xff", b"\0\0\0\x0d" + b"\xff" * 12])
def test_what_no_peer_says_ends_its_connection(stand: Stand, data: bytes) -> None:
    qemu, guest = stand.running()
    hostile = stand.qemu()
    hostile.control.sendall(data)
    with pytest.raises(EOFError):
        exactly(hostile.control, 1)
    assert guest.startup() == 0x100 and qemu.good(Command.GET_ESTABLISHED) == bytes(4), "and nobody else's"
    assert stand.said[-1].startswith("control: ")


def test_descriptors_that_nobody_asked_for(stand: Stand) -> None:
    """None is kept, whatever it is, and there is one connection for commands."""
    socket_of, no_socket = socket.socketpair(), os.open("/dev/null", os.O_RDONLY)
    for command, given in (
        (Command.GET_CONFIG, [socket_of[0].fileno()]),
        (Command.SET_DATA_FD, [no_socket]),
        (Command.SET_DATA_FD, [no_socket, no_socket]),
    ):
        hostile = stand.qemu()
        socket.send_fds(hostile.control, [struct.pack(">I", command)], given)
        with pytest.raises(EOFError):
            exactly(hostile.control, 1)
    qemu, _ = stand.running()
    before, threads = qemu.commands, threading.active_count()
    for _ in range(20):
        assert qemu.connect().startup() == 0x100
        assert before is not None and before.recv(1) == b""
        before = qemu.commands
    assert threading.active_count() <= threads + 1
    os.close(no_socket)
    for sock in socket_of:
        sock.close()


@pytest.mark.parametrize("length", [0, 9, limits.MAX_TPM_COMMAND + 1, 0xFFFFFFFF])
def test_lengths_of_commands(stand: Stand, length: int) -> None:
    qemu, _ = stand.running()
    assert qemu.commands is not None
    qemu.commands.sendall(struct.pack(">HII", 0x8001, length, 0x144))
    assert qemu.commands.recv(1) == b""
    assert "a command of" in stand.said[-1]
    assert qemu.connect().startup() == 0x100, "another connection goes on"


def test_the_longest_command(stand: Stand) -> None:
    qemu, _ = stand.running()
    answer = qemu.command(struct.pack(">HII", 0x8001, limits.MAX_TPM_COMMAND, 0x144) + bytes(limits.MAX_TPM_COMMAND - 10))
    assert tpm2.HEAD.unpack(answer)[2] != 0


def test_a_command_that_ends_early(stand: Stand) -> None:
    qemu, _ = stand.running()
    assert qemu.commands is not None
    qemu.commands.sendall(struct.pack(">HII", 0x8001, 100, 0x144) + bytes(10))
    qemu.commands.shutdown(socket.SHUT_WR)
    assert qemu.commands.recv(1) == b""
    assert stand.said[-1] == "commands: a command that ends early"


@pytest.mark.parametrize("seed", range(20))
def test_random_commands(stand: Stand, seed: int) -> None:
    """Whatever comes gets a response, and the TPM goes on."""
    rng = random.Random(seed)
    _, guest = stand.running()
    for _ in range(200):
        code = rng.choice([rng.randrange(0x11F, 0x1A0), rng.randrange(1 << 32)])
        body = rng.randbytes(rng.choice([0, 2, 4, 12, 60, 500]))
        data = struct.pack(">HII", rng.choice([0x8001, 0x8002, rng.randrange(1 << 16)]), 10 + len(body), code) + body
        assert guest.process(data)[:2] in (b"\x80\x01", b"\x80\x02", b"\x00\xc4")
    stand.machine.reset()
