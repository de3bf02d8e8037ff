"""Many light hosts over the real API: each joins with a token, has its own certificate, and exchanges as real ones do."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hsmvisor.host import limits
from hsmvisor.manager.engine.results import Result
from hsmvisor.manager.inventory.reports import Report
from hsmvisor_rpc.sealed.fleet import HOST_URI, JoinStatement, JoinToken, join_proof
from hsmvisor_rpc.v1 import manager_pb2 as pb
from hsmvisor_rpc.v1 import manager_pb2_grpc as rpc
from support.host_process import new_id
from support.light_host import LightGuest, LightHost, NewRecipient

WAIT = 20  #: seconds of an exchange in which nothing happens
GATHER = 0.005  #: seconds in which what happens at the same time becomes one exchange, as in hsmvisor.host.uplink
REST = 0.02  #: seconds after an exchange that was answered at once, with nothing


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
    """One host's side of the exchanges, as a real one's: one tells nothing and waits for commands, another one tells what is new.

    After a command the manager is told its result, and of the guest again.
    """

    def __init__(self, host: LightHost, joined: Joined, seen: Callable[[], None]) -> None:
        """`seen`: called after each command that was carried out."""
        self.host, self._seen = host, seen
        credentials = grpc.ssl_channel_credentials(joined.authorities, joined.key, joined.chain)
        self._channel = grpc.aio.secure_channel(joined.address, credentials)
        self._stub = rpc.HostLinkStub(self._channel)
        self.exchanges, self.failures, self.refused = 0, 0, 0  #: exchanges that failed; commands that a module refused
        self._untold: set[str] = set()  #: guests
        self._given: asyncio.Queue[pb.HostCommand] = asyncio.Queue()
        self._news = asyncio.Event()
        self._all = True

    def changed(self) -> None:
        """A guest came, or is another one."""
        self._untold.update(self.host.guests)
        self._news.set()

    async def run(self) -> None:
        while True:
            try:
                await self._speak()
            except grpc.aio.AioRpcError as error:
                self.failures += 1
                if error.code() is grpc.StatusCode.CANCELLED:
                    raise
                await asyncio.sleep(1)

    async def _speak(self) -> None:
        """Until an exchange fails."""
        await self._tell()
        work = [asyncio.create_task(run()) for run in (self._listen, self._carry_out, self._keep_telling)]
        try:
            await asyncio.gather(*work)
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _listen(self) -> None:
        while True:
            began = time.monotonic()
            answer = await self._exchange(wait_seconds=WAIT)
            if not answer.commands and time.monotonic() - began < 1:
                await asyncio.sleep(REST)

    async def _carry_out(self) -> None:
        while True:
            command = await self._given.get()
            if command.attest:
                result = self.host.attest(command.id, command.module, command.attest)
            else:
                result = self.host.carry_out(command.id, command.module, command.signed_command)
            self.refused += not result.done
            self.host.results.append(result)
            self._untold.update({command.module} & set(self.host.guests))  # a light guest and its module have one name
            self._news.set()
            self._seen()
            await asyncio.sleep(0)

    async def _keep_telling(self) -> None:
        while True:
            await self._news.wait()
            await asyncio.sleep(GATHER)
            await self._tell()

    async def _tell(self) -> None:
        host, everything = self.host, self._all
        self._news.clear()
        names = sorted(host.guests if everything else self._untold & host.guests.keys())
        names = names if everything else names[: limits.MAX_REPORTED]
        told = {name: host.report(host.guests[name]) for name in names}
        results = host.results[: limits.MAX_RESULTS]
        self._untold.difference_update(names)
        self._all = False
        try:
            await self._exchange(all=everything, guests=map(_guest, told.values()), results=map(_result, results))
        except grpc.aio.AioRpcError:
            self._all = self._all or everything
            self._untold.update(names)
            raise
        host.told |= told
        host.results = host.results[len(results) :]
        if self._all or self._untold or host.results:
            self._news.set()

    async def _exchange(self, **told: Any) -> pb.ExchangeResponse:
        self.host.number += 1
        request = pb.ExchangeRequest(session=self.host.session, number=self.host.number, version="light", **told)
        answer: pb.ExchangeResponse = await self._stub.Exchange(request, timeout=WAIT + 60)
        self.exchanges += 1
        if answer.tell_all:
            self._all = True
            self._news.set()
        for command in answer.commands:
            self._given.put_nowait(command)
        return answer

    async def close(self) -> None:
        await self._channel.close()


def _guest(report: Report) -> pb.GuestReport:
    return pb.GuestReport(
        name=report.name,
        kind=report.kind,
        owner=report.owner,
        attributes=report.attributes,
        module=report.module,
        signed_identity=report.signed_identity,
        sequence=report.sequence,
        materials=[_material(name, {n: told.state for n, told in there.items()}) for name, there in report.materials.items()],
    )


def _material(name: str, states: Mapping[int, str]) -> pb.MaterialReport:
    return pb.MaterialReport(name=name, generations=[pb.GenerationReport(number=n, state=s) for n, s in states.items()])


def _result(result: Result) -> pb.CommandResult:
    return pb.CommandResult(
        id=result.id,
        done=result.done,
        reason=result.reason,
        detail=result.detail,
        public_key=result.public_key,
        csr=result.csr,
        sequence=result.sequence,
        material=None if result.states is None else _material("", result.states),
        attestation=result.attestation,
        tpm_certificates=result.tpm_certificates,
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
