"""The way to the manager: from options, the environment and the user's file to stubs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import click
import grpc
from click.core import ParameterSource
from hsmvisor.cli.context import MANAGER, USAGE, Command, CommandError, Context, Target
from hsmvisor.client.managers import ManagerAt
from hsmvisor.client.reason import with_reason
from hsmvisor_rpc.v1 import manager_pb2_grpc as rpc

DEFAULT_ADDRESS = "unix:/run/hsmvisor-manager/control.sock"  #: of a manager without a configuration
_TLS = ("tls_ca", "tls_cert", "tls_key")  #: options of `hsmvisor`
_HINT = "hsmvisor fleet --help tells how a manager is reached"


def default_file() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hsmvisor/manager.toml"


@dataclass(frozen=True)
class ManagerOptions:
    """What the command line and the environment say of it; `tls_said`: the command line itself names files for TLS."""

    address: str = ""
    file: Path | None = None
    token_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    tls_said: bool = False

    @classmethod
    def of(cls, root: click.Context) -> ManagerOptions:
        """`root`: the context of `hsmvisor` itself, with its options read."""
        params = root.params
        ca, certificate, key = (params.get(name) for name in _TLS)
        said = any(root.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in _TLS)
        return cls(params.get("manager") or "", params.get("manager_file"), params.get("token_file"), ca, certificate, key, said)

    def at(self) -> ManagerAt:
        """Options count more than the file, and the file more than the environment's TLS files, which may be a host's.

        Raises BadManagerFile, OSError.
        """
        path = self.file or default_file()
        known = ManagerAt.read(path) if self.file or path.exists() else ManagerAt()
        address = self.address or known.address or DEFAULT_ADDRESS
        if address.startswith("unix:"):
            # who comes by the socket is known by that; a token is shown there only where that was said for this socket
            token = self.token_file or (known.token_file if address == known.address else None)
            return ManagerAt(address, token_file=token, root=known.root)
        found = replace(known, address=address, token_file=self.token_file or known.token_file)
        if self.tls_said or known.ca is None:
            found = replace(found, ca=self.ca or known.ca, certificate=self.certificate, key=self.key)
        return found


class Manager:
    """Stubs of one channel, which is made with the first call."""

    def __init__(self, options: ManagerOptions, timeout: float, why: str = "") -> None:
        self._options, self.timeout, self._why = options, timeout, why

    @cached_property
    def at(self) -> ManagerAt:
        try:
            return self._options.at()
        except ValueError as error:
            raise CommandError(str(error), USAGE, _HINT) from None

    @cached_property
    def channel(self) -> grpc.Channel:
        try:
            channel = self.at.channel()
        except ValueError as error:
            raise CommandError(str(error), USAGE, _HINT) from None
        return with_reason(channel, self._why) if self._why else channel

    @cached_property
    def fleet(self) -> rpc.FleetServiceStub:
        return rpc.FleetServiceStub(self.channel)

    @cached_property
    def requests(self) -> rpc.RequestServiceStub:
        return rpc.RequestServiceStub(self.channel)

    @cached_property
    def policies(self) -> rpc.PolicyServiceStub:
        return rpc.PolicyServiceStub(self.channel)

    @cached_property
    def authorities(self) -> rpc.AuthorityServiceStub:
        return rpc.AuthorityServiceStub(self.channel)

    @cached_property
    def history(self) -> rpc.HistoryServiceStub:
        return rpc.HistoryServiceStub(self.channel)

    def pages(self, method: Callable[..., Any], request: Any, field: str, most: int = 0) -> list[Any]:
        """Returns what all pages of a list have in `field`; `most`: no more than so many."""
        found: list[Any] = []
        while True:
            if most:
                request.page_size = min(most - len(found), 1000)
            answer = method(request, timeout=self.timeout)
            found += getattr(answer, field)
            if not answer.next_page_token or (most and len(found) >= most):
                return found
            request.page_token = answer.next_page_token


def manager_of(ctx: Context) -> Manager:
    """Returns the manager that the command is for."""
    manager = ctx.manager
    assert isinstance(manager, Manager)
    return manager


class ManagerCommand(Command):
    """What it cannot reach is a manager."""

    target: ClassVar[Target] = MANAGER


class ManagerGroup(click.Group):
    command_class = ManagerCommand
    group_class = type


def words(values: Iterable[str]) -> str:
    """For a cell of a table."""
    return ", ".join(values) or "-"
