"""A TPM that goes on: what its QEMU asks and its guest commands, in any order, while the module wants other keys and the machine
moves.  The TPM is libtpms itself, in this process.

An input is a row of steps, each begun by one byte: four bits say what happens, the rest how.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import struct
import threading
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from fuzz.harness import Input, block
from hsmvisord.tpm import guard
from hsmvisord.tpm import wanted as placing
from hsmvisord.tpm.blobs import Blobs
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.tpm.managed import Asleep, NotPlaced, State, Wanted
from hsmvisord.tpm.platform import FIRST, LAST, PrivateKey
from hsmvisord.tpm.seals import Seals
from hsmvisord.tpm.server import Server
from hsmvisord.wire import tpm2
from hsmvisord.wire import tpm_control as t
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, HEAD, LOCKOUT, NULL, OWNER, PLATFORM, BadResponse, Code, Tpm2Error, number, sized
from hsmvisord.wire.tpm_control import Blob, BrokenControl, Command, Control
from support import tpm_guest as g
from support.tpm_guest import DIGEST, Machine, sign_command, the_machine
from support.tpm_qemu import SIZES

INVARIANT = (
    "every question and every command has one answer, as long as its head says, until one that cannot be ends the connection; what "
    "the module wants is refused as it says, or is so; after each start of the guest's it finds no key at a handle of the platform "
    "that is not wanted; no answer shows 16 bytes of a private key, nor does the log; a state that is not the module's "
    "is refused; no descriptor is left; nothing else is raised"
)
MAX_LENGTH = 1000
STEPS = 48  #: of one input

QUESTION, CONTROL, COMMAND, COMMANDS, WANT, POWER, SAVE, BRING, START, MOVE, LOOK, FLIP, CLEAR = range(13)
FIXED, APPENDED = 4, 8  #: bits of how a command is told: its head has its length again; more stands behind it
#: Bits of the first byte: what is wanted is known; started; no firmware; keys from the start; commands as they come to QEMU's.
TOLD, AWAKE, BARE, HAS, SOON = 1, 2, 4, 8, 16

P256S = (0x81800000, 0x81800001, 0x81000007)
RSA = 0x8180FFFF
MINE = P256S[-1]
MOVES = (b"i" * 16, b"j" * 16)
_FAULTS = (Tpm2Error, BadResponse, TpmFault)

EC_CREATED = sized(sized(b"") + sized(b"")) + sized(tpm2.parent_template(b"")) + sized(b"") + struct.pack(">I", 0)
SESSION = sized(bytes(16)) + sized(b"")


def _nv(index: int, attributes: int, size: int) -> bytes:
    return sized(b"") + sized(struct.pack(">IHI", index, tpm2.SHA256, attributes) + sized(b"") + number(size))


def _said(code: int, handles: tuple[int, ...] = (), parameters: bytes = b"", password: bool = True) -> bytes:
    told = bytearray(tpm2.command(Code.STARTUP, handles, parameters, EMPTY_PASSWORD if password else None))
    told[6:10] = struct.pack(">I", code)
    return bytes(told)


#: What a guest says; where more than a number comes from an answer, see Stand.command.
COMMANDS_SAID: tuple[bytes, ...] = (
    *(_said(Code.STARTUP, (), number(kind), False) for kind in (tpm2.CLEAR, tpm2.STATE)),
    *(_said(Code.SHUTDOWN, (), number(kind), False) for kind in (tpm2.CLEAR, tpm2.STATE)),
    *(sign_command(handle, DIGEST) for handle in P256S),
    sign_command(RSA, DIGEST, g.RSASSA),
    *(_said(Code.READ_PUBLIC, (handle,), b"", False) for handle in (P256S[0], MINE, 0x80000000, RSA)),
    *(_said(Code.CREATE_PRIMARY, (hierarchy,), EC_CREATED) for hierarchy in (OWNER, PLATFORM, NULL)),
    *(_said(Code.EVICT_CONTROL, (OWNER, one), struct.pack(">I", MINE)) for one in (MINE, 0x80000000)),
    *(_said(Code.EVICT_CONTROL, (PLATFORM, one), struct.pack(">I", P256S[0])) for one in (P256S[0], 0x80000000)),
    _said(Code.EVICT_CONTROL, (PLATFORM, 0x80000000), struct.pack(">I", 0x81FFFFFF)),
    *(_said(g.OBJECT_CHANGE_AUTH, (one, 0x80000000), sized(b"mine")) for one in (P256S[0], MINE)),
    _said(g.DUPLICATE, (MINE, 0x80000000), sized(b"") + number(tpm2.NULL_ALGORITHM)),
    _said(Code.NV_DEFINE_SPACE, (OWNER,), _nv(0x01800000, 0x02060006, 64)),
    _said(Code.NV_DEFINE_SPACE, (OWNER,), _nv(0x01800001, 0x02060006, 2048)),
    _said(Code.NV_DEFINE_SPACE, (PLATFORM,), _nv(0x01400001, 0x42070001, 16)),
    _said(Code.NV_WRITE, (OWNER, 0x01800000), sized(b"value") + number(0)),
    _said(Code.NV_READ, (OWNER, 0x01800000), struct.pack(">HH", 5, 0)),
    _said(Code.NV_READ, (0x01400001, 0x01400001), struct.pack(">HH", 4, 0)),
    _said(Code.NV_UNDEFINE_SPACE, (OWNER, 0x01800000)),
    _said(Code.NV_UNDEFINE_SPACE, (PLATFORM, 0x01400001)),
    _said(Code.CLEAR, (LOCKOUT,)),
    _said(Code.CLEAR, (PLATFORM,)),
    *(_said(Code.HIERARCHY_CONTROL, (PLATFORM,), struct.pack(">IB", one, on)) for one in (OWNER, PLATFORM) for on in (0, 1)),
    _said(Code.HIERARCHY_CONTROL, (OWNER,), struct.pack(">IB", OWNER, 0)),
    *(_said(Code.HIERARCHY_CHANGE_AUTH, (one,), sized(b"theirs")) for one in (OWNER, PLATFORM)),
    *(_said(Code.SET_PRIMARY_POLICY, (one,), sized(b"p" * 32) + number(tpm2.SHA256)) for one in (OWNER, PLATFORM)),
    _said(Code.CHANGE_PPS, (PLATFORM,)),
    _said(Code.CHANGE_EPS, (PLATFORM,)),
    *(_said(Code.START_AUTH_SESSION, (NULL, NULL), SESSION + bytes([kind]) + number(0x10) + number(tpm2.SHA256), False)
      for kind in (0, 1)),
    *(_said(Code.CONTEXT_SAVE, (one,), b"", False) for one in (0x80000000, 0x02000000, 0x03000000, MINE)),
    *(_said(Code.FLUSH_CONTEXT, (), struct.pack(">I", one), False) for one in (0x80000000, 0x02000000, 0x03000001)),
    _said(Code.POLICY_LOCALITY, (0x03000000,), bytes([200]), False),
    _said(Code.GET_CAPABILITY, (), struct.pack(">III", tpm2.HANDLES, 0x81000000, 254), False),
    _said(0x17B, (), number(48), False),  # TPM2_GetRandom
    _said(g.PCR_EXTEND, (7,), struct.pack(">IH", 1, tpm2.SHA256) + DIGEST),
    _said(Code.CONTEXT_LOAD, (), b"", False),
    _said(Code.LOAD, (0x80000000,)),
)  # fmt: skip
CONTEXT_LOAD, LOAD = len(COMMANDS_SAID) - 2, len(COMMANDS_SAID) - 1


@functools.cache
def keys() -> dict[int, tuple[Wanted, Wanted]]:
    """Two for each handle: one follows the other."""

    def both(make: Callable[[], PrivateKey], certificate: bytes) -> tuple[Wanted, Wanted]:
        return Wanted(make()), Wanted(make(), certificate=certificate)

    found = {handle: both(lambda: ec.generate_private_key(ec.SECP256R1()), b"c" * 300) for handle in P256S}
    found[RSA] = both(lambda: rsa.generate_private_key(65537, 2048), b"")
    return found


@functools.cache
def secrets() -> tuple[bytes, ...]:
    """16 bytes each, of all that a private key is made of, as numbers and in libtpms' own order of bytes."""
    found = []
    for one in (one for pair in keys().values() for one in pair):
        if isinstance(one.key, rsa.RSAPrivateKey):
            numbers = one.key.private_numbers()
            values = [(numbers.p, 128), (numbers.q, 128), (numbers.d, 256)]
        else:
            values = [(one.key.private_numbers().private_value, 32)]
        for value, size in values:
            big = value.to_bytes(size, "big")
            found += [form[at : at + 16] for form in (big, big[::-1]) for at in range(0, size, 16)]
    return tuple(found)


