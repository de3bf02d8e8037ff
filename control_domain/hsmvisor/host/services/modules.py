"""ModuleService: modules are created, shown, set, watched and destroyed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

from hsmvisor.host import convert, limits, qemu_arguments, qemu_tpm, qemu_usb, reports
from hsmvisor.host.attachments import Attachments, plug_of
from hsmvisor.host.config import SOFTWARE
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.module import FAILED, SERVING, Module
from hsmvisor.host.modules import Modules
from hsmvisor.host.state import State
from hsmvisor.host.usb_attachments import UsbAttachments, usb_plug_of, usbip_address, usbip_peers
from hsmvisor.serving.errors import Forbidden, Invalid, ServiceError
from hsmvisor.serving.gate import caller, origin
from hsmvisor.serving.limits import request_id
from hsmvisor.serving.pages import page
from hsmvisor.serving.requests import Request, Requests, request
from hsmvisor.serving.text import clean
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc

_STATUS_WITHIN = 2.0  #: seconds that a list waits for the workers' own words


async def _status(module: Module) -> reports.Status | None:
    """What the worker says, None when it says nothing in time."""
    if module.state not in (SERVING, FAILED):  # one that failed may have a worker that only cannot use its keys
        return None
    try:
        async with asyncio.timeout(_STATUS_WITHIN):
            return await module.status()
    except (ServiceError, TimeoutError):
        return None


async def _shown(module: Module) -> pb.Module:
    return convert.module(module, await _status(module))


def _by_usb(untrusted_face: int) -> bool:
    """Says whether a face is USB; raises Invalid."""
    if untrusted_face not in pb.Face.values():
        raise Invalid(
            "FACE", f"a module is a guest's vsock or USB device, or TPM, not {untrusted_face}", "leave face out for vsock"
        )
    return untrusted_face == pb.USB


def _demand_pluggable(untrusted_face: int, name: str) -> None:
    """Raises Invalid."""
    if untrusted_face == pb.TPM:
        hint = f"start the guest with it: hsmvisor module qemu-args {name} --as tpm; hsmvisor module settings says that it has one"
        raise Invalid("FACE", "a TPM is in its guest from the machine's start to its end: QEMU cannot plug one in or out", hint)


def _described_tpm(module: Module, driver: str) -> pb.DeviceDescription:
    """Raises ServiceError."""
    tpm = module.faces.tpm
    tpm.demand_enabled()
    if driver not in qemu_tpm.DRIVERS:
        raise Invalid("TPM_DRIVER", f"{driver!r:.20} is no driver of a TPM", f"QEMU has {' and '.join(qemu_tpm.DRIVERS)}")
    plug = qemu_tpm.TpmPlug(module.name, str(tpm.path))
    return pb.DeviceDescription(qemu_arguments=qemu_tpm.arguments(plug, driver), libvirt_xml=qemu_tpm.libvirt_xml(plug, driver))


class ModuleService(rpc.ModuleServiceServicer):
    def __init__(
        self,
        modules: Modules,
        attachments: Attachments,
        usb_attachments: UsbAttachments,
        requests: Requests,
        state: State,
        identity: HostIdentity,
    ) -> None:
        self._modules, self._attachments, self._usb_attachments = modules, attachments, usb_attachments
        self._requests, self._state, self._identity = requests, state, identity

    async def CreateModule(self, untrusted: pb.CreateModuleRequest, context: Any) -> pb.Module:
        name, root = limits.module_name(untrusted.name), limits.root(untrusted.root)
        settings = convert.settings(untrusted.settings).beginning()
        asked = request(untrusted.request_id, "CreateModule", name.encode(), root, settings.encode().encode())
        fields = {
            "module": name,
            "root": hashlib.sha256(root).hexdigest(),
            "cryptoprocessor": settings.cryptoprocessor or SOFTWARE,
        }
        await self._requests.once(
            origin(), "module.create", asked, fields, lambda: self._modules.create(name, root, settings, asked)
        )
        return await _shown(self._modules.get(name))

    async def GetModule(self, untrusted: pb.GetModuleRequest, context: Any) -> pb.Module:
        return await _shown(self._modules.get(limits.module_name(untrusted.name)))

    async def ListModules(self, untrusted: pb.ListModulesRequest, context: Any) -> pb.ListModulesResponse:
        chosen, token = page(self._modules.all(), lambda module: module.name, untrusted.page_size, untrusted.page_token)
        return pb.ListModulesResponse(modules=await asyncio.gather(*map(_shown, chosen)), next_page_token=token)

    async def UpdateModule(self, untrusted: pb.UpdateModuleRequest, context: Any) -> pb.Module:
        name, settings = limits.module_name(untrusted.name), convert.settings(untrusted.settings)
        asked = request(untrusted.request_id, "UpdateModule", name.encode(), settings.encode().encode())

        async def work() -> bytes:
            await self._modules.get(name).configure(settings, asked, b"")
            return b""

        await self._requests.once(origin(), "module.update", asked, {"module": name, "settings": settings.encode()}, work)
        return await _shown(self._modules.get(name))

    async def DestroyModule(self, untrusted: pb.DestroyModuleRequest, context: Any) -> pb.DestroyModuleResponse:
        name = limits.module_name(untrusted.name)
        asked = request(untrusted.request_id, "DestroyModule", name.encode())
        fields: dict[str, Any] = {"module": name}
        left = ""

        async def work() -> bytes:
            nonlocal left
            module = self._modules.get(name)
            by_usb, plug = module.faces.usb_attachment, usb_plug_of(module)
            left = await self._attachments.destroy(name, asked)
            await self._usb_attachments.clear(name, by_usb, plug)
            if left:
                fields.update(keys_left_in=module.settings.cryptoprocessor, why_left=clean(left))
            return b""

        await self._requests.once(origin(), "module.destroy", asked, fields, work)
        return pb.DestroyModuleResponse(keys_left=left)

    async def GetIdentity(self, untrusted: pb.GetIdentityRequest, context: Any) -> pb.Identity:
        module = self._modules.get(limits.module_name(untrusted.name))
        sequence = (await module.status()).sequence
        row = module.row
        signed = self._identity.certify(row.module_id, row.name, module.recipient, module.root, row.created_at)
        return pb.Identity(signed_identity=signed, sequence=sequence)

    async def SetPin(self, untrusted: pb.SetPinRequest, context: Any) -> pb.Module:
        name, pin = limits.module_name(untrusted.name), limits.pin(untrusted.pin)
        # only a slow hash of a PIN may stand in the state file
        stretched = await asyncio.to_thread(hashlib.scrypt, pin, salt=request_id(untrusted.request_id).encode(), n=2**14, r=8, p=1)
        asked = request(untrusted.request_id, "SetPin", name.encode(), stretched)

        async def work() -> bytes:
            module = self._modules.get(name)
            await module.ask(m.SetPin(module.ticket(asked), pin), m.Done)
            return await self._settled(module, asked)

        await self._requests.once(origin(), "module.set-pin", asked, {"module": name, "set": bool(pin)}, work)
        return await _shown(self._modules.get(name))

    async def SetTokenPresent(self, untrusted: pb.SetTokenPresentRequest, context: Any) -> pb.Module:
        name, present = limits.module_name(untrusted.name), untrusted.present
        asked = request(untrusted.request_id, "SetTokenPresent", name.encode(), bytes([present]))

        async def work() -> bytes:
            module = self._modules.get(name)
            await module.ask(m.SetTokenPresent(present), m.Done)
            return await self._settled(module, asked)

        await self._requests.once(origin(), "module.set-token-present", asked, {"module": name, "present": present}, work)
        return await _shown(self._modules.get(name))

    async def _settled(self, module: Module, asked: Request) -> bytes:
        """Stores the answer where the worker's own change did not carry it."""
        await self._state.record(asked, b"")
        module.touched()
        return b""

    async def UpgradeModule(self, untrusted: pb.UpgradeModuleRequest, context: Any) -> pb.UpgradeModuleResponse:
        name, renew = limits.module_name(untrusted.name), untrusted.renew_launcher
        asked = request(untrusted.request_id, "UpgradeModule", name.encode(), bytes([renew]))
        fields: dict[str, Any] = {"module": name, "renew_launcher": renew}

        async def work() -> bytes:
            answer = convert.upgraded(name, await self._modules.upgrade(name, renew))
            fields.update(old_pid=answer.old_pid, pid=answer.pid, connections=answer.connections)
            await self._state.record(asked, answer.SerializeToString())
            return answer.SerializeToString()

        return pb.UpgradeModuleResponse.FromString(await self._requests.once(origin(), "module.upgrade", asked, fields, work))

    async def BreakGlass(self, untrusted: pb.BreakGlassRequest, context: Any) -> pb.Module:
        name, root = limits.module_name(untrusted.name), limits.root(untrusted.new_root)
        asked = request(untrusted.request_id, "BreakGlass", name.encode(), root)
        fields: dict[str, Any] = {"module": name, "new_root": hashlib.sha256(root).hexdigest()}

        async def work() -> bytes:
            if not caller().local:
                raise Forbidden("LOCAL", "break-glass is for an operator on the host itself", "use the host's own control socket")
            if not untrusted.empty_it:
                raise Invalid("CONFIRMATION", f"break-glass loses every key of module {name}", "set empty_it (--yes-empty-it)")
            if not origin().why:
                raise Invalid("WHY", "break-glass is recorded with its reason", "send the metadata hsmvisor-why (--why)")
            old = self._modules.get(name)
            fields.update(old_module_id=old.module_id.hex(), old_root=hashlib.sha256(old.root).hexdigest())
            new = await self._modules.break_glass(name, root, asked)
            fields.update(module_id=new.module_id.hex())
            return new.module_id

        await self._requests.once(origin(), "module.break-glass", asked, fields, work)
        return await _shown(self._modules.get(name))

    async def AttachModule(self, untrusted: pb.AttachModuleRequest, context: Any) -> pb.Module:
        _demand_pluggable(untrusted.face, untrusted.name)
        if _by_usb(untrusted.face):
            return await self._attach_usb(untrusted)
        if untrusted.hybrid_path:
            return await self._attach_hybrid(untrusted)
        name, path, bus = limits.module_name(untrusted.name), limits.qmp_path(untrusted.qmp_path), limits.bus(untrusted.bus)
        asked = request(untrusted.request_id, "AttachModule", name.encode(), path.encode(), bus.encode())
        fields: dict[str, Any] = {"module": name, "qmp": path, "bus": bus}

        async def work() -> bytes:
            row = await self._attachments.attach(name, path, bus, asked)
            fields.update(bus=clean(row.bus), device=clean(row.device))
            return b""

        await self._requests.once(origin(), "module.attach", asked, fields, work)
        return await _shown(self._modules.get(name))

    async def _attach_hybrid(self, untrusted: pb.AttachModuleRequest) -> pb.Module:
        name, path = limits.module_name(untrusted.name), limits.hybrid_path(untrusted.hybrid_path)
        if untrusted.qmp_path or untrusted.bus:
            raise Invalid("HYBRID_PATH", "a module is attached by one of qmp_path and hybrid_path", "leave the other one empty")
        asked = request(untrusted.request_id, "AttachModule", name.encode(), b"hybrid", path.encode())

        async def work() -> bytes:
            await self._attachments.attach_hybrid(name, path, asked)
            return b""

        await self._requests.once(origin(), "module.attach", asked, {"module": name, "hybrid": path}, work)
        return await _shown(self._modules.get(name))

    async def _attach_usb(self, untrusted: pb.AttachModuleRequest) -> pb.Module:
        name = limits.module_name(untrusted.name)
        if untrusted.hybrid_path or untrusted.bus:
            raise Invalid("FACE", "a USB device is attached by qmp_path or usbip_listen, without a bus", "leave the others empty")
        if bool(untrusted.qmp_path) == bool(untrusted.usbip_listen):
            raise Invalid("FACE", "a USB device is attached by one of qmp_path and usbip_listen", "leave the other one empty")
        if untrusted.qmp_path:
            path = limits.qmp_path(untrusted.qmp_path)
            asked = request(untrusted.request_id, "AttachModule", name.encode(), b"usb", path.encode())
            fields: dict[str, Any] = {"module": name, "face": "usb", "qmp": path}

            async def work() -> bytes:
                await self._usb_attachments.attach(name, path, asked)
                return b""
        else:
            address, peers = usbip_address(untrusted.usbip_listen), usbip_peers(list(untrusted.usbip_peers))
            asked = request(
                untrusted.request_id, "AttachModule", name.encode(), b"usbip", address.encode(), " ".join(peers).encode()
            )
            fields = {"module": name, "face": "usb", "usbip": address, "peers": list(peers)}

            async def work() -> bytes:
                await self._usb_attachments.attach_usbip(name, address, peers, asked)
                return b""

        await self._requests.once(origin(), "module.attach", asked, fields, work)
        return await _shown(self._modules.get(name))

    async def _detach_usb(self, name: str, path: str, untrusted: pb.DetachModuleRequest) -> pb.Module:
        asked = request(untrusted.request_id, "DetachModule", name.encode(), b"usb", path.encode())
        fields: dict[str, Any] = {"module": name, "face": "usb", "qmp": path}

        async def work() -> bytes:
            fields.update(was_plugged=await self._usb_attachments.detach(name, path, asked))
            return b""

        await self._requests.once(origin(), "module.detach", asked, fields, work)
        return await _shown(self._modules.get(name))

    async def DetachModule(self, untrusted: pb.DetachModuleRequest, context: Any) -> pb.Module:
        name = limits.module_name(untrusted.name)
        path = limits.qmp_path(untrusted.qmp_path) if untrusted.qmp_path else ""
        _demand_pluggable(untrusted.face, name)
        if _by_usb(untrusted.face):
            return await self._detach_usb(name, path, untrusted)
        asked = request(untrusted.request_id, "DetachModule", name.encode(), path.encode())
        fields: dict[str, Any] = {"module": name, "qmp": path}

        async def work() -> bytes:
            attached = self._modules.get(name).faces.attachment
            fields.update(qmp=path or (attached.qmp if attached else ""))
            if attached and attached.hybrid:
                fields.update(hybrid=attached.hybrid)
            fields.update(was_plugged=await self._attachments.detach(name, path, asked))
            return b""

        await self._requests.once(origin(), "module.detach", asked, fields, work)
        return await _shown(self._modules.get(name))

    async def DescribeDevice(self, untrusted: pb.DescribeDeviceRequest, context: Any) -> pb.DeviceDescription:
        module = self._modules.get(limits.module_name(untrusted.name))
        if untrusted.face == pb.TPM:
            return _described_tpm(module, untrusted.tpm_driver or qemu_tpm.DRIVERS[0])
        if _by_usb(untrusted.face):
            usb = usb_plug_of(module)
            return pb.DeviceDescription(qemu_arguments=qemu_usb.arguments(usb), libvirt_xml=qemu_usb.libvirt_xml(usb))
        plug = plug_of(module)
        memory, machine = limits.memory(untrusted.memory or "2G"), untrusted.machine or qemu_arguments.MACHINES[0]
        line = limits.command_line(untrusted.command_line)
        return pb.DeviceDescription(
            qemu_arguments=qemu_arguments.arguments(plug, memory, machine),
            libvirt_xml=qemu_arguments.libvirt_xml(plug, machine),
            findings=map(convert.finding, qemu_arguments.check(plug, line) if line else ()),
        )

    async def AttestTpm(self, untrusted: pb.AttestTpmRequest, context: Any) -> pb.AttestTpmResponse:
        tpm = self._modules.get(limits.module_name(untrusted.name)).faces.tpm
        nonce, pcrs = limits.quote(untrusted.nonce, tuple(untrusted.pcrs))
        return pb.AttestTpmResponse(attestation=await tpm.attest(nonce, pcrs))

    async def GetTpmIdentity(self, untrusted: pb.GetTpmIdentityRequest, context: Any) -> pb.TpmIdentity:
        tpm = self._modules.get(limits.module_name(untrusted.name)).faces.tpm
        identity = await tpm.identity()
        rsa, p256, platform = tpm.life.certificates
        return pb.TpmIdentity(
            signed_identity=identity,
            endorsement_certificates=[rsa, p256],
            platform_certificate=platform,
            ca_certificate=tpm.ca_certificate,
        )

    async def GetStatistics(self, untrusted: pb.GetStatisticsRequest, context: Any) -> pb.Statistics:
        module = self._modules.get(limits.module_name(untrusted.name))
        return convert.statistics(await module.statistics())

    async def WatchModules(self, untrusted: pb.WatchModulesRequest, context: Any) -> AsyncIterator[pb.ModuleChange]:
        name = limits.module_name(untrusted.name) if untrusted.name else ""
        async for change in self._modules.watch(name):
            yield convert.change(change, await _status(change.module))
