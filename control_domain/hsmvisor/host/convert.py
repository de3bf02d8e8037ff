"""Where protobuf messages and the host's own types meet; nowhere else."""

from __future__ import annotations

import dataclasses

from hsmvisor.host import limits, reports
from hsmvisor.host.cryptoprocessor import Cryptoprocessor
from hsmvisor.host.enrolment import OneTimeSecret
from hsmvisor.host.hsms import Hsm
from hsmvisor.host.measures import Measure
from hsmvisor.host.module import Module, Upgraded
from hsmvisor.host.modules import Change
from hsmvisor.host.qemu_survey import Finding
from hsmvisor.host.settings import EVERYTHING, Card, Policy, Settings, Tpm
from hsmvisor.host.uplink.uplink import LinkState
from hsmvisor.serving.events import EventRow
from hsmvisor.serving.text import clean
from hsmvisor.serving.timestamps import timestamp
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.commands import Action, fingerprint
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb


def settings(message: pb.ModuleSettings) -> Settings:
    """Raises Invalid."""
    p = message.policy
    lists = tuple(p.mechanisms), tuple(p.forbidden)
    policy = Policy(lists[0], p.min_rsa_bits, p.min_ec_bits, p.rate, p.burst, lists[1], p.min_pin, p.legacy)
    return Settings(
        message.log_signatures,
        message.max_sessions,
        message.max_connections,
        policy,
        message.guest_token,
        message.cryptoprocessor,
        Card(tuple(sorted(message.card.slots.items())), message.card.yubikey, message.card.usb_id, message.card.replug),
        Tpm(message.tpm.enabled, tuple(sorted(message.tpm.keys.items())), message.tpm.no_firmware),
    ).check()


def settings_message(settings: Settings) -> pb.ModuleSettings:
    policy = None if settings.policy == EVERYTHING else pb.Policy(**dataclasses.asdict(settings.policy))
    return pb.ModuleSettings(
        log_signatures=settings.log_signatures,
        max_sessions=settings.max_sessions,
        max_connections=settings.max_connections,
        policy=policy,
        guest_token=settings.guest_token,
        cryptoprocessor=settings.cryptoprocessor,
        card=_card(settings.card),
        tpm=_tpm(settings.tpm),
    )


def _card(card: Card) -> pb.Card | None:
    if card == Card():
        return None
    return pb.Card(slots=dict(card.slots), yubikey=card.yubikey, usb_id=card.usb_id, replug=card.replug)


def _tpm(tpm: Tpm) -> pb.Tpm | None:
    return None if tpm == Tpm() else pb.Tpm(enabled=tpm.enabled, keys=dict(tpm.keys), no_firmware=tpm.no_firmware)


def measure(row: Measure) -> pb.Measure:
    return pb.Measure(name=row.name, applied=row.applied, detail=row.detail)


def module(module: Module, status: reports.Status | None) -> pb.Module:
    """`status`: what its worker says, None while it says nothing."""
    told = status or reports.Status()
    return pb.Module(
        name=module.name,
        module_id=module.module_id,
        state=module.state,
        address=module.address,
        created_at=timestamp(module.row.created_at),
        pid=module.pid,
        restarts=module.restarts,
        root=fingerprint(module.root),
        settings=settings_message(module.settings),
        pin_set=told.pin_set,
        token_present=told.token_present,
        materials=len(told.materials),
        connections=min(told.connections, 2**32 - 1),
        sessions=min(told.sessions, 2**32 - 1),
        measures=map(measure, (*(told.measures or module.measures), *module.cryptoprocessor.measures, *module.faces.tpm.measures)),
        failure=module.failure,
        device=_device(module),
        hsm_helper=_hsm_helper(module.cryptoprocessor),
        tpm=_tpm_state(module),
    )


def _tpm_state(module: Module) -> pb.TpmState | None:
    if not module.settings.tpm.enabled:
        return None
    tpm = module.faces.tpm
    process = tpm.life.process
    return pb.TpmState(
        socket=str(tpm.path),
        tss_path=str(tpm.tss),
        pid=process.pid if process else 0,
        restarts=tpm.life.restarts,
        state=tpm.life.state,
        failure=tpm.life.failure,
        peer=tpm.peer,
        keys_failure=tpm.keys_failure,
    )


def _hsm_helper(cryptoprocessor: Cryptoprocessor) -> pb.HsmHelper | None:
    if not cryptoprocessor.hsm:
        return None
    return pb.HsmHelper(pid=cryptoprocessor.pid, restarts=cryptoprocessor.restarts, token=cryptoprocessor.token)


def hsm(hsm: Hsm, modules: int, purges: int) -> pb.Hsm:
    row = hsm.row
    return pb.Hsm(name=row.name, library=row.library, token=row.token, modules=modules, failure=clean(hsm.barred), purges=purges)


