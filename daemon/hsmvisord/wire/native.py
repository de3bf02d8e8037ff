"""The server's side of the native dialect (NATIVE.md)."""

from __future__ import annotations

import struct
from typing import Any, ClassVar

from hsmvisord import ck, limits
from hsmvisord.wire import fields
from hsmvisord.wire.attributes import Kind, from_memory, kind_of, to_memory
from hsmvisord.wire.calls import Attribute, BadMessage, Call, Mechanism, Request, Unreadable
from hsmvisord.wire.codec import TableCodec, bad_message, known_call
from hsmvisord.wire.fields import Malformed, Reader
from hsmvisord.wire.table import NATIVE_CALLS, SIGNATURES

VERSION = 1
OPTION_DEADLINE = 1

# Forms of a mechanism and of an attribute
ABSENT, RAW, STRUCTURED, NULL_MECHANISM = 0, 1, 2, 255
UNAVAILABLE, MEMORY, TEMPLATE, TOO_SMALL = range(4)

_UNBOUNDED = limits.MAX_MESSAGE  #: room of a template's attributes: the library fits them into the caller's

_U32 = struct.Struct(">I")
_OPTION = struct.Struct(">HH")
_ATTRIBUTE = struct.Struct(">QBI")  #: up to its value, or to the count of a template's attributes
_ERROR = struct.Struct(">IIIIQ")

# The hot path
_ONCE = struct.Struct(">IQQBQBI")  #: session, mechanism without parameter, key, up to the length of the data
_DATA = struct.Struct(">IQBI")  #: session, up to the length of the data
_INIT = struct.Struct(">IQQBQ")  #: session, mechanism without parameter, key
_BYTES_REPLY = struct.Struct(">IIIIBI")
_ONCE_CALLS = {258: Call.SIGN_ONCE, 259: Call.DECRYPT_ONCE, 279: Call.ENCRYPT_ONCE}
_DATA_CALLS = {int(call): call for call, (request, _) in SIGNATURES.items() if request == b"uayfy"}
_INIT_CALLS = {int(call): call for call, (request, _) in SIGNATURES.items() if request == b"uMu"}


class NativeCodec(TableCodec):
    dialect: ClassVar[str] = "native"
    calls: ClassVar[frozenset[Call]] = NATIVE_CALLS

    def __init__(self) -> None:
        super().__init__()
        self._read["M"] = read_mechanism

    def decode(self, ident: int, options: bytes, message: bytes | memoryview) -> Request:
        deadline = self._deadline(ident, options) if options else 0
        size = len(message)
        if size < 4:
            raise BadMessage(ident, ck.CKR_DEVICE_ERROR, "no call")
        call_id = _U32.unpack_from(message)[0]
        if type(message) is not bytes:
            pass
        elif call_id in _ONCE_CALLS:
            if size >= 38 and message[20] == ABSENT:
                _, session, kind, _, key, valid, length = _ONCE.unpack_from(message)
                if valid and size == 38 + length:
                    data, room = message[34 : 34 + length], fields.room_of(_U32.unpack_from(message, 34 + length)[0])
                    return Request(ident, _ONCE_CALLS[call_id], (session, Mechanism(kind), key, data, room), deadline)
        elif call_id in _DATA_CALLS:
            if size >= 21:
                _, session, valid, length = _DATA.unpack_from(message)
                if valid and size == 21 + length:
                    room = fields.room_of(_U32.unpack_from(message, 17 + length)[0])
                    return Request(ident, _DATA_CALLS[call_id], (session, message[17 : 17 + length], room), deadline)
        elif call_id in _INIT_CALLS and size == 29 and message[20] == ABSENT:
            _, session, kind, _, key = _INIT.unpack(message)
            return Request(ident, _INIT_CALLS[call_id], (session, Mechanism(kind), key), deadline)
        call = known_call(ident, call_id, self.calls)
        try:
            return Request(ident, call, self.read_fields(call, fields.reader_of(message, 4), self._read), deadline)
        except Malformed as error:
            raise bad_message(ident, call, error) from None

    def _deadline(self, ident: int, options: bytes) -> int:
        deadline, offset = 0, 0
        if len(options) > limits.MAX_NATIVE_OPTIONS:
            raise BadMessage(ident, ck.CKR_DEVICE_ERROR, f"{len(options)} bytes of options")
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

    def read_attributes(self, reader: Reader, depth: int) -> tuple[Attribute, ...]:
        if depth > limits.MAX_NESTING:
            raise Malformed("templates nested too deep")
        attributes = []
        for _ in range(reader.count_attributes()):
            kind, form, size = _ATTRIBUTE.unpack(reader.take(_ATTRIBUTE.size))
            if form == MEMORY:
                attributes.append(Attribute(kind, from_memory(kind, reader.take(size), self.ulong_size)))
            elif form == TEMPLATE and kind_of(kind) is Kind.TEMPLATE:
                reader.offset -= 4  # the count of its attributes
                attributes.append(Attribute(kind, self.read_attributes(reader, depth + 1)))
            else:
                raise Malformed(f"attribute 0x{kind:x} of form {form}")
        return tuple(attributes)

    def read_rooms(self, reader: Reader, depth: int) -> tuple[tuple[int, int | None], ...]:
        return tuple([(reader.u64(), reader.room()) for _ in range(reader.count_attributes())])

    def write_attribute(self, attribute: int, value: Any, room: int | None) -> tuple[bytes, int]:
        head = fields.u64(attribute)
        if isinstance(value, Unreadable):
            return head + bytes((UNAVAILABLE,)), value.value
        if kind_of(attribute) is Kind.TEMPLATE:
            nested = [self.write_attribute(kind, inner, _UNBOUNDED)[0] for kind, inner in value]
            return head + bytes((TEMPLATE,)) + fields.u32(len(value)) + b"".join(nested), ck.CKR_OK
        memory = to_memory(value, self.ulong_size)
        if room is None or len(memory) > room:
            rv = ck.CKR_OK if room is None else ck.CKR_BUFFER_TOO_SMALL
            return head + bytes((TOO_SMALL,)) + fields.u32(len(memory)), rv
        return head + bytes((MEMORY,)) + fields.prefixed(memory), ck.CKR_OK


def read_mechanism(reader: Reader) -> Mechanism | None:
    """Returns None for a NULL mechanism."""
    kind, form = reader.u64(), reader.u8()
    if form == ABSENT:
        return Mechanism(kind)
    begin = reader.offset
    if form == RAW:
        parameter = reader.prefixed()
        fields.check_parameter(len(parameter))
        return Mechanism(kind, parameter)
    if form == STRUCTURED:
        count = reader.u8()
        if count > limits.MAX_MECHANISM_ITEMS:
            raise Malformed(f"a mechanism of {count} items")
        items = tuple([_item(reader) for _ in range(count)])
        fields.check_parameter(reader.offset - begin)
        return Mechanism(kind, items)
    if form == NULL_MECHANISM:
        return None
    raise Malformed(f"a mechanism of form {form}")


def _item(reader: Reader) -> int | bytes:
    code = reader.u8()
    if code == ord("u"):
        return reader.u64()
    if code == ord("b"):
        return reader.prefixed()
    raise Malformed(f"a mechanism item of kind {code}")
