"""Who is calling, and what it may be: peer credentials, a client certificate, or a signed request."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cryptography import x509
from hsmvisor.host import relay
from hsmvisor.host.config import Config
from hsmvisor.host.errors import Unauthenticated
from hsmvisor.host.relay import Credentials
from hsmvisor.host.roles import Role
from hsmvisor.host.signatures import Signatures
from hsmvisor_rpc.v1.request_signing import SIGNATURE

_ALL = frozenset(Role)


@dataclass(frozen=True)
class Caller:
    """Who calls, for the audit log, and what it may be.  `known`: its identity is proved; `local`: by the kernel of this host."""

    name: str
    roles: frozenset[Role]
    known: bool = True
    local: bool = False


@dataclass(frozen=True)
class Call:
    """What the transport and gRPC tell of one call.  `body` is None where requests are streamed."""

    method: str
    body: bytes | None
    metadata: Mapping[str, str | bytes]
    peer: str
    auth: Mapping[str, Sequence[bytes]]


class Authenticator:
    def __init__(self, config: Config, signatures: Signatures) -> None:
        self._config, self._signatures = config, signatures

    async def identify(self, call: Call) -> Caller:
        """Returns the caller; one whose identity is not proved has no roles.  Raises Unauthenticated for a wrong proof."""
        if SIGNATURE in call.metadata:
            if call.body is None:
                raise Unauthenticated(
                    "SIGNATURE", "a method that streams its requests cannot be signed", "use a client certificate"
                )
            key = await self._signatures.verify(call.method, call.body, call.metadata)
            return Caller(f"key:{key.name}", key.roles)
        local = relay.parse_peer(call.peer)
        if local is not None:
            prefix, credentials = local
            if prefix == relay.LOCAL:
                return self._local(credentials)
        elif call.peer.startswith("unix"):
            raise Unauthenticated("PEER", "this socket is not for callers; use the control socket")
        elif certificate := call.auth.get("x509_pem_cert"):
            return self._certified(certificate[0])
        return Caller(f"unknown:{call.peer}", frozenset(), known=False)

    # ---- local callers ------------------------------------------------------------------------------------------

    def _local(self, credentials: Credentials) -> Caller:
        name = f"uid:{credentials.uid} pid:{credentials.pid}"
        if credentials.uid in (0, os.geteuid()):
            return Caller(name, _ALL, local=True)
        roles: set[Role] = set()
        groups = _groups(credentials)
        for allow in self._config.control.allow:
            uid, gid = allow.uid, allow.gid
            if allow.user:
                uid = _uid(allow.user)
            if allow.group:
                gid = _gid(allow.group)
            if uid == credentials.uid or gid in groups:
                roles.update(allow.roles)
        return Caller(name, frozenset(roles), local=True)

    # ---- certificates -------------------------------------------------------------------------------------------

    def _certified(self, pem: bytes) -> Caller:
        certificate = x509.load_pem_x509_certificate(pem)
        subject, names = certificate.subject.rfc4514_string(), _alternative_names(certificate)
        roles: set[Role] = set()
        for client in self._config.tls.clients:
            if (client.subject and client.subject == subject) or (client.san and client.san in names):
                roles.update(client.roles)
        return Caller(f"cert:{subject or ','.join(sorted(names))}", frozenset(roles))


def _groups(credentials: Credentials) -> set[int]:
    """Returns the user's groups; SO_PEERCRED tells only the effective one."""
    try:
        name = pwd.getpwuid(credentials.uid).pw_name
    except KeyError:
        return {credentials.gid}
    return {credentials.gid, *os.getgrouplist(name, credentials.gid)}


def _uid(user: str) -> int:
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return -1


def _gid(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return -1


def _alternative_names(certificate: x509.Certificate) -> set[str]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    names: set[str] = set()
    for kind in (x509.DNSName, x509.UniformResourceIdentifier, x509.RFC822Name):
        names.update(extension.get_values_for_type(kind))
    return names