def _device(module: Module) -> pb.Device:
    device, row, attachment = module.faces.device, module.faces.attachment, None
    if row is not None:
        attachment = pb.Attachment(
            qmp_path=row.qmp,
            bus=row.bus,
            device_id=row.device,
            chardev_id=row.chardev,
            attached_at=timestamp(row.at),
            hybrid_path=row.hybrid,
            listening=bool(row.hybrid) and module.faces.hybrid.path == row.hybrid,
        )
    return pb.Device(
        socket=str(device.path),
        guest_cid=device.cid,
        port=limits.VSOCK_PORT,
        plugged=device.plugged,
        attachment=attachment,
        usb=_usb(module),
    )


def _usb(module: Module) -> pb.Usb:
    usb, row, attachment = module.faces.usb, module.faces.usb_attachment, None
    if row is not None:
        attachment = pb.UsbAttachment(
            qmp_path=row.qmp,
            device_id=row.device,
            listen=row.listen,
            peers=row.peers,
            listening=bool(row.listen) and usb.usbip == row.listen,
            attached_at=timestamp(row.at),
        )
    ident = str(module.settings.card.usb_ids())
    return pb.Usb(
        socket=str(usb.path), usb_id=ident, serial=module.name, protocol=usb.protocol, peer=usb.peer, attachment=attachment
    )


def finding(row: Finding) -> pb.DeviceFinding:
    return pb.DeviceFinding(reason=row.reason, problem=row.problem, change=row.change)


def change(change: Change, status: reports.Status | None) -> pb.ModuleChange:
    return pb.ModuleChange(kind=change.kind, module=module(change.module, status))


def material(module_name: str, row: reports.Material) -> pb.Material:
    return pb.Material(
        module=module_name,
        name=row.name,
        mode=row.mode,
        profile=row.profile,
        key_type=row.key_type,
        alias_id=row.alias_id,
        generations=map(_generation, row.generations),
    )


def _generation(row: reports.Generation) -> pb.Generation:
    return pb.Generation(
        number=row.number,
        state=row.state,
        id=row.id,
        public_key=row.public_key,
        certificates=row.certificates,
        staged_at=timestamp(row.staged_at),
        activated_at=timestamp(row.activated_at),
        retired_at=timestamp(row.retired_at),
        drain_ends_at=timestamp(row.drain_ends_at),
        after_drain=row.after_drain,
        not_after=timestamp(row.not_after),
        last_used_at=timestamp(row.last_used_at),
        operations=row.operations,
        connections=row.connections,
        certificate_only=row.certificate_only,
        on_expiry=row.on_expiry,
        drain_seconds=row.drain_seconds,
        csr=row.csr,
    )


def executed(module_name: str, done: m.Executed) -> pb.ExecuteResponse:
    status = reports.material(reports.parse(done.report))
    return pb.ExecuteResponse(
        action=done.action,
        material=done.material,
        generation=min(done.generation, 2**32 - 1),
        sequence=done.sequence,
        signer=done.signer,
        status=material(module_name, status),
        csr=reports.csr(status, done.generation) if done.action == Action.GENERATE else b"",
    )


def statistics(row: reports.Statistics) -> pb.Statistics:
    return pb.Statistics(
        operations=[
            pb.OperationStatistics(
                operation=o.operation,
                mechanism=o.mechanism,
                count=o.count,
                errors=o.errors,
                seconds=o.seconds,
                bucket_bounds=o.bounds,
                bucket_counts=o.counts,
            )
            for o in row.operations
        ],
        connections=row.connections,
        sessions=row.sessions,
        connections_total=row.connections_total,
        connections_refused=row.connections_refused,
        resident_bytes=row.resident_bytes,
        uptime_seconds=row.uptime_seconds,
    )


def manager_link(state: LinkState | None) -> pb.ManagerLink | None:
    if state is None:
        return None
    membership = state.membership
    return pb.ManagerLink(
        host_name=membership.name,
        address=state.address,
        connected=state.connected,
        failure=state.failure,
        since=timestamp(state.since),
        certificate_ends_at=timestamp(membership.ends_at),
        renewal_failure=state.renewal_failure,
        root=fingerprint(membership.root),
        addresses=membership.addresses,
        commands=state.commands,
        heard_at=timestamp(state.heard_at),
    )


def secret(secret: OneTimeSecret) -> pb.CreateEnrolmentResponse:
    return pb.CreateEnrolmentResponse(secret=secret.text, expires_at=timestamp(secret.expires_at))


def event(row: EventRow) -> pb.Event:
    return pb.Event(id=row.id, at=timestamp(row.at_ms / 1000), kind=row.kind, module=row.subject, detail=row.detail)


def upgraded(name: str, known: Upgraded) -> pb.UpgradeModuleResponse:
    return pb.UpgradeModuleResponse(
        name=name,
        old_pid=known.old_pid,
        pid=known.new_pid,
        applications=known.applications,
        connections=known.connections,
        lingering=known.lingering,
        seconds=known.took,
        paused_seconds=known.paused,
    )
