"""Message-based processes (PKCS#11 3.1, 5.9, 5.11, 5.14, 5.16): one Init, then message after message with that key and mechanism.

Each message is an operation of its own: it is admitted as one (`admit`), counted as one, and with a key that asks each time needs
a login of its own.  An error ends the message; the process goes on until it is finished or cancelled.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import SecretKey, Signer, Stream, Verifier
from hsmvisord.token.nonces import Nonces, Source
from hsmvisord.token.operations import GONE, Operation, Output
from hsmvisord.wire.calls import MORE_FOLLOWS, Mechanism, Needed

Admit = Callable[[], None]

_NONCE_SIZE = struct.Struct(">B")


def _fits(size: int, room: int | None) -> bool:
    return room is not None and size <= room


class MessageOperation(Operation):
    """`finished`: the last call ended a message well.  `ready` is the key's part; `admit` raises unless a message may begin now."""

    __slots__ = ("_admit", "_asks", "_message", "_ready", "finished")

    def __init__(self, mechanism: int, generation: tuple[str, int] | None, ready: Any, admit: Admit) -> None:
        super().__init__(mechanism, generation)
        self._ready, self._admit = ready, admit
        self._asks = self.finished = False
        self._message: Any = None  #: the open one

    @property
    def resting(self) -> bool:
        return self._message is None and (self.locked is not None or not self._asks)

    def check_resting(self) -> None:
        """Raises CKR_OPERATION_ACTIVE within a message."""
        if self._message is not None:
            raise CkError(ck.CKR_OPERATION_ACTIVE, "a message is open")

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """One message in one call."""
        with self._beginning():
            yield
        self.finished = True
        self._ask()

    @contextmanager
    def _beginning(self) -> Iterator[None]:
        if self.locked is not None:
            raise CkError(ck.CKR_USER_NOT_LOGGED_IN, "this key asks for a login at each use (CKU_CONTEXT_SPECIFIC)")
        self._admit()
        try:
            yield
        except BaseException:
            self._end()
            raise

    @contextmanager
    def _next(self) -> Iterator[Any]:
        """Gives the open message for one more part: an error ends it."""
        if self._message is None:
            raise CkError(ck.CKR_OPERATION_NOT_INITIALIZED, "no message is open")
        try:
            yield self._message
        except BaseException:
            self._end()
            raise

    def _end(self, finished: bool = False) -> None:
        self._message, self.finished = None, finished
        self._ask()

    def _ask(self) -> None:
        if self._asks and self.locked is None and self._ready is not GONE:
            self.locked = True

    def lock(self) -> None:
        self._asks = self.locked = True

    def unlock(self) -> None:
        super().unlock()
        self.locked = None

    def revoke(self) -> None:
        self._ready, self.locked = GONE, None
        if self._message is not None:
            self._message = GONE


class MessageSignOperation(MessageOperation):
    name, counted = "message sign", "sign"
    __slots__ = ()
    _ready: Signer

    def sign(self, data: bytes, room: int | None) -> Output:
        self.check_resting()
        size = self._ready.output_size
        if not _fits(size, room):
            return Needed(size)
        with self._whole():
            return self._ready.sign(data)

    def begin(self) -> None:
        self.check_resting()
        begin = self._ready.begin
        if begin is None:
            raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED, "this mechanism signs in one part only")
        with self._beginning():
            self._message = begin()

    def next(self, data: bytes, room: int | None) -> Output:
        """`room` MORE_FOLLOWS: it is not the last part."""
        with self._next() as message:
            if room == MORE_FOLLOWS:
                message.update(data)
                return Needed(0)
            size = self._ready.output_size
            if not _fits(size, room):
                return Needed(size)
            message.update(data)
            signature: bytes = message.finish()
        self._end(finished=True)
        return signature


class MessageVerifyOperation(MessageOperation):
    name, counted = "message verify", "verify"
    __slots__ = ()
    _ready: Verifier

    def verify(self, data: bytes, signature: bytes) -> None:
        self.check_resting()
        with self._whole():
            self._ready.verify(data, signature)

    def begin(self) -> None:
        self.check_resting()
        begin = self._ready.begin
        if begin is None:
            raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED, "this mechanism verifies in one part only")
        with self._beginning():
            self._message = begin()

    def next(self, data: bytes, signature: bytes | None) -> None:
        """`signature` None: it is not the last part."""
        with self._next() as message:
            message.update(data)
            if signature is not None:
                message.finish(signature)
        if signature is not None:
            self._end(finished=True)


