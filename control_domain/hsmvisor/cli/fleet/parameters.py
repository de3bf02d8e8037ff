"""Names that shells complete by asking the manager, and options that several commands have."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import click
import grpc
from click.shell_completion import CompletionItem
from hsmvisor.cli.context import CommandError, Context
from hsmvisor.cli.fleet.reach import Manager, ManagerOptions
from hsmvisor.cli.modules import request_id
from hsmvisor_rpc.sealed.fleet import PCRS
from hsmvisor_rpc.v1 import manager_pb2 as pb

_COMPLETE_WITHIN = 2.0  #: seconds
_COMPLETED = 1000  #: names at most

_PCRS = re.compile(r"([0-9]{1,2})(?:-([0-9]{1,2}))?")

REASONS = ("unspecified", "key_compromise", "affiliation_changed", "superseded", "cessation_of_operation")


class _Named(click.ParamType[str]):
    """`ask`: returns names and what to say of each."""

    def __init__(self, name: str, ask: Callable[[Manager], Iterable[tuple[str, str]]]) -> None:
        self.name, self._ask = name, ask

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        with contextlib.suppress(grpc.RpcError, CommandError, ValueError, OSError):
            manager = Manager(ManagerOptions.of(ctx.find_root()), _COMPLETE_WITHIN)
            found = dict(self._ask(manager))
            return [CompletionItem(name, help=told) for name, told in found.items() if name.startswith(incomplete)]
        return []


def _hosts(manager: Manager) -> Iterable[tuple[str, str]]:
    found = manager.pages(manager.fleet.ListHosts, pb.ListHostsRequest(), "hosts", _COMPLETED)
    return ((host.name, host.state) for host in found)


def _resources(manager: Manager) -> Iterable[tuple[str, str]]:
    found = manager.pages(manager.fleet.ListResources, pb.ListResourcesRequest(), "resources", _COMPLETED)
    return ((resource.id, f"{resource.kind} of {resource.owner}") for resource in found)


def _materials(manager: Manager) -> Iterable[tuple[str, str]]:
    found = manager.pages(manager.requests.List, pb.ListRequestsRequest(state="active"), "requests", _COMPLETED)
    return ((request.spec.material, f"of {request.owner}") for request in found)


def _authorities(manager: Manager) -> Iterable[tuple[str, str]]:
    answer = manager.authorities.ListAuthorities(pb.ListAuthoritiesRequest(), timeout=manager.timeout)
    return ((authority.name, authority.kind) for authority in answer.authorities)


def _tokens(manager: Manager) -> Iterable[tuple[str, str]]:
    found = manager.pages(manager.fleet.ListTokens, pb.ListTokensRequest(), "tokens", _COMPLETED)
    return ((token.id, f"of {token.owner}") for token in found if not token.revoked)


class Pcrs(click.ParamType[tuple[int, ...]]):
    """Numbers of PCRs: 4, 0-7, or several of these with commas between them."""

    name = "pcrs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found: set[int] = set()
        for part in str(value).split(","):
            match = _PCRS.fullmatch(part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last or last not in PCRS:
                self.fail(f"{value!r}: PCRs are {PCRS.start} to {PCRS.stop - 1}, as 4, 0-7 or 0,4,7", param, ctx)
            found.update(range(first, last + 1))
        return tuple(sorted(found))


HOST_NAME = _Named("host", _hosts)
RESOURCE_NAME = _Named("resource", _resources)
MATERIAL_NAME = _Named("material", _materials)
AUTHORITY_NAME = _Named("authority", _authorities)
TOKEN_ID = _Named("id", _tokens)

ident_option = click.option("--request-id", "ident", default=request_id, help="Makes a repeated call the same call.")
why_option = click.option("--why", "because", default="", help="A reason, for the records.")
owner_option = click.option("--owner", default="", help="Whose it is, where it is not your own.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def because_of(ctx: Context, because: str) -> str:
    """Returns the reason of a command, or the one that was given for the whole invocation."""
    return because or ctx.why
