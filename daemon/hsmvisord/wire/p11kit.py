"""The server's side of p11-kit's RPC, for clients of every release from 0.23 to 0.26 (p11-kit/rpc-message.c).

How a client writes a mechanism depends on its release, not on the version that was agreed; its first byte tells the release:
0 (up to 0.24.1), 1 (0.25.0-0.25.5), 2 (0.25.6 on).
"""

from __future__ import annotations

import struct
from typing import Any, ClassVar

from hsmvisord import ck
from hsmvisord.wire import fields, limits, p11kit_mechanism
from hsmvisord.wire.attributes import Kind, from_memory, kind_of, to_memory
from hsmvisord.wire.calls import Attribute, BadMessage, Call, Request, Unreadable
from hsmvisord.wire.codec import TableCodec, known_call, unreadable_rv
from hsmvisord.wire.fields import Malformed, Reader
from hsmvisord.wire.frames import frame
from hsmvisord.wire.table import SIGNATURES

MAX_VERSION = 2
MAGIC = b"PRIVATE-GNOME-KEYRING-PKCS11-PROTOCOL-V-1"
EMPTY_ROOM = 0xFFFFFFFF  #: a pointer with length 0, from 0.25.0 on
LABEL_WIDTH = 32  #: of CK_TOKEN_INFO.label
_ATTRIBUTE_SIZE = 24  #: sizeof (CK_ATTRIBUTE) of a 64-bit client

#: Attributes that p11-kit writes as one byte, or as a u64; all others travel as the client's memory.
_BYTE = frozenset(
    {0x1, 0x2, 0x86, *range(0x103, 0x10D), 0x162, 0x163, 0x164, 0x165, 0x170, 0x171, 0x200, 0x202, 0x210, 0x301, 0x302, 0x405}
)
_ULONG = frozenset(
    {0x0, 0x80, 0x87, 0x88, 0x100, 0x121, 0x133, 0x134, 0x160, 0x161, 0x166, 0x201, 0x300, *range(0x400, 0x405), 0x406, 0x500}
)

_ERROR = struct.Struct(">IIIIIcQ")
_HEADS = {call: struct.pack(">II", call, len(reply)) + reply for call, (_, reply) in SIGNATURES.items()}


