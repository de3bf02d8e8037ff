"""The file that a backup is: sealed members, then a manifest that the host signed.

    "hsmvisor-backup 1\\n"
    the sealed bytes of each member, one after the other
    the manifest (hsmvisor_rpc.sealed.canonical)
    the host key's signature over it, 64 bytes
    the manifest's length, u32 big-endian

A member is sealed in chunks of 1 MiB with AES-256-GCM.  The key is made for this file alone (HKDF-SHA256 with a salt of its own)
from one that the key provider derives from the master key, which is not in the file: who has the file alone learns what the
manifest says and nothing else.  With the master key, what opens is what that host wrote: the host's private key is a member, its
public one signed the manifest, and the manifest names all the rest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hsmvisor_rpc.sealed.canonical import MAX_RECORD, MalformedRecord, Record

MAGIC = b"hsmvisor-backup "
VERSION = b"1\n"
CHUNK = 1024 * 1024  #: plain bytes
HOST_KEY, STATE = "host.key", "state.db"
MEMBERS = (HOST_KEY, STATE)
_TAG, _SIGNATURE = 16, 64
_READ = 1024 * 1024


class BadBackup(Exception):
    """The file is not a whole and true backup; the message says why."""


class WrongKey(Exception):
    """What is sealed in the file does not open with this key."""


@dataclass(frozen=True)
class Manifest(Record):
    """What is in the file; all that somebody without the master key can read."""

    TYPE: ClassVar[str] = "backup"
    backup_id: bytes
    host_key: bytes  #: raw Ed25519 public key of the host
    made_at: int  #: seconds
    version: str  #: release of the service
    schema: int  #: of the state file
    provider: str  #: kind and fingerprint of the master key
    salt: bytes
    audit_sequence: int  #: the next line of the audit log, when the backup was made
    audit_head: str  #: hash of the line before it
    modules: tuple[str, ...]
    names: tuple[str, ...]  #: of the members
    sizes: tuple[int, ...]  #: plain bytes of each
    digests: tuple[bytes, ...]  #: SHA-256 of the sealed bytes of each

    @property
    def host_id(self) -> bytes:
        return hashlib.sha256(self.host_key).digest()


def sealed_size(size: int) -> int:
    return size + _TAG * _chunks(size)


def _chunks(size: int) -> int:
    return max(1, -(-size // CHUNK))


class _Cipher:
    def __init__(self, provider_key: bytes, salt: bytes, backup_id: bytes) -> None:
        key = HKDF(SHA256(), 32, salt=salt, info=b"hsmvisor backup\0" + backup_id).derive(provider_key)
        self._aead, self._id = AESGCM(key), backup_id

    def _words(self, member: int, chunk: int, is_last: bool) -> tuple[bytes, bytes]:
        nonce = member.to_bytes(4, "big") + chunk.to_bytes(8, "big")  # the key is used for one file
        return nonce, self._id + MEMBERS[member].encode() + bytes([is_last])

    def seal(self, member: int, chunk: int, is_last: bool, plain: bytes) -> bytes:
        nonce, associated = self._words(member, chunk, is_last)
        return self._aead.encrypt(nonce, plain, associated)

    def open(self, member: int, chunk: int, is_last: bool, sealed: bytes) -> bytes:
        nonce, associated = self._words(member, chunk, is_last)
        return self._aead.decrypt(nonce, sealed, associated)


# ---- making one -----------------------------------------------------------------------------------------------------


def write(
    out: BinaryIO,
    members: Sequence[BinaryIO],
    provider_key: bytes,
    sign: Callable[[bytes], bytes],
    describe: Callable[[bytes, bytes, tuple[int, ...], tuple[bytes, ...]], Manifest],
) -> Manifest:
    """Writes the file; `members` in the order of MEMBERS.  `describe` makes the manifest from its id, salt, sizes and digests."""
    backup_id, salt = os.urandom(16), os.urandom(32)
    cipher = _Cipher(provider_key, salt, backup_id)
    out.write(MAGIC + VERSION)
    sizes, digests = [], []
    for number, member in enumerate(members):
        size = member.seek(0, os.SEEK_END)
        member.seek(0)
        digest = hashlib.sha256()
        for chunk in range(count := _chunks(size)):
            sealed = cipher.seal(number, chunk, chunk + 1 == count, member.read(CHUNK))
            digest.update(sealed)
            out.write(sealed)
        sizes.append(size)
        digests.append(digest.digest())
    manifest = describe(backup_id, salt, tuple(sizes), tuple(digests))
    data = manifest.encode()
    out.write(data + sign(data) + len(data).to_bytes(4, "big"))
    return manifest


# ---- reading one ----------------------------------------------------------------------------------------------------


def read_manifest(file: BinaryIO) -> Manifest:
    """Reads the end of the file and checks the signature; raises BadBackup.  What is sealed is not looked at yet."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(len(MAGIC + VERSION))
    if not head.startswith(MAGIC):
        raise BadBackup("it is not a backup of a host")
    if head != MAGIC + VERSION:
        raise BadBackup("it was made by a newer release: use that one")
    tail = 4 + _SIGNATURE
    if size < len(head) + tail:
        raise BadBackup("it is cut off")
    file.seek(-4, os.SEEK_END)
    length = int.from_bytes(file.read(4), "big")
    if not 0 < length <= min(MAX_RECORD, size - len(head) - tail):
        raise BadBackup("it is cut off or damaged: there is no manifest at its end")
    file.seek(-(tail + length), os.SEEK_END)
    data, signature = file.read(length), file.read(_SIGNATURE)
    try:
        manifest = Manifest.decode(data)
        Ed25519PublicKey.from_public_bytes(manifest.host_key).verify(signature, data)
    except (MalformedRecord, ValueError):
        raise BadBackup("it is cut off or damaged: there is no manifest at its end") from None
    except InvalidSignature:
        raise BadBackup("its manifest is not signed by the host that it names") from None
    if manifest.names != MEMBERS or len(manifest.sizes) != len(MEMBERS) or len(manifest.digests) != len(MEMBERS):
        raise BadBackup(f"it holds {', '.join(manifest.names)} instead of {', '.join(MEMBERS)}")
    if size != len(head) + sum(map(sealed_size, manifest.sizes)) + length + tail:
        raise BadBackup("its size is not what its manifest says")
    return manifest