def chosen(mask: int) -> dict[int, Wanted]:
    """Two bits for each handle: none of both, or one, or the other."""
    return {handle: pair[bits & 1] for at, (handle, pair) in enumerate(keys().items()) if (bits := mask >> 2 * at & 3) & 2}


@functools.cache
def manufactured() -> tuple[Machine, bytes]:
    machine = the_machine()
    machine.anew()
    machine.managed.switch_off()
    return machine, machine.managed.tpm.permanent


class Stand:
    """One TPM's process: its server, and whoever else has to do with it."""

    def __init__(self, first: int) -> None:
        self.machine, permanent = manufactured()
        managed = self.managed = self.machine.managed
        self._forget()
        managed._firmware = not first & BARE
        self.machine.anew(permanent, chosen(0xBA) if first & HAS else {}, bool(first & TOLD))
        managed.switch_off()
        self.said: list[str] = []
        self.server = Server(managed, Seals(Blobs(bytes(32), b"m" * 16), self.said.append, lambda: 0.0), self.said.append)
        self.linger = 0.001 if first & SOON else 0.0  #: plain ones are answered by plain.c
        self.blobs: list[tuple[int, bytes]] = []
        self.context = self.private = b""
        if first & AWAKE:
            self.ask(struct.pack(">II", Command.INIT, 0))
            self.commands(COMMANDS_SAID[0])

    def _forget(self) -> None:
        """What an earlier input brought and never went on with."""
        self.managed._kept._asked = {}
        for _ in range(2):
            with contextlib.suppress(TpmFault):
                self.managed.tpm.switch_on()
        self.managed.tpm.switch_off()

    def end(self) -> None:
        self._forget()
        self.managed._firmware = True
        for said in (*self.said, *self.machine.said):
            shows_nothing(said.encode())

    # ---- connections --------------------------------------------------------------------------------------------------

    def ask(self, data: bytes, padded: bool = True, descriptor: int = -1, is_socket: bool = True) -> bytes:
        """All that is answered to these questions; a descriptor comes with the first one."""
        brought: list[socket.socket] = []
        answers = talk(lambda sock: self.server.serve_control(sock, padded, brought.append), data, descriptor)
        for one in brought:
            one.close()
        control, at = Control(padded), 0
        with contextlib.suppress(BrokenControl):
            control.receive(data)
            while (asked := control.next()) is not None:
                if descriptor >= 0 and not (is_socket and asked.command is Command.SET_DATA_FD):
                    break  # nobody asked for it
                descriptor = -1
                size = SIZES.get(asked.command, 4)
                if asked.command is Command.GET_STATE_BLOB:
                    size += int.from_bytes(answers[at + 12 : at + 16], "big")
                assert len(answers) - at >= size, f"{asked.command.name}: {len(answers) - at} bytes of {size}"
                at += size
                if asked.command is Command.SHUTDOWN:
                    break
        assert at == len(answers), f"{len(answers) - at} bytes that nobody asked for"
        return answers

    def commands(self, data: bytes) -> None:
        answers = talk(lambda sock: self.server.serve_commands(sock, self.linger), data)
        said, answer, at = whole(data), b"", 0
        for _ in said:
            assert len(answers) - at >= HEAD.size, "a command without an answer"
            size = HEAD.unpack_from(answers, at)[1]
            answer = answers[at : at + size]
            assert len(answer) == size >= HEAD.size
            at += size
        assert at == len(answers), f"{len(answers) - at} bytes that nobody asked for"
        if said and not HEAD.unpack_from(answer)[2]:
            self.heard(HEAD.unpack_from(said[-1])[2], answer)

    def heard(self, code: int, answer: bytes) -> None:
        """After a command that went well."""
        if code == Code.STARTUP:
            self.only_what_is_wanted()
        elif code == Code.CONTEXT_SAVE:
            self.context = answer[HEAD.size :]
        elif code in (g.OBJECT_CHANGE_AUTH, g.DUPLICATE):
            self.private = answer[HEAD.size + 4 :]

    def only_what_is_wanted(self) -> None:
        """At the platform's handles, where no other key of the module's can hide: as the guest finds them."""
        if self.managed._wanted is None:
            return
        guest = g.Guest(lambda command: self.managed.process(command, self.server.locality))
        for handle in guest.handles(FIRST):
            result, answer = guest.say(Code.READ_PUBLIC, (handle,))
            if handle <= LAST and result != guard.RC_HANDLE:  # else it is barred
                one = self.managed._wanted.get(handle)
                assert one is not None and sized(placing.name_of(handle, one)) in answer, f"{handle:#x}: {self.machine.said}"

    # ---- steps --------------------------------------------------------------------------------------------------------

    def command(self, which: int, much: int, given: Input) -> None:
        which %= len(COMMANDS_SAID)
        told = bytearray(COMMANDS_SAID[which])
        if which == CONTEXT_LOAD:
            told += self.context
        elif which == LOAD:
            told += self.private
        for _ in range(much & 3):
            told[int.from_bytes(given.take(1), "big") % len(told)] = given.byte()
        if much & APPENDED:
            told += given.block()
        if much & FIXED or which in (CONTEXT_LOAD, LOAD):
            told[2:6] = struct.pack(">I", len(told))
        self.commands(bytes(told))

    def want(self, mask: int) -> None:
        keys = chosen(mask)
        try:
            self.managed.want(keys)
        except Asleep:
            assert self.managed.state is not State.AWAKE
            return
        except NotPlaced:
            keys = {handle: one for handle, one in keys.items() if handle >= FIRST}
        except _FAULTS:
            return
        with contextlib.suppress(*_FAULTS):
            found = self.managed.names()
            expected = {handle: placing.name_of(handle, one) for handle, one in keys.items()}
            assert {handle: name for handle, name in found.items() if handle >= FIRST or handle in keys} == expected

    def power(self, much: int) -> None:
        match much % 5:
            case 0:
                self.ask(struct.pack(">I", Command.STOP))
            case 1:
                self.ask(struct.pack(">II", Command.INIT, much >> 3))
            case 2:
                self.ask(struct.pack(">I", Command.SHUTDOWN))
            case 3:
                self.server.machine_gone()
            case 4:
                self.ask(struct.pack(">III", Command.STOP, Command.INIT, 0))
                self.commands(COMMANDS_SAID[0])

    def save(self) -> None:
        """As QEMU does before it leaves; none of it is of use to it."""
        for kind in Blob:
            answer = self.ask(struct.pack(">IIII", Command.GET_STATE_BLOB, t.DECRYPTED, kind, 0))
            result, flags, total, length = struct.unpack_from(">IIII", answer)
            assert not length or (result, flags, total, length) == (t.SUCCESS, t.ENCRYPTED, length, len(answer) - 16)
            if length:
                self.blobs.append((kind, answer[16:]))
        del self.blobs[:-6]

    def bring(self, much: int, given: Input | None = None) -> None:
        """`given`: where a byte of it is another one."""
        if not self.blobs:
            return
        kind, data = self.blobs[much % len(self.blobs)]
        if given is not None:
            at = int.from_bytes(given.take(2), "big") % len(data)
            data = data[:at] + bytes([data[at] ^ (given.byte() or 1)]) + data[at + 1 :]
        answer = self.ask(struct.pack(">IIII", Command.SET_STATE_BLOB, t.ENCRYPTED, kind, len(data)) + data)
        assert given is None or answer != bytes(4), "a blob that was changed was taken"

    def bring_clear(self, flags: int) -> None:
        """What only the TPM's process knows: who made it can have put anything into it."""
        data = self.managed.tpm.permanent
        answer = self.ask(struct.pack(">IIII", Command.SET_STATE_BLOB, flags, Blob.PERMANENT, len(data)) + data)
        assert answer != bytes(4), "a blob in the clear was taken"

    def look(self, much: int) -> None:
        with contextlib.suppress(Asleep, *_FAULTS):
            if much & 1:
                self.managed.quote(bytes(8), (much >> 1,))
            else:
                self.managed.names()


