"""MaterialService: signed commands go to their module as they are; materials are shown."""

from __future__ import annotations

import hashlib
from typing import Any

from hsmvisor.host import convert, limits, reports
from hsmvisor.host.modules import Modules
from hsmvisor.host.state import State
from hsmvisor.serving.errors import Invalid, NotFound
from hsmvisor.serving.events import Events
from hsmvisor.serving.gate import origin
from hsmvisor.serving.pages import page
from hsmvisor.serving.requests import Requests, request
from hsmvisor.serving.text import clean
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.sealed.commands import Action
from hsmvisor_rpc.sealed.limits import MAX_SIGNED
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc


class MaterialService(rpc.MaterialServiceServicer):
    def __init__(self, modules: Modules, requests: Requests, state: State, events: Events) -> None:
        self._modules, self._requests, self._state, self._events = modules, requests, state, events

    async def Execute(self, untrusted: pb.ExecuteRequest, context: Any) -> pb.ExecuteResponse:
        name, command = limits.module_name(untrusted.module), untrusted.signed_command
        asked = request(untrusted.request_id, "Execute", name.encode(), command)
        # who signed what is the module's to judge: refused, the line shows which bytes; carried out, the module's own words
        fields: dict[str, Any] = {"module": name, "command": hashlib.sha256(command).hexdigest()}

        async def work() -> bytes:
            if not 1 <= len(command) <= MAX_SIGNED:
                raise Invalid("TOO_LARGE" if command else "MALFORMED", f"signed_command has 1-{MAX_SIGNED} bytes")
            module = self._modules.get(name)
            done = await module.ask(m.Execute(module.ticket(asked), command), m.Executed)
            await self._state.record(asked, done.encode())  # the worker's own change carried it, where there was one
            if done.action == Action.CHANGE_ROOT:
                await module.refresh_root()
            fields.update(_told(done))
            self._events.emit("command-executed", name, _told(done))
            module.touched()
            return done.encode()

        answer = await self._requests.once(origin(), "material.execute", asked, fields, work)
        done = m.Executed.decode(answer)
        if done.compromised:  # also when the call is repeated: the first one may have been cut short here
            await self._modules.get(name).forget_key()
        return convert.executed(name, done)

    async def GetMaterial(self, untrusted: pb.GetMaterialRequest, context: Any) -> pb.Material:
        module, name = limits.module_name(untrusted.module), limits.material_name(untrusted.name)
        for material in (await self._modules.get(module).status()).materials:
            if material.name == name:
                return convert.material(module, material)
        raise NotFound("MATERIAL", f"module {module} has no material {name}", "hsmvisor material list shows those there are")

    async def ListMaterials(self, untrusted: pb.ListMaterialsRequest, context: Any) -> pb.ListMaterialsResponse:
        module = limits.module_name(untrusted.module)
        materials = (await self._modules.get(module).status()).materials
        chosen, token = page(materials, lambda material: material.name, untrusted.page_size, untrusted.page_token)
        return pb.ListMaterialsResponse(materials=[convert.material(module, row) for row in chosen], next_page_token=token)


def _told(done: m.Executed) -> dict[str, Any]:
    """What a module says of a command that it carried out, cleaned for a line.  Of a key that it made: which request came out."""
    csr = b""
    if done.action == Action.GENERATE:
        csr = reports.csr(reports.material(reports.parse(done.report)), done.generation)
    return {
        "action": clean(done.action),
        "material": clean(done.material),
        "generation": done.generation,
        "sequence": done.sequence,
        "signer": clean(done.signer),
        **({"compromised": True} if done.compromised else {}),
        **({"csr": hashlib.sha256(csr).hexdigest()} if csr else {}),
    }
