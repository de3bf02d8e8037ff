"""Who speaks with the TPM: QEMU by a control connection and one for commands that comes with it, and the TSS' swtpm TCTI by a
connection for each command.

A peer that says what cannot be loses its connection; the TPM stays as it is.  A successor of this process may go on with QEMU's
connections: what was asked and not answered by one that died, it answers as a failure.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from hsmvisor_rpc.internal.descriptors import close_descriptors, receive

from hsmvisord import limits, memory
from hsmvisord.tpm import library
from hsmvisord.tpm.blobs import BadBlob
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.tpm.managed import ManagedTpm
from hsmvisord.tpm.seals import Seals
from hsmvisord.tpm.stream import Busy, CommandStream, wait
from hsmvisord.wire import tpm_control as wire
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

    def __init__(self, managed: ManagedTpm, seals: Seals, log: Callable[[str], None]) -> None:
        self._managed, self._tpm, self._seals, self._log = managed, managed.tpm, seals, log
        self._lock = threading.Lock()  #: questions come one after the other, whoever asks
        self._turn = threading.Lock()  #: held from a command's coming until its answer is sent
        self._leaving = self._left = False
        self.locality = 0  #: kept over INIT: QEMU does not say it again after a reset
        self._hashed: list[bytes] | None = None

    @contextlib.contextmanager
    def parting(self) -> Iterator[None]:
        """What was asked is answered, nothing is meanwhile, and nothing after it: that stays in the connections, for a successor.
        Where what is done meanwhile fails, all goes on here."""
        self._leaving = True
        with self._tpm.held_off(), self._turn, self._lock:
            try:
                yield
            except BaseException:
                self._leaving = False
                raise
            self._left = True

    def machine_gone(self) -> None:
        """QEMU has ended, with or without a word: the TPM loses its power with it, and what it brought is nobody's."""
        with contextlib.suppress(TpmFault):  # a successor has it
            self._managed.switch_off()
            self._managed.forget_brought()
        self._seals.departed()

    # ---- commands ---------------------------------------------------------------------------------------------------

    def serve_commands(self, sock: socket.socket, linger: float = 0.0, busy: Busy | None = None) -> str:
        """Answers command after command until the peer goes, or says what cannot be; returns why.  Closes it, unless a successor
        has it too.

        `linger`: seconds that the next command is waited for before others who ask have their turn; `busy`: says to a successor
        whether a command was taken that was not answered.
        """
        noted = busy or Busy()
        commands = CommandStream(sock, linger, noted, lambda: self._managed.process_plain(sock, noted.page, lambda: self.locality))
        why = ""
        try:
            while commands.wait():
                with self._turn:
                    if self._left:
                        return ""
                    while (command := commands.next()) is not None:
                        commands.answer(self._managed.process(command, self.locality))
                        if self._leaving:
                            break
        except (BrokenControl, OSError, TpmFault) as error:
            why = str(error)
            self._log(f"commands: {error}")
        sock.close()
        return why

    def start_commands(self, sock: socket.socket, busy: Busy) -> None:
        """As serve_commands of QEMU's, in the background."""

        def run() -> None:
            self.serve_commands(sock, limits.TPM_LINGER_SECONDS, busy)

        memory.start_thread("tpm commands", run)

    # ---- control ----------------------------------------------------------------------------------------------------

    def serve_control(self, sock: socket.socket, padded: bool = True, take: Callable[[socket.socket], None] | None = None) -> str:
        """Answers question after question until the peer goes, or says what cannot be; returns why.  Closes it, unless a successor
        has it too.

        `padded`: as QEMU asks.  `take` gets the connection for commands that QEMU brings; without it, that is served here and ends
        with this one, or with the next that it brings.
        """
        control, given = Control(padded), list[int]()
        commands: socket.socket | None = None
        why = ""
        try:
            while True:
                wait(sock)
                with self._lock:
                    if self._left:
                        return ""
                    asked = _next_question(sock, control, given)
                if asked is None:
                    break
                if len(given) > (asked.command is Command.SET_DATA_FD):
                    raise BrokenControl("a descriptor with a question that brings none")
                if given:
                    brought = _socket(given)
                    if take is not None:
                        take(brought)
                    else:
                        shut(commands)
                        commands = brought
                        self.start_commands(brought, Busy())
                    sock.sendall(wire.answer(asked.command))
                else:
                    sock.sendall(self.answer(asked))
                if asked.command is Command.SHUTDOWN:
                    break
        except (BrokenControl, OSError) as error:
            why = str(error)
            self._log(f"control: {error}")
        finally:
            close_descriptors(given)
            shut(commands)
        sock.close()
        return why

    def answer(self, asked: Asked) -> bytes:
        if asked.command is Command.CANCEL:  # a command may run, and holds nothing that this needs
            self._tpm.cancel()
            return wire.answer(asked.command)
        with self._lock:
            try:
                with self._managed.turn():
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
                self._seals.arrived()
            case Command.STOP:
                self._managed.switch_off()
            case Command.SHUTDOWN:
                self._managed.switch_off()
                self._managed.forget_brought()
                self._seals.departed()
            case Command.GET_ESTABLISHED:
                values = (int(self._tpm.established),)
            case Command.SET_LOCALITY:
                self.locality = _locality(asked)
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
        begins, data = self._managed.blob(_kind(asked))
        sealed = self._seals.seal(asked.blob, begins, data) if data else b""
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
            data = self._seals.open(asked.blob, asked.data)
        except BadBlob as error:
            self._log(f"a state blob was refused: {error}")
            raise Refused(wire.BAD_PARAMETER) from None
        self._managed.set_state(kind, data)


def _socket(given: list[int]) -> socket.socket:
    """Takes it out of what was given.  Raises BrokenControl."""
    try:
        found = socket.socket(fileno=given[0])
    except OSError as error:
        raise BrokenControl(f"a connection for commands that is none: {error.strerror}") from None
    given.clear()
    return found


def shut(sock: socket.socket | None) -> None:
    """Its thread finds the end, and closes it."""
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _locality(asked: Asked) -> int:
    if asked.number > limits.MAX_TPM_LOCALITY:
        raise Refused(wire.BAD_LOCALITY)
    return asked.number


def _kind(asked: Asked) -> int:
    try:
        return _KINDS[Blob(asked.blob)]
    except ValueError:
        raise Refused(wire.BAD_PARAMETER) from None


def _next_question(sock: socket.socket, control: Control, given: list[int]) -> Asked | None:
    """Returns the next question whole, None at the end.  Raises BrokenControl, OSError; TimeoutError of one that does not go on."""
    asked: Asked | None = control.next()
    sock.settimeout(limits.TPM_QUESTION_SECONDS)
    try:
        while asked is None:
            data, descriptors = receive(sock, 1)
            given += descriptors
            if not data:
                if control.pending:
                    raise BrokenControl("a question that ends early")
                return None
            control.receive(data)
            asked = control.next()
    finally:
        sock.settimeout(None)
    return asked
