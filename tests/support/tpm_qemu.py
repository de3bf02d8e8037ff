"""QEMU's side of a TPM: its control connection, and the one for commands that it brings (backends/tpm/tpm_emulator.c)."""

from __future__ import annotations

import socket
import struct

from hsmvisord.wire import tpm2
from hsmvisord.wire import tpm_control as t
from hsmvisord.wire.tpm_control import Command
from support.tpm_guest import Guest

WITHIN = 20.0
#: Bytes that QEMU reads for an answer; of the others 4.
SIZES = {Command.GET_CAPABILITY: 8, Command.GET_ESTABLISHED: 8, Command.GET_STATE_BLOB: 16, Command.SET_BUFFER_SIZE: 16}
SIZES |= {Command.GET_CONFIG: 8, Command.GET_INFO: 12}


class Qemu:
    """QEMU's side of both connections."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        control.settimeout(WITHIN)
        self.commands: socket.socket | None = None

    def ask(self, command: Command, body: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        """Returns as many bytes as QEMU reads."""
        question = struct.pack(">I", command) + body
        if fds:
            socket.send_fds(self.control, [question], list(fds))
        else:
            self.control.sendall(question)
        return exactly(self.control, SIZES.get(command, 4))

    def good(self, command: Command, body: bytes = b"") -> bytes:
        answer = self.ask(command, body)
        assert answer[:4] == bytes(4), (command, answer.hex())
        return answer[4:]

    def connect(self) -> Guest:
        """Brings the connection for commands."""
        ours, theirs = socket.socketpair()
        ours.settimeout(WITHIN)
        self.commands = ours
        assert self.ask(Command.SET_DATA_FD, fds=(theirs.fileno(),)) == bytes(4)
        theirs.close()
        return Guest(self.command)

    def command(self, data: bytes) -> bytes:
        assert self.commands is not None
        self.commands.sendall(data)
        head = exactly(self.commands, 10)
        return head + exactly(self.commands, tpm2.HEAD.unpack(head)[1] - 10)

    def start(self, flags: int = 0) -> None:
        for command, body in (
            (Command.STOP, b""),
            (Command.SET_BUFFER_SIZE, bytes(4)),
            (Command.STOP, b""),
            (Command.SET_BUFFER_SIZE, struct.pack(">I", 3968)),
            (Command.INIT, struct.pack(">I", flags)),
        ):
            self.good(command, body)

    def blob(self, kind: int) -> tuple[int, bytes]:
        """Returns flags and content; asked for in the clear, as QEMU does."""
        flags, total, length = struct.unpack(">III", self.good(Command.GET_STATE_BLOB, struct.pack(">III", t.DECRYPTED, kind, 0)))
        assert total == length, "QEMU wants it whole"
        return flags, exactly(self.control, length)

    def set_blob(self, kind: int, flags: int, data: bytes) -> int:
        self.control.sendall(struct.pack(">IIII", Command.SET_STATE_BLOB, flags, kind, len(data)))
        self.control.sendall(data)
        return int.from_bytes(exactly(self.control, 4), "big")

    def close(self) -> None:
        self.control.close()
        if self.commands is not None:
            self.commands.close()


def exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data
