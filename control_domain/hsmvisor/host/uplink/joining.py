"""First contact with a management plane, and leaving it.

The token that an operator brings says where managers are, whom to believe as one, and a one-time secret.  Both ends prove that they
know it: a manager that does not is not obeyed.  Where the operator brings a certificate instead, TLS alone is the proof.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import socket
import time
from dataclasses import dataclass, field

import grpc
from hsmvisor.host import limits
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.state import State
from hsmvisor.host.uplink.membership import JOINING, Attempt, BadMembership, Membership, Memory, der, port_of
from hsmvisor.host.uplink.uplink import Uplink
from hsmvisor.host.uplink.wire import LinkFault, ManagerChannel
from hsmvisor.serving.errors import (
    Conflict,
    Exists,
    Forbidden,
    Invalid,
    ServiceError,
    StorageUnavailable,
    Unavailable,
    WrongState,
)
from hsmvisor.serving.requests import Request, digest
from hsmvisor.serving.text import clean
from hsmvisor_rpc.sealed.canonical import MalformedRecord
from hsmvisor_rpc.sealed.commands import fingerprint
from hsmvisor_rpc.sealed.fleet import JoinStatement, JoinToken, join_proof

_REFUSALS: dict[grpc.StatusCode, type[ServiceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: Invalid,
    grpc.StatusCode.ALREADY_EXISTS: Exists,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: WrongState,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Unavailable,
}


@dataclass(frozen=True)
class Invitation:
    """What an operator brings.  Its repr shows no secret."""

    name: str
    addresses: tuple[str, ...]
    authorities: tuple[bytes, ...]  #: DER
    secret: bytes = field(repr=False)
    certificate: bytes = field(repr=False)  #: PEM with its chain
    key: bytes = field(repr=False)  #: PEM
    replace: bool = False

    @property
    def token(self) -> str:
        """What the secret was, for the one who knows it; empty without."""
        return hashlib.sha256(b"hsmvisor token\0" + self.secret).hexdigest() if self.secret else ""

    @property
    def digest(self) -> str:
        told = (self.name.encode(), self.secret, self.certificate, self.key, *map(str.encode, self.addresses), *self.authorities)
        return digest(*told).hex()


def invitation(
    untrusted_token: str,
    untrusted_name: str,
    untrusted_addresses: tuple[str, ...],
    untrusted_authorities: bytes,
    certificate: bytes,
    key: bytes,
    replace: bool,
) -> Invitation:
    """Raises Invalid; what it says holds nothing of token or key."""
    name = untrusted_name or socket.gethostname().partition(".")[0].lower()
    if not limits.NAME.fullmatch(name):
        raise Invalid(
            "NAME", f"{clean(name)!r} is no name for a host: 1-64 of a-z 0-9 . _ -, first a letter or digit", "give --name"
        )
    addresses, secret = untrusted_addresses, b""
    authorities: tuple[bytes, ...] = ()
    try:
        if untrusted_token:
            token = JoinToken.parse(untrusted_token)
            addresses, authorities, secret = (*addresses, *token.addresses), token.authorities, token.secret
        if untrusted_authorities:
            authorities = (*authorities, *der(untrusted_authorities))
        for address in addresses:
            port_of(address)
        if not addresses or not authorities or max(len(addresses), len(authorities)) > limits.MAX_MANAGERS:
            raise BadMembership(f"1-{limits.MAX_MANAGERS} addresses of managers and as many authorities are needed")
        if bool(certificate) != bool(key):
            raise BadMembership("a certificate and its key come together")
        if certificate:
            der(certificate)
            secret = b""
        elif not secret:
            raise BadMembership("it has no one-time secret, and there is no certificate in its place")
    except (MalformedRecord, ValueError) as error:
        raise Invalid("TOKEN", f"this host cannot join with that: {error}", "hsmvisor fleet host token makes a new one") from None
    return Invitation(name, addresses, authorities, secret, certificate, key, replace)


class Joining:
    """`ports`: TCP ports that this process may connect to; None: all."""

    def __init__(
        self, memory: Memory, identity: HostIdentity, uplink: Uplink, state: State, version: str, ports: frozenset[int] | None
    ) -> None:
        self._memory, self._identity, self._uplink, self._state = memory, identity, uplink, state
        self._version, self._ports = version, ports
        self._alone = asyncio.Lock()

    @property
    def uplink(self) -> Uplink:
        return self._uplink

    async def join(self, asked: Invitation, request: Request) -> bytes:
        """Raises ServiceError; then the host is where it was."""
        async with self._alone:
            await self._join(asked)
            await self._state.record(request, b"")
        return b""

    async def _join(self, asked: Invitation) -> None:
        there = self._uplink.membership
        if there is not None and asked.token and there.token == asked.token and there.name == asked.name:
            return  # with this very token
        if there is not None and not asked.replace and not set(asked.authorities) & set(there.authorities):
            raise _other(there)
        self._demand_ports(asked)
        try:
            attempt = self._memory.attempt(JOINING, asked.digest, self._identity.host_id.hex())
            membership = await self._ask(asked, attempt)
            if there is not None and there.root != membership.root and not asked.replace:
                raise _other(there)
            await self._uplink.adopt(membership)
        except OSError as error:
            hint = "look at the state directory's disk and permissions, then try again"
            raise StorageUnavailable("STORAGE", f"{self._memory.directory}: {error.strerror}", hint) from None
        with contextlib.suppress(OSError):
            self._memory.end(JOINING)

    async def leave(self, request: Request) -> bytes:
        """Returns b"1" when there was one to leave.  Raises ServiceError."""
        async with self._alone:
            try:
                was = await self._uplink.leave()
            except OSError as error:
                raise StorageUnavailable("STORAGE", f"{self._memory.directory}: {error.strerror}") from None
            answer = b"1" if was else b""
            await self._state.record(request, answer)
        return answer

    def _demand_ports(self, asked: Invitation) -> None:
        """The service gave up to connect elsewhere (measures.py), before it knew of this manager."""
        if self._ports is None:
            return
        if missing := sorted({port_of(address) for address in asked.addresses} - self._ports):
            told = ", ".join(map(str, missing))
            hint = (
                f"put it into manager.ports of the host's configuration ([manager] ports = [{told}]), and start the service again"
            )
            raise WrongState("MANAGER_PORT", f"this service may not connect to port {told}", hint)

    # ---- one manager after the other ------------------------------------------------------------------------------

    async def _ask(self, asked: Invitation, attempt: Attempt) -> Membership:
        statement = JoinStatement(asked.name, self._identity.public, attempt.csr, attempt.nonce)
        fault: LinkFault | None = None
        for address in asked.addresses:
            channel = ManagerChannel(address, asked.authorities, asked.certificate, asked.key)
            try:
                return await self._ask_one(channel, asked, attempt, statement)
            except LinkFault as error:
                fault = error
                if not error.away:
                    break
            finally:
                await channel.close()
        assert fault is not None
        if fault.away:
            hint = "is it running, and may this host reach it? does the token fit its certificate?"
            raise Unavailable("MANAGER", f"the manager at {address} cannot be reached: {fault.detail}", hint) from None
        kind = _REFUSALS.get(fault.code, Forbidden)
        raise kind(fault.reason or "MANAGER", f"the manager at {address} refuses: {fault.detail}", fault.hint) from None

    async def _ask_one(self, channel: ManagerChannel, asked: Invitation, attempt: Attempt, statement: JoinStatement) -> Membership:
        """Raises LinkFault, and Forbidden where whoever answered is not who made the token."""
        proof = join_proof(asked.secret, "host", statement) if asked.secret else b""
        signature = self._identity.sign(statement.encode())
        answer = await channel.join(attempt.request_id, statement, proof, signature, self._version)
        if asked.secret and not hmac.compare_digest(join_proof(asked.secret, "manager", statement, answer.root), answer.proof):
            raise Forbidden(
                "MANAGER_PROOF",
                "whoever answered does not know the token's secret: it is not obeyed, and nothing was changed",
                "ask who runs the manager for a new token, and compare the addresses in it",
            )
        host_id = self._identity.host_id.hex()
        try:
            if answer.host != host_id:
                raise BadMembership("it names another host")
            return Membership(
                host_id,
                asked.name,
                answer.root,
                tuple(answer.addresses) or asked.addresses,
                tuple(answer.authorities) or asked.authorities,
                tuple(answer.certificates),
                attempt.key,
                time.time(),
                asked.token,
            ).check()
        except BadMembership as error:
            raise Forbidden("MANAGER_ANSWER", f"the manager's answer cannot be used: {error}") from None


def _other(there: Membership) -> WrongState:
    where = f"{there.addresses[0]}, root {fingerprint(there.root).hex()[:16]}"
    hint = "--replace leaves it for the other one; modules that are there obey the root that they obey"
    return WrongState("MANAGER", f"this host has joined another management plane ({where})", hint)
