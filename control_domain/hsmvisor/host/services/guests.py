"""GuestService: guests are registered, changed, shown and removed."""

from __future__ import annotations

import json
from typing import Any

from hsmvisor.host import limits
from hsmvisor.host.guest_rows import Guest
from hsmvisor.host.guests import Guests
from hsmvisor.serving.gate import origin
from hsmvisor.serving.pages import page
from hsmvisor.serving.requests import Requests, request
from hsmvisor.serving.timestamps import timestamp
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc


class GuestService(rpc.GuestServiceServicer):
    def __init__(self, guests: Guests, requests: Requests) -> None:
        self._guests, self._requests = guests, requests

    async def RegisterGuest(self, untrusted: pb.RegisterGuestRequest, context: Any) -> pb.Guest:
        guest = _asked_for(untrusted)
        asked = request(untrusted.request_id, "RegisterGuest", _encoded(guest))
        fields: dict[str, Any] = {"guest": guest.name, "guest_kind": guest.kind, "owner": guest.owner, "module": guest.module}
        fields["attributes"] = dict(guest.attributes)
        await self._requests.once(origin(), "guest.register", asked, fields, lambda: self._guests.register(guest, asked, fields))
        return self._shown(self._guests.get(guest.name))

    async def UpdateGuest(self, untrusted: pb.UpdateGuestRequest, context: Any) -> pb.Guest:
        name, owner = limits.guest_name(untrusted.name), limits.owner(untrusted.owner)
        attributes = limits.attributes(untrusted.attributes)
        asked = request(untrusted.request_id, "UpdateGuest", name.encode(), owner.encode(), json.dumps(attributes).encode())
        fields = {"guest": name, "owner": owner, "attributes": attributes}
        await self._requests.once(
            origin(), "guest.update", asked, fields, lambda: self._guests.update(name, owner, attributes, asked)
        )
        return self._shown(self._guests.get(name))

    async def RemoveGuest(self, untrusted: pb.RemoveGuestRequest, context: Any) -> pb.RemoveGuestResponse:
        name, keep = limits.guest_name(untrusted.name), untrusted.keep_module
        asked = request(untrusted.request_id, "RemoveGuest", name.encode(), bytes([keep]))
        fields: dict[str, Any] = {"guest": name, "keep_module": keep}
        left = ""

        async def work() -> bytes:
            nonlocal left
            module, left = await self._guests.remove(name, keep, asked, fields)
            return module.encode()

        answer = await self._requests.once(origin(), "guest.remove", asked, fields, work)
        return pb.RemoveGuestResponse(module=answer.decode(), keys_left=left)

    async def GetGuest(self, untrusted: pb.GetGuestRequest, context: Any) -> pb.Guest:
        return self._shown(self._guests.get(limits.guest_name(untrusted.name)))

    async def ListGuests(self, untrusted: pb.ListGuestsRequest, context: Any) -> pb.ListGuestsResponse:
        chosen, token = page(self._guests.all(), lambda guest: guest.name, untrusted.page_size, untrusted.page_token)
        return pb.ListGuestsResponse(guests=map(self._shown, chosen), next_page_token=token)

    def _shown(self, guest: Guest) -> pb.Guest:
        return pb.Guest(
            name=guest.name,
            kind=guest.kind,
            owner=guest.owner,
            attributes=guest.attributes,
            module=guest.module,
            changed=guest.changed,
            changed_at=timestamp(guest.at),
            refused=self._guests.refused.get(guest.name, ""),
        )


def _asked_for(untrusted: pb.RegisterGuestRequest) -> Guest:
    """Raises Invalid."""
    name, kind = limits.guest_name(untrusted.name), limits.guest_kind(untrusted.kind)
    owner, attributes = limits.owner(untrusted.owner), limits.attributes(untrusted.attributes)
    module = "" if untrusted.no_module else limits.module_name(untrusted.module or name)
    return Guest(name, kind, owner, attributes, module)


def _encoded(guest: Guest) -> bytes:
    return json.dumps([guest.name, guest.kind, guest.owner, guest.attributes, guest.module]).encode()