def talk(serve: Callable[[socket.socket], object], data: bytes, descriptor: int = -1) -> bytes:
    """What is answered to all of it by one who serves a connection to its end."""
    ours, theirs = socket.socketpair()
    parts: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(ConnectionResetError):  # it was closed with something unread in it
            while part := ours.recv(1 << 16):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with contextlib.suppress(OSError):
            if descriptor >= 0 and data:
                socket.send_fds(ours, [data], [descriptor])
            else:
                ours.sendall(data)
            ours.shutdown(socket.SHUT_WR)
        serve(theirs)
    finally:
        theirs.close()
        reader.join()
        ours.close()
    answers = b"".join(parts)
    shows_nothing(answers)
    return answers


def whole(data: bytes) -> list[bytes]:
    """The commands that came whole, up to one that cannot be."""
    found = []
    while len(data) >= HEAD.size:
        size = HEAD.unpack_from(data)[1]
        if not HEAD.size <= size <= 4096 or size > len(data):
            break
        found.append(data[:size])
        data = data[size:]
    return found


def shows_nothing(data: bytes) -> None:
    assert not any(secret in data for secret in secrets()), "a private key is shown"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def run(data: bytes) -> None:
    given = Input(data)
    keys(), manufactured()
    before = descriptors()
    stand = Stand(given.byte())
    steps = 0
    try:
        while given.more and steps < STEPS:
            steps += 1
            head = given.byte()
            step(stand, head & 15, head >> 4, given)
    finally:
        stand.end()
    assert descriptors() == before, "a descriptor is left"


