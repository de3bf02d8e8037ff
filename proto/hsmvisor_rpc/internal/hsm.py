"""What a worker asks of the helper that holds its module's session with a hardware security module, and its answers.

On a stream socket, one question at a time: each message is its length (4 bytes, big-endian) and a record.  The helper begins with
Welcome.  A key is named by 16 random bytes; the helper knows those of its module alone.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hsmvisor_rpc.internal.phases import by_type
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record, record_type

MAX_MESSAGE = 4 * 1024 * 1024  #: bytes: the largest data of one operation, and its frame
MAX_KEYS = 32768  #: of a module: in one List
KEY_NAME = 16  #: bytes

SIGN, ENCRYPT, DECRYPT, DERIVE = "sign", "encrypt", "decrypt", "derive"


@dataclass(frozen=True)
class Welcome(Record):
    """First from the helper."""

    TYPE: ClassVar[str] = "hsm-welcome"
    token: str  #: manufacturer, model and serial number
    mechanisms: tuple[int, ...]  #: CKM_ that the hardware has


@dataclass(frozen=True)
class Use(Record):
    """An operation with one key.  `parameter`: the mechanism's, by `encode_parameter`.  -> Data"""

    TYPE: ClassVar[str] = "hsm-use"
    operation: str  #: SIGN, ENCRYPT, DECRYPT, DERIVE
    key: bytes
    mechanism: int
    parameter: tuple[bytes, ...]
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class MakePair(Record):
    """-> Made"""

    TYPE: ClassVar[str] = "hsm-make-pair"
    key: bytes  #: the name of the new key; the worker chooses it, and can destroy what it had no answer about
    key_type: int  #: CKK_
    bits: int  #: of an RSA key
    parameters: bytes  #: CKA_EC_PARAMS of others
    readable: bool
    wrappable: bool


@dataclass(frozen=True)
class MakeSecret(Record):
    """-> Made"""

    TYPE: ClassVar[str] = "hsm-make-secret"
    key: bytes
    key_type: int
    size: int  #: bytes
    readable: bool
    wrappable: bool


@dataclass(frozen=True)
class TakePrivate(Record):
    """-> Made"""

    TYPE: ClassVar[str] = "hsm-take-private"
    key: bytes
    pkcs8: bytes = field(repr=False)
    readable: bool
    wrappable: bool


@dataclass(frozen=True)
class TakeSecret(Record):
    """-> Made"""

    TYPE: ClassVar[str] = "hsm-take-secret"
    key: bytes
    key_type: int
    value: bytes = field(repr=False)
    readable: bool
    wrappable: bool


@dataclass(frozen=True)
class Wrap(Record):
    """One of `wrapper` (a secret key) and `public` (SubjectPublicKeyInfo of an RSA key) wraps.  -> Data"""

    TYPE: ClassVar[str] = "hsm-wrap"
    wrapper: bytes
    public: bytes
    mechanism: int
    parameter: tuple[bytes, ...]
    key: bytes


@dataclass(frozen=True)
class Unwrap(Record):
    """-> Made"""

    TYPE: ClassVar[str] = "hsm-unwrap"
    key: bytes
    unwrapper: bytes
    mechanism: int
    parameter: tuple[bytes, ...]
    wrapped: bytes
    private: bool  #: a private key, not a secret one
    key_type: int
    size: int  #: bytes of a secret key, 0: not known
    readable: bool
    wrappable: bool


@dataclass(frozen=True)
class Export(Record):
    """A readable key as PrivateKeyInfo, or as its value.  -> Data"""

    TYPE: ClassVar[str] = "hsm-export"
    key: bytes


@dataclass(frozen=True)
class Destroy(Record):
    """Also one that is not there.  -> Data, empty"""

    TYPE: ClassVar[str] = "hsm-destroy"
    key: bytes


@dataclass(frozen=True)
class List(Record):
    """-> Keys"""

    TYPE: ClassVar[str] = "hsm-list"


@dataclass(frozen=True)
class Keys(Record):
    TYPE: ClassVar[str] = "hsm-keys"
    names: tuple[bytes, ...]


@dataclass(frozen=True)
class Made(Record):
    """A key that is in the hardware now."""

    TYPE: ClassVar[str] = "hsm-made"
    key_type: int
    public: bytes  #: SubjectPublicKeyInfo; of a secret key empty
    size: int  #: bytes of a secret key


@dataclass(frozen=True)
class Data(Record):
    TYPE: ClassVar[str] = "hsm-data"
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Failed(Record):
    TYPE: ClassVar[str] = "hsm-failed"
    rv: int  #: CKR_
    detail: str


QUESTIONS = by_type(frozenset({Use, MakePair, MakeSecret, TakePrivate, TakeSecret, Wrap, Unwrap, Export, Destroy, List}))
ANSWERS = by_type(frozenset({Keys, Made, Data, Failed, Welcome}))


def encode_parameter(value: Any) -> tuple[bytes, ...]:
    """Of None, bytes, or a tuple of ints and bytes; nothing is as none."""
    if value in (None, b"", ()):
        return ()
    if isinstance(value, bytes):
        return (b"y" + value,)
    return (b"t", *(b"u" + item.to_bytes(8, "big") if isinstance(item, int) else b"y" + item for item in value))


def decode_parameter(encoded: tuple[bytes, ...]) -> Any:
    """Raises MalformedRecord."""
    if not encoded:
        return None
    if encoded[0][:1] == b"y" and len(encoded) == 1:
        return encoded[0][1:]
    if encoded[0] != b"t":
        raise MalformedRecord("a parameter")
    return tuple(map(_item, encoded[1:]))


def _item(encoded: bytes) -> int | bytes:
    kind, value = encoded[:1], encoded[1:]
    if kind == b"u" and len(value) == 8:
        return int.from_bytes(value, "big")
    if kind == b"y":
        return value
    raise MalformedRecord("an item of a parameter")


def send(sock: socket.socket, record: Record) -> None:
    """Raises OSError."""
    body = record.encode()
    sock.sendall(len(body).to_bytes(4, "big") + body)


def receive(sock: socket.socket, known: dict[str, type[Record]]) -> Record | None:
    """Returns the next message, None at the end.  Raises OSError, MalformedRecord."""
    head = _take(sock, 4)
    if not head:
        return None
    size = int.from_bytes(head, "big")
    if size > MAX_MESSAGE:
        raise MalformedRecord(f"a message of {size} bytes")
    body = _take(sock, size)
    if len(head) < 4 or len(body) < size:
        raise MalformedRecord("a message that ends early")
    kind = known.get(record_type(body))
    if kind is None:
        raise MalformedRecord("a message that does not belong here")
    return kind.decode(body)


def _take(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            break
        data += part
    return bytes(data)
