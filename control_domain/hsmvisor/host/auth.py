"""Who is calling, and what it may be: peer credentials, a client certificate, or a signed request."""

from __future__ import annotations

import os

from hsmvisor.host.config import Config
from hsmvisor.host.roles import Role
from hsmvisor.serving import peers
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
        proof = peers.proof_of(call)
        if isinstance(proof, Credentials):
            return self._local(proof)
        if proof is not None:
            return self._certified(peers.shown(proof))
        return Caller(f"unknown:{call.peer}", frozenset(), known=False)

    # ---- local callers ------------------------------------------------------------------------------------------

    def _local(self, credentials: Credentials) -> Caller:
        name = f"uid:{credentials.uid} pid:{credentials.pid}"
        if credentials.uid in (0, os.geteuid()):
            return Caller(name, _ALL, local=True)
        roles: set[Role] = set()
        groups = peers.groups_of(credentials)
        for allow in self._config.control.allow:
            if peers.is_meant(allow, credentials, groups):
                roles.update(allow.roles)
        return Caller(name, frozenset(roles), local=True)

    # ---- certificates -------------------------------------------------------------------------------------------

    def _certified(self, shown: peers.Shown) -> Caller:
        roles = {role for client in self._config.tls.clients if shown.fits(client) for role in client.roles}
        return Caller(str(shown), frozenset(roles))