def step(stand: Stand, what: int, much: int, given: Input) -> None:
    if what == QUESTION:
        question = struct.pack(">I", given.byte() % 0x15) + given.take(much)
        if much & 8:
            with socket.socket(socket.AF_UNIX) as brought, open(os.devnull) as other:
                is_socket = not much & 4
                stand.ask(question, descriptor=(brought if is_socket else other).fileno(), is_socket=is_socket)
        else:
            stand.ask(question)
    elif what == CONTROL:
        stand.ask(given.block(), padded=bool(much & 1))
    elif what == COMMAND:
        stand.command(given.byte(), much, given)
    elif what == COMMANDS:
        stand.commands(given.block())
    elif what == WANT:
        stand.want(given.byte())
    elif what == POWER:
        stand.power(much)
    elif what == SAVE:
        stand.save()
    elif what == BRING:
        stand.bring(much)
    elif what == FLIP:
        stand.bring(much, given)
    elif what == CLEAR:
        stand.bring_clear(much)
    elif what == START:
        stand.commands(COMMANDS_SAID[0])
    elif what == MOVE:
        stand.server._seals.move(bool(much & 1), MOVES[much >> 1 & 1], bytes([much >> 2]) * 32 if much & 4 else b"")
    elif what == LOOK:
        stand.look(much)


