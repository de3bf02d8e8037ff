"""Keys that owners asked to keep: wrapped by the issuer's key provider, and bound to their line and generation."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hsmvisor.manager.issuer.files import kept_secret
from hsmvisor.manager.issuer.keys import BadKey
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record

KEY_SIZE, NONCE_SIZE = 32, 12


class ProviderFault(Exception):
    """The key provider cannot be used now; the message says why, and what to do.  `locked`: nor may it be tried again."""

    def __init__(self, detail: str, locked: bool = False) -> None:
        super().__init__(detail)
        self.locked = locked


class NotOpened(Exception):
    """The provider's key does not open it."""


@dataclass(frozen=True)
class EscrowContext(Record):
    """What a kept key is bound to; its encoding is the additional data."""

    TYPE: ClassVar[str] = "escrow-context"
    line: str
    generation: int
    public_key: bytes  #: SubjectPublicKeyInfo, DER


@dataclass(frozen=True)
class WrappedKey(Record):
    """As a key stands in the manager's database."""

    TYPE: ClassVar[str] = "wrapped-key"
    provider: str  #: its kind
    key_id: bytes  #: of the provider's key
    public_key: bytes
    nonce: bytes
    sealed: bytes  #: AES-256-GCM: PKCS #8 in DER, and the tag


class Wrapper(Protocol):
    """An AES-256 key that stays where it is."""

    @property
    def kind(self) -> str: ...

    def probe(self) -> None:
        """Makes the key where there is none.  Raises ProviderFault."""
        ...

    def wrap(self, plain: bytes, nonce: bytes, context: bytes) -> tuple[bytes, bytes]:
        """Returns the key's id, and ciphertext with tag.  Raises ProviderFault."""
        ...

    def unwrap(self, key_id: bytes, sealed: bytes, nonce: bytes, context: bytes) -> bytes:
        """Raises ProviderFault, NotOpened."""
        ...


class FileWrapper:
    """A file of KEY_SIZE random bytes that its owner alone may read.  Its repr shows nothing."""

    kind = "file"

    def __init__(self, path: Path) -> None:
        """Raises BadFile."""
        key = kept_secret(path, KEY_SIZE, lambda: os.urandom(KEY_SIZE), "the escrow key")
        self._aead = AESGCM(key)
        self._id = hashlib.sha256(b"hsmvisor escrow key\0" + key).digest()[:16]

    def probe(self) -> None:
        return

    def wrap(self, plain: bytes, nonce: bytes, context: bytes) -> tuple[bytes, bytes]:
        return self._id, self._aead.encrypt(nonce, plain, context)

    def unwrap(self, key_id: bytes, sealed: bytes, nonce: bytes, context: bytes) -> bytes:
        if key_id != self._id:
            raise ProviderFault("the key was wrapped by another escrow key than the file's: restore that one")
        try:
            return self._aead.decrypt(nonce, sealed, context)
        except InvalidTag:
            raise NotOpened from None


def wrap(wrapper: Wrapper, pkcs8: bytes, context: EscrowContext) -> bytes:
    """Returns the encoding of the WrappedKey.  Raises ProviderFault."""
    nonce = os.urandom(NONCE_SIZE)
    key_id, sealed = wrapper.wrap(pkcs8, nonce, context.encode())
    return WrappedKey(wrapper.kind, key_id, context.public_key, nonce, sealed).encode()


def unwrap(wrapper: Wrapper, data: bytes, line: str, generation: int) -> tuple[bytes, bytes]:
    """Returns PKCS #8, and the public key that it was kept for.  Raises ProviderFault, BadKey."""
    try:
        wrapped = WrappedKey.decode(data)
    except MalformedRecord:
        raise BadKey("what was kept is no wrapped key") from None
    if wrapped.provider != wrapper.kind:
        raise ProviderFault(f"the key was wrapped by a {wrapped.provider[:16]!r}, the escrow is a {wrapper.kind!r} now")
    if len(wrapped.nonce) != NONCE_SIZE:
        raise BadKey("what was kept is no wrapped key")
    context = EscrowContext(line, generation, wrapped.public_key).encode()
    try:
        return wrapper.unwrap(wrapped.key_id, wrapped.sealed, wrapped.nonce, context), wrapped.public_key
    except NotOpened:
        raise BadKey("the kept key does not open: it was altered, or kept for another line or generation") from None
