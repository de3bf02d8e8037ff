"""hsmvisor material ...: keys and certificates in modules, generation by generation."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from typing import Any, BinaryIO

import click
import grpc
from hsmvisor.authority import AuthorityError, Bundle, BundleError, Staging
from hsmvisor.authority.records import Delivery, content_of
from hsmvisor.authority.redelivery import redeliver as pusher_redeliver
from hsmvisor.cli.context import FAILURE, USAGE, CommandError, Context, Group, pass_context, plain, table, when
from hsmvisor.cli.parameters import Duration
from hsmvisor.cli.staging import staging_options
from hsmvisor_rpc.sealed.refusal import Refusal
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc


@click.group(cls=Group)
def material() -> None:
    """Keys and certificates in modules. A material has generations: staged, current, retiring, destroyed."""


def _rows(found: list[pb.Material]) -> list[tuple[Any, ...]]:
    return [
        (
            m.name,
            m.key_type,
            m.mode,
            m.profile,
            g.number,
            g.state,
            when(g.not_after),
            g.operations,
            when(g.last_used_at),
            g.connections,
        )
        for m in found
        for g in m.generations
    ]


def show_materials(found: list[pb.Material]) -> None:
    columns = ("material", "key", "mode", "profile", "generation", "state", "expires", "operations", "last used", "held by")
    table(columns, _rows(found))


def _passphrase(file: BinaryIO | None) -> bytes | None:
    return file.read().rstrip(b"\r\n") if file else None


@material.command()
@click.argument("module")
@click.argument("name")
@click.option("--key", type=click.File("rb"), help="Private key: PEM, DER (PKCS #8) or PKCS #12.")
@click.option("--cert", type=click.File("rb"), help="Certificates in PEM, in any order.")
@click.option("--passphrase-file", type=click.File("rb"), help="Passphrase of an encrypted key; - reads standard input.")
@staging_options
@click.option("--no-activate", is_flag=True, help="Stage only.")
@click.option("--again", is_flag=True, help="Make a new generation even of what is current already.")
@pass_context
def push(
    ctx: Context, /, module: str, name: str, key: BinaryIO | None, cert: BinaryIO | None, passphrase_file: BinaryIO | None,
    no_activate: bool, again: bool, **staging: Any,
) -> None:  # fmt: skip
    """Deliver a key and its certificates, sealed to MODULE, and make them current.

    Without --key the certificate alone is renewed. What is current already is left as it is; what an interrupted push staged is
    gone on with.

    Example: hsmvisor material push web-1 tls --key tls.key --cert chain.pem
    """
    if key is None and cert is None:
        raise CommandError("give --key, --cert or both", USAGE)
    bundle = Bundle.make(key.read() if key else None, cert.read() if cert else b"", _passphrase(passphrase_file))
    pusher = ctx.pusher()
    wanted = Staging(**staging)
    generation, state = (0, "") if again else pusher.delivered(module, name, bundle, wanted)
    if state == "current" or (state and no_activate):
        answer, more = pb.ExecuteResponse(material=name, generation=generation, status=get(ctx, module, name)), " already"
    else:
        more = ""
        if not state:
            generation = pusher.next_generation(module, name)
            answer = pusher.stage(module, name, bundle, wanted, generation, _path(key), _path(cert))
        if not no_activate:
            answer = pusher.activate(module, name, generation)
        state = "staged" if no_activate else "current"
    text = f"{name} in {module}: generation {generation} ({answer.status.key_type}) is {state}{more}"
    ctx.result(answer, lambda: click.echo(text))


def _path(file: BinaryIO | None) -> str:
    """Where the owner keeps it; empty for what came through a pipe."""
    return os.path.abspath(file.name) if file is not None and os.path.isfile(file.name) else ""


@material.command("list")
@click.argument("module")
@pass_context
def list_(ctx: Context, module: str) -> None:
    """The materials of a module with their generations: state, last use, who holds them."""
    found = _list(ctx, module)
    ctx.result({"materials": [plain(m) for m in found]}, lambda: show_materials(found))
    _say_what_is_owed(ctx, module)


def _say_what_is_owed(ctx: Context, module: str) -> None:
    """On the error output: for who delivers to this module."""
    try:
        pusher = ctx.known_pusher()
        owed = pusher.owed(module) if pusher is not None else ""
    except Refusal as error:
        owed = f"{error}: hsmvisor host enrol --replace when the host was set up anew"
    except (AuthorityError, grpc.RpcError):
        return  # it obeys another authority, or cannot say
    if owed:
        click.echo(f"hsmvisor: {owed}\n  hsmvisor material redeliver {module}", err=True)


def _list(ctx: Context, module: str) -> list[pb.Material]:
    stub, token = rpc.MaterialServiceStub(ctx.channel), ""
    found: list[pb.Material] = []
    while True:
        answer = stub.ListMaterials(pb.ListMaterialsRequest(module=module, page_token=token), timeout=ctx.timeout)
        found += answer.materials
        token = answer.next_page_token
        if not token:
            return found


def get(ctx: Context, module: str, name: str) -> pb.Material:
    return rpc.MaterialServiceStub(ctx.channel).GetMaterial(pb.GetMaterialRequest(module=module, name=name), timeout=ctx.timeout)


@material.command()
@click.argument("module")
@click.argument("name")
@pass_context
def show(ctx: Context, module: str, name: str) -> None:
    """One material with its generations."""
    found = get(ctx, module, name)
    ctx.result(found, lambda: show_materials([found]))


def _told(ctx: Context, answer: pb.ExecuteResponse) -> None:
    ctx.result(answer, lambda: show_materials([answer.status]))


@material.command()
@click.argument("module")
@click.argument("name")
@click.argument("generation", type=int)
@pass_context
def activate(ctx: Context, module: str, name: str, generation: int) -> None:
    """Make a staged generation current; the one before retires."""
    _told(ctx, ctx.pusher().activate(module, name, generation))


@material.command("roll-back")
@click.argument("module")
@click.argument("name")
@click.argument("generation", type=int)
@pass_context
def roll_back(ctx: Context, module: str, name: str, generation: int) -> None:
    """Make a retiring generation current again."""
    _told(ctx, ctx.pusher().roll_back(module, name, generation))


@material.command()
@click.argument("module")
@click.argument("name")
@click.argument("generation", type=int)
@click.option("--drain", type=Duration(), default=0, help="How long it still serves; default: as it was staged with.")
@click.option(
    "--after-drain", type=click.Choice(["extend", "refuse"]), default="extend", show_default=True,
    help="Whether who holds it may go on when that time is over, as long as it is used.",
)  # fmt: skip
@pass_context
def retire(ctx: Context, module: str, name: str, generation: int, drain: int, after_drain: str) -> None:
    """Take the current generation out of service, or set the drain of a retiring one anew."""
    _told(ctx, ctx.pusher().retire(module, name, generation, drain, after_drain))


@material.command()
@click.argument("module")
@click.argument("name")
@click.argument("generation", type=int)
@click.option("--compromised", is_flag=True, help="The key may be known to others: replace the process that held it as well.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_context
def destroy(ctx: Context, module: str, name: str, generation: int, compromised: bool, yes: bool) -> None:
    """Destroy a staged or retiring generation now: whoever still holds its key gets CKR_KEY_HANDLE_INVALID."""
    if not yes:
        click.confirm(f"Destroy generation {generation} of {name} in {module}?", abort=True, err=True)
    _told(ctx, ctx.pusher().destroy(module, name, generation, compromised))


@material.command()
@click.argument("module")
@click.argument("name", required=False)
@click.option("--key", type=click.File("rb"), help="For NAME: where its private key is now.")
@click.option("--cert", type=click.File("rb"), help="For NAME: where its certificates are now.")
@click.option("--passphrase-file", type=click.File("rb"), help="Passphrase of the encrypted keys.")
@click.option("--forget", is_flag=True, help="Deliver nothing; forget what the module had.")
@pass_context
def redeliver(
    ctx: Context, module: str, name: str | None, key: BinaryIO | None, cert: BinaryIO | None, passphrase_file: BinaryIO | None,
    forget: bool,
) -> None:  # fmt: skip
    """Bring MODULE up to what this authority delivered: after its host was restored from a backup, or the module was made anew.

    Keys are read where they were when they were pushed; the authority keeps none. What was destroyed since is destroyed again.
    """
    pusher = ctx.pusher()
    if forget:
        pusher.records.forget(module)
        ctx.result({"forgotten": module}, lambda: click.echo(f"what {module} had is forgotten"))
        return
    passphrase = _passphrase(passphrase_file)
    given = Bundle.make(key.read() if key else None, cert.read() if cert else b"", passphrase) if key or cert else None

    def source(material: str, delivery: Delivery) -> Bundle:
        return given if given is not None and material == name else _from_files(delivery, passphrase)

    done = pusher_redeliver(pusher, module, source)
    rows = [(o.material, o.done, o.generation or "-", o.detail) for o in done]

    def text() -> None:
        if rows:
            table(("material", "", "generation", "to do"), rows)
        else:
            click.echo(f"{module} has all that was delivered to it")

    ctx.result({"done": [dataclasses.asdict(o) for o in done]}, text)
    if any(o.done == "missing" for o in done):
        sys.exit(FAILURE)


def _from_files(delivery: Delivery, passphrase: bytes | None) -> Bundle:
    """Raises BundleError when the files do not hold what was delivered."""
    if delivery.made:
        raise BundleError("its key was made in the module")
    if not delivery.key_file:
        raise BundleError("its key came through a pipe")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb")) if path else None for path in (delivery.key_file, delivery.cert_file)]
        content = [file.read() if file else b"" for file in files]
    try:
        bundle = Bundle.make(content[0], content[1], passphrase)
    except BundleError as error:
        raise BundleError(f"{delivery.key_file}: {error}") from None
    if content_of(bundle.public_key, bundle.certificates) != delivery.content:
        raise BundleError(f"{delivery.key_file} holds another key or certificate than was delivered")
    return bundle


@material.command("generate-test")
@click.argument("directory", type=click.Path(file_okay=False))
@click.option("--name", default="localhost", show_default=True, help="DNS name of the leaf.")
@click.option(
    "--type",
    "kind",
    default="ec-p256",
    show_default=True,
    help="ec-p256, ec-p384, ec-p521, rsa-2048, rsa-3072, rsa-4096, ed25519, ed448, ml-dsa-44, ml-dsa-65, ml-dsa-87.",
)
@click.option("--days", default=30, show_default=True, help="Lifetime of the leaf.")
@pass_context
def generate_test(ctx: Context, directory: str, name: str, kind: str, days: int) -> None:
    """Make a key with a chain of a test CA in DIRECTORY: key.pem, chain.pem, ca.pem. For trying out, never for service."""
    from hsmvisor.cli.testing import make_chain

    began = time.monotonic()
    with ctx.patience(f"making a key of type {kind}"):
        files = make_chain(directory, name, kind, days)
    ctx.result({"files": files}, lambda: click.echo(f"made {', '.join(files)} in {time.monotonic() - began:.1f} s"))
