"""HostService: what this host is, first contact, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from hsmvisor.host import convert
from hsmvisor.host.backup import Backups
from hsmvisor.host.enrolment import Enrolments
from hsmvisor.host.foundation import Foundation
from hsmvisor.host.hsms import Hsm, Hsms
from hsmvisor.host.measures import Measure
from hsmvisor.host.metrics import Metrics
from hsmvisor.host.modules import Modules
from hsmvisor.host.purges import Purges
from hsmvisor.host.uplink.joining import Joining, invitation
from hsmvisor.serving.audit import Audit
from hsmvisor.serving.errors import Forbidden, Invalid, ServiceError
from hsmvisor.serving.gate import caller, origin
from hsmvisor.serving.requests import Requests, request
from hsmvisor.serving.text import clean
from hsmvisor.serving.timestamps import timestamp
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc

_PART = 256 * 1024  #: bytes of a backup in one message


@dataclass(frozen=True)
class About:
    """What stays the same while the service runs."""

    version: str
    started_at: float
    measures: tuple[Measure, ...]


class HostService(rpc.HostServiceServicer):
    def __init__(
        self,
        about: About,
        foundation: Foundation,
        modules: Modules,
        enrolments: Enrolments,
        requests: Requests,
        metrics: Metrics,
        audit: Audit,
        backups: Backups,
        hsms: Hsms,
        purges: Purges,
        joining: Joining,
    ) -> None:
        self._about, self._foundation, self._modules, self._enrolments = about, foundation, modules, enrolments
        self._requests, self._metrics, self._audit, self._backups = requests, metrics, audit, backups
        self._hsms, self._purges, self._joining = hsms, purges, joining

    async def GetHost(self, untrusted: pb.GetHostRequest, context: Any) -> pb.Host:
        known = caller()
        key_provider, measures = await self._foundation.helpers()
        return pb.Host(
            host_key=self._foundation.identity.public,
            version=self._about.version,
            started_at=timestamp(self._about.started_at),
            modules=len(self._modules.all()),
            measures=map(convert.measure, (*self._about.measures, *measures)),
            key_provider=key_provider,
            caller=known.name,
            roles=sorted(known.roles),
            hsms=map(self._hsm, self._hsms.all()),
            manager=convert.manager_link(self._joining.uplink.state),
        )

    def _hsm(self, hsm: Hsm) -> pb.Hsm:
        modules = sum(module.settings.cryptoprocessor == hsm.row.name for module in self._modules.all())
        return convert.hsm(hsm, modules, self._purges.left(hsm.row.name))

    async def Enrol(self, untrusted: pb.EnrolRequest, context: Any) -> pb.EnrolResponse:
        manager = clean(untrusted.manager)
        if not manager:
            raise Invalid("MANAGER", "manager names you in this host's audit log")
        nonce, proof = untrusted.nonce, untrusted.proof
        asked = request(untrusted.request_id, "Enrol", nonce, proof, manager.encode())
        ours = await self._requests.once(
            origin(), "host.enrol", asked, {"manager": manager}, lambda: self._enrolments.enrol(nonce, proof, manager, asked)
        )
        return pb.EnrolResponse(host_key=self._foundation.identity.public, proof=ours)

    async def CreateEnrolment(self, untrusted: pb.CreateEnrolmentRequest, context: Any) -> pb.CreateEnrolmentResponse:
        lifetime = untrusted.lifetime_seconds
        asked = request(untrusted.request_id, "CreateEnrolment", lifetime.to_bytes(8, "big"))
        answer = await self._requests.once(
            origin(), "host.create-enrolment", asked, {"lifetime": lifetime}, lambda: self._enrolments.create(lifetime, asked)
        )
        return convert.secret(self._enrolments.secret(answer))

    async def JoinManager(self, untrusted: pb.JoinManagerRequest, context: Any) -> pb.ManagerLink:
        asked = invitation(
            untrusted.token,
            untrusted.name,
            tuple(untrusted.addresses),
            untrusted.authorities,
            untrusted.certificate,
            untrusted.key,
            untrusted.replace,
        )
        made = request(untrusted.request_id, "JoinManager", asked.digest.encode(), bytes([asked.replace]))
        fields = {"name": asked.name, "managers": [clean(address) for address in asked.addresses], "replace": asked.replace}

        async def work() -> bytes:
            _demand_local("to join a manager")
            return await self._joining.join(asked, made)

        await self._requests.once(origin(), "host.join", made, fields, work)
        link = convert.manager_link(self._joining.uplink.state)
        return link or pb.ManagerLink()  # a repeated call, of a host that has left it meanwhile

    async def LeaveManager(self, untrusted: pb.LeaveManagerRequest, context: Any) -> pb.LeaveManagerResponse:
        made = request(untrusted.request_id, "LeaveManager")

        async def work() -> bytes:
            _demand_local("to leave a manager")
            return await self._joining.leave(made)

        answer = await self._requests.once(origin(), "host.leave", made, {}, work)
        return pb.LeaveManagerResponse(was_joined=bool(answer))

    async def GetMetrics(self, untrusted: pb.GetMetricsRequest, context: Any) -> pb.Metrics:
        return pb.Metrics(text=await self._metrics.text())

    async def Backup(self, untrusted: pb.BackupRequest, context: Any) -> AsyncIterator[pb.BackupPart]:
        who = {"who": origin().who, "why": origin().why}
        self._audit.demand_working()
        try:
            made = await self._backups.make()
        except ServiceError as error:
            await self._audit.record("host.backup", **who, result="failed", reason=error.reason, detail=error.detail)
            raise
        with made.file:
            backup_id = made.manifest.backup_id.hex()
            await self._audit.record("host.backup", **who, backup=backup_id, modules=len(made.manifest.modules), result="ok")
            while data := await asyncio.to_thread(made.file.read, _PART):
                yield pb.BackupPart(data=data, total=made.size)


def _demand_local(what: str) -> None:
    if not caller().local:
        raise Forbidden("LOCAL", f"{what} is for an operator on the host itself", "use the host's own control socket")
