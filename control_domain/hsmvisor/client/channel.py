"""Channels to a host: a unix socket, or TCP under TLS."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hsmvisor.client.signing import SigningChannel, SigningKey
from hsmvisor.serving.limits import MAX_ANSWER

_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_ANSWER),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # a restarted host is found again quickly: its control API is back within 2 s
    ("grpc.initial_reconnect_backoff_ms", 100),
    # the time that one attempt to connect may take as well: a busy host is not an absent one
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files: whom to believe, and who we are (both or neither of certificate and key)."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None  #: the name to expect in the host's certificate, where it is not the address


def connect(address: str, *, tls: TlsFiles | None = None, signing: SigningKey | None = None) -> grpc.Channel:
    """Returns a channel to `unix:/path` or `host:port`; it connects with the first call.

    TCP needs `tls`.  With `signing` every call is signed.  Raises ValueError on an address or combination that cannot
    be, OSError when a file cannot be read.
    """
    if address.startswith("unix:"):
        if tls is not None:
            raise ValueError(f"{address}: TLS is for TCP; a unix socket knows its caller by peer credentials")
        # the path is no host name: without an authority of our own it would be sent as one
        channel = grpc.insecure_channel(address, [*_OPTIONS, ("grpc.default_authority", "localhost")])
    else:
        if not _is_host_port(address):
            raise ValueError(f"{address!r}: expected unix:/path or host:port")
        if tls is None:
            raise ValueError(f"{address}: TCP needs TLS (a CA file; and a certificate, or a signing key)")
        channel = grpc.secure_channel(address, _credentials(tls), _options(tls))
    return channel if signing is None else SigningChannel(channel, signing)


def _is_host_port(address: str) -> bool:
    host, separator, port = address.rpartition(":")
    return bool(host and separator) and port.isascii() and port.isdigit() and 0 < int(port) < 65536


def _credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    if (tls.certificate is None) != (tls.key is None):
        raise ValueError("a client certificate and its key come together")
    if tls.certificate is not None and tls.key is not None:
        _demand_a_pair(tls.certificate, tls.key)
    return grpc.ssl_channel_credentials(
        root_certificates=_certificates(tls.ca),
        private_key=tls.key.read_bytes() if tls.key else None,
        certificate_chain=_certificates(tls.certificate) if tls.certificate else None,
    )


def _demand_a_pair(certificate: Path, key: Path) -> None:
    try:
        private = load_pem_private_key(key.read_bytes(), None)
    except (ValueError, TypeError):
        raise ValueError(f"{key}: not an unencrypted private key in PEM") from None
    if x509.load_pem_x509_certificates(_certificates(certificate))[0].public_key() != private.public_key():
        raise ValueError(f"{key}: not the key of the certificate in {certificate}")


def _certificates(path: Path) -> bytes:
    """Returns the file; raises ValueError where gRPC would only say that there is no connection."""
    data = path.read_bytes()
    try:
        first = x509.load_pem_x509_certificates(data)[0]
    except (ValueError, IndexError):
        raise ValueError(f"{path}: not a certificate in PEM") from None
    if first.not_valid_after_utc.timestamp() <= time.time():
        raise ValueError(f"{path}: this certificate expired at {first.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    return data


def _options(tls: TlsFiles) -> list[tuple[str, int | str]]:
    if tls.server_name is None:
        return _OPTIONS
    return [*_OPTIONS, ("grpc.ssl_target_name_override", tls.server_name)]
