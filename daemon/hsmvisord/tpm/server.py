"""Who speaks with the TPM: QEMU by a control connection and one for commands that comes with it, and the TSS' swtpm TCTI by a
connection for each command.

A peer that says what cannot be loses its connection; the TPM stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable

from hsmvisor_rpc.internal.descriptors import receive

from hsmvisord import limits, memory
from hsmvisord.tpm import library
from hsmvisord.tpm.blobs import BadBlob, Blobs
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.tpm.managed import ManagedTpm
from hsmvisord.wire import tpm_control as wire
from hsmvisord.wire.tpm2 import HEAD
from hsmvisord.wire.tpm_control import Asked, Blob, BrokenControl, Capability, Command, Control

#: What is answered.  Without state blobs and STOP QEMU would refuse to migrate.
CAPABILITIES = (
    Capability.INIT
    | Capability.SHUTDOWN
    | Capability.GET_ESTABLISHED
    | Capability.SET_LOCALITY
    | Capability.HASHING
    | Capability.CANCEL
    | Capability.STORE_VOLATILE
    | Capability.RESET_ESTABLISHED
    | Capability.GET_STATE_BLOB
    | Capability.SET_STATE_BLOB
    | Capability.STOP
    | Capability.GET_CONFIG
    | Capability.SET_DATA_FD
    | Capability.SET_BUFFER_SIZE
)
#: The protocol's kinds of state, as libtpms has them.
_KINDS = {Blob.PERMANENT: library.PERMANENT, Blob.VOLATILE: library.VOLATILE, Blob.SAVED: library.SAVED}


class Refused(Exception):
    """A question that is answered with a result other than success."""

    def __init__(self, result: int) -> None:
        super().__init__(f"{result:#x}")
        self.result = result


class Server:
    """`log` gets what an operator should know."""

    def __init__(self, managed: ManagedTpm, blobs: Blobs, log: Callable[[str], None]) -> None:
        self._managed, self._tpm, self._blobs, self._log = managed, managed.tpm, blobs, log
        self._lock = threading.Lock()  #: questions come one after the other, whoever asks
        self._locality = 0  #: kept over INIT: QEMU does not say it again after a reset
        self._hashed: list[bytes] | None = None

    # ---- commands ---------------------------------------------------------------------------------------------------

    def serve_commands(self, sock: socket.socket) -> None:
        """Answers command after command until the peer goes, or says what cannot be.  Closes it."""
        commands = _Commands(sock)
        with sock:
            try:
                while (command := commands.next()) is not None:
                    sock.sendall(self._managed.process(command, self._locality))
            except (BrokenControl, OSError, TpmFault) as error:
                self._log(f"commands: {error}")

    # ---- control ----------------------------------------------------------------------------------------------------

    def serve_control(self, sock: socket.socket, padded: bool = True) -> None:
        """Answers question after question until the peer goes, or says what cannot be.  Closes it.

        `padded`: as QEMU asks.  One of QEMU brings the connection for commands, which ends with this one.
        """
        control, given = Control(padded), list[int]()
        commands: list[socket.socket] = []
        try:
            while True:
                data, descriptors = receive(sock, 1)
                given += descriptors
                if not data:
                    return
                control.receive(data)
                while (asked := control.next()) is not None:
                    if asked.command is Command.SET_DATA_FD and given:
                        commands.append(socket.socket(fileno=given.pop(0)))
                        self._start(commands[-1])
                        sock.sendall(wire.answer(asked.command))
                    else:
                        sock.sendall(self.answer(asked))
                    if asked.command is Command.SHUTDOWN:
                        return
        except (BrokenControl, OSError) as error:
            self._log(f"control: {error}")
        finally:
            for descriptor in given:
                os.close(descriptor)
            for one in commands:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _start(self, sock: socket.socket) -> None:
        memory.start_thread("tpm commands", lambda: self.serve_commands(sock))

    def answer(self, asked: Asked) -> bytes:
        if asked.command is Command.CANCEL:  # a command may run, and holds nothing that this needs
            self._tpm.cancel()
            return wire.answer(asked.command)
        with self._lock:
            try:
                return self._answer(asked)
            except Refused as refused:
                return wire.refusal(asked.command, refused.result)
            except TpmFault as fault:
                self._log(f"{asked.command.name}: {fault}")
                return wire.refusal(asked.command, wire.FAIL)

    def _answer(self, asked: Asked) -> bytes:
        values: tuple[int, ...] = ()
        match asked.command:
            case Command.GET_CAPABILITY:
                return wire.capabilities(CAPABILITIES)
            case Command.INIT:
                self._managed.switch_on()  # a flag has swtpm delete the file of the volatile state: here is none
            case Command.STOP | Command.SHUTDOWN:
                self._managed.switch_off()
            case Command.GET_ESTABLISHED:
                values = (int(self._tpm.established),)
            case Command.SET_LOCALITY:
                self._locality = _locality(asked)
            case Command.RESET_ESTABLISHED:
                self._tpm.reset_established(_locality(asked))
            case Command.HASH_START | Command.HASH_DATA | Command.HASH_END:
                self._hash(asked)
            case Command.STORE_VOLATILE:
                self._tpm.state(library.VOLATILE)  # whoever wants it asks for the blob
            case Command.GET_STATE_BLOB:
                return self._blob(asked)
            case Command.SET_STATE_BLOB:
                self._take_blob(asked)
            case Command.GET_CONFIG:
                values = (0,)
            case Command.SET_BUFFER_SIZE:
                values = self._tpm.buffer_size(asked.number)
            case _:  # a descriptor that did not come, GET_INFO, LOCK_STORAGE
                raise Refused(wire.BAD_ORDINAL)
        return wire.answer(asked.command, *values)

    def _hash(self, asked: Asked) -> None:
        if asked.command is Command.HASH_START:
            self._hashed = []
        elif self._hashed is None:
            raise Refused(wire.FAIL)
        elif asked.command is Command.HASH_DATA:
            if sum(map(len, self._hashed)) + len(asked.data) > limits.MAX_TPM_HASHED:
                self._hashed = None
                raise Refused(wire.BAD_PARAMETER)
            self._hashed.append(asked.data)
        else:
            parts, self._hashed = self._hashed, None
            self._tpm.hash(parts)

    def _blob(self, asked: Asked) -> bytes:
        """Sealed, whatever was asked for; QEMU hands the flag that says so on to the machine's next host."""
        data = self._tpm.state(_kind(asked))
        sealed = self._blobs.seal(asked.blob, data) if data else b""
        if asked.offset > len(sealed):
            raise Refused(wire.BAD_PARAMETER)
        part = sealed[asked.offset :]
        return wire.answer(asked.command, wire.ENCRYPTED if sealed else 0, len(sealed), len(part), data=part)

    def _take_blob(self, asked: Asked) -> None:
        kind = _kind(asked)
        if not asked.flags & wire.ENCRYPTED:
            self._log("a state blob in the clear was refused: its keys would have been anybody's")
            raise Refused(wire.BAD_PARAMETER)
        try:
            data = self._blobs.open(asked.blob, asked.data)
        except BadBlob as error:
            self._log(f"a state blob was refused: {error}")
            raise Refused(wire.BAD_PARAMETER) from None
        self._managed.set_state(kind, data)


def _locality(asked: Asked) -> int:
    if asked.number > limits.MAX_TPM_LOCALITY:
        raise Refused(wire.BAD_LOCALITY)
    return asked.number


def _kind(asked: Asked) -> int:
    try:
        return _KINDS[Blob(asked.blob)]
    except ValueError:
        raise Refused(wire.BAD_PARAMETER) from None


class _Commands:
    """Whole commands out of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._in = sock, b""

    def next(self) -> bytes | None:
        """None at the end.  Raises BrokenControl, OSError."""
        while True:
            if len(self._in) >= HEAD.size:
                _, length, _ = HEAD.unpack_from(self._in)
                if not HEAD.size <= length <= limits.MAX_TPM_COMMAND:
                    raise BrokenControl(f"a command of {length} bytes, {HEAD.size} to {limits.MAX_TPM_COMMAND}")
                if len(self._in) >= length:
                    command, self._in = self._in[:length], self._in[length:]
                    return command
            part = self._sock.recv(limits.MAX_TPM_COMMAND)
            if not part:
                if self._in:
                    raise BrokenControl("a command that ends early")
                return None
            self._in += part