def verify(file: BinaryIO) -> Manifest:
    """Checks the whole file; needs no key.  Raises BadBackup."""
    manifest = read_manifest(file)
    file.seek(len(MAGIC + VERSION))
    for name, size, wanted in zip(manifest.names, manifest.sizes, manifest.digests, strict=True):
        left, digest = sealed_size(size), hashlib.sha256()
        while left and (data := file.read(min(left, _READ))):
            digest.update(data)
            left -= len(data)
        if left or digest.digest() != wanted:
            raise BadBackup(f"{name} in it is damaged")
    return manifest


def unpack(file: BinaryIO, manifest: Manifest, provider_key: bytes, directory: Path) -> None:
    """Opens the members into new files in `directory`, synced.  Raises WrongKey, BadBackup, OSError."""
    cipher = _Cipher(provider_key, manifest.salt, manifest.backup_id)
    file.seek(len(MAGIC + VERSION))
    for number, (name, size) in enumerate(zip(manifest.names, manifest.sizes, strict=True)):
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            for plain in _opened(file, cipher, number, size):
                out.write(plain)
            out.flush()
            os.fsync(out.fileno())


def _opened(file: BinaryIO, cipher: _Cipher, number: int, size: int) -> Iterator[bytes]:
    for chunk in range(count := _chunks(size)):
        is_last = chunk + 1 == count
        plain = size - chunk * CHUNK if is_last else CHUNK
        try:
            yield cipher.open(number, chunk, is_last, file.read(plain + _TAG))
        except InvalidTag:
            if number or chunk:
                raise BadBackup(f"{MEMBERS[number]} in it does not open") from None
            raise WrongKey from None
