"""What a caller's connection proves of it: a local user and its groups, the names in a certificate; and which rows of a
configuration mean it."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass

from cryptography import x509
from hsmvisor.serving import relay
from hsmvisor.serving.access import Call
from hsmvisor.serving.config import CertificateRow, LocalRow
from hsmvisor.serving.errors import Unauthenticated
from hsmvisor.serving.relay import Credentials


def proof_of(call: Call) -> Credentials | bytes | None:
    """Returns a local caller's credentials, a certificate in PEM, or None: nothing is proved.  Raises Unauthenticated."""
    local = relay.parse_peer(call.peer)
    if local is not None:
        prefix, credentials = local
        return credentials if prefix == relay.LOCAL else None
    if call.peer.startswith("unix"):
        raise Unauthenticated("PEER", "this socket is not for callers; use the control socket")
    shown = call.auth.get("x509_pem_cert")
    return bytes(shown[0]) if shown else None


# ---- local callers ------------------------------------------------------------------------------------------------------


def is_meant(row: LocalRow, credentials: Credentials, groups: set[int]) -> bool:
    """`groups`: the caller's."""
    uid = _uid_of(row.user) if row.user else row.uid
    gid = _gid_of(row.group) if row.group else row.gid
    return uid == credentials.uid or gid in groups


def groups_of(credentials: Credentials) -> set[int]:
    """Returns the user's groups; SO_PEERCRED tells only the effective one."""
    try:
        name = pwd.getpwuid(credentials.uid).pw_name
    except KeyError:
        return {credentials.gid}
    return {credentials.gid, *os.getgrouplist(name, credentials.gid)}


def _uid_of(user: str) -> int:
    """Returns -1 for a user that there is not, which no caller has."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return -1


def _gid_of(group: str) -> int:
    """Returns -1 for a group that there is not."""
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return -1


# ---- certificates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A client certificate and its names."""

    certificate: x509.Certificate
    subject: str  #: RFC 4514
    alternatives: frozenset[str]  #: DNS names, URIs and mail addresses

    def __str__(self) -> str:
        """As it stands in the audit log."""
        return f"cert:{self.subject or ','.join(sorted(self.alternatives))}"

    def fits(self, row: CertificateRow) -> bool:
        return (bool(row.subject) and row.subject == self.subject) or (bool(row.san) and row.san in self.alternatives)


def shown(pem: bytes) -> Shown:
    """Raises Unauthenticated."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        return Shown(certificate, certificate.subject.rfc4514_string(), _alternatives(certificate))
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, x509.InvalidVersion):
        raise Unauthenticated("CERTIFICATE", "the client certificate cannot be read") from None


def _alternatives(certificate: x509.Certificate) -> frozenset[str]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    kinds = (x509.DNSName, x509.UniformResourceIdentifier, x509.RFC822Name)
    return frozenset(name for kind in kinds for name in extension.get_values_for_type(kind))
