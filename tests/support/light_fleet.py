"""Many light hosts over the real API: each joins with a token, has its own certificate, and exchanges as real ones do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hsmvisor.manager.inventory.reports import Report
from hsmvisor_rpc.sealed.fleet import HOST_URI, JoinStatement, JoinToken, join_proof
from hsmvisor_rpc.v1 import manager_pb2 as pb
from hsmvisor_rpc.v1 import manager_pb2_grpc as rpc
from support.host_process import new_id
from support.light_host import LightGuest, LightHost, NewRecipient

WAIT = 20  #: seconds of an exchange in which nothing happens
TOLD_AT_ONCE = 400  #: guests in one exchange, of which there is one after the other at the beginning


@dataclass
class Joined:
    """What a host has got."""

    root: bytes
    chain: bytes  #: PEM
    key: bytes
    authorities: bytes
    address: str


async def join(name: str, host: LightHost, token: str) -> Joined:
    """The first contact of a real host."""
    known = JoinToken.parse(token)
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(HOST_URI + host.id.hex())])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, False)
    csr = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    statement = JoinStatement(name, host.public, csr, os.urandom(32))
    credentials = grpc.ssl_channel_credentials(root_certificates=_pem(known.authorities))
    async with grpc.aio.secure_channel(known.addresses[0], credentials) as channel:
        request = pb.JoinRequest(
            request_id=new_id(),
            name=name,
            host_key=host.public,
            csr=csr,
            nonce=statement.nonce,
            proof=join_proof(known.secret, "host", statement),
            signature=host.key.sign(statement.encode()),
            version="light",
        )
        answer = await rpc.HostLinkStub(channel).Join(request, timeout=60)
    assert answer.proof == join_proof(known.secret, "manager", statement, answer.root)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Joined(answer.root, _pem(answer.certificates), private, _pem(answer.authorities), answer.addresses[0])


def _pem(ders: Sequence[bytes]) -> bytes:
    return b"".join(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in ders)


class Linked:
    """One host's side of the exchanges."""

    def __init__(self, host: LightHost, joined: Joined, seen: Callable[[], None]) -> None:
        """`seen`: called after each command that was carried out."""
        self.host, self._seen = host, seen
        credentials = grpc.ssl_channel_credentials(joined.authorities, joined.key, joined.chain)
        self._channel = grpc.aio.secure_channel(joined.address, credentials)
        self._stub = rpc.HostLinkStub(self._channel)
        self.exchanges, self.failures = 0, 0
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """A guest came, went, or is another one."""
        self._changed.set()

    async def run(self) -> None:
        while True:
            try:
                await self._exchange()
            except grpc.aio.AioRpcError as error:
                self.failures += 1
                if error.code() is grpc.StatusCode.CANCELLED:
                    raise
                await asyncio.sleep(1)

    async def _exchange(self) -> None:
        host = self.host
        everything = host.number == 0
        now = {name: host.report(guest) for name, guest in host.guests.items() if everything or name not in host.told}
        results, told = host.results, list(now.values())
        host.number += 1
        request = pb.ExchangeRequest(
            session=host.session,
            number=host.number,
            all=everything,
            guests=[_guest(report) for report in told],
            results=[_result(r) for r in results],
            wait_seconds=WAIT,
            version="light",
        )
        self._changed.clear()
        call = self._stub.Exchange(request, timeout=WAIT + 60)
        change = asyncio.ensure_future(self._changed.wait())
        done, _ = await asyncio.wait({asyncio.ensure_future(_answer(call)), change}, return_when=asyncio.FIRST_COMPLETED)
        if change in done and not call.done():
            call.cancel()  # the next one tells
            return
        change.cancel()
        answer = await call
        self.exchanges += 1
        if answer.tell_all:
            host.number = 0
            return
        host.results = host.results[len(results) :]
        host.told |= now
        for command in answer.commands:
            host.results.append(host.carry_out(command.id, command.module, command.signed_command))
            self._seen()
            await asyncio.sleep(0)

    async def close(self) -> None:
        await self._channel.close()


async def _answer(call: grpc.aio.UnaryUnaryCall) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        await call


def _guest(report: Report) -> pb.GuestReport:
    return pb.GuestReport(
        name=report.name,
        kind=report.kind,
        owner=report.owner,
        attributes=report.attributes,
        module=report.module,
        signed_identity=report.signed_identity,
        sequence=report.sequence,
    )


def _result(result: object) -> pb.CommandResult:
    from hsmvisor.manager.engine.results import Result

    assert isinstance(result, Result)
    states = [pb.GenerationReport(number=n, state=state) for n, state in (result.states or {}).items()]
    return pb.CommandResult(
        id=result.id,
        done=result.done,
        reason=result.reason,
        detail=result.detail,
        public_key=result.public_key,
        csr=result.csr,
        sequence=result.sequence,
        material=pb.MaterialReport(generations=states),
    )


@dataclass
class LightFleet:
    """`token`: makes a join token for a name."""

    token: Callable[[str], str]
    new_recipient: NewRecipient
    links: list[Linked] = field(default_factory=list)
    commands: int = 0

    def __post_init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    async def grow(self, hosts: int, guests: int, first: int = 0, **attributes: str) -> None:
        for number in range(first, first + hosts):
            await self.add(f"host-{number}", [f"vm-{number}-{n}" for n in range(guests)], **attributes)

    async def add(self, name: str, guests: Sequence[str], **attributes: str) -> Linked:
        host = LightHost(name, b"", time.time, self.new_recipient)
        joined = await join(name, host, await asyncio.to_thread(self.token, name))
        host.root = joined.root
        for guest in guests:
            host.add(guest, **attributes)
        link = Linked(host, joined, self._count)
        self.links.append(link)
        self._tasks.append(asyncio.get_running_loop().create_task(link.run()))
        return link

    def _count(self) -> None:
        self.commands += 1

    @property
    def guests(self) -> list[LightGuest]:
        return [guest for link in self.links for guest in link.host.guests.values()]

    def holding(self, material: str, least: int) -> int:
        """Returns how many modules have a current generation of this number or a later one."""
        found = (guest.module.current(material) for guest in self.guests)
        return sum(generation is not None and generation.number >= least for generation in found)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self.links:
            await link.close()