# ---- authenticated encryption -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MessageParameter:
    """What CK_GCM_MESSAGE_PARAMS, CK_CCM_MESSAGE_PARAMS or CK_SALSA20_CHACHA20_POLY1305_MSG_PARAMS says of one message.

    `tag` is empty where the token makes it; `bits` and `length` are those of GCM's tag and of CCM's data.
    """

    mechanism: int
    source: Source
    tag: bytes
    tag_size: int
    bits: int = 0
    length: int = 0

    def usual(self, nonce: bytes, data: bytes) -> Mechanism:
        """Returns the mechanism of one encryption with this IV and associated data."""
        match self.mechanism:
            case ck.CKM_AES_GCM:
                return Mechanism(self.mechanism, (nonce, 8 * len(nonce), data, self.bits))
            case ck.CKM_AES_CCM:
                return Mechanism(self.mechanism, (self.length, nonce, data, self.tag_size))
        return Mechanism(self.mechanism, (nonce, data))

    def kind(self) -> tuple[int, int, int]:
        """What stays the same for all parts of a message."""
        return self.tag_size, self.length, len(self.source.given)


def message_parameter(mechanism: Mechanism, wanted: int) -> MessageParameter:
    """Reads the fields of a structure; `wanted` is the mechanism that was initialized.  Raises CkError."""
    if mechanism.type == wanted:
        match wanted, mechanism.parameter:
            case ck.CKM_AES_GCM, (bytes(iv), int(fixed), int(generator), bytes(tag), int(bits)):
                return MessageParameter(wanted, Source(iv, fixed, generator), tag, bits // 8, bits=bits)
            case ck.CKM_AES_CCM, (int(length), bytes(nonce), int(fixed), int(generator), bytes(mac), int(size)):
                return MessageParameter(wanted, Source(nonce, fixed, generator), mac, size, length=length)
            case ck.CKM_CHACHA20_POLY1305, (bytes(nonce), bytes(tag)):
                return MessageParameter(wanted, Source(nonce), tag, 16)
    raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, f"not the parameter of a message of {ck.mechanism_name(wanted)}")


def _check_data(data: bytes) -> None:
    if len(data) > limits.MAX_MESSAGE_DATA:
        raise CkError(ck.CKR_ARGUMENTS_BAD, f"at most {limits.MAX_MESSAGE_DATA} bytes of associated data of a message in parts")


class _Parts:
    """An open message: what comes out is as long as what goes in, but not before it may."""

    __slots__ = ("_due", "kind", "made", "stream")

    def __init__(self, stream: Stream, kind: tuple[int, int, int], made: bytes = b"") -> None:
        self.stream, self.kind = stream, kind
        self.made = made  #: its IV, if the token made it
        self._due = 0  #: bytes that are in and not out

    def needed(self, size: int, last: bool) -> int:
        """Returns how much comes out of the next part."""
        return self._due + size if last else self.stream.room(size)

    def update(self, data: bytes) -> bytes:
        out = self.stream.update(data)
        self._due += len(data) - len(out)
        return out


class _CipherMessages(MessageOperation):
    """`usual` parameters of one process come from its Init, if that has any: then they hold for all messages."""

    __slots__ = ("_nonces", "_preset")
    _ready: SecretKey

    def __init__(self, mechanism: Mechanism, key: SecretKey, admit: Admit, random: Callable[[int], bytes]) -> None:
        super().__init__(mechanism.type, None, key, admit)
        self._nonces = Nonces(random)
        self._preset = b""  #: the IV of the message that a predecessor had open
        if mechanism.parameter is not None:
            first = message_parameter(mechanism, mechanism.type)
            key.encrypter(first.usual(first.source.given, b""))
            self._settle(first.source)

    def _settle(self, source: Source) -> None:
        """What an Init says of the IVs."""

    def _begin(self, wanted: MessageParameter, nonce: bytes, data: bytes, decrypting: bool) -> Stream:
        make = self._ready.decrypter if decrypting else self._ready.encrypter
        begin = make(wanted.usual(nonce, data)).begin
        assert begin is not None  # each of these mechanisms works in parts
        return begin()


def _same(message: _Parts, wanted: MessageParameter) -> None:
    if message.kind != wanted.kind():
        raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "the parameter is another one than that of the message's begin")


