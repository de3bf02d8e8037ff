"""hsmvisor request import: a key of the owner's own, sealed here to the manager's issuer."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import BinaryIO, TextIO

import click
from hsmvisor.bundle import Bundle
from hsmvisor.cli.context import REFUSED, USAGE, CommandError, Context, pass_context
from hsmvisor.cli.fleet.finding import find
from hsmvisor.cli.fleet.parameters import MATERIAL_NAME, ident_option, owner_option
from hsmvisor.cli.fleet.reach import Manager, ManagerCommand, manager_of
from hsmvisor.cli.fleet.waiting import Waiting
from hsmvisor.cli.parameters import Duration, HexBytes
from hsmvisor.client.importing import checked_issuer, seal_import
from hsmvisor_rpc.v1 import manager_pb2 as pb


class RootKey(click.ParamType[bytes]):
    """In hexadecimal, or a file that holds it so (STATE/fleet/root/root.pub of a manager)."""

    name = "hex|file"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        if isinstance(value, bytes):
            return value
        text = str(value)
        if not re.fullmatch(r"[0-9a-fA-F]{64}", text) and Path(text).is_file():
            text = Path(text).read_text(encoding="ascii", errors="replace").strip()
        return HexBytes(32).convert(text, param, ctx)


@click.command("import", cls=ManagerCommand)
@click.argument("material", type=MATERIAL_NAME)
@owner_option
@click.option("--key-file", type=click.File("rb"), help="The private key: PEM, DER (PKCS #8) or PKCS #12; - reads standard input.")
@click.option("--cert-file", type=click.File("rb"), help="Its certificates in PEM or DER, in any order.")
@click.option("--passphrase-file", type=click.File("rb"), help="Passphrase of an encrypted key.")
@click.option(
    "--pkcs11",
    "library",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Instead of --key-file: the PKCS #11 library of the key store that has the key.",
)
@click.option("--token", default="", help="Label of the token there.")
@click.option("--label", default="", help="Label of the key there (CKA_LABEL).")
@click.option("--id", "key_id", type=HexBytes(), default=b"", help="Or its CKA_ID, in hexadecimal.")
@click.option("--pin-file", type=click.File("r"), help="The token's PIN; - reads standard input. Default: a prompt.")
@click.option(
    "--root",
    type=RootKey(),
    help="The fleet's root, in hexadecimal or as a file: its word counts for the issuer's key. Default: root in manager.toml.",
)
@click.option("--wait/--no-wait", default=None, help="Wait until it serves or fails; on a terminal that is the default.")
@click.option("--timeout", "within", type=Duration(), default=300, show_default="5m", help="How long to wait at most.")
@ident_option
@pass_context
def import_(
    ctx: Context, material: str, owner: str, key_file: BinaryIO | None, cert_file: BinaryIO | None,
    passphrase_file: BinaryIO | None, library: Path | None, token: str, label: str, key_id: bytes, pin_file: TextIO | None,
    root: bytes | None, wait: bool | None, within: int, ident: str,
) -> None:  # fmt: skip
    """Give the key (and its certificates) for a request with --source imported: the next generation of MATERIAL.

    It is sealed here to the fleet's issuer, a confined process of the manager, which seals it to the modules that are to have it
    and forgets it: the manager itself sees no key. That the issuer's key is the fleet's own is checked against the fleet's
    root, where you say which that is; otherwise you trust the connection to the manager for it.

    A key in a PKCS #11 key store may be imported where it may leave it (CKA_EXTRACTABLE); its certificates there come along.

    \b
    Example: hsmvisor request import web --key-file web.key --cert-file web.pem
    Example: hsmvisor request import web --pkcs11 /usr/lib/softhsm/libsofthsm2.so --token old --label web --pin-file pin
    """
    if (key_file is None) == (library is None):
        raise click.UsageError("give --key-file, or --pkcs11 with --token and --label or --id")
    if library is not None and not (token and (label or key_id)):
        raise click.UsageError("--pkcs11 comes with --token, and --label or --id")
    manager = manager_of(ctx)
    found = find(manager, material, owner)
    if found.spec.source != "imported":
        hint = f"cancel it and ask anew: hsmvisor request apply {material} --source imported ..."
        raise CommandError(f"{material} is not imported: its source is {found.spec.source}", REFUSED, hint)
    certificates = cert_file.read() if cert_file else b""
    if library is not None:
        bundle = _from_token(library, token, label, key_id, pin_file, certificates)
    else:
        assert key_file is not None
        passphrase = passphrase_file.read().rstrip(b"\r\n") if passphrase_file else None
        bundle = Bundle.make(key_file.read(), certificates, passphrase)
    issuer = _issuer(ctx, manager, root)
    asked = pb.ImportRequest(
        request_id=ident,
        id=found.id,
        envelope=seal_import(bundle, issuer, found.id),
        certificates=bundle.certificates,
        public_key=bundle.public_key,
    )
    done = manager.requests.Import(asked, timeout=manager.timeout)
    if sys.stderr.isatty() if wait is None else wait:
        newest = max((g.number for line in done.lines for g in line.generations), default=1)
        done = Waiting(ctx, within).until_done(done, {line.id: newest - 1 for line in done.lines})
        text = f"{material} of {done.owner}: the imported key serves"
    else:
        text = f"{material} of {done.owner}: the key is imported; hsmvisor request show {material} tells how far it is"
    ctx.result(done, lambda: click.echo(text))


def _issuer(ctx: Context, manager: Manager, root: bytes | None) -> bytes:
    """Returns to whom the key is sealed.  Raises Refusal, CommandError."""
    told = manager.requests.GetIssuer(pb.GetIssuerRequest(), timeout=manager.timeout)
    if root is None and manager.at.root:
        try:
            root = bytes.fromhex(manager.at.root)
        except ValueError:
            root = b""
        if len(root) != 32:
            raise CommandError("root in manager.toml is not a key in hexadecimal (64 characters)", USAGE)
    if root is None:
        if not ctx.json:
            click.echo(f"  the issuer's key is believed as {manager.at.address} tells it; --root KEY has it checked", err=True)
        return bytes(told.recipient)
    return checked_issuer(told.recipient, told.signature, root)


def _from_token(library: Path, token: str, label: str, key_id: bytes, pin_file: TextIO | None, certificates: bytes) -> Bundle:
    """Raises BundleError, CommandError."""
    try:
        from hsmvisor.client.key_stores import StoredKey, take_out
    except ImportError as error:
        raise CommandError(f"PKCS #11 cannot be used: {error.name} is not installed", USAGE, "pip install python-pkcs11") from None
    pin = pin_file.read().rstrip("\r\n") if pin_file else str(click.prompt(f"PIN of {token}", hide_input=True, err=True))
    return take_out(StoredKey(library, token, pin, label, key_id), certificates)
