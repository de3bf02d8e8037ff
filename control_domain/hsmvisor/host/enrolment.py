"""First contact: one-time secrets, and the proof of both ends that they know one (hsmvisor_rpc.sealed.identity)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import time
from dataclasses import dataclass

from hsmvisor.host import limits
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.state import State
from hsmvisor.serving.errors import Forbidden, Invalid
from hsmvisor.serving.requests import Request
from hsmvisor_rpc.sealed.identity import enrol_proof

_NONCE = 32
_ID = 16


@dataclass(frozen=True)
class OneTimeSecret:
    """A secret for people to carry; its repr shows nothing."""

    text: str
    expires_at: int

    def __repr__(self) -> str:
        return "OneTimeSecret()"


class Enrolments:
    def __init__(self, state: State, identity: HostIdentity) -> None:
        self._state, self._identity = state, identity

    async def create(self, untrusted_lifetime: int, request: Request) -> bytes:
        """Returns what `secret` makes the one-time secret of; lifetime in seconds, 0 = default.  Raises Invalid, Exhausted."""
        lifetime = untrusted_lifetime or limits.DEFAULT_ENROLMENT_LIFETIME
        if lifetime > limits.MAX_ENROLMENT_LIFETIME:
            raise Invalid("LIFETIME", f"a one-time secret lives at most {limits.MAX_ENROLMENT_LIFETIME} s")
        id, expires_at = os.urandom(_ID), int(time.time()) + lifetime
        result = id + expires_at.to_bytes(8, "big")
        secret_hash = hashlib.sha256(self._text(id).encode()).digest()
        await self._state.add_enrolment(id, secret_hash, expires_at, request, result)
        return result

    def secret(self, result: bytes) -> OneTimeSecret:
        """Makes the secret (again) of what `create` returned."""
        return OneTimeSecret(self._text(result[:_ID]), int.from_bytes(result[_ID:], "big"))

    async def enrol(self, nonce: bytes, proof: bytes, manager: str, request: Request) -> bytes:
        """Returns our proof and uses the secret up; raises Invalid, Forbidden."""
        if len(nonce) != _NONCE:
            raise Invalid("NONCE", f"the nonce has {_NONCE} bytes")
        now = int(time.time())
        for row in await self._state.open_enrolments(now):
            secret = self._text(row.id).encode()
            if not hmac.compare_digest(enrol_proof(secret, "manager", nonce), proof):
                continue
            ours = enrol_proof(secret, "host", nonce, self._identity.public)
            if not await self._state.use_enrolment(row.id, manager, request, ours):
                break
            return ours
        await self._state.count_wrong_proof(now)
        raise Forbidden(
            "ENROLMENT", "no open one-time secret fits this proof", "it is used once, for a limited time: ask for a new one"
        )

    def _text(self, id: bytes) -> str:
        text = base64.b32encode(self._identity.enrolment_secret(id)).decode().lower()
        return "-".join(text[i : i + 8] for i in range(0, len(text), 8))
