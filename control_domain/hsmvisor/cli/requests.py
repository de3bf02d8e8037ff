"""hsmvisor material generate, certify: keys that modules make, the requests for their certificates, and the certificates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import click
from hsmvisor.authority import Bundle, Staging
from hsmvisor.authority.csr import CertificateRequest
from hsmvisor.cli.context import Command, Context, pass_context
from hsmvisor.cli.materials import get
from hsmvisor.cli.staging import staging_options
from hsmvisor_rpc.sealed.commands import KEY_TYPES
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb

_KINDS = ("dns", "ip", "uri", "email")


@click.command(cls=Command)
@click.argument("module")
@click.argument("name")
@click.option("--key-type", type=click.Choice(KEY_TYPES), default="P-256", show_default=True, help="What to make.")
@click.option(
    "--dns", multiple=True, help="A host name for the certificate, or *.example.net; the first one is its common name too."
)
@click.option("--ip", multiple=True, help="An address for the certificate.")
@click.option("--uri", multiple=True, help="A URI for the certificate, such as spiffe://fleet/web-1.")
@click.option("--email", multiple=True, help="An e-mail address for the certificate.")
@staging_options
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the request there, not to the standard output.")
@click.option("--again", is_flag=True, help="Make another key even where one like it waits for its certificate.")
@pass_context
def generate(ctx: Context, /, module: str, name: str, key_type: str, out: Path | None, again: bool, **options: Any) -> None:
    """Have MODULE make the key itself, and print the request for its certificate (PKCS #10, PEM).

    The private key never exists outside of the module: it cannot be delivered again, nor be put into another module. It is a staged
    generation that no guest sees before you activate it. Give the request to your certificate authority, and its answer to
    `hsmvisor material certify`. A key of the same type, names and options that still waits for its certificate is not made again:
    its request is printed anew.

    Several names: give an option several times. Without any name the request is for the key alone.

    Example: hsmvisor material generate web-1 tls --key-type P-256 --dns www.example.net --out web-1.csr
    """
    names = [f"{kind}:{value}" for kind in _KINDS for value in options.pop(kind)]
    wanted, pusher = Staging(**options), ctx.pusher()
    found = None if again else pusher.generated(module, name, key_type, names, wanted)
    if found is not None:
        generation, request = found
    else:
        generation = pusher.next_generation(module, name)
        with ctx.patience(f"{module} is making a key of type {key_type}"):
            answer = pusher.generate(module, name, key_type, names, wanted, generation)
        request = CertificateRequest.read(answer.csr)
    if out is not None:
        out.write_bytes(request.pem)
    told = {"module": module, "material": name, "generation": generation, "key_type": key_type, "names": list(request.names)}
    more = {"already": found is not None, "csr": request.pem.decode(), "file": str(out or "")}

    def text() -> None:
        if out is None:
            click.echo(request.pem.decode(), nl=False)
        state = "waits for its certificate already" if found else "is staged and waits for its certificate"
        said = f"{name} in {module}: generation {generation} ({key_type}) {state}"
        cure = f"hsmvisor material certify {module} {name} {generation} --cert-file FILE --activate"
        click.echo(f"{said}\n  {cure}", err=out is None)

    ctx.result(told | more, text)


@click.command(cls=Command)
@click.argument("module")
@click.argument("name")
@click.argument("generation", type=int)
@click.option("--cert-file", type=click.File("rb"), required=True, help="Certificates in PEM or DER, in any order; - reads them.")
@click.option("--activate", is_flag=True, help="Make the generation current then; the one before retires.")
@pass_context
def certify(ctx: Context, module: str, name: str, generation: int, cert_file: BinaryIO, activate: bool) -> None:
    """Put the certificates that the authority made to a staged GENERATION that has none.

    They are checked against its key and each other before anything changes. What is there already is left as it is. To renew a
    certificate later, for the same key: hsmvisor material push MODULE NAME --cert FILE.

    Example: hsmvisor material certify web-1 tls 1 --cert-file chain.pem --activate
    """
    bundle, pusher = Bundle.make(None, cert_file.read()), ctx.pusher()
    status, more = get(ctx, module, name), " already"
    known = next((g for g in status.generations if g.number == generation), pb.Generation())
    answer = pb.ExecuteResponse(material=name, generation=generation, status=status)
    if tuple(known.certificates) != bundle.certificates:
        path = os.path.abspath(cert_file.name) if os.path.isfile(cert_file.name) else ""
        answer, more = pusher.certify(module, name, generation, bundle, path), ""
    if activate and known.state != "current":
        answer, more = pusher.activate(module, name, generation), ""
    state = next((g.state for g in answer.status.generations if g.number == generation), "")
    text = f"{name} in {module}: generation {generation} ({answer.status.key_type}) has its certificate and is {state}{more}"
    ctx.result(answer, lambda: click.echo(text))


COMMANDS = (generate, certify)  #: of the group `material`