class MessageEncryptOperation(_CipherMessages):
    """Its results are the IV where the token makes it, else nothing; the tag; and the ciphertext."""

    name, counted = "message encrypt", "encrypt"
    __slots__ = ()

    def _settle(self, source: Source) -> None:
        self._nonces.settle(source)

    def encrypt(self, mechanism: Mechanism, associated: bytes, data: bytes, room: int | None) -> tuple[bytes, bytes, Output]:
        wanted = message_parameter(mechanism, self.mechanism)
        self.check_resting()
        if not _fits(len(data), room):
            return b"", b"", Needed(len(data))
        with self._whole():
            nonce = self._nonces.next(wanted.source)
            sealed = self._ready.encrypter(wanted.usual(nonce, associated)).run(data)
            return self._told(wanted, nonce), sealed[len(data) :], sealed[: len(data)]

    def begin(self, mechanism: Mechanism, associated: bytes) -> bytes:
        """Returns the IV, if the token made it."""
        preset, self._preset = self._preset, b""  # whatever comes of it: an IV is for one message
        wanted = message_parameter(mechanism, self.mechanism)
        self.check_resting()
        _check_data(associated)
        with self._beginning():
            nonce = preset or self._nonces.next(wanted.source)
            made = self._told(wanted, nonce)
            self._message = _Parts(self._begin(wanted, nonce, associated, decrypting=False), wanted.kind(), made)
            return made

    def next(self, mechanism: Mechanism, data: bytes, room: int | None, last: bool) -> tuple[bytes, Output]:
        """Returns the tag, after the last part, and what comes out of this one."""
        wanted = message_parameter(mechanism, self.mechanism)
        with self._next() as message:
            if message is GONE:
                GONE.refuse()
            _same(message, wanted)
            needed = message.needed(len(data), last)
            if not _fits(needed, room):
                return b"", Needed(needed)
            out: bytes = message.update(data)
            if not last:
                return b"", out
            out += message.stream.finish()
        self._end(finished=True)
        return out[needed:], out[:needed]

    @staticmethod
    def _told(wanted: MessageParameter, nonce: bytes) -> bytes:
        return nonce if wanted.source.generator != ck.CKG_NO_GENERATE else b""

    def carried(self) -> bytes:
        made = self._message.made if isinstance(self._message, _Parts) else b""
        return _NONCE_SIZE.pack(len(made)) + made + self._nonces.saved()

    def carry(self, state: bytes) -> None:
        size = state[0] if state else 0
        if size > limits.MAX_MADE_IV or len(state) < 1 + size:
            raise ValueError("not what a message-based encryption leaves behind")
        self._preset = state[1 : 1 + size]
        self._nonces.restore(state[1 + size :])


class MessageDecryptOperation(_CipherMessages):
    """Nothing comes out before the tag was found right."""

    name, counted = "message decrypt", "decrypt"
    __slots__ = ()

    def decrypt(self, mechanism: Mechanism, associated: bytes, data: bytes, room: int | None) -> Output:
        wanted = self._with_tag(mechanism)
        self.check_resting()
        if not _fits(len(data), room):
            return Needed(len(data))
        with self._whole(), _authentic():
            return self._ready.decrypter(wanted.usual(wanted.source.given, associated)).run(data + wanted.tag)

    def begin(self, mechanism: Mechanism, associated: bytes) -> None:
        wanted = message_parameter(mechanism, self.mechanism)
        self.check_resting()
        _check_data(associated)
        with self._beginning():
            self._message = _Parts(self._begin(wanted, wanted.source.given, associated, decrypting=True), wanted.kind())

    def next(self, mechanism: Mechanism, data: bytes, room: int | None, last: bool) -> Output:
        wanted = self._with_tag(mechanism) if last else message_parameter(mechanism, self.mechanism)
        with self._next() as message, _authentic():
            if message is GONE:
                GONE.refuse()
            _same(message, wanted)
            needed = message.needed(len(data), last)
            if not _fits(needed, room):
                return Needed(needed)
            out: bytes = message.update(data)
            if not last:
                return out
            out += message.update(wanted.tag) + message.stream.finish()
        self._end(finished=True)
        return out

    def _with_tag(self, mechanism: Mechanism) -> MessageParameter:
        wanted = message_parameter(mechanism, self.mechanism)
        if len(wanted.tag) != wanted.tag_size:
            raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "a tag of another length")
        return wanted


@contextmanager
def _authentic() -> Iterator[None]:
    """What is not authentic is CKR_AEAD_DECRYPT_FAILED in a message."""
    try:
        yield
    except CkError as error:
        if error.rv == ck.CKR_ENCRYPTED_DATA_INVALID:
            raise CkError(ck.CKR_AEAD_DECRYPT_FAILED, "not authentic") from None
        raise
