"""Requests and resources by what people write: a material's name or an id, HOST/NAME or NAME."""

from __future__ import annotations

import re

import grpc
from hsmvisor.cli.context import USAGE, CommandError
from hsmvisor.cli.fleet.reach import Manager
from hsmvisor_rpc.v1 import manager_pb2 as pb

_ID = re.compile(r"[0-9a-f]{32}")


def get(manager: Manager, asked: pb.GetRequest) -> pb.MaterialRequest:
    """Returns a request with all of its lines, however many there are.  Raises grpc.RpcError."""
    found = manager.requests.Get(asked, timeout=manager.timeout)
    while found.next_page_token:
        more = manager.requests.Get(pb.GetRequest(id=found.id, page_token=found.next_page_token), timeout=manager.timeout)
        found.lines.extend(more.lines)
        found.next_page_token = more.next_page_token
    return found


def find(manager: Manager, name: str, owner: str = "") -> pb.MaterialRequest:
    """Returns one's own, or the only one of that name that one may see.  Raises grpc.RpcError, CommandError."""
    asked = [pb.GetRequest(material=name, owner=owner)]
    if _ID.fullmatch(name) and not owner:
        asked.insert(0, pb.GetRequest(id=name))
    missing: grpc.RpcError | None = None
    for request in asked:
        try:
            return get(manager, request)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            missing = error
    assert missing is not None
    if owner:
        raise missing
    everybody = manager.pages(manager.requests.List, pb.ListRequestsRequest(), "requests")
    found = [one for one in everybody if one.spec.material == name]
    if not found:
        raise missing
    if len(found) > 1:
        owners = ", ".join(sorted(one.owner for one in found))
        raise CommandError(f"several owners have a material {name}: {owners}", USAGE, "say whose with --owner")
    return get(manager, pb.GetRequest(id=found[0].id))


def resource_id(manager: Manager, name: str) -> str:
    """Returns HOST/NAME for a name that may lack its host; empty stays empty.  Raises grpc.RpcError."""
    if not name or "/" in name:
        return name
    return manager.fleet.GetResource(pb.GetResourceRequest(id=name), timeout=manager.timeout).id
