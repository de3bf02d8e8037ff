"""A small client of the module's guest listener, for tests: what the two dialects have in common.

Requests take and replies give the plain values that `hsmvisord.wire.calls` describes.
"""

from __future__ import annotations

import itertools
import socket
import struct
from typing import Any

from hsmvisord import ck
from hsmvisord.wire.calls import MORE_FOLLOWS, Attribute, Call, Mechanism, Needed
from hsmvisord.wire.table import CALLS

HEADER = struct.Struct(">III")
DEFAULT_TIMEOUT = 20  #: seconds until a test that waits for an answer fails


class Refused(Exception):
    """The server answered with a CK_RV."""

    def __init__(self, call: Call, rv: int) -> None:
        super().__init__(f"{call.name}: {ck.rv_name(rv)}")
        self.call, self.rv = call, rv


class Closed(Exception):
    """The server closed the connection."""


class ReplyReader:
    """Reads the fields of one reply; `done` fails the test when something is left."""

    def __init__(self, data: bytes) -> None:
        self.data, self.offset = data, 0

    def take(self, count: int) -> bytes:
        taken = self.data[self.offset : self.offset + count]
        assert len(taken) == count, f"the reply ends {count - len(taken)} bytes too early"
        self.offset += count
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def prefixed(self) -> bytes:
        return self.take(self.number(4))

    def done(self) -> None:
        assert self.offset == len(self.data), f"the reply has {len(self.data) - self.offset} bytes too many"


class Encoding:
    """One dialect as a client speaks it; subclasses add attributes, mechanisms and the message's head.  No I/O."""

    def request(self, call: Call, *args: Any) -> bytes:
        """Returns the message of a request."""
        codes = CALLS[call][0]
        return self.head(call) + b"".join([self.field(code, value) for code, value in zip(codes, args, strict=True)])

    def reply(self, call: Call, message: bytes) -> tuple[Any, ...]:
        """Returns the values of a reply; raises Refused."""
        reader = ReplyReader(message)
        rv = self.reply_head(call, reader)
        if rv is not None:
            reader.done()
            raise Refused(call, rv)
        values = tuple([self.reply_field(code, reader) for code in CALLS[call][1]])
        reader.done()
        return values

    def head(self, call: Call) -> bytes:
        raise NotImplementedError

    def reply_head(self, call: Call, reader: ReplyReader) -> int | None:
        """Returns the CK_RV of an error reply."""
        raise NotImplementedError

    def attribute(self, attribute: Attribute) -> bytes:
        raise NotImplementedError

    def rooms(self, wanted: list[tuple[int, int | None]]) -> bytes:
        raise NotImplementedError

    def mechanism(self, mechanism: Mechanism | None) -> bytes:
        raise NotImplementedError

    def byte_array(self, value: bytes | None) -> bytes:
        raise NotImplementedError

    def room(self, room: int | None) -> bytes:
        raise NotImplementedError

    def count(self, room: int | None) -> bytes:
        return self.room(room)

    def reply_attribute(self, reader: ReplyReader) -> tuple[int, Any]:
        raise NotImplementedError

    def reply_update(self, reader: ReplyReader) -> Any:
        raise NotImplementedError

    def field(self, code: str, value: Any) -> bytes:
        match code:
            case "u":
                return struct.pack(">Q", value)
            case "y":
                return bytes((value,))
            case "s" | "z":
                return struct.pack(f">I{len(value)}s", len(value), value)
            case "ay":
                return self.byte_array(value)
            case "au":
                return b"\1" + struct.pack(f">I{len(value)}Q", len(value), *value)
            case "fy":
                return self.room(value)
            case "fu":
                return self.count(value)
            case "Ny":
                return b"\0" if value == MORE_FOLLOWS else b"\1" + self.room(value)
            case "aA":
                return self.template(value)
            case "fA":
                return self.rooms(value)
            case "M":
                return self.mechanism(value)
        raise ValueError(code)

    def template(self, attributes: tuple[Attribute, ...]) -> bytes:
        return struct.pack(">I", len(attributes)) + b"".join([self.attribute(Attribute(*item)) for item in attributes])

    def reply_field(self, code: str, reader: ReplyReader) -> Any:
        match code:
            case "u":
                return reader.number(8)
            case "y":
                return reader.number(1)
            case "v":
                return reader.number(1), reader.number(1)
            case "s":
                return reader.prefixed()
            case "ay":
                return reader.prefixed() if reader.number(1) else Needed(reader.number(4))
            case "au":
                valid, count = reader.number(1), reader.number(4)
                return tuple([reader.number(8) for _ in range(count)]) if valid else Needed(count)
            case "aA":
                return [self.reply_attribute(reader) for _ in range(reader.number(4))]
            case "P":
                return self.reply_update(reader)
        raise ValueError(code)


