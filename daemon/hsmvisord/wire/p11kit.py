"""The server's side of p11-kit's RPC, for clients of every release from 0.23 to 0.26 (p11-kit/rpc-message.c).

How a client writes a mechanism depends on its release, not on the version that was agreed; its first byte tells the release:
0 (up to 0.24.1), 1 (0.25.0-0.25.5), 2 (0.25.6 on).
"""

from __future__ import annotations

import struct
from typing import Any, ClassVar

from hsmvisord import ck, limits
from hsmvisord.wire import fields, p11kit_mechanism
from hsmvisord.wire.attributes import P11KIT_BYTE, P11KIT_ULONG, Kind, from_memory, kind_of, to_memory, widened
from hsmvisord.wire.calls import Attribute, BadMessage, Call, Mechanism, Request, Unreadable
from hsmvisord.wire.codec import FieldReaders, TableCodec, bad_message, known_call
from hsmvisord.wire.fields import Malformed, Reader
from hsmvisord.wire.frames import frame
from hsmvisord.wire.table import P11KIT_CALLS, SIGNATURES

MAX_VERSION = 2
MAGIC = b"PRIVATE-GNOME-KEYRING-PKCS11-PROTOCOL-V-1"
LABEL_WIDTH = 32  #: bytes of CK_TOKEN_INFO.label

_U32 = struct.Struct(">I")
_ERROR = struct.Struct(">IIIIIcQ")
_HEADS = {call: struct.pack(">II", call, len(reply)) + reply for call, (_, reply) in SIGNATURES.items()}

# The hot path: calls of one signature, by the bytes that stand between the call and the fields.
_DATA_SIGNATURE = b"\0\0\0\5uayfy"  #: session, data, room
_DATA_CALLS = {int(call): call for call in P11KIT_CALLS if SIGNATURES[call][0] == b"uayfy"}
_DATA = struct.Struct(">QBI")  #: at 13: session, valid, length
_INIT_SIGNATURE = b"\0\0\0\3uMu"  #: session, mechanism, key
_INIT_CALLS = {int(call): call for call in P11KIT_CALLS if SIGNATURES[call][0] == b"uMu"}
_INIT_OLD = struct.Struct(">QIIQ")  #: at 11, a mechanism without parameter, followed by a NULL
_INIT_NEW = struct.Struct(">QIQ")  #: the same, followed by nothing
_WITH_PARAMETER = frozenset({0, p11kit_mechanism.NULL_MECHANISM, *p11kit_mechanism.PARAMETERS})  #: or with another meaning


