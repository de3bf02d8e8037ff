"""hsmvisor usb: what an operator runs in a guest that does not see its module."""

from __future__ import annotations

import dataclasses
import json
import sys

import click
from hsmvisor import usb_import, usb_probe
from hsmvisor.cli.context import FAILURE, Command, CommandError, Context, Group, pass_context, table


@click.group(cls=Group)
def usb() -> None:
    """A module as a USB device, looked at from its guest."""


@usb.command(cls=Command)
@click.option("--serial", default="", metavar="NAME", help="Of the module, if several are plugged in; default: all.")
@pass_context
def probe(ctx: Context, serial: str) -> None:
    """Look, in the guest, at all that stands between a program and the module's USB device.

    Each step says what it found and, where something is wrong, what to do: the bus, the device, access to it, libccid's list of
    readers, pcscd, the card, and a channel of the PKCS#11 library. Nothing is changed, and no other program is disturbed.

    It asks neither host nor manager. A guest without this command runs the file usb_probe.py of the package by itself: it needs
    python3-usb alone.

    \b
    Exit code 1: something is wrong.
    Example:
      hsmvisor usb probe
    """
    found = list(usb_probe.probe(serial))
    if ctx.json:
        click.echo(json.dumps([dataclasses.asdict(one) for one in found]))
    else:
        table(("step", "", "found", "what to do"), [(f.step, f.result, f.found, f.change) for f in found])
    if any(one.result == usb_probe.WRONG for one in found):
        sys.exit(FAILURE)


@usb.command("import", cls=Command)
@click.argument("name")
@pass_context
def import_(ctx: Context, name: str) -> None:
    """Import the USB device of module NAME into this guest's kernel over vsock: no network, no QEMU option.

    The module is to be the guest's vsock device. Run it in the guest, as root, and again each time that the device was lost. A
    guest without this command runs the file usb_import.py of the package by itself.

    \b
    Example:
      hsmvisor usb import web-1
    """
    try:
        port = usb_import.import_device(name)
    except usb_import.NotImported as error:
        raise CommandError(str(error), FAILURE, error.hint) from None
    if ctx.json:
        click.echo(json.dumps({"port": port}))
    else:
        click.echo(f"imported, vhci port {port}")
