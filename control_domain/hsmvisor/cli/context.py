"""What every command shares: the way to the host, output for people and for programs, errors with their exit codes."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import click
import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hsmvisor.authority import Authority, AuthorityError, BundleError, Pusher
from hsmvisor.authority.store import default_directory
from hsmvisor.client import SigningKey, TlsFiles, connect
from hsmvisor.client.reason import with_reason
from hsmvisor.serving import errors
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc
from rich.console import Console
from rich.table import Table

DEFAULT_HOST = "unix:/run/hsmvisor/control.sock"

WIDTH = 240  #: columns of a table that goes to a file or a pipe

#: Exit codes; `hsmvisor --help` lists them.
FAILURE, USAGE, NOT_FOUND, REFUSED, NOT_PERMITTED, UNREACHABLE, TIMEOUT = range(1, 8)

_EXIT_CODES = {
    grpc.StatusCode.NOT_FOUND: NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION: REFUSED,
    grpc.StatusCode.INVALID_ARGUMENT: REFUSED,
    grpc.StatusCode.ALREADY_EXISTS: REFUSED,
    grpc.StatusCode.ABORTED: REFUSED,
    grpc.StatusCode.PERMISSION_DENIED: NOT_PERMITTED,
    grpc.StatusCode.UNAUTHENTICATED: NOT_PERMITTED,
    grpc.StatusCode.UNAVAILABLE: UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: TIMEOUT,
}

#: Where the reason says more than the code.
_EXIT_REASONS: dict[str, int] = {Reason.UNKNOWN_MATERIAL: NOT_FOUND, Reason.UNKNOWN_GENERATION: NOT_FOUND}

PATIENCE = 2.0  #: seconds after which a command says what it is at


@dataclass(frozen=True)
class Target:
    """Whom a command talks to, as its errors call it."""

    name: str
    unreachable: str  #: what to look at then
    not_permitted: str


HOST = Target(
    "the host",
    "is hsmvisor-host running (systemctl status hsmvisor-host)? is --host right?",
    "use it as root or as a member of the socket's group (control.socket_group)",
)
MANAGER = Target(
    "the manager",
    "is hsmvisor-manager running (systemctl status hsmvisor-manager)? is --manager right? see hsmvisor fleet --help",
    "use it as root or as one whom control.socket_mode and control.socket_group of the manager let in",
)


class CommandError(click.ClickException):
    """Shown as one line, with what to do under it; as JSON for a program that asked for it."""

    def __init__(self, message: str, exit_code: int = FAILURE, hint: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]
        self.hint, self.reason, self.json = hint, reason, False

    def show(self, file: Any = None) -> None:
        if self.json:
            told = {"exit_code": self.exit_code, "reason": self.reason, "message": self.message, "hint": self.hint}
            click.echo(json.dumps({"error": told}), err=True)
            return
        click.echo(f"hsmvisor: {self.message}", err=True)
        if self.hint:
            click.echo(f"  {self.hint}", err=True)


@dataclass
class Context:
    """Made once for each invocation."""

    host: str
    timeout: float
    json: bool
    authority_directory: Path
    root_passphrase: bytes | None
    tls: TlsFiles | None
    signing: SigningKey | None
    why: str = ""
    manager: Any = None  #: a cli.fleet.reach.Manager, where a command is for one

    @cached_property
    def channel(self) -> grpc.Channel:
        try:
            channel = connect(self.host, tls=self.tls, signing=self.signing)
        except (ValueError, OSError) as error:
            raise CommandError(str(error), USAGE) from None
        return with_reason(channel, self.why) if self.why else channel

    @cached_property
    def modules(self) -> rpc.ModuleServiceStub:
        return rpc.ModuleServiceStub(self.channel)

    @cached_property
    def hosts(self) -> rpc.HostServiceStub:
        return rpc.HostServiceStub(self.channel)

    def at(self, address: str) -> Context:
        """Returns the same for another host, where one command is for two: TLS is of that which is reached by TCP."""
        return replace(self, host=address, tls=None if address.startswith("unix:") else self.tls)

    def all_modules(self) -> list[pb.Module]:
        found: list[pb.Module] = []
        token = ""
        while True:
            answer = self.modules.ListModules(pb.ListModulesRequest(page_token=token), timeout=self.timeout)
            found += answer.modules
            token = answer.next_page_token
            if not token:
                return found

    @contextmanager
    def patience(self, doing: str) -> Iterator[None]:
        """What takes more than two seconds says what it is: to people, on the standard error."""
        console = Console(stderr=True)
        status = console.status(doing + " ...")
        show = status.start if console.is_terminal else lambda: console.print(doing + " ...")
        timer = threading.Timer(PATIENCE, show)
        if not self.json:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            status.stop()

    def authority(self, create: bool = False) -> Authority:
        """`create`: makes it on first use, and says so."""
        if create and not (self.authority_directory / "root.key").exists():
            authority = Authority.create(self.authority_directory, self.root_passphrase)
            self.say(f"made an authority in {self.authority_directory}: keep a copy of its root.key in a safe place")
            return authority
        return Authority.open(self.authority_directory, self.root_passphrase)

    def pusher(self, create: bool = False) -> Pusher:
        """The host's key is pinned when it is met on its own unix socket, else by `hsmvisor host enrol`."""
        authority = self.authority(create)
        if self.host not in authority.hosts:
            if not self.host.startswith("unix:"):
                hint = "hsmvisor host new-secret on the host, then hsmvisor host enrol here"
                raise CommandError(f"the host {self.host} is not enrolled with this authority", NOT_PERMITTED, hint)
            authority.pin(self.host, self.hosts.GetHost(pb.GetHostRequest(), timeout=self.timeout).host_key)
        return Pusher(self.channel, authority, authority.hosts[self.host], self.timeout, self.host)

    def known_pusher(self) -> Pusher | None:
        """A pusher where there is an authority that knows the host; None for those who only look."""
        if not (self.authority_directory / "root.pub").exists():
            return None
        authority = self.authority()
        key = authority.hosts.get(self.host)
        return Pusher(self.channel, authority, key, self.timeout, self.host) if key else None

    # ---- output ---------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """For people; a program that asked for JSON does not see it."""
        if not self.json:
            click.echo(text)

    def result(self, message: Message | dict[str, Any] | list[Any], text: Callable[[], None]) -> None:
        """Prints the result: JSON, or what `text` prints."""
        if self.json:
            click.echo(json.dumps(plain(message), indent=2))
        else:
            text()

    def line(self, message: Message, text: str) -> None:
        """Prints one of many that come as they happen: for a program one JSON object a line."""
        click.echo(json.dumps(plain(message)) if self.json else text)
        sys.stdout.flush()


