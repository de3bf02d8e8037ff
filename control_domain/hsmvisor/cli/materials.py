"""hsmvisor material ...: keys and certificates in modules, generation by generation."""

from __future__ import annotations

import time
from typing import Any, BinaryIO

import click
from hsmvisor.authority import Bundle, Staging
from hsmvisor.cli.context import USAGE, CommandError, Context, Group, pass_context, plain, table, when
from hsmvisor.cli.parameters import Duration, HexBytes
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc

PROFILES = ("tls", "ssh", "request-signing", "decrypt", "card", "any")


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
@click.option(
    "--mode",
    type=click.Choice(["pin", "follow"]),
    default="pin",
    show_default=True,
    help="follow: a bare key whose handle signs with the newest generation.",
)
@click.option("--profile", type=click.Choice(PROFILES), default="tls", show_default=True, help="What the key may do.")
@click.option("--alias-id", type=HexBytes(), default=b"", help="CKA_ID that finds it too, for clients configured by id.")
@click.option(
    "--drain", type=Duration(), default=0, help="How long it serves after it retires; default: until its certificate expires."
)
@click.option(
    "--after-drain", type=click.Choice(["extend", "refuse"]), default="extend", show_default=True,
    help="Whether who holds it may go on when that time is over, as long as it is used.",
)  # fmt: skip
@click.option(
    "--on-expiry", type=click.Choice(["keep", "refuse"]), default="keep", show_default=True,
    help="Whether the key signs on after its certificate expired.",
)  # fmt: skip
@click.option("--self-signed", is_flag=True, help="Show a bare key with a self-signed certificate (Java hides keys without one).")
@click.option("--no-activate", is_flag=True, help="Stage only.")
@click.option("--again", is_flag=True, help="Make a new generation even of what is current already.")
@pass_context
def push(
    ctx: Context, /, module: str, name: str, key: BinaryIO | None, cert: BinaryIO | None, passphrase_file: BinaryIO | None,
    no_activate: bool, again: bool, drain: int, **staging: Any,
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
    wanted = Staging(drain_seconds=drain, **staging)
    generation, state = (0, "") if again else pusher.delivered(module, name, bundle, wanted)
    if state == "current" or (state and no_activate):
        answer, more = pb.ExecuteResponse(material=name, generation=generation, status=_get(ctx, module, name)), " already"
    else:
        more = ""
        if not state:
            generation = pusher.next_generation(module, name)
            answer = pusher.stage(module, name, bundle, wanted, generation)
        if not no_activate:
            answer = pusher.activate(module, name, generation)
        state = "staged" if no_activate else "current"
    text = f"{name} in {module}: generation {generation} ({answer.status.key_type}) is {state}{more}"
    ctx.result(answer, lambda: click.echo(text))


@material.command("list")
@click.argument("module")
@pass_context
def list_(ctx: Context, module: str) -> None:
    """The materials of a module with their generations: state, last use, who holds them."""
    found = _list(ctx, module)
    ctx.result({"materials": [plain(m) for m in found]}, lambda: show_materials(found))


def _list(ctx: Context, module: str) -> list[pb.Material]:
    stub, token = rpc.MaterialServiceStub(ctx.channel), ""
    found: list[pb.Material] = []
    while True:
        answer = stub.ListMaterials(pb.ListMaterialsRequest(module=module, page_token=token), timeout=ctx.timeout)
        found += answer.materials
        token = answer.next_page_token
        if not token:
            return found


def _get(ctx: Context, module: str, name: str) -> pb.Material:
    return rpc.MaterialServiceStub(ctx.channel).GetMaterial(pb.GetMaterialRequest(module=module, name=name), timeout=ctx.timeout)


@material.command()
@click.argument("module")
@click.argument("name")
@pass_context
def show(ctx: Context, module: str, name: str) -> None:
    """One material with its generations."""
    found = _get(ctx, module, name)
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
