"""What a face needs of a dialect, and the part that both share: a table-driven decoder and encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from hsmvisord import ck, limits
from hsmvisord.wire import fields
from hsmvisord.wire.calls import BadMessage, Call, Request
from hsmvisord.wire.fields import Malformed, Reader
from hsmvisord.wire.frames import frame
from hsmvisord.wire.table import CALLS

#: Where a NULL mechanism cancels the operation (PKCS#11 3.0, 5.8-5.15); elsewhere it is CKR_ARGUMENTS_BAD.
_CANCELLING = frozenset(
    {
        Call.ENCRYPT_INIT,
        Call.DECRYPT_INIT,
        Call.DIGEST_INIT,
        Call.SIGN_INIT,
        Call.SIGN_RECOVER_INIT,
        Call.VERIFY_INIT,
        Call.VERIFY_RECOVER_INIT,
        Call.VERIFY_SIGNATURE_INIT,
        Call.MESSAGE_ENCRYPT_INIT,
        Call.MESSAGE_DECRYPT_INIT,
        Call.MESSAGE_SIGN_INIT,
        Call.MESSAGE_VERIFY_INIT,
    }
)


FieldReaders = dict[str, Callable[[Reader], Any]]


class Codec(Protocol):
    dialect: ClassVar[str]
    calls: ClassVar[frozenset[Call]]  #: that it has
    ulong_size: int  #: of the client: 4 or 8

    def decode(self, ident: int, options: bytes, message: bytes | memoryview) -> Request:
        """Raises BadMessage; the connection goes on."""
        ...

    def reply(self, request: Request, *values: Any) -> bytes:
        """Returns the frame of a reply; the values are in the order of the call's reply signature."""
        ...

    def error(self, ident: int, rv: int) -> bytes:
        """Returns the frame that answers a request with this CK_RV, which is not CKR_OK."""
        ...


class TableCodec:
    """Decodes and encodes by the call table; a dialect adds its attributes, mechanisms (`M`) and message head."""

    dialect: ClassVar[str] = ""
    calls: ClassVar[frozenset[Call]] = frozenset()

    def __init__(self) -> None:
        self.ulong_size = 8
        self._read: FieldReaders = {
            "u": Reader.u64,
            "y": Reader.u8,
            "v": Reader.version,
            "s": Reader.prefixed,
            "z": Reader.text,
            "ay": Reader.byte_array,
            "au": Reader.ulong_array,
            "fy": Reader.room,
            "fu": Reader.room,
            "Ny": Reader.room_or_none,
            "aA": lambda reader: self.read_attributes(reader, 0),
            "fA": lambda reader: self.read_rooms(reader, 0),
        }
        self._write: dict[str, Callable[[Any], bytes]] = {
            "u": fields.u64,
            "y": fields.u8,
            "v": bytes,
            "s": fields.prefixed,
            "ay": fields.byte_array,
            "au": fields.ulong_array,
        }

    # ---- what a dialect adds --------------------------------------------------------------------------------------

    def read_attributes(self, reader: Reader, depth: int) -> tuple[Any, ...]:
        raise NotImplementedError

    def read_rooms(self, reader: Reader, depth: int) -> tuple[tuple[int, int | None], ...]:
        raise NotImplementedError

    def write_attribute(self, attribute: int, value: Any, room: int | None) -> tuple[bytes, int]:
        """Returns the encoding and the CK_RV that this attribute alone would have; `room` None: the caller asks for the size."""
        raise NotImplementedError

    def head(self, call: Call) -> bytes:
        """What stands before a reply's fields."""
        raise NotImplementedError

    # ---- shared ---------------------------------------------------------------------------------------------------

    def read_fields(self, call: Call, reader: Reader, read: FieldReaders) -> tuple[Any, ...]:
        """Reads the whole rest of a message; raises Malformed."""
        codes = CALLS[call][0]
        args = tuple([read[code](reader) for code in codes])
        reader.finish()
        if None in args and "M" in codes and args[codes.index("M")] is None and call not in _CANCELLING:
            raise Malformed("a NULL mechanism", ck.CKR_ARGUMENTS_BAD)
        return args

    def reply(self, request: Request, *values: Any) -> bytes:
        call = request.call
        if call is Call.GET_ATTRIBUTE_VALUE:
            body = self._attribute_reply(request, values[0])
        else:
            write = self._write
            body = b"".join([write[code](value) for code, value in zip(CALLS[call][1], values, strict=True)])
        return frame(request.id, self.head(call) + body)

    def _attribute_reply(self, request: Request, values: list[tuple[int, Any]]) -> bytes:
        """C_GetAttributeValue (PKCS#11 3.1, 5.7.5): each attribute on its own, then one CK_RV for all."""
        parts, codes, size = [fields.u32(len(values))], set(), 0
        for (attribute, value), (_, room) in zip(values, request.args[2], strict=True):
            encoded, rv = self.write_attribute(attribute, value, room)
            parts.append(encoded)
            size += len(encoded)
            if size > limits.MAX_MESSAGE:
                raise BadMessage(request.id, ck.CKR_HOST_MEMORY, "the values would not fit into a message")
            codes.add(rv)
        order = (ck.CKR_ATTRIBUTE_SENSITIVE, ck.CKR_ATTRIBUTE_TYPE_INVALID, ck.CKR_BUFFER_TOO_SMALL)
        rv = next((code for code in order if code in codes), ck.CKR_OK)
        return b"".join(parts) + fields.u64(rv)


_CALLS_BY_ID: dict[int, Call] = {int(call): call for call in CALLS}


def known_call(ident: int, call_id: int, served: frozenset[Call]) -> Call:
    """Returns the call if the dialect has it."""
    call = _CALLS_BY_ID.get(call_id)
    if call is None or call not in served:
        raise BadMessage(ident, ck.CKR_FUNCTION_NOT_SUPPORTED, f"call {call_id}")
    return call


def bad_message(ident: int, call: Call, error: Malformed) -> BadMessage:
    return BadMessage(ident, error.rv, f"{call.name}: {error}")