def plain(message: Any) -> Any:
    """Returns JSON values: bytes fields as base64, as protobuf's JSON has them."""
    if isinstance(message, Message):
        return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    if isinstance(message, dict):
        return {k: plain(v) for k, v in message.items()}
    if isinstance(message, list | tuple):
        return [plain(v) for v in message]
    return message


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*[str(value) for value in row])
    Console(width=None if sys.stdout.isatty() else WIDTH).print(drawn)


def when(stamp: Timestamp) -> str:
    return stamp.ToDatetime().strftime("%Y-%m-%d %H:%M:%SZ") if stamp.seconds else "-"


def fail(error: Exception, target: Target = HOST) -> NoReturn:
    """Turns what a command met into one line and an exit code."""
    if isinstance(error, grpc.RpcError):
        raise of_call(error, target) from None
    if isinstance(error, Refusal):
        hint = "was the host set up anew? hsmvisor host new-secret there, then hsmvisor host enrol --replace here"
        hint = hint if error.reason is Reason.WRONG_HOST else ""
        raise CommandError(str(error), REFUSED, hint, reason=error.reason) from None
    if isinstance(error, AuthorityError | BundleError):
        raise CommandError(str(error), REFUSED) from None
    raise error


def of_call(error: grpc.RpcError, target: Target = HOST) -> CommandError:
    code, detail = error.code(), error.details() or ""
    reason, hint = errors.told(error)
    if code is grpc.StatusCode.UNAVAILABLE and not reason:
        return _unreachable(detail, target)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CommandError(f"{target.name} did not answer in time", TIMEOUT, "--timeout SECONDS gives it longer")
    text = f"{reason}: {detail}" if reason and not detail.startswith(reason) else detail or str(code)
    return CommandError(text, _EXIT_REASONS.get(reason, _EXIT_CODES.get(code, FAILURE)), hint, reason)


def _unreachable(detail: str, target: Target) -> CommandError:
    """`detail`: gRPC's words."""
    why = errors.last_words(detail).rpartition(" error: ")[2]
    text, hint = f"{target.name} cannot be reached: {why}", target.unreachable
    if "Permission denied" in why:
        return CommandError(text, NOT_PERMITTED, target.not_permitted)
    if any(word in why for word in ("andshake", "SSL", "ertificate", "Socket closed")):
        hint = (
            f"does the CA (--tls-ca) fit {target.name}'s certificate, and ours (--tls-cert) its client_ca? are all of them in time?"
        )
    return CommandError(text, UNREACHABLE, hint)


def _as_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and (found := ctx.find_object(Context)):
        found.json = True


class Command(click.Command):
    """Takes --json behind its name as well, and fails with one line, never with a traceback."""

    target: ClassVar[Target] = HOST

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        shown = click.Option(["--json"], is_flag=True, expose_value=False, callback=_as_json, help="Results for programs.")
        self.params.append(shown)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            try:
                return super().invoke(ctx)
            except (grpc.RpcError, Refusal, AuthorityError, BundleError) as error:
                fail(error, self.target)
            except BrokenPipeError:
                raise  # click ends quietly
            except OSError as error:
                code = NOT_PERMITTED if isinstance(error, PermissionError) else FAILURE
                raise CommandError(f"{error.filename or 'a system call'}: {error.strerror or error}", code) from None
        except CommandError as error:
            found = ctx.find_object(Context)
            error.json = found is not None and found.json
            raise


class Group(click.Group):
    command_class = Command


pass_context = click.pass_obj


def default_authority() -> Path:
    return default_directory()
