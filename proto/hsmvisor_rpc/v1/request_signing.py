"""Signed requests: how a caller without a client certificate proves who it is, request by request.

Four metadata entries accompany the call; the signature covers the canonical encoding of a SignedRequest, which
binds the method, the time, a nonce and the SHA-256 of the request's serialised bytes as they travel.  An HMAC key
answers HMAC-SHA256, a key pair Ed25519 (RFC 8032); both travel as lower-case hexadecimal.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from hsmvisor_rpc.sealed.canonical import Record

KEY = "hsmvisor-key"  #: name of the key, as the host's configuration calls it
TIME = "hsmvisor-time"  #: seconds since 1970, decimal
NONCE = "hsmvisor-nonce"  #: NONCE_SIZE random bytes, hexadecimal
SIGNATURE = "hsmvisor-signature"  #: hexadecimal
WHY = "hsmvisor-why"  #: beside them, or with any other call: the caller's reason, for the audit log; no signature covers it

NONCE_SIZE = 16  #: bytes
MIN_SECRET = 32  #: bytes of a shared secret


@dataclass(frozen=True)
class SignedRequest(Record):
    """What the signature of one call covers."""

    TYPE: ClassVar[str] = "signed-request"
    version: int  #: 1
    key: str
    method: str  #: "/hsmvisor.v1.ModuleService/CreateModule"
    time: int
    nonce: bytes
    body: bytes  #: SHA-256 of the serialised request


def covered(key: str, method: str, time: int, nonce: bytes, body: bytes) -> bytes:
    """Returns the bytes to sign for a call whose serialised request is `body`."""
    return SignedRequest(1, key, method, time, nonce, hashlib.sha256(body).digest()).encode()