class P11KitCodec(TableCodec):
    dialect: ClassVar[str] = "p11-kit"

    def __init__(self, client_version: int) -> None:
        super().__init__()
        self.client_version = client_version
        self._new_mechanisms = client_version >= 2  #: the form that is tried first

    def decode(self, ident: int, options: bytes, message: bytes) -> Request:
        reader = Reader(message)
        try:
            call_id = reader.u32()
            signature = reader.bytes_or_null() or b""
        except Malformed as error:
            raise BadMessage(ident, ck.CKR_DEVICE_ERROR, str(error)) from None
        call = known_call(ident, call_id)
        if call >= Call.HELLO:
            raise BadMessage(ident, ck.CKR_FUNCTION_NOT_SUPPORTED, "a call of the native dialect")
        if signature != SIGNATURES[call][0]:
            raise BadMessage(ident, ck.CKR_DEVICE_ERROR, f"{call.name}: signature {signature[:32]!r}")
        request = self._decode_fields(ident, call, message, reader.offset)
        return self._checked(request)

    def _decode_fields(self, ident: int, call: Call, message: bytes, offset: int) -> Request:
        """Tries the mechanism form of the client's release, then the other: a message must be consumed exactly."""
        forms = (self._new_mechanisms, not self._new_mechanisms) if b"M" in SIGNATURES[call][0] else (True,)
        failure: BadMessage | None = None
        for form in forms:
            self._new_mechanisms_now = form
            try:
                return self.decode_message(ident, call, Reader(message, offset), 0)
            except BadMessage as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def _checked(self, request: Request) -> Request:
        if request.call is Call.INITIALIZE and request.args[0] != MAGIC:
            raise BadMessage(request.id, ck.CKR_GENERAL_ERROR, "C_Initialize without p11-kit's words")
        if request.call is Call.INIT_TOKEN:
            # Clients of release 0.24 and older send what stands behind their label too.
            slot, so_pin, label = request.args
            return Request(request.id, request.call, (slot, so_pin, label[:LABEL_WIDTH]))
        if request.call is Call.GET_ATTRIBUTE_VALUE and self.client_version < 2:
            # Releases up to 0.25.3 fail the whole call when a template is in the answer, even as unavailable.
            if any(kind_of(attribute) is Kind.TEMPLATE for attribute, _ in request.args[2]):
                raise BadMessage(request.id, ck.CKR_ATTRIBUTE_TYPE_INVALID, "a template attribute")
        return request

    def error(self, ident: int, rv: int) -> bytes:
        return _ERROR.pack(ident, 0, 17, 0, 1, b"u", rv)

    def reply(self, request: Request, *values: Any) -> bytes:
        if len(values) == 1 and type(values[0]) is bytes:
            return frame(request.id, _HEADS[request.call] + fields.byte_array(values[0]))
        return super().reply(request, *values)

    def head(self, call: Call) -> bytes:
        return _HEADS[call]

    def read_room(self, reader: Reader) -> int | None:
        room = reader.u32()
        return 0 if room == EMPTY_ROOM else room or None

    # ---- attributes -------------------------------------------------------------------------------------------------

    def read_attributes(self, reader: Reader, depth: int) -> tuple[Attribute, ...]:
        if depth > limits.MAX_NESTING:
            raise Malformed("templates nested too deep")
        return tuple([self._attribute(reader, depth) for _ in range(reader.count_attributes())])

    def _attribute(self, reader: Reader, depth: int) -> Attribute:
        kind = reader.u32()
        if not reader.u8():
            return Attribute(kind, b"")
        size = reader.u32()
        if kind in _BYTE:
            value = reader.u8()
            return Attribute(kind, value != 0 if size == 1 else bytes((value,)))
        if kind in _ULONG:
            number = reader.u64()
            return Attribute(kind, number if size in (4, 8) else b"")
        match kind_of(kind):
            case Kind.ULONGS:
                return Attribute(kind, reader.ulongs(reader.u32()))
            case Kind.TEMPLATE:
                return Attribute(kind, self.read_attributes(reader, depth + 1))
        return Attribute(kind, from_memory(kind, reader.bytes_or_null() or b"", 8))

    def read_rooms(self, reader: Reader, depth: int) -> tuple[tuple[int, int | None], ...]:
        """A template's room is followed by nested ones: from 0.25.6 on only when it is not 0, in 0.25.4-0.25.5 always, before never."""
        if depth > limits.MAX_NESTING:
            raise Malformed("templates nested too deep")
        rooms: list[tuple[int, int | None]] = []
        for _ in range(reader.count_attributes()):
            kind, room = reader.u32(), reader.u32()
            if kind_of(kind) is Kind.TEMPLATE and (
                (self.client_version >= 2 and room) or (self.client_version == 1 and self._nested_follows(reader))
            ):
                self.read_rooms(reader, depth + 1)
            rooms.append((kind, room or None))
        return tuple(rooms)

    @staticmethod
    def _nested_follows(reader: Reader) -> bool:
        """0.25.4 and 0.25.5 write a nested count of 0, which no attribute of theirs begins with (CKA_CLASS has room 8)."""
        following = reader.data[reader.offset : reader.offset + 4]
        return following == b"\0\0\0\0" and reader.data[reader.offset + 4 : reader.offset + 8] != b"\0\0\0\x08"

    def write_attribute(self, attribute: int, value: Any, room: int | None) -> tuple[bytes, int]:
        head = fields.u32(attribute)
        if isinstance(value, Unreadable):
            return head + b"\0", unreadable_rv(value)
        # A 32-bit client asks with room 4 for a CK_ULONG.
        ulong_size = 4 if room == 4 and kind_of(attribute) is Kind.ULONG else 8
        if attribute in _BYTE:
            size, encoded = 1, bytes((bool(value),))
        elif attribute in _ULONG:
            size, encoded = ulong_size, fields.u64(value)
        elif kind_of(attribute) is Kind.ULONGS:
            size, encoded = 8 * len(value), fields.u32(len(value)) + b"".join(fields.u64(item) for item in value)
        elif kind_of(attribute) is Kind.TEMPLATE:
            size, encoded = _ATTRIBUTE_SIZE * len(value), fields.u32(len(value))
        else:
            memory = to_memory(value, ulong_size)
            size, encoded = len(memory), fields.prefixed(memory)
        rv = ck.CKR_BUFFER_TOO_SMALL if room is not None and size > room else ck.CKR_OK
        return head + b"\1" + fields.u32(size) + encoded, rv

    # ---- mechanisms -------------------------------------------------------------------------------------------------

    def read_mechanism(self, reader: Reader) -> Any:
        return p11kit_mechanism.read(reader, self._new_mechanisms_now, self.client_version)

    def write_parameter_update(self, mechanism: Any) -> bytes:
        return p11kit_mechanism.parameter_update(mechanism)
