"""p11-kit's RPC as its client releases speak it (p11-kit/rpc-client.c, rpc-message.c of each release)."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Any

from hsmvisord.wire.attributes import P11KIT_BYTE, P11KIT_ULONG, Kind, kind_of
from hsmvisord.wire.calls import Attribute, Call, Mechanism, Needed
from hsmvisord.wire.table import SIGNATURES
from support.wire_client import Encoding, ReplyReader, WireClient

MAGIC = b"PRIVATE-GNOME-KEYRING-PKCS11-PROTOCOL-V-1"
NULL = b"\xff\xff\xff\xff"

PSS = (0xD, 0xE, 0x47, 0x43, 0x44, 0x45)
IV = (0x1082, 0x1085, 0x2104, 0x2105, 0x2106, 0x2107, 0x2108, 0x1089, 0x122, 0x125, 0x133, 0x136, 0x150, 0x152, 0x153, 0x21)
WITH_PARAMETER = (*PSS, *IV, 0x9, 0x1050, 0x1086, 0x1087, 0x222, 0x252)


@dataclass(frozen=True)
class Release:
    """What differs between the releases of the client."""

    first: int  #: the byte of the handshake
    new_mechanisms: bool = False
    null_mechanism: bytes | None = None  #: None: this release crashes instead
    tells_empty_room: bool = True  #: writes 0xffffffff for a buffer of length 0
    nested_rooms: str = "never"  #: after the room of a template: never, always, if_room


RELEASES = {
    "0.23": Release(0, tells_empty_room=False),
    "0.24.1": Release(0, tells_empty_room=False),
    "0.25.0": Release(1, null_mechanism=b"\0\0\0\0"),
    "0.25.3": Release(1, null_mechanism=NULL),
    "0.25.5": Release(1, null_mechanism=NULL, nested_rooms="always"),
    "0.26.4": Release(2, new_mechanisms=True, null_mechanism=NULL, nested_rooms="if_room"),
}


class P11KitEncoding(Encoding):
    def __init__(self, release: Release) -> None:
        self.release = release

    def head(self, call: Call) -> bytes:
        signature = SIGNATURES[call][0]
        return struct.pack(">II", call, len(signature)) + signature

    def reply_head(self, call: Call, reader: ReplyReader) -> int | None:
        told, signature = reader.number(4), reader.prefixed()
        if told == 0:
            assert signature == b"u"
            rv = reader.number(8)
            assert rv != 0, "an error reply with CKR_OK: the client makes CKR_DEVICE_ERROR of it"
            return rv
        assert (told, signature) == (call, SIGNATURES[call][1])
        return None

    def byte_array(self, value: bytes | None) -> bytes:
        return b"\1" + (NULL if value is None else struct.pack(">I", len(value)) + value)

    def room(self, room: int | None) -> bytes:
        if room == 0 and self.release.tells_empty_room:
            return NULL
        return struct.pack(">I", room or 0)

    def count(self, room: int | None) -> bytes:
        return struct.pack(">I", room or 0)

    def rooms(self, wanted: list[tuple[int, int | None]]) -> bytes:
        return struct.pack(">I", len(wanted)) + b"".join([self.attribute_room(kind, room or 0) for kind, room in wanted])

    def attribute_room(self, kind: int, room: int) -> bytes:
        written = struct.pack(">II", kind, room)
        rule = self.release.nested_rooms
        if kind_of(kind) is Kind.TEMPLATE and (rule == "always" or (rule == "if_room" and room)):
            written += struct.pack(">I", room // 24) + struct.pack(">II", 0, 0) * (room // 24)
        return written

    def attribute(self, attribute: Attribute) -> bytes:
        kind, value = attribute
        head = struct.pack(">I", kind) + b"\1"
        if kind in P11KIT_BYTE:
            return head + struct.pack(">IB", 0 if value == b"" else 1, bool(value))
        if kind in P11KIT_ULONG:
            return head + (struct.pack(">IQ", 0, 0) if value == b"" else struct.pack(">IQ", 8, value))
        match kind_of(kind):
            case Kind.ULONGS:
                return head + struct.pack(f">II{len(value)}Q", 8 * len(value), len(value), *value)
            case Kind.TEMPLATE:
                return head + struct.pack(">I", 24 * len(value)) + self.template(value)
            case Kind.BOOL:
                value = bytes((value,)) if isinstance(value, bool) else value
            case Kind.ULONG:
                value = value.to_bytes(8, "little") if isinstance(value, int) else value
        return head + struct.pack(">II", len(value), len(value)) + value

    def mechanism(self, mechanism: Mechanism | None) -> bytes:
        release = self.release
        if mechanism is None:
            assert release.null_mechanism is not None, "this release crashes on a NULL mechanism"
            return release.null_mechanism
        head, parameter = struct.pack(">I", mechanism.type), mechanism.parameter
        if mechanism.type not in WITH_PARAMETER:
            assert parameter is None
            return head if release.new_mechanisms else head + NULL
        if release.new_mechanisms:
            head += b"\0" if parameter is None else b"\1"
        if parameter is None:
            assert release.new_mechanisms, "this release returns CKR_HOST_MEMORY itself"
            return head
        items = (parameter,) if isinstance(parameter, bytes) else parameter
        return head + b"".join([self.item(item) for item in items])

    @staticmethod
    def item(item: int | bytes) -> bytes:
        return struct.pack(">I", len(item)) + item if isinstance(item, bytes) else struct.pack(">Q", item)

    def reply_attribute(self, reader: ReplyReader) -> tuple[int, Any]:
        """Fails where the stock client would: a value that is not as long as it is said to be."""
        kind, valid = reader.number(4), reader.number(1)
        if not valid:
            return kind, None
        size = reader.number(4)
        if kind in P11KIT_BYTE:
            assert size == 1
            return kind, bool(reader.number(1))
        if kind in P11KIT_ULONG:
            assert size in (4, 8)
            return kind, reader.number(8)
        match kind_of(kind):
            case Kind.ULONGS:
                count = reader.number(4)
                assert size == 8 * count
                return kind, tuple([reader.number(8) for _ in range(count)])
            case Kind.TEMPLATE:
                count = reader.number(4)
                assert size == 24 * count
                return kind, tuple([Attribute(*self.reply_attribute(reader)) for _ in range(count)])
        value = reader.prefixed()
        assert size == len(value)
        return kind, value

    def reply_update(self, reader: ReplyReader) -> Any:
        """The rest of the message is the update and the handle."""
        return reader.take(len(reader.data) - reader.offset - 8)


class P11KitClient(WireClient):
    """One connection of `p11-kit-client.so`; `initialize` comes first."""

    def __init__(self, sock: socket.socket, release: str = "0.26.4") -> None:
        self.release = RELEASES[release]
        super().__init__(sock, P11KitEncoding(self.release), self.release.first)

    def initialize(self) -> None:
        self.call(Call.INITIALIZE, MAGIC, 0, b"\0")

    def slots(self) -> tuple[int, ...]:
        needed = self.call(Call.GET_SLOT_LIST, 1, None)[0]
        count = needed.size if isinstance(needed, Needed) else len(needed)
        return tuple(self.call(Call.GET_SLOT_LIST, 1, count)[0]) if count else ()