# ---- seeds ------------------------------------------------------------------------------------------------------------


def command(which: int) -> bytes:
    return bytes([COMMAND, which])


def first(code: int, further: int = 0) -> bytes:
    """As the first command of this code is told, or one that comes so many later."""
    return command(next(at for at, said in enumerate(COMMANDS_SAID) if HEAD.unpack_from(said)[2] == code) + further)


def want(mask: int) -> bytes:
    return bytes([WANT, mask])


def power(much: int) -> bytes:
    return bytes([POWER | much << 4])


STOP, INIT, SHUTDOWN, GONE, RESET = map(power, range(5))
SAVED, STARTED, CHANGED, BROUGHT = bytes([SAVE]), bytes([START]), bytes([FLIP, 0, 90, 1]), bytes([BRING, BRING | 16])
LEAVES, COMES = (bytes([MOVE | much << 4]) for much in (5, 4))
NOTHING, ALL, OTHERS = 0, 0xAA, 0xFF  #: of `want`
PLAIN, QUICK = bytes([TOLD | AWAKE]), bytes([TOLD | AWAKE | SOON])
SIGNS, SLEEPS, WAKES, PRIMARY = first(Code.SIGN), first(Code.SHUTDOWN, 1), first(Code.STARTUP, 1), first(Code.CREATE_PRIMARY)
CONTEXTS = PRIMARY * 3 + first(Code.START_AUTH_SESSION) * 3 + first(Code.CONTEXT_SAVE) + first(Code.FLUSH_CONTEXT)


