"""The control channel of a TPM, the TPM's side: swtpm's protocol, as QEMU's `-tpmdev emulator` and the TSS' swtpm TCTI speak it
(qemu, backends/tpm/tpm_ioctl.h; tpm2-tss, tcti-swtpm.c).  Sans-IO; big-endian.

One question at a time.  QEMU reads as many bytes for an answer as the command has, whatever the result: so each has one size.
QEMU sends three bytes of padding behind a locality, the TCTI none; the channel's owner says which of the two it speaks with.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

from hsmvisord import limits


class Command(IntEnum):
    GET_CAPABILITY = 0x01
    INIT = 0x02
    SHUTDOWN = 0x03
    GET_ESTABLISHED = 0x04
    SET_LOCALITY = 0x05
    HASH_START = 0x06
    HASH_DATA = 0x07
    HASH_END = 0x08
    CANCEL = 0x09
    STORE_VOLATILE = 0x0A
    RESET_ESTABLISHED = 0x0B
    GET_STATE_BLOB = 0x0C
    SET_STATE_BLOB = 0x0D
    STOP = 0x0E
    GET_CONFIG = 0x0F
    SET_DATA_FD = 0x10  #: a descriptor comes with it
    SET_BUFFER_SIZE = 0x11
    GET_INFO = 0x12
    LOCK_STORAGE = 0x13


class Capability(IntFlag):
    INIT = 1
    SHUTDOWN = 1 << 1
    GET_ESTABLISHED = 1 << 2
    SET_LOCALITY = 1 << 3
    HASHING = 1 << 4
    CANCEL = 1 << 5
    STORE_VOLATILE = 1 << 6
    RESET_ESTABLISHED = 1 << 7
    GET_STATE_BLOB = 1 << 8
    SET_STATE_BLOB = 1 << 9
    STOP = 1 << 10
    GET_CONFIG = 1 << 11
    SET_DATA_FD = 1 << 12
    SET_BUFFER_SIZE = 1 << 13
    GET_INFO = 1 << 14
    SEND_COMMAND_HEADER = 1 << 15
    LOCK_STORAGE = 1 << 16


class Blob(IntEnum):
    PERMANENT, VOLATILE, SAVED = 1, 2, 3


#: Of a result, as TPM 1.2 has them; a result with bit 0x800 set is one that goes away by itself (QEMU takes it for "no such blob").
SUCCESS, FAIL, BAD_PARAMETER, BAD_ORDINAL, BAD_LOCALITY, RETRY = 0, 9, 3, 10, 61, 0x800
DECRYPTED = 1  #: a flag of GET_STATE_BLOB: the blob is asked for in the clear
ENCRYPTED = 2  #: a flag of a blob

_CODE, _WORD = struct.Struct(">I"), struct.Struct(">I")


class BrokenControl(Exception):
    """What no peer says.  The text says what came."""


@dataclass(frozen=True)
class Asked:
    """One question; a field that its command does not have is 0 or empty.

    `number`: of INIT the flags, of the locality commands the locality, of SET_BUFFER_SIZE the size that is wanted (0: none),
    of LOCK_STORAGE the retries.
    """

    command: Command
    number: int = 0
    flags: int = 0  #: of the blob commands and GET_INFO
    blob: int = 0  #: which one; whether it is a Blob is for whoever answers
    offset: int = 0
    data: bytes = field(default=b"", repr=False)


#: Bytes behind the code, as QEMU sends them: the larger of its question's and its answer's structure where it has a union of both.
_BODY: dict[Command, struct.Struct] = {
    Command.INIT: struct.Struct(">I"),
    Command.SET_LOCALITY: struct.Struct(">B3x"),
    Command.HASH_DATA: struct.Struct(">I"),
    Command.RESET_ESTABLISHED: struct.Struct(">B3x"),
    Command.GET_STATE_BLOB: struct.Struct(">III"),
    Command.SET_STATE_BLOB: struct.Struct(">III"),
    Command.SET_BUFFER_SIZE: struct.Struct(">I"),
    Command.GET_INFO: struct.Struct(">QI4x"),
    Command.LOCK_STORAGE: struct.Struct(">I"),
}
_LOCALITY = struct.Struct(">B")  #: as the TCTI sends it
_NOTHING = struct.Struct("")
_LOCALITIES = (Command.SET_LOCALITY, Command.RESET_ESTABLISHED)

#: How many bytes of data follow the body, by the body's values; and how many there may be.
_MOST = {Command.HASH_DATA: limits.MAX_TPM_HASH, Command.SET_STATE_BLOB: limits.MAX_TPM_BLOB}

#: What an answer has behind its result, where it has something.
_ANSWER: dict[Command, struct.Struct] = {
    Command.GET_ESTABLISHED: struct.Struct(">B3x"),
    Command.GET_STATE_BLOB: struct.Struct(">III"),  # flags, all of it, what comes now
    Command.GET_CONFIG: struct.Struct(">I"),
    Command.SET_BUFFER_SIZE: struct.Struct(">III"),  # that it has now, the least, the most
    Command.GET_INFO: struct.Struct(">II"),  # all of it, what comes now
}


class Control:
    """Takes questions apart; `answer` and `refusal` make what is sent back."""

    def __init__(self, padded: bool = True) -> None:
        """`padded`: three bytes follow a locality, as QEMU has it."""
        self._padded = padded
        self._in = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of a question that has not come whole."""
        return len(self._in)

    def receive(self, data: bytes) -> None:
        """Raises BrokenControl when more comes than one question has room for: nobody asks before the last one was answered."""
        self._in += data
        if len(self._in) > MOST:
            raise BrokenControl(f"{len(self._in)} bytes in one question, at most {MOST}")

    def next(self) -> Asked | None:
        """Returns what came whole.  Raises BrokenControl as soon as a head shows that it cannot be."""
        if len(self._in) < _CODE.size:
            return None
        (code,) = _CODE.unpack_from(self._in)
        try:
            command = Command(code)
        except ValueError:
            raise BrokenControl(f"command {code:#x}") from None
        body = self._body(command)
        begins = _CODE.size + body.size
        if len(self._in) < begins:
            return None
        values = body.unpack_from(self._in, _CODE.size)
        length = values[-1] if command in _MOST else 0
        if length > (most := _MOST.get(command, 0)):
            raise BrokenControl(f"{command.name} with {length} bytes, at most {most}")
        if len(self._in) < begins + length:
            return None
        data = bytes(self._in[begins : begins + length])
        del self._in[: begins + length]
        return _asked(command, values, data)

    def _body(self, command: Command) -> struct.Struct:
        if command in _LOCALITIES and not self._padded:
            return _LOCALITY
        return _BODY.get(command, _NOTHING)


