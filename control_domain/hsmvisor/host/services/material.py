"""MaterialService: signed commands go to their module as they are; materials are shown."""

from __future__ import annotations

from typing import Any

from hsmvisor.host import convert, limits
from hsmvisor.host.commands import Commands
from hsmvisor.host.modules import Modules
from hsmvisor.serving.errors import NotFound
from hsmvisor.serving.gate import origin
from hsmvisor.serving.pages import page
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc


class MaterialService(rpc.MaterialServiceServicer):
    def __init__(self, modules: Modules, commands: Commands) -> None:
        self._modules, self._commands = modules, commands

    async def Execute(self, untrusted: pb.ExecuteRequest, context: Any) -> pb.ExecuteResponse:
        name = limits.module_name(untrusted.module)
        return convert.executed(name, await self._commands.execute(origin(), untrusted.request_id, name, untrusted.signed_command))

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
