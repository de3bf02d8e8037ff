"""Who is calling, and what it may be: peer credentials, a client certificate, or a signed request."""

from __future__ import annotations

import os

from cryptography import x509
from hsmvisor.host.config import Config
from hsmvisor.host.roles import Role
from hsmvisor.serving import peers, relay
from hsmvisor.serving.access import Call, Caller
from hsmvisor.serving.errors import Unauthenticated
from hsmvisor.serving.relay import Credentials
from hsmvisor.serving.signatures import Signatures
from hsmvisor_rpc.v1.request_signing import SIGNATURE

_ALL = frozenset(Role)


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
        groups = peers.groups_of(credentials)
        for allow in self._config.control.allow:
            uid, gid = allow.uid, allow.gid
            if allow.user:
                uid = peers.uid_of(allow.user)
            if allow.group:
                gid = peers.gid_of(allow.group)
            if uid == credentials.uid or gid in groups:
                roles.update(allow.roles)
        return Caller(name, frozenset(roles), local=True)

    # ---- certificates -------------------------------------------------------------------------------------------

    def _certified(self, pem: bytes) -> Caller:
        certificate = x509.load_pem_x509_certificate(pem)
        subject, names = certificate.subject.rfc4514_string(), peers.alternative_names(certificate)
        roles: set[Role] = set()
        for client in self._config.tls.clients:
            if (client.subject and client.subject == subject) or (client.san and client.san in names):
                roles.update(client.roles)
        return Caller(f"cert:{subject or ','.join(sorted(names))}", frozenset(roles))
