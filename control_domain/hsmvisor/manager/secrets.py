"""Small secrets in files: the manager's own key, and what tokens are made of."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hsmvisor.files import OthersRead, read_private, write_private
from hsmvisor.serving.errors import Broken
from hsmvisor_rpc.sealed.commands import fingerprint, raw_public

SIZE = 32


def load(path: Path, make: bool, hint: str) -> bytes:
    """Returns the file's 32 bytes; `make`: new ones where there is none.  Raises Broken, with `hint` where it is missing."""
    try:
        if not path.exists():
            if not make:
                raise Broken("KEY_MISSING", f"{path} is missing; nothing was written", hint)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(path, os.urandom(SIZE))
        found = read_private(path)
    except OthersRead:
        raise Broken("KEY_MODE", f"others may read {path}", f"chmod 600 {path}, and think of who read it") from None
    except OSError as error:
        raise Broken("KEY", f"{path}: {error.strerror}", "look at the directory's owner, mode and disk") from None
    if len(found) != SIZE:
        raise Broken("KEY", f"{path} has {len(found)} bytes instead of {SIZE}", hint)
    return found


def fingerprint_of(secret: bytes) -> str:
    """Tells secrets apart and says nothing of them."""
    return hashlib.sha256(b"hsmvisor fingerprint\0" + secret).hexdigest()


class ManagerKey:
    """Who one manager is: it signs its audit log.  Its repr shows nothing."""

    def __init__(self, private: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(private)
        self.public = raw_public(self._key.public_key())
        self.id = fingerprint(self.public).hex()

    def __repr__(self) -> str:
        return f"ManagerKey({self.id[:16]})"

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)
