"""What QEMU or a TSS says to a TPM's control channel, and what comes back to the module from its TPM.

The first byte of an input chooses who asks; the rest is the stream.  It is heard whole and byte by byte.
"""

from __future__ import annotations

import struct

from hsmvisord import limits
from hsmvisord.wire import tpm2
from hsmvisord.wire import tpm_control as t
from hsmvisord.wire.tpm2 import BadResponse, Code, Response, Tpm2Error
from hsmvisord.wire.tpm_control import Asked, BrokenControl, Command, Control

INVARIANT = (
    "a stream is questions, or it is BrokenControl; what is asked is said in the bytes that came, within its limits; the same "
    "comes of a stream whole and byte by byte; every refusal is as long as an answer that went well; a response of the TPM is "
    "taken apart, or it is Tpm2Error or BadResponse; nothing else is raised"
)
MAX_LENGTH = 2000
TSS, RESPONSE = 1, 2  #: bits of the first byte


def heard(data: bytes, padded: bool, step: int) -> tuple[list[Asked], str]:
    control, found, why = Control(padded), list[Asked](), ""
    try:
        for at in range(0, len(data), step):
            control.receive(data[at : at + step])
            while (asked := control.next()) is not None:
                check(asked)
                found.append(asked)
            assert control.pending <= t.MOST
    except BrokenControl as error:
        why = str(error)
    return found, why


def check(asked: Asked) -> None:
    assert len(asked.data) <= {Command.HASH_DATA: limits.MAX_TPM_HASH, Command.SET_STATE_BLOB: limits.MAX_TPM_BLOB}.get(
        asked.command, 0
    )
    assert 0 <= asked.number < 1 << 32 and 0 <= asked.offset < 1 << 32 and 0 <= asked.blob < 1 << 32
    refusal = t.refusal(asked.command, t.FAIL)
    assert len(refusal) in (4, 8, 12, 16)


def answered(data: bytes) -> None:
    try:
        response = Response(Code.READ_PUBLIC, data)
        response.number()
        response.parameters()
        taken = response.sized(), response.rest()
    except (Tpm2Error, BadResponse):
        return
    assert sum(map(len, taken)) <= len(data) - tpm2.HEAD.size


def run(data: bytes) -> None:
    head, stream = data[:1], data[1:]
    if head and head[0] & RESPONSE:
        answered(stream)
        return
    padded = not (head and head[0] & TSS)
    whole, why = heard(stream, padded, max(len(stream), 1))
    bytewise, why_bytewise = heard(stream, padded, 1)
    assert (whole, why) == (bytewise, why_bytewise)


def seeds() -> dict[str, bytes]:
    ask = struct.Struct(">I").pack
    whole = b"".join(
        (
            ask(Command.SET_DATA_FD), ask(Command.GET_CAPABILITY), ask(Command.STOP), ask(Command.SET_BUFFER_SIZE) + ask(3968),
            ask(Command.INIT) + ask(0), ask(Command.GET_ESTABLISHED), ask(Command.SET_LOCALITY) + b"\1\0\0\0",
            ask(Command.GET_STATE_BLOB) + struct.pack(">III", 1, 1, 0), ask(Command.STOP),
            ask(Command.SET_STATE_BLOB) + struct.pack(">III", 2, 1, 5) + b"state", ask(Command.HASH_DATA) + ask(3) + b"abc",
            ask(Command.GET_INFO) + bytes(16), ask(Command.CANCEL), ask(Command.SHUTDOWN),
        )
    )  # fmt: skip
    return {
        "qemu": b"\0" + whole,
        "tss": b"\1" + ask(Command.SET_LOCALITY) + b"\3" + ask(Command.INIT) + ask(1),
        "unknown": b"\0" + ask(0x14),
        "too long": b"\0" + ask(Command.HASH_DATA) + ask(limits.MAX_TPM_HASH + 1),
        "response": b"\2" + struct.pack(">HIIIH", 0x8002, 24, 0, 8, 4) + b"name" + b"rest",
        "failed": b"\2" + struct.pack(">HII", 0x8001, 10, 0x18B),
        "short": b"\2" + struct.pack(">HIIH", 0x8001, 12, 0, 9),
    }