class WireClient:
    """One connection.  `call` asks and waits; `send` and `receive` pipeline."""

    def __init__(self, sock: socket.socket, encoding: Encoding, first: int) -> None:
        sock.settimeout(DEFAULT_TIMEOUT)
        self.sock, self.encoding = sock, encoding
        self._ids = itertools.count(0x10)
        self._sent: dict[int, Call] = {}
        sock.sendall(bytes((first,)))
        self.answer = self.take(1)[0]  #: the byte that the server answered

    def take(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise Closed(f"closed with {count - len(data)} bytes to come")
            data += piece
        return bytes(data)

    def send_message(self, call: Call, message: bytes, options: bytes = b"") -> int:
        """Sends a message that may be anything; returns the request's id."""
        ident = next(self._ids)
        self._sent[ident] = call
        self.sock.sendall(HEADER.pack(ident, len(options), len(message)) + options + message)
        return ident

    def send(self, call: Call, *args: Any, options: bytes = b"") -> int:
        return self.send_message(call, self.encoding.request(call, *args), options)

    def receive(self) -> tuple[int, tuple[Any, ...] | Refused]:
        """Returns the id and the values of the next reply; an error reply is returned as Refused."""
        ident, option_size, size = HEADER.unpack(self.take(HEADER.size))
        assert option_size == 0, "a reply has no options"
        message = self.take(size)
        call = self._sent.pop(ident)
        try:
            return ident, self.encoding.reply(call, message)
        except Refused as refused:
            return ident, refused

    def call(self, call: Call, *args: Any, options: bytes = b"") -> tuple[Any, ...]:
        """Returns the reply's values; raises Refused, Closed."""
        ident = self.send(call, *args, options=options)
        answered, values = self.receive()
        assert answered == ident, f"request {ident} was answered as {answered}"
        if isinstance(values, Refused):
            raise values
        return values

    def close(self) -> None:
        self.sock.close()

    # ---- what most tests begin with ----------------------------------------------------------------------------------

    def open_session(self, slot: int = 0, flags: int = ck.CKF_SERIAL_SESSION) -> int:
        return int(self.call(Call.OPEN_SESSION, slot, flags)[0])

    def find(self, session: int, *template: tuple[int, Any]) -> tuple[int, ...]:
        """Returns all handles."""
        self.call(Call.FIND_OBJECTS_INIT, session, template)
        found: list[int] = []
        while handles := self.call(Call.FIND_OBJECTS, session, 64)[0]:
            found += handles
        self.call(Call.FIND_OBJECTS_FINAL, session)
        return tuple(found)

    def get(self, session: int, handle: int, *attributes: int, room: int | None = 65536) -> tuple[dict[int, Any], int]:
        """Returns the values by type (None: unavailable; Needed: no room) and the CK_RV of C_GetAttributeValue."""
        values, rv = self.call(Call.GET_ATTRIBUTE_VALUE, session, handle, [(kind, room) for kind in attributes])
        return dict(values), rv

    def value(self, session: int, handle: int, attribute: int) -> Any:
        values, rv = self.get(session, handle, attribute)
        if rv:
            raise Refused(Call.GET_ATTRIBUTE_VALUE, rv)
        return values[attribute]

    def sign(self, session: int, mechanism: Mechanism, key: int, data: bytes, room: int | None = 65536) -> Any:
        """C_SignInit, C_Sign."""
        self.call(Call.SIGN_INIT, session, mechanism, key)
        return self.call(Call.SIGN, session, data, room)[0]

    def decrypt(self, session: int, mechanism: Mechanism, key: int, data: bytes, room: int | None = 65536) -> Any:
        self.call(Call.DECRYPT_INIT, session, mechanism, key)
        return self.call(Call.DECRYPT, session, data, room)[0]

    def login(self, session: int, pin: bytes | None, user: int = ck.CKU_USER) -> None:
        self.call(Call.LOGIN, session, user, pin)
