"""Who this host is: its Ed25519 key, what it signs, and the keys it derives from it."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hsmvisor.files import OthersRead, read_private, write_private
from hsmvisor.serving.errors import Broken
from hsmvisor_rpc.sealed.attestation import TpmIdentity
from hsmvisor_rpc.sealed.commands import fingerprint, raw_public, sign
from hsmvisor_rpc.sealed.identity import ModuleIdentity

KEY_SIZE = 32
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


class HostIdentity:
    """The host's key.  Its repr shows nothing of it."""

    def __init__(self, private: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(private)
        self.public = raw_public(self._key.public_key())
        self.host_id = fingerprint(self.public)
        self._ticket_key = _derive(private, b"hsmvisor request ticket")
        self._enrolment_key = _derive(private, b"hsmvisor enrolment")
        self._tpm_ca_secret = int.from_bytes(_derive(private, b"hsmvisor TPM CA", 40), "big")

    def __repr__(self) -> str:
        return f"HostIdentity({self.host_id.hex()[:16]})"

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def certify(self, module_id: bytes, name: str, recipient: bytes, root: bytes, created_at: int) -> bytes:
        """Returns the signed ModuleIdentity; `root` is the raw root key."""
        return sign(ModuleIdentity(self.host_id, module_id, name, recipient, fingerprint(root), created_at), self._key).encode()

    def certify_tpm(self, identity: TpmIdentity) -> bytes:
        """Returns the signed TpmIdentity."""
        return sign(identity, self._key).encode()

    def tpm_ca_key(self) -> ec.EllipticCurvePrivateKey:
        """Of the authority that certifies its modules' TPMs, on P-256 (FIPS 186-5, A.2.1: 64 bits more than needed, so no bias)."""
        return ec.derive_private_key(self._tpm_ca_secret % (_P256_ORDER - 1) + 1, ec.SECP256R1())

    def ticket(self, module_id: bytes, request: str) -> str:
        """Returns the proof that we ourselves gave a module this request: it comes back with what the module stores."""
        return hmac.new(self._ticket_key, module_id + request.encode(), hashlib.sha256).hexdigest()

    def enrolment_secret(self, id: bytes) -> bytes:
        """Returns the one-time secret's 20 bytes; it is made again from its id, so the state file holds none."""
        return hmac.new(self._enrolment_key, id, hashlib.sha256).digest()[:20]


def _derive(private: bytes, info: bytes, size: int = 32) -> bytes:
    return HKDF(SHA256(), size, salt=None, info=info).derive(private)


def load(path: Path, *, new_host: bool) -> HostIdentity:
    """Reads the host's key; makes one when there is none and `new_host`.  Raises Broken."""
    try:
        if not path.exists():
            if not new_host:
                raise Broken(
                    "HOST_KEY_MISSING",
                    f"{path} is missing, but this host has a state: with a new key no manager would know it",
                    "restore the file from a backup",
                )
            write_private(path, os.urandom(KEY_SIZE))
        private = read_private(path)
    except OthersRead as error:
        raise Broken("HOST_KEY_MODE", str(error), f"chmod 600 {path}, and think of who read it") from None
    except OSError as error:
        raise Broken("HOST_KEY", f"{path}: {error.strerror}", "look at the directory's owner, mode and disk") from None
    if len(private) != KEY_SIZE:
        raise Broken("HOST_KEY", f"{path} has {len(private)} bytes instead of {KEY_SIZE}", "restore the file from a backup")
    return HostIdentity(private)
