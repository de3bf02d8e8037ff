"""The operations that a session can have open, and how each ends (PKCS#11 3.1, 5.2: an error ends the operation, but for
CKR_BUFFER_TOO_SMALL and the question for the length).

`room` is the caller's buffer: None = a NULL pointer, which asks for the length.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from hsmvisord import ck, limits
from hsmvisord.budget import Budget
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import Cipher, MultiPart, MultiPartVerify, Signer, Stream, Verifier
from hsmvisord.token.journal import Journal
from hsmvisord.token.objects import KeyUse
from hsmvisord.wire.calls import Needed

Output = bytes | Needed

SHORT = 64  #: handles


def _fits(size: int, room: int | None) -> bool:
    return room is not None and size <= room


class Operation:
    """One open operation.  `done` tells the session to forget it.

    `name`: of its kind, of which a session has one; `counted`: as statistics have it, if another.
    """

    name = ""
    counted = ""
    __slots__ = ("done", "generation", "journal", "key_handle", "locked", "mechanism")

    def __init__(self, mechanism: int, generation: tuple[str, int] | None) -> None:
        self.mechanism = mechanism
        self.generation = generation
        self.done = False
        self.journal: Journal | None = None
        self.key_handle = 0  #: of a guest's own key
        self.locked: Any = None  #: the ready operation, while a login for this use is missing

    @property
    def resting(self) -> bool:
        """Whether its Init alone makes what it is now: a message-based process between two messages."""
        return False

    def carried(self) -> bytes:
        """What its requests do not tell a successor (at most journal.MAX_CARRIED bytes)."""
        return b""

    def carry(self, state: bytes) -> None:
        """Takes that over, after its Init was carried out again.  Raises ValueError."""

    def lock(self) -> None:
        """It waits for a login (CKA_ALWAYS_AUTHENTICATE)."""

    def unlock(self) -> None:
        """The login has come: not to be had again, so no successor carries the operation out."""
        if self.journal is not None:
            self.journal.whole = False

    def revoke(self) -> None:
        """The key is gone: the next call of the operation answers CKR_KEY_HANDLE_INVALID.  Nothing holds the key here any more."""


class _Gone:
    """Instead of a key's ready operation."""

    def refuse(self, *_: Any) -> Any:
        raise CkError(ck.CKR_KEY_HANDLE_INVALID, "the key was destroyed")

    sign = verify = run = update = finish = room = last = bound = encrypter = decrypter = refuse
    output_size = begin = property(refuse)


GONE: Any = _Gone()


class _Locked:
    """Instead of a key's ready operation, until the user has logged in for it."""

    def refuse(self, *_: Any) -> Any:
        raise CkError(ck.CKR_USER_NOT_LOGGED_IN, "this key asks for a login at each use (CKU_CONTEXT_SPECIFIC)")

    sign = run = bound = refuse
    output_size = begin = property(refuse)


LOCKED: Any = _Locked()


class SignOperation(Operation):
    name = "sign"
    __slots__ = ("_parts", "_signer")

    def __init__(self, mechanism: int, use: KeyUse, signer: Signer) -> None:
        self.mechanism, self.generation, self.done, self.journal = mechanism, use.generation, False, None
        self.key_handle, self.locked = 0, None
        self._signer = signer
        self._parts: MultiPart | None = None

    def sign(self, data: bytes, room: int | None) -> Output:
        signer = self._signer
        if self._parts is not None:
            self.done = True
            raise CkError(ck.CKR_OPERATION_ACTIVE, "C_Sign after C_SignUpdate")
        if room is None or signer.output_size > room:
            return Needed(signer.output_size)
        self.done = True
        return signer.sign(data)

    def update(self, data: bytes) -> None:
        if self._parts is None:
            if self._signer.begin is None:
                raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED, "this mechanism signs in one part only")
            self._parts = self._signer.begin()
        self._parts.update(data)

    def final(self, room: int | None) -> Output:
        if self._parts is None:
            if self._signer.begin is None:
                self.done = True
                raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED, "this mechanism signs in one part only")
            self._parts = self._signer.begin()
        if not _fits(self._signer.output_size, room):
            return Needed(self._signer.output_size)
        self.done = True
        return self._parts.finish()

    def lock(self) -> None:
        self.locked, self._signer = self._signer, LOCKED

    def unlock(self) -> None:
        super().unlock()
        self._signer, self.locked = self.locked, None

    def revoke(self) -> None:
        self._signer, self.locked = GONE, None
        if self._parts is not None:
            self._parts = GONE


class SignRecoverOperation(SignOperation):
    """In one part; the data can be recovered from the signature."""

    name, counted = "sign recover", "sign"
    __slots__ = ()


class _VerifyOperation(Operation):
    name = "verify"
    __slots__ = ("_parts", "_verifier")

    def __init__(self, mechanism: int, verifier: Verifier) -> None:
        super().__init__(mechanism, None)
        self._verifier = verifier
        self._parts: MultiPartVerify | None = None

    def verify(self, data: bytes, signature: bytes) -> None:
        self.done = True
        if self._parts is not None:
            raise CkError(ck.CKR_OPERATION_ACTIVE, "C_Verify after C_VerifyUpdate")
        self._verifier.verify(data, signature)

    def update(self, data: bytes) -> None:
        if self._parts is None:
            if self._verifier.begin is None:
                raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED, "this mechanism verifies in one part only")
            self._parts = self._verifier.begin()
        self._parts.update(data)

    def final(self, signature: bytes) -> None:
        self.done = True
        if self._parts is None:
            if self._verifier.begin is None:
                raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED, "this mechanism verifies in one part only")
            self._parts = self._verifier.begin()
        self._parts.finish(signature)

    def revoke(self) -> None:
        self._verifier = GONE
        if self._parts is not None:
            self._parts = GONE