#: Bytes of the longest question.
MOST = _CODE.size + max(s.size for s in _BODY.values()) + max(_MOST.values())


def _asked(command: Command, values: tuple[int, ...], data: bytes) -> Asked:
    match command:
        case Command.GET_STATE_BLOB:
            return Asked(command, flags=values[0], blob=values[1], offset=values[2])
        case Command.SET_STATE_BLOB:
            return Asked(command, flags=values[0], blob=values[1], data=data)
        case Command.GET_INFO:
            return Asked(command, flags=values[0], offset=values[1])
        case Command.HASH_DATA:
            return Asked(command, data=data)
    return Asked(command, number=values[0] if values else 0)


def capabilities(found: Capability) -> bytes:
    """The answer to GET_CAPABILITY, the only one without a result."""
    return struct.pack(">Q", found)


def answer(command: Command, *values: int, data: bytes = b"") -> bytes:
    """One that went well: what the command's answer has, in the protocol's order, and data behind it."""
    return _WORD.pack(SUCCESS) + _ANSWER.get(command, _NOTHING).pack(*values) + data


def refusal(command: Command, result: int) -> bytes:
    """As long as an answer that went well, for QEMU waits for all of it."""
    if command is Command.GET_CAPABILITY:
        return capabilities(Capability(0))
    return _WORD.pack(result) + bytes(_ANSWER.get(command, _NOTHING).size)
