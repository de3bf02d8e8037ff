"""Signed requests, the service's side: whose signature it is, whether it is in time, and whether it was seen before."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hsmvisor.files import OthersRead, read_private
from hsmvisor.serving.errors import BadConfig, Unauthenticated
from hsmvisor_rpc.v1 import request_signing
from hsmvisor_rpc.v1.request_signing import KEY, MIN_SECRET, NONCE, NONCE_SIZE, SIGNATURE, TIME


class RequestKey(Protocol):
    """A row of the configuration: `hmac` (a shared secret in hexadecimal) or `ed25519` (a public key in PEM)."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def roles(self) -> Iterable[str]: ...


class Nonces(Protocol):
    """Where it is kept which requests were seen; each method may raise StorageUnavailable."""

    async def take_nonce(self, key: str, nonce: bytes, expires_at: int) -> bool:
        """Says whether the nonce is new for this key; it is kept until `expires_at` (seconds)."""

    async def signed_from(self) -> int:
        """Returns the time up to which signed requests are refused, seconds: a restored state does not know which were seen."""


@dataclass(frozen=True)
class KnownKey:
    name: str
    roles: frozenset[str]
    verify: Callable[[bytes, bytes], bool]  #: signature, covered bytes


def load_keys(rows: Iterable[RequestKey]) -> dict[str, KnownKey]:
    """Reads the key files; raises BadConfig."""
    return {row.name: KnownKey(row.name, frozenset(row.roles), _verifier(row)) for row in rows}


def _verifier(row: RequestKey) -> Callable[[bytes, bytes], bool]:
    path = Path(row.file)
    try:
        data = path.read_bytes() if row.kind == "ed25519" else read_private(path)
    except OthersRead:
        raise BadConfig(f"signed key {row.name}", f"others may read the shared secret in {path}: chmod 600 it") from None
    except OSError as error:
        raise BadConfig(f"signed key {row.name}", f"{path}: {error.strerror}") from None
    if row.kind == "ed25519":
        return _ed25519(row.name, data, path)
    try:
        secret = bytes.fromhex(data.decode("ascii").strip())
    except ValueError:
        raise BadConfig(f"signed key {row.name}", f"{path}: a shared secret is written in hexadecimal") from None
    if len(secret) < MIN_SECRET:
        raise BadConfig(f"signed key {row.name}", f"{path}: a shared secret has at least {MIN_SECRET} bytes")
    return lambda signature, covered: hmac.compare_digest(hmac.new(secret, covered, hashlib.sha256).digest(), signature)


def _ed25519(name: str, data: bytes, path: Path) -> Callable[[bytes, bytes], bool]:
    try:
        key = load_pem_public_key(data)
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise BadConfig(f"signed key {name}", f"{path}: not an Ed25519 public key in PEM")
    public = key

    def verify(signature: bytes, covered: bytes) -> bool:
        try:
            public.verify(signature, covered)
        except InvalidSignature:
            return False
        return True

    return verify


class Signatures:
    """Checks signed requests.  A nonce is kept until its request would be too late anyway, also over a restart."""

    def __init__(
        self, keys: dict[str, KnownKey], skew: int, nonces: Nonces, service: str, now: Callable[[], float] = time.time
    ) -> None:
        self._keys, self._skew, self._nonces, self._service, self._now = keys, skew, nonces, service, now
        self._from: int | None = None

    async def verify(self, method: str, body: bytes, untrusted_metadata: Mapping[str, str | bytes]) -> KnownKey:
        """Returns whose request it is; raises Unauthenticated."""
        key = self._keys.get(str(untrusted_metadata.get(KEY, "")))
        try:
            at = int(str(untrusted_metadata[TIME]))
            nonce = bytes.fromhex(str(untrusted_metadata[NONCE]))
            signature = bytes.fromhex(str(untrusted_metadata[SIGNATURE]))
        except (KeyError, ValueError):
            raise Unauthenticated("SIGNATURE", f"a signed request carries {KEY}, {TIME}, {NONCE} and {SIGNATURE}") from None
        # one answer for an unknown key and a wrong signature: who asks learns no names
        if key is None or len(nonce) != NONCE_SIZE or not 0 <= at < 2**40:
            raise _does_not_fit()
        if not key.verify(signature, request_signing.covered(key.name, method, at, nonce, body)):
            raise _does_not_fit()
        late = self._now() - at
        if abs(late) > self._skew:
            raise Unauthenticated(
                "REQUEST_TIME", f"the request was signed {late:.0f} s ago; the limit is {self._skew} s", "compare the clocks"
            )
        if self._from is None:
            self._from = await self._nonces.signed_from()
        if at <= self._from:
            again = time.strftime("%H:%M:%S", time.gmtime(self._from))
            raise Unauthenticated(
                "REQUEST_TIME", f"the {self._service} was restored from a backup and does not know which requests it has seen",
                f"sign the request again after {again} UTC",
            )  # fmt: skip
        if not await self._nonces.take_nonce(key.name, nonce, at + 2 * self._skew + 1):
            raise Unauthenticated("REQUEST_REPLAY", "this very request was seen before", "sign each request anew")
        return key


def _does_not_fit() -> Unauthenticated:
    return Unauthenticated(
        "SIGNATURE", "the signature does not fit the request, or the key is not known", "check the key and its name"
    )
