"""The client's side of signed requests: a key, and a channel that signs each call."""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hsmvisor_rpc.v1 import request_signing

Serialize = Callable[[Any], bytes]
Metadata = Sequence[tuple[str, str | bytes]]


class SigningKey:
    """A shared secret (HMAC-SHA256) or an Ed25519 key, under the name that the host knows it by.  Its repr shows no key."""

    def __init__(self, name: str, key: bytes | Ed25519PrivateKey) -> None:
        if isinstance(key, bytes) and len(key) < request_signing.MIN_SECRET:
            raise ValueError(f"a shared secret has at least {request_signing.MIN_SECRET} bytes, this has {len(key)}")
        self.name = name
        self._key = key

    @classmethod
    def load(cls, path: str | os.PathLike[str], name: str | None = None) -> SigningKey:
        """Reads a PEM private key (Ed25519) or a shared secret in hexadecimal; `name`: default the file's stem.

        Raises OSError, or ValueError with what is wrong with the file.
        """
        path = Path(path)
        data = path.read_bytes()
        return cls(name or path.stem, _parse(data, path))

    def sign(self, covered: bytes) -> bytes:
        if isinstance(self._key, bytes):
            return hmac.new(self._key, covered, hashlib.sha256).digest()
        return self._key.sign(covered)

    def metadata(self, method: str, body: bytes) -> list[tuple[str, str]]:
        """Returns the metadata that proves one call."""
        now, nonce = int(time.time()), os.urandom(request_signing.NONCE_SIZE)
        signature = self.sign(request_signing.covered(self.name, method, now, nonce, body))
        return [
            (request_signing.KEY, self.name),
            (request_signing.TIME, str(now)),
            (request_signing.NONCE, nonce.hex()),
            (request_signing.SIGNATURE, signature.hex()),
        ]

    def __repr__(self) -> str:
        return f"SigningKey({self.name!r})"


def _parse(data: bytes, path: Path) -> bytes | Ed25519PrivateKey:
    if data.lstrip().startswith(b"-----BEGIN"):
        try:
            key = load_pem_private_key(data, None)
        except (ValueError, TypeError):
            raise ValueError(f"{path}: not an unencrypted private key in PEM") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{path}: signed requests take an Ed25519 key")
        return key
    try:
        return bytes.fromhex(data.decode("ascii").strip())
    except ValueError:
        raise ValueError(f"{path}: a shared secret is written in hexadecimal") from None


class _SignedCall:
    """One method: serialises once, signs those bytes, sends those bytes."""

    def __init__(self, inner: Any, key: SigningKey, method: str, serialize: Serialize) -> None:
        self._inner, self._key, self._method, self._serialize = inner, key, method, serialize

    def _prepare(self, request: Any, metadata: Metadata | None) -> tuple[bytes, list[tuple[str, str | bytes]]]:
        body = self._serialize(request)
        return body, [*(metadata or ()), *self._key.metadata(self._method, body)]

    def __call__(self, request: Any, timeout: float | None = None, metadata: Metadata | None = None, **options: Any) -> Any:
        body, metadata = self._prepare(request, metadata)
        return self._inner(body, timeout=timeout, metadata=metadata, **options)

    def with_call(self, request: Any, timeout: float | None = None, metadata: Metadata | None = None, **options: Any) -> Any:
        body, metadata = self._prepare(request, metadata)
        return self._inner.with_call(body, timeout=timeout, metadata=metadata, **options)

    def future(self, request: Any, timeout: float | None = None, metadata: Metadata | None = None, **options: Any) -> Any:
        body, metadata = self._prepare(request, metadata)
        return self._inner.future(body, timeout=timeout, metadata=metadata, **options)


class SigningChannel(grpc.Channel):
    """A channel whose every call is signed.  Methods that stream requests cannot be: there is no one body to sign."""

    def __init__(self, channel: grpc.Channel, key: SigningKey) -> None:
        self._channel, self._key = channel, key

    def unary_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, *args: Any, **options: Any
    ) -> Any:
        inner = self._channel.unary_unary(method, None, response_deserializer, *args, **options)
        return _SignedCall(inner, self._key, method, request_serializer or bytes)

    def unary_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, *args: Any, **options: Any
    ) -> Any:
        inner = self._channel.unary_stream(method, None, response_deserializer, *args, **options)
        return _SignedCall(inner, self._key, method, request_serializer or bytes)

    def stream_unary(self, method: str, *args: Any, **options: Any) -> Any:
        raise NotImplementedError(f"{method} streams its requests, which cannot be signed: use a client certificate")

    def stream_stream(self, method: str, *args: Any, **options: Any) -> Any:
        raise NotImplementedError(f"{method} streams its requests, which cannot be signed: use a client certificate")

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        self._channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> SigningChannel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
