"""The native dialect (NATIVE.md) as the library speaks it."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Any

from hsmvisord.wire.attributes import Kind, from_memory, kind_of
from hsmvisord.wire.calls import Attribute, Call, Mechanism, Needed
from support.wire_client import Encoding, ReplyReader, WireClient

NEW, JOIN, FORK, RESUME = range(4)


class NativeEncoding(Encoding):
    def __init__(self, ulong_size: int = 8) -> None:
        self.ulong_size = ulong_size

    def head(self, call: Call) -> bytes:
        return struct.pack(">I", call)

    def reply_head(self, call: Call, reader: ReplyReader) -> int | None:
        told = reader.number(4)
        if told == 0:
            return reader.number(8)
        assert told == call, f"a reply to {call} says {told}"
        return None

    def byte_array(self, value: bytes | None) -> bytes:
        return b"\0\0\0\0\0" if value is None else b"\1" + struct.pack(">I", len(value)) + value

    def room(self, room: int | None) -> bytes:
        return struct.pack(">I", 0 if room is None else room or 0xFFFFFFFF)

    def rooms(self, wanted: list[tuple[int, int | None]]) -> bytes:
        return struct.pack(">I", len(wanted)) + b"".join([struct.pack(">Q", kind) + self.room(room) for kind, room in wanted])

    def memory(self, value: Any) -> bytes:
        """Returns a value as a C program holds it."""
        match value:
            case bytes():
                return value
            case bool():
                return bytes((value,))
            case int():
                return (value % (1 << 8 * self.ulong_size)).to_bytes(self.ulong_size, "little")
        return b"".join([self.memory(item) for item in value])

    def attribute(self, attribute: Attribute) -> bytes:
        head = struct.pack(">Q", attribute.type)
        if kind_of(attribute.type) is Kind.TEMPLATE:
            return head + b"\2" + self.template(attribute.value)
        memory = self.memory(attribute.value)
        return head + b"\1" + struct.pack(">I", len(memory)) + memory

    def mechanism(self, mechanism: Mechanism | None) -> bytes:
        if mechanism is None:
            return struct.pack(">QB", 0, 255)
        head = struct.pack(">Q", mechanism.type)
        match mechanism.parameter:
            case None:
                return head + b"\0"
            case bytes() as raw:
                return head + b"\1" + struct.pack(">I", len(raw)) + raw
            case items:
                return head + bytes((2, len(items))) + b"".join([self.item(item) for item in items])

    @staticmethod
    def item(item: int | bytes) -> bytes:
        return b"b" + struct.pack(">I", len(item)) + item if isinstance(item, bytes) else b"u" + struct.pack(">Q", item)

    def reply_attribute(self, reader: ReplyReader) -> tuple[int, Any]:
        kind, form = reader.number(8), reader.number(1)
        match form:
            case 0:
                return kind, None
            case 1:
                return kind, from_memory(kind, reader.prefixed(), self.ulong_size)
            case 2:
                return kind, tuple([Attribute(*self.reply_attribute(reader)) for _ in range(reader.number(4))])
            case 3:
                return kind, Needed(reader.number(4))
        raise AssertionError(f"an attribute of form {form}")


@dataclass(frozen=True)
class Greeting:
    """The reply to Hello."""

    ticket: bytes
    joined: bool
    epoch: int
    watermark: int
    max_message: int
    max_connections: int


class NativeClient(WireClient):
    """One connection of the library; `hello` comes first."""

    def __init__(self, sock: socket.socket, first: int = 0x81, ulong_size: int = 8) -> None:
        super().__init__(sock, NativeEncoding(ulong_size), first)
        self.ulong_size = ulong_size

    def hello(
        self, mode: int = NEW, ticket: bytes | None = None, watermark: int = 0, program: bytes = b"pytest", pid: int = 1
    ) -> Greeting:
        ticket, joined, *rest = self.call(Call.HELLO, self.ulong_size, mode, ticket, watermark, program, pid)
        return Greeting(ticket, bool(joined), *rest)

    def sign_once(self, session: int, mechanism: Mechanism, key: int, data: bytes, room: int | None = 65536) -> Any:
        return self.call(Call.SIGN_ONCE, session, mechanism, key, data, room)[0]

    def decrypt_once(self, session: int, mechanism: Mechanism, key: int, data: bytes, room: int | None = 65536) -> Any:
        return self.call(Call.DECRYPT_ONCE, session, mechanism, key, data, room)[0]

    def verify_once(self, session: int, mechanism: Mechanism, key: int, data: bytes, signature: bytes) -> None:
        self.call(Call.VERIFY_ONCE, session, mechanism, key, data, signature)

    def digest_once(self, session: int, mechanism: Mechanism, data: bytes, room: int | None = 65536) -> Any:
        return self.call(Call.DIGEST_ONCE, session, mechanism, data, room)[0]

    def find_once(self, session: int, *template: tuple[int, Any], most: int = 64) -> tuple[tuple[int, ...], bool, int]:
        """Returns handles, whether there are more, and the watermark of the view."""
        handles, more, watermark = self.call(Call.FIND_ONCE, session, template, most)
        return handles, bool(more), watermark

    def rotation_wait(self, last: int, deadline_ms: int = 0) -> int:
        return int(self.call(Call.ROTATION_WAIT, last, options=deadline_option(deadline_ms))[0])


def deadline_option(milliseconds: int) -> bytes:
    return struct.pack(">HHI", 1, 4, milliseconds) if milliseconds else b""
