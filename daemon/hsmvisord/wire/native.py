"""The server's side of the native dialect (NATIVE.md)."""

from __future__ import annotations

import struct
from typing import Any, ClassVar

from hsmvisord import ck
from hsmvisord.wire import fields, limits
from hsmvisord.wire.attributes import Kind, from_memory, kind_of, to_memory
from hsmvisord.wire.calls import Attribute, BadMessage, Call, Mechanism, Request, Unreadable
from hsmvisord.wire.codec import TableCodec, unreadable_rv
from hsmvisord.wire.fields import Malformed, Reader

VERSION = 1
EMPTY_ROOM = 0xFFFFFFFF  #: a pointer with length 0
OPTION_DEADLINE = 1

ABSENT, RAW, STRUCTURED, NULL_MECHANISM = 0, 1, 2, 255
UNAVAILABLE, MEMORY, TEMPLATE, TOO_SMALL = range(4)

_U32 = struct.Struct(">I")
_OPTION = struct.Struct(">HH")
_ONCE = struct.Struct(">IQQBQBI")  #: SignOnce with a mechanism without parameter, up to the length of the data
_SIGN = struct.Struct(">IQBI")  #: Sign up to the length of the data
_ERROR = struct.Struct(">IIIIQ")
_BYTES_REPLY = struct.Struct(">IIIIBI")


class NativeCodec(TableCodec):
    dialect: ClassVar[str] = "native"

    def decode(self, ident: int, options: bytes, message: bytes) -> Request:
        deadline = self._deadline(ident, options) if options else 0
        size = len(message)
        if size < 4:
            raise BadMessage(ident, ck.CKR_DEVICE_ERROR, "no call")
        call_id = _U32.unpack_from(message)[0]
        if call_id in (258, 259) and size >= 38 and message[20] == ABSENT:
            # the hot path: u session, M without parameter, u key, ay data, fy room
            _, session, kind, _, key, valid, length = _ONCE.unpack_from(message)
            if valid and size == 38 + length:
                room = _U32.unpack_from(message, 34 + length)[0]
                args = (session, Mechanism(kind), key, message[34 : 34 + length], self._room(room))
                return Request(ident, Call.SIGN_ONCE if call_id == 258 else Call.DECRYPT_ONCE, args, deadline)
        elif call_id == 43 and size >= 21:
            _, session, valid, length = _SIGN.unpack_from(message)
            if valid and size == 21 + length:
                room = _U32.unpack_from(message, 17 + length)[0]
                return Request(ident, Call.SIGN, (session, message[17 : 17 + length], self._room(room)), deadline)
        return self.decode_message(ident, call_id, Reader(message, 4), deadline)

    def _deadline(self, ident: int, options: bytes) -> int:
        deadline, offset = 0, 0
        while offset + 4 <= len(options):
            kind, length = _OPTION.unpack_from(options, offset)
            value = options[offset + 4 : offset + 4 + length]
            if len(value) != length:
                break
            if kind == OPTION_DEADLINE and length == 4:
                deadline = int.from_bytes(value, "big")
            offset += 4 + length
        if offset != len(options):
            raise BadMessage(ident, ck.CKR_DEVICE_ERROR, "options")
        return deadline

    def error(self, ident: int, rv: int) -> bytes:
        return _ERROR.pack(ident, 0, 12, 0, rv)

    def reply(self, request: Request, *values: Any) -> bytes:
        if len(values) == 1 and type(values[0]) is bytes:
            data = values[0]
            return _BYTES_REPLY.pack(request.id, 0, 9 + len(data), request.call, 1, len(data)) + data
        return super().reply(request, *values)

    def head(self, call: Call) -> bytes:
        return fields.u32(call)

    @staticmethod
    def _room(room: int) -> int | None:
        return room if 0 < room < EMPTY_ROOM else None if room == 0 else 0

    def read_room(self, reader: Reader) -> int | None:
        return self._room(reader.u32())

    def read_attributes(self, reader: Reader, depth: int) -> tuple[Attribute, ...]:
        if depth > limits.MAX_NESTING:
            raise Malformed("templates nested too deep")
        attributes = []
        for _ in range(reader.count_attributes()):
            kind, form = reader.u64(), reader.u8()
            if form == MEMORY:
                attributes.append(Attribute(kind, from_memory(kind, reader.prefixed(), self.ulong_size)))
            elif form == TEMPLATE and kind_of(kind) is Kind.TEMPLATE:
                attributes.append(Attribute(kind, self.read_attributes(reader, depth + 1)))
            else:
                raise Malformed(f"attribute 0x{kind:x} of form {form}")
        return tuple(attributes)

    def read_rooms(self, reader: Reader, depth: int) -> tuple[tuple[int, int | None], ...]:
        return tuple([(reader.u64(), self._room(reader.u32())) for _ in range(reader.count_attributes())])

    def read_mechanism(self, reader: Reader) -> Mechanism | None:
        kind, form = reader.u64(), reader.u8()
        if form == ABSENT:
            return Mechanism(kind)
        if form == RAW:
            return Mechanism(kind, reader.prefixed())
        if form == STRUCTURED:
            count = reader.u8()
            if count > limits.MAX_MECHANISM_ITEMS:
                raise Malformed(f"a mechanism of {count} items")
            return Mechanism(kind, tuple([self._item(reader) for _ in range(count)]))
        if form == NULL_MECHANISM:
            return None
        raise Malformed(f"a mechanism of form {form}")

    def _item(self, reader: Reader) -> int | bytes:
        code = reader.u8()
        if code == ord("u"):
            return reader.u64()
        if code == ord("b"):
            return reader.prefixed()
        raise Malformed(f"a mechanism item of kind {code}")

    def write_attribute(self, attribute: int, value: Any, room: int | None) -> tuple[bytes, int]:
        head = fields.u64(attribute)
        if isinstance(value, Unreadable):
            return head + bytes((UNAVAILABLE,)), unreadable_rv(value)
        if kind_of(attribute) is Kind.TEMPLATE:
            # Only empty templates exist so far: an empty array needs no room.
            return head + bytes((TEMPLATE,)) + fields.u32(len(value)), ck.CKR_OK
        memory = to_memory(value, self.ulong_size)
        if room is None or len(memory) > room:
            rv = ck.CKR_OK if room is None else ck.CKR_BUFFER_TOO_SMALL
            return head + bytes((TOO_SMALL,)) + fields.u32(len(memory)), rv
        return head + bytes((MEMORY,)) + fields.prefixed(memory), ck.CKR_OK

    def write_parameter_update(self, mechanism: Any) -> bytes:
        return b""