def questions() -> bytes:
    bodies = {
        Command.INIT: bytes(4), Command.SET_LOCALITY: b"\3\0\0\0", Command.RESET_ESTABLISHED: b"\3\0\0\0",
        Command.HASH_DATA: b"\0\0\0\3abc", Command.GET_STATE_BLOB: struct.pack(">III", 1, 1, 0),
        Command.SET_STATE_BLOB: struct.pack(">III", 2, 1, 5) + b"state", Command.SET_BUFFER_SIZE: bytes(4),
        Command.GET_INFO: bytes(16), Command.LOCK_STORAGE: bytes(4),
    }  # fmt: skip
    last = (Command.INIT, Command.SHUTDOWN)
    rest = [one for one in Command if one not in last]
    return b"".join(struct.pack(">I", one) + bodies.get(one, b"") for one in (*rest, *last))


def seeds() -> dict[str, bytes]:
    each = range(len(COMMANDS_SAID))
    said = {f"command {at}": want(ALL) + PRIMARY + command(at) + want(OTHERS) + RESET for at in each}
    return (
        {name: PLAIN + steps for name, steps in said.items()}
        | {f"{name}, soon": QUICK + steps for name, steps in said.items()}
        | {
            "questions": PLAIN + bytes([CONTROL | 16]) + block(questions()) + INIT + STARTED,
            "commands": PLAIN + want(ALL) + bytes([COMMANDS]) + block(COMMANDS_SAID[4] + COMMANDS_SAID[8] + COMMANDS_SAID[0]),
            "swaps": PLAIN + b"".join(want(mask) + SIGNS + command(6) for mask in (ALL, OTHERS, NOTHING, ALL)),
            "snapshot": PLAIN + want(ALL) + SAVED + want(NOTHING) + STOP + BROUGHT + INIT + SIGNS + RESET,
            "older state alone": PLAIN + want(ALL) + SAVED + want(NOTHING) + STOP + BROUGHT[:1] + INIT + STARTED + SIGNS,
            "changed": PLAIN + want(ALL) + SAVED + STOP + CHANGED + BROUGHT + INIT,
            "in the clear": PLAIN + want(ALL) + STOP + bytes([CLEAR, CLEAR | t.ENCRYPTED << 4]) + INIT,
            "moved": PLAIN + want(ALL) + LEAVES + SAVED + GONE + COMES + BROUGHT + INIT + want(OTHERS) + SIGNS,
            "sleeps": PLAIN + want(ALL) + SLEEPS + want(OTHERS) + STOP + INIT + WAKES + SIGNS + RESET,
            "said it would sleep": PLAIN + want(ALL) + SLEEPS + want(NOTHING) + SIGNS + SAVED,
            "not told": bytes([AWAKE]) + SAVED + STOP + BROUGHT + INIT + want(ALL) + RESET,
            "bare": bytes([TOLD | AWAKE | BARE | HAS]) + PRIMARY + want(ALL) + SIGNS + RESET + want(OTHERS),
            "contexts": PLAIN + want(ALL) + CONTEXTS + command(CONTEXT_LOAD) + want(OTHERS) + SIGNS + RESET,
            "a copy": PLAIN + want(ALL) + PRIMARY + first(g.OBJECT_CHANGE_AUTH) + want(NOTHING) + command(LOAD) + RESET,
            "the guest's own": PLAIN + PRIMARY + first(Code.EVICT_CONTROL, 1) + want(ALL) + first(Code.EVICT_CONTROL) + want(ALL),
            "at a platform's handle": PLAIN + PRIMARY + command(13) + first(Code.EVICT_CONTROL, 3) + want(ALL) + RESET,
            "switched off": PLAIN + want(ALL) + first(Code.HIERARCHY_CONTROL, 2) + want(NOTHING) + RESET + want(OTHERS),
            "looked at": PLAIN + want(ALL) + bytes([LOOK, LOOK | 1 << 4, LOOK | 7 << 4]) + SLEEPS + bytes([LOOK, LOOK | 1 << 4]),
            "ends": PLAIN + want(ALL) + SHUTDOWN + INIT + STARTED + GONE + INIT + STARTED + SIGNS,
            "a descriptor": PLAIN + bytes([QUESTION | 8 << 4, Command.SET_DATA_FD]),
            "no socket": PLAIN + bytes([QUESTION | 12 << 4, Command.SET_DATA_FD]),
            "a descriptor with another question": PLAIN + bytes([QUESTION | 8 << 4, Command.GET_CONFIG]),
        }
    )
