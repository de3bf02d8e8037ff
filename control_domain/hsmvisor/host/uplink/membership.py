"""What a host keeps of the management plane that it has joined: one private file, whole or not there.

STATE/manager/membership.json   the identity certificate with its key, whom to believe, where managers are, what new modules obey
STATE/manager/joining.json      a join that was begun, so that the same one is asked for again where its answer was lost
STATE/manager/renewing.json     and a renewal: the manager knows two certificates of a host, and which key it will have
STATE/manager/renewed.json      the membership with the new certificate, until that has worked: then the old one counts no more
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from hsmvisor.addresses import is_address, split
from hsmvisor.files import sync_path, write_private
from hsmvisor.host import limits
from hsmvisor_rpc.sealed import names
from hsmvisor_rpc.sealed.fleet import HOST_URI

_MEMBERSHIP, _RENEWED, JOINING, RENEWING = "membership.json", "renewed.json", "joining.json", "renewing.json"

NONCE = 32  #: bytes


class BadMembership(ValueError):
    """What is kept, or what a manager sent, is not what it has to be; the message says what."""


@dataclass(frozen=True)
class Membership:
    """Its repr shows no key."""

    host_id: str  #: hexadecimal
    name: str  #: of this host in the fleet
    root: bytes  #: raw Ed25519: what new guests' modules obey
    addresses: tuple[str, ...]  #: of managers, host:port
    authorities: tuple[bytes, ...]  #: DER: roots of the managers' certificates
    chain: tuple[bytes, ...]  #: DER, the host's own certificate first
    key: bytes = field(repr=False)  #: PEM
    issued_at: float  #: seconds, by this host's clock
    token: str  #: SHA-256 of the token that it joined with, hexadecimal; empty: it came with a certificate

    @cached_property
    def ends_at(self) -> float:
        return x509.load_der_x509_certificate(self.chain[0]).not_valid_after_utc.timestamp()

    @property
    def renew_at(self) -> float:
        """At half of its life."""
        return self.issued_at + (self.ends_at - self.issued_at) / 2

    def check(self) -> Self:
        """Raises BadMembership: key and certificate belong together and are for this host, addresses and root can be used."""
        if len(self.root) != limits.ROOT_SIZE:
            raise BadMembership(f"a root has {limits.ROOT_SIZE} bytes")
        for what, values, most in (
            ("addresses", self.addresses, limits.MAX_MANAGERS),
            ("authorities", self.authorities, limits.MAX_AUTHORITIES),
            ("certificates", self.chain, limits.MAX_AUTHORITIES),
        ):
            if not 1 <= len(values) <= most:
                raise BadMembership(f"there are 1-{most} {what}, these are {len(values)}")
        for address in self.addresses:
            port_of(address)
        try:
            leaf, *_ = [x509.load_der_x509_certificate(der) for der in (*self.chain, *self.authorities)]
            public = load_pem_private_key(self.key, None).public_key()
            told = names.told_by(leaf)
        except (ValueError, TypeError, x509.InvalidVersion) as error:
            raise BadMembership(f"a certificate or its key cannot be used: {error}") from None
        if _spki(leaf.public_key()) != _spki(public):
            raise BadMembership("the certificate is for another key")
        if f"uri:{HOST_URI}{self.host_id}" not in map(str, told):
            raise BadMembership("the certificate is not for this host")
        return self


@dataclass(frozen=True)
class Attempt:
    """What was begun: repeated with the same bytes, it is the same one.  Its repr shows no key."""

    asked: str  #: SHA-256 of what was asked for, hexadecimal
    request_id: str
    nonce: bytes
    csr: bytes  #: DER
    key: bytes = field(repr=False)  #: PEM


class Memory:
    """The files.  Methods raise OSError."""

    def __init__(self, state: Path) -> None:
        self.directory = state / "manager"

    def membership(self) -> Membership | None:
        """Raises BadMembership."""
        found = self._read(_MEMBERSHIP, Membership)
        return None if found is None else found.check()

    def keep(self, membership: Membership) -> None:
        self._write(_MEMBERSHIP, membership)

    def forget(self) -> None:
        self._remove(_MEMBERSHIP)
        self.end_renewal()

    def candidate(self) -> Membership | None:
        """Returns the one with a renewed certificate, of which it is not known whether it has worked.  Raises BadMembership."""
        found = self._read(_RENEWED, Membership)
        return None if found is None else found.check()

    def offer(self, candidate: Membership) -> None:
        self._write(_RENEWED, candidate)

    def end_renewal(self) -> None:
        self._remove(_RENEWED)
        self._remove(RENEWING)

    def attempt(self, name: str, asked: str, host_id: str) -> Attempt:
        """Returns the attempt that was begun for this, or one that is begun now."""
        with contextlib.suppress(BadMembership):
            found: Attempt | None = self._read(name, Attempt)
            if found is not None and found.asked == asked:
                return found
        key, csr = _new_key(host_id)
        made = Attempt(asked, os.urandom(16).hex(), os.urandom(NONCE), csr, key)
        self._write(name, made)
        return made

    def end(self, name: str) -> None:
        self._remove(name)

    def _write(self, name: str, record: Membership | Attempt) -> None:
        self.directory.mkdir(mode=0o700, exist_ok=True)
        values = {row.name: _plain(getattr(record, row.name)) for row in fields(record)}
        write_private(self.directory / name, json.dumps(values, indent=1).encode())
        sync_path(self.directory.parent)

    def _read(self, name: str, kind: type[Any]) -> Any:
        path = self.directory / name
        try:
            values = json.loads(path.read_bytes())
            return kind(**{row.name: _value(str(row.type), values[row.name]) for row in fields(kind)})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadMembership(f"{path} cannot be read") from None

    def _remove(self, name: str) -> None:
        path = self.directory / name
        if path.exists():
            path.unlink()
            sync_path(self.directory)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _value(kind: str, value: Any) -> Any:
    if kind == "bytes":
        return base64.b64decode(value, validate=True)
    if kind.startswith("tuple["):
        return tuple(_value(kind[6:].partition(",")[0], item) for item in value)
    return {"str": str, "float": float}[kind](value)


# ---- keys and addresses -----------------------------------------------------------------------------------------------


def _new_key(host_id: str) -> tuple[bytes, bytes]:
    """Returns a key in PEM and the request for its certificate, DER."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = names.request([names.uri(HOST_URI + host_id)]).sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), csr


def pem(certificates: tuple[bytes, ...]) -> bytes:
    return b"".join(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in certificates)


def der(pem: bytes) -> tuple[bytes, ...]:
    """Raises ValueError."""
    return tuple(certificate.public_bytes(Encoding.DER) for certificate in x509.load_pem_x509_certificates(pem))


def port_of(address: str) -> int:
    """Returns the port of host:port; raises BadMembership."""
    sound = len(address) <= limits.MAX_ADDRESS and address.isascii() and address.isprintable() and is_address(address)
    if not sound or (port := split(address)[1]) == 0:
        raise BadMembership(f"a manager's address is host:port, not {address[: limits.MAX_ADDRESS]!r}")
    return port


def _spki(key: Any) -> bytes:
    public: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return public
