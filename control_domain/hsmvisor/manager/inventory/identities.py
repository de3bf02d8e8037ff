"""The manager's own authority `fleet`: it certifies hosts and the managers themselves, and nobody else.

A certificate counts as a host's where this authority signed it; which of them counts now stands in the database (HostRow).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hsmvisor.files import write_private
from hsmvisor.manager.ca import names
from hsmvisor.manager.ca.builtin.authority import BuiltinCa
from hsmvisor.manager.ca.interface import Order
from hsmvisor_rpc.sealed.fleet import HOST_URI

RENEW_AT = 1 / 2  #: of its life a manager's own certificate is renewed
LOOK_EVERY = 3600.0  #: seconds


class Identities:
    def __init__(self, ca: BuiltinCa) -> None:
        self._ca = ca
        self._issuer = x509.load_der_x509_certificate(ca.intermediate)

    @property
    def root(self) -> bytes:
        """DER."""
        return self._ca.root

    @property
    def authorities_pem(self) -> bytes:
        """What a TLS server believes, and what a client does: root and intermediate."""
        found = (x509.load_der_x509_certificate(der) for der in (self._ca.root, self._ca.intermediate))
        return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in found)

    async def issue(self, order: Order) -> tuple[bytes, ...]:
        """Raises CaError."""
        return (await self._ca.issue(order, _keep_nothing)).chain

    def signed(self, certificate: x509.Certificate) -> bool:
        try:
            certificate.verify_directly_issued_by(self._issuer)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def host_of(self, certificate: x509.Certificate) -> str:
        """Returns the host's id where this authority signed it for a host, empty otherwise; whether it counts now is not said."""
        if not self.signed(certificate):
            return ""
        try:
            uris = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
                x509.UniformResourceIdentifier
            )
        except (ValueError, x509.ExtensionNotFound):
            return ""
        found = [uri.removeprefix(HOST_URI) for uri in uris if uri.startswith(HOST_URI)]
        return found[0] if len(found) == 1 else ""


async def _keep_nothing(text: str) -> None:
    return


class OwnCertificate:
    """The certificate that a manager shows to hosts and owners, where it has none of somebody else: files, renewed in service."""

    def __init__(self, identities: Identities, directory: Path, served: Sequence[str], clock: Callable[[], float]) -> None:
        """`served`: host names and addresses that it is for."""
        self._identities, self._served, self._clock = identities, tuple(served), clock
        self.file = directory / "server.pem"  #: key and certificates in one, so that they fit each other whenever it is read
        self.authorities = directory / "authorities.pem"

    async def ensure(self) -> None:
        """Makes it where it is missing, near its end, or for other names.  Raises CaError, OSError."""
        write_private(self.authorities, self._identities.authorities_pem)
        if self._is_good():
            return
        key = ec.generate_private_key(ec.SECP256R1())
        wanted = names.parse_all(self._served)
        csr = names.request(wanted).sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
        chain = await self._identities.issue(Order(hashlib.sha256(csr).hexdigest(), csr, "host", wanted))
        pem = b"".join(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in chain)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_private(self.file, private + pem)

    def _is_good(self) -> bool:
        try:
            found = x509.load_pem_x509_certificates(self.file.read_bytes())[0]
            told = names.told_by(found)
        except (OSError, ValueError, IndexError):
            return False
        begin, end = found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()
        same = set(told) == set(names.parse_all(self._served)) and self._identities.signed(found)
        return same and self._clock() < begin + (end - begin) * RENEW_AT

    async def keep(self) -> None:
        """Renews it for ever; a failure is tried again."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            await self.ensure()
