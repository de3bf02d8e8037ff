"""Where an authority's keys are: in a file that its own user alone reads, or in a PKCS #11 token, where they stay.

Both give keys that `cryptography` signs certificates with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from hsmvisor.files import OthersRead, read_private, write_private

ROOT, INTERMEDIATE = "root", "intermediate"


class NoKey(Exception):
    """A key that is missing or cannot be used; the message says what to do."""


class KeyStore(Protocol):
    def key(self, name: str, make: bool) -> ec.EllipticCurvePrivateKey:
        """Returns the key of that name; `make`: a new one where there is none.  Raises NoKey."""
        ...


@dataclass(frozen=True)
class FileKeys:
    """PKCS #8 in PEM, one file a key."""

    directory: Path

    def key(self, name: str, make: bool) -> ec.EllipticCurvePrivateKey:
        path = self.directory / f"{name}.key"
        if not path.exists():
            if not make:
                raise NoKey(f"{path} is missing: restore it, or begin a new authority")
            self._make(path)
        try:
            key = load_pem_private_key(read_private(path), None)
        except OthersRead:
            raise NoKey(f"{path} can be read by others: chmod 600") from None
        except (ValueError, TypeError):
            raise NoKey(f"{path} is no private key in PEM without a password") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise NoKey(f"{path} is no EC key")
        return key

    def _make(self, path: Path) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = ec.generate_private_key(ec.SECP384R1())
        write_private(path, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