class VerifyOperation(_VerifyOperation):
    __slots__ = ()


class VerifySignatureOperation(_VerifyOperation):
    """A verification whose signature comes first (PKCS#11 3.2, 5.15.7)."""

    __slots__ = ("_signature",)

    def __init__(self, mechanism: int, verifier: Verifier, signature: bytes) -> None:
        super().__init__(mechanism, verifier)
        if len(signature) > limits.MAX_SIGNATURE:
            raise CkError(ck.CKR_SIGNATURE_LEN_RANGE, f"no signature has more than {limits.MAX_SIGNATURE} bytes")
        self._signature = signature

    def check(self, data: bytes) -> None:
        self.verify(data, self._signature)

    def end(self) -> None:
        self.final(self._signature)


class _CipherOperation(Operation):
    """Encryption or decryption, in one part or in several.

    What came out last is kept until the caller's buffer has room for it: of some mechanisms its length is known only then.
    """

    __slots__ = ("_cipher", "_input", "_output", "_stream")

    def __init__(self, mechanism: int, generation: tuple[str, int] | None, cipher: Cipher) -> None:
        super().__init__(mechanism, generation)
        self._cipher = cipher
        self._stream: Stream | None = None
        self._input = b""
        self._output: bytes | None = None

    def run(self, data: bytes, room: int | None) -> Output:
        if self._stream is not None:
            self.done = True
            raise CkError(ck.CKR_OPERATION_ACTIVE, "one part after a part of several")
        if room is None:
            return Needed(self._cipher.bound(len(data)))
        if self._output is None or data != self._input:
            self._output, self._input = self._cipher.run(data), data
        return self._given(self._output, room)

    def update(self, data: bytes, room: int | None) -> Output:
        stream = self._parts(begins=room is not None)
        needed = stream.room(len(data))
        return stream.update(data) if _fits(needed, room) else Needed(needed)

    def final(self, room: int | None) -> Output:
        stream = self._parts()
        if room is None:
            return Needed(stream.last())
        if self._output is None:
            self._output = stream.finish()
        return self._given(self._output, room)

    def needed(self, size: int) -> int:
        """Returns what `update` with so many bytes gives; nothing has happened."""
        return self._parts(begins=False).room(size)

    def _parts(self, begins: bool = True) -> Stream:
        """`begins` False: a question for the length, after which all is as before."""
        if self._stream is not None:
            return self._stream
        if self._cipher.begin is None:
            self.done = True
            raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED, f"this mechanism can {self.name} in one part only")
        stream = self._cipher.begin()
        if begins:
            self._stream = stream
        return stream

    def _given(self, output: bytes, room: int) -> Output:
        if len(output) > room:
            return Needed(len(output))
        self.done = True
        return output

    def lock(self) -> None:
        self.locked, self._cipher = self._cipher, LOCKED

    def unlock(self) -> None:
        super().unlock()
        self._cipher, self.locked = self.locked, None

    def revoke(self) -> None:
        self._cipher, self._output, self.locked = GONE, None, None
        if self._stream is not None:
            self._stream = GONE


class DecryptOperation(_CipherOperation):
    name = "decrypt"
    __slots__ = ()


class EncryptOperation(_CipherOperation):
    name = "encrypt"
    __slots__ = ()


class VerifyRecoverOperation(_CipherOperation):
    """In one part: a signature in, the data out."""

    name, counted = "verify recover", "verify"
    __slots__ = ()


class DigestOperation(Operation):
    name = "digest"
    __slots__ = ("_hash", "_size", "_updated")

    def __init__(self, mechanism: int, size: int, begin: Callable[[], Any]) -> None:
        super().__init__(mechanism, None)
        self._size = size
        self._hash = begin()
        self._updated = False

    def digest(self, data: bytes, room: int | None) -> Output:
        if self._updated:
            self.done = True
            raise CkError(ck.CKR_OPERATION_ACTIVE, "C_Digest after C_DigestUpdate")
        if not _fits(self._size, room):
            return Needed(self._size)
        self._hash.update(data)
        return self._finish()

    def update(self, data: bytes) -> None:
        self._updated = True
        self._hash.update(data)

    def final(self, room: int | None) -> Output:
        return self._finish() if _fits(self._size, room) else Needed(self._size)

    def _finish(self) -> bytes:
        self.done = True
        return bytes(self._hash.digest())


class FindOperation(Operation):
    """`budget` is for the handles that all searches of the module keep; short answers are free."""

    name = "find"
    __slots__ = ("_budget", "_handles", "_next", "_taken")

    def __init__(self, handles: list[int], budget: Budget) -> None:
        super().__init__(0, None)
        self._taken = 0
        self._budget, self._next = budget, 0
        if len(handles) > SHORT and not budget.take(len(handles)):
            raise CkError(ck.CKR_HOST_MEMORY, "the module's open searches have used up their room")
        self._handles = array("I", handles)
        self._taken = len(handles) if len(handles) > SHORT else 0

    def __del__(self) -> None:
        if self._taken:
            self._budget.give(self._taken)

    def take(self, count: int) -> tuple[int, ...]:
        taken = tuple(self._handles[self._next : self._next + count])
        self._next += len(taken)
        return taken

    @property
    def more(self) -> bool:
        return self._next < len(self._handles)