class P11KitCodec(TableCodec):
    dialect: ClassVar[str] = "p11-kit"
    calls: ClassVar[frozenset[Call]] = P11KIT_CALLS

    def __init__(self, client_version: int) -> None:
        super().__init__()
        self.client_version = client_version
        self._read |= {"ay": self.read_byte_array, "fu": self.read_count}
        self._write["P"] = p11kit_mechanism.parameter_update
        new = self._read | {"M": lambda reader: p11kit_mechanism.read(reader, True, client_version)}
        old = self._read | {"M": lambda reader: p11kit_mechanism.read(reader, False, client_version)}
        self._forms: tuple[FieldReaders, FieldReaders] = (new, old) if client_version >= 2 else (old, new)

    def decode(self, ident: int, options: bytes, message: bytes | memoryview) -> Request:
        size = len(message)
        if type(message) is not bytes:
            pass
        elif size >= 30 and message[4:13] == _DATA_SIGNATURE:
            hot = _DATA_CALLS.get(_U32.unpack_from(message)[0])
            session, valid, length = _DATA.unpack_from(message, 13)
            if hot is not None and valid and size == 30 + length:
                room = _U32.unpack_from(message, 26 + length)[0]
                return Request(ident, hot, (session, message[26 : 26 + length], fields.room_of(room)))
        elif size in (31, 35) and message[4:11] == _INIT_SIGNATURE:
            hot = _INIT_CALLS.get(_U32.unpack_from(message)[0])
            null = fields.NULL
            if size == 35:
                session, kind, null, key = _INIT_OLD.unpack_from(message, 11)
            else:
                session, kind, key = _INIT_NEW.unpack_from(message, 11)
            if hot is not None and null == fields.NULL and kind not in _WITH_PARAMETER:
                return Request(ident, hot, (session, Mechanism(kind), key))
        return self._decode_any(ident, message)

    def _decode_any(self, ident: int, message: bytes | memoryview) -> Request:
        reader = fields.reader_of(message)
        try:
            call_id = reader.u32()
            signature = reader.prefixed()
        except Malformed as error:
            raise BadMessage(ident, error.rv, str(error)) from None
        call = known_call(ident, call_id, self.calls)
        if signature != SIGNATURES[call][0]:
            raise BadMessage(ident, ck.CKR_DEVICE_ERROR, f"{call.name}: signature {signature[:32]!r}")
        return Request(ident, call, self._decode_fields(ident, call, message, reader.offset))

    def _decode_fields(self, ident: int, call: Call, message: bytes | memoryview, offset: int) -> tuple[Any, ...]:
        """Tries the mechanism form of the client's release, then the other: a message must be consumed exactly."""
        first, other = self._forms
        try:
            return self._checked(call, self.read_fields(call, fields.reader_of(message, offset), first))
        except Malformed as error:
            failure = error
        if b"M" in SIGNATURES[call][0]:
            try:
                return self.read_fields(call, fields.reader_of(message, offset), other)
            except Malformed:
                pass  # the failure of the form that was to be expected tells more
        raise bad_message(ident, call, failure)

    @staticmethod
    def _checked(call: Call, args: tuple[Any, ...]) -> tuple[Any, ...]:
        match call:
            case Call.INITIALIZE if args[0] != MAGIC:
                raise Malformed("not p11-kit's words", ck.CKR_GENERAL_ERROR)
            case Call.INIT_TOKEN:
                # Clients up to release 0.24.1 send what stands behind their label too.
                return (*args[:2], args[2][:LABEL_WIDTH])
            case Call.INIT_TOKEN2 if len(args[2]) != LABEL_WIDTH:
                raise Malformed(f"a label of {len(args[2])} bytes")
        return args

    def error(self, ident: int, rv: int) -> bytes:
        return _ERROR.pack(ident, 0, 17, 0, 1, b"u", rv)

    def reply(self, request: Request, *values: Any) -> bytes:
        if len(values) == 1 and type(values[0]) is bytes:
            return frame(request.id, _HEADS[request.call] + fields.byte_array(values[0]))
        return super().reply(request, *values)

    def head(self, call: Call) -> bytes:
        return _HEADS[call]

    @staticmethod
    def read_count(reader: Reader) -> int | None:
        """`fu`: no release tells a pointer with length 0 from NULL."""
        return reader.u32() or None

    @staticmethod
    def read_byte_array(reader: Reader) -> bytes | None:
        """`ay`: a NULL pointer with length 0 is valid, its length is that of a NULL."""
        if reader.u8():
            return reader.prefixed_or_null()
        reader.u32()
        return None

    # ---- attributes -------------------------------------------------------------------------------------------------

    def read_attributes(self, reader: Reader, depth: int) -> tuple[Attribute, ...]:
        if depth > limits.MAX_NESTING:
            raise Malformed("templates nested too deep")
        return tuple([self._attribute(reader, depth) for _ in range(reader.count_attributes())])

    def _attribute(self, reader: Reader, depth: int) -> Attribute:
        attribute = reader.u32()
        if not reader.u8():
            return Attribute(attribute, b"")
        size = reader.u32()  # ulValueLen; the client writes a zero byte or u64 where that is 0
        if attribute in P11KIT_BYTE:
            flag = reader.u8() != 0
            return Attribute(attribute, flag if size == 1 else b"")
        if attribute in P11KIT_ULONG:
            if size == 4:
                self.ulong_size = 4
            number = reader.u64()
            return Attribute(attribute, widened(number, size) if size in (4, 8) else b"")
        match kind_of(attribute):
            case Kind.ULONGS:
                return Attribute(attribute, reader.ulongs(reader.u32()))
            case Kind.TEMPLATE:
                return Attribute(attribute, self.read_attributes(reader, depth + 1))
        memory = reader.prefixed_or_null() or b""
        ulong_size = 4 if len(memory) == 4 else 8  # a 32-bit client's
        return Attribute(attribute, from_memory(attribute, memory, ulong_size))

    def read_rooms(self, reader: Reader, depth: int) -> tuple[tuple[int, int | None], ...]:
        if depth > limits.MAX_NESTING:
            raise Malformed("templates nested too deep")
        return tuple([self._room_of_attribute(reader, depth) for _ in range(reader.count_attributes())])

    def _room_of_attribute(self, reader: Reader, depth: int) -> tuple[int, int | None]:
        attribute, room = reader.u32(), reader.u32()
        if kind_of(attribute) is Kind.TEMPLATE:
            if self.client_version < 2:
                # Releases up to 0.25.3 fail the whole call when a template is in the answer, even as unavailable.
                raise Malformed("a template attribute", ck.CKR_ATTRIBUTE_TYPE_INVALID)
            if room:
                self.read_rooms(reader, depth + 1)
        return attribute, room or None

    def write_attribute(self, attribute: int, value: Any, room: int | None) -> tuple[bytes, int]:
        head = fields.u32(attribute)
        if isinstance(value, Unreadable):
            return head + b"\0", value.value
        # A 32-bit client asks with room 4 for a CK_ULONG, and searches with values of 4 bytes.
        ulong_size = 4 if room == 4 and kind_of(attribute) is Kind.ULONG else self.ulong_size
        if attribute in P11KIT_BYTE:
            size, encoded = 1, fields.u8(bool(value))
        elif attribute in P11KIT_ULONG:
            size, encoded = ulong_size, fields.u64(value)
        elif kind_of(attribute) is Kind.ULONGS:
            size, encoded = ulong_size * len(value), fields.u32(len(value)) + b"".join([fields.u64(item) for item in value])
        elif kind_of(attribute) is Kind.TEMPLATE:
            nested = [self.write_attribute(kind, inner, None)[0] for kind, inner in value]
            size, encoded = 3 * ulong_size * len(value), fields.u32(len(value)) + b"".join(nested)
        else:
            memory = to_memory(value, ulong_size)
            size, encoded = len(memory), fields.prefixed(memory)
        rv = ck.CKR_BUFFER_TOO_SMALL if room is not None and size > room else ck.CKR_OK
        return head + b"\1" + fields.u32(size) + encoded, rv
