"""hsmvisor module attach, detach, qemu-args, libvirt-xml: a module as a device of a QEMU guest."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click
from hsmvisor.cli.context import REFUSED, Command, Context, pass_context, table
from hsmvisor.cli.modules import request_id
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb

FACES = {"vsock": pb.VSOCK, "usb": pb.USB, "tpm": pb.TPM}
_MACHINE = click.option(
    "--machine", type=click.Choice(["q35", "pc"]), default="q35", show_default=True, help="The guest's machine type."
)
_FACE = click.option(
    "--as",
    "face",
    type=click.Choice(list(FACES)),
    default="vsock",
    show_default=True,
    help="As what: a virtio-vsock device, a USB device (smart card reader, and channels for the library), or a TPM 2.0 "
    "(qemu-args and libvirt-xml alone: QEMU cannot plug one in). It may be all of them.",
)
_DRIVER = click.option(
    "--tpm-driver",
    "driver",
    type=click.Choice(["tpm-crb", "tpm-tis"]),
    default="tpm-crb",
    show_default=True,
    help="With --as tpm: the device that the guest's kernel drives.",
)
_IDENT = click.option("--request-id", "ident", help="Makes a repeated call the same call.")


@click.command(cls=Command)
@click.argument("name")
@click.option("--qmp", "path", type=click.Path(), help="QMP socket of the guest's QEMU: its -qmp unix:PATH,server=on,wait=off.")
@click.option("--hybrid", type=click.Path(), help="Vsock path (uds_path) of a Firecracker or Cloud Hypervisor guest.")
@click.option("--bus", default="", help="Id of a free pcie-root-port of the guest; default: the first one that is free.")
@_FACE
@click.option("--usbip", metavar="ADDRESS:PORT", help="With --as usb: where the guest's kernel imports it, here.")
@click.option("--peer", "peers", multiple=True, help="With --usbip: address or network that may import it; may be repeated.")
@_IDENT
@pass_context
def attach(
    ctx: Context,
    name: str,
    path: str | None,
    hybrid: str | None,
    bus: str,
    face: str,
    usbip: str | None,
    peers: tuple[str, ...],
    ident: str | None,
) -> None:
    """Plug module NAME into a running QEMU guest, or connect it with a guest of Firecracker or Cloud Hypervisor (--hybrid).

    The guest sees a virtio-vsock device and reaches its module at vsock:cid=2;port=9111, with stock drivers. What would fail in
    silence is checked first: shared guest memory, a free root port, no other vsock device; if something is missing, nothing is
    changed, and it is said which option QEMU needs. A module that is plugged in already is left as it is.

    With --as usb the guest sees a smart card reader with a PIV card, and programs with our library reach the whole token at usb:.
    It needs a USB controller alone. Where QEMU cannot be asked, the guest's kernel imports the device by USB/IP (--usbip), which
    has neither login nor encryption: only on the guest's own network, and only from --peer.

    \b
    Example:
      qemu-system-x86_64 ... -qmp unix:/run/vm/web-1.qmp,server=on,wait=off
      hsmvisor module attach web-1 --qmp /run/vm/web-1.qmp
      hsmvisor module attach db-2 --hybrid /srv/vm/db-2.vsock
      hsmvisor module attach web-1 --as usb --qmp /run/vm/web-1.qmp
      hsmvisor module attach web-1 --as usb --usbip 192.0.2.1:3240 --peer 192.0.2.17
    """
    if face == "tpm":
        raise click.UsageError(f"QEMU cannot plug a TPM in: start the guest with it (hsmvisor module qemu-args {name} --as tpm)")
    if face == "usb":
        _attach_usb(ctx, name, path, usbip, peers, bool(hybrid or bus), ident)
        return
    if usbip or peers:
        raise click.UsageError("--usbip and --peer go with --as usb")
    if (path is None) == (hybrid is None):
        raise click.UsageError("give one of --qmp and --hybrid")
    if hybrid is not None and bus:
        raise click.UsageError("--bus goes with --qmp")
    asked = pb.AttachModuleRequest(request_id=ident or request_id(), name=name, bus=bus)
    if path is not None:
        asked.qmp_path = str(Path(path).absolute())
    if hybrid is not None:
        asked.hybrid_path = str(Path(hybrid).absolute())
    with ctx.patience(f"plugging {name} in"):
        found = ctx.modules.AttachModule(asked, timeout=ctx.timeout)
    device = found.device
    if hybrid is not None:
        place = f"{device.attachment.hybrid_path}_{device.port}"
        ctx.result(found, lambda: click.echo(f"module {name} listens at {place}; in the guest: vsock:cid=2;port={device.port}"))
        return
    told = f"module {name} is plugged in (bus {device.attachment.bus}); in the guest: vsock:cid=2;port={device.port}"
    ctx.result(found, lambda: click.echo(told))


def _attach_usb(
    ctx: Context, name: str, path: str | None, usbip: str | None, peers: tuple[str, ...], others: bool, ident: str | None
) -> None:
    if others or (path is None) == (usbip is None):
        raise click.UsageError("with --as usb give one of --qmp and --usbip, and neither --hybrid nor --bus")
    if bool(peers) != bool(usbip):
        raise click.UsageError("--usbip and --peer go together: who may import the device is named")
    asked = pb.AttachModuleRequest(request_id=ident or request_id(), name=name, face=pb.USB)
    if path is not None:
        asked.qmp_path = str(Path(path).absolute())
    if usbip is not None:
        asked.usbip_listen = usbip
        asked.usbip_peers.extend(peers)
    with ctx.patience(f"plugging {name} in"):
        found = ctx.modules.AttachModule(asked, timeout=ctx.timeout)
    usb = found.device.usb
    told = f"module {name} is plugged in as USB device {usb.usb_id}; in the guest: usb:serial={usb.serial}"
    if usbip is not None:
        host, _, port = usbip.rpartition(":")
        import_it = f"usbip --tcp-port {port} attach -r {host.strip('[]')} -b {usb.serial}"
        told = f"module {name} may be imported at {usbip}; in the guest: modprobe vhci-hcd && {import_it}"
    ctx.result(found, lambda: click.echo(told))


@click.command(cls=Command)
@click.argument("name")
@click.option(
    "--qmp", "path", type=click.Path(), help="QMP socket of a guest that was started with the module; default: as attached."
)
@_FACE
@_IDENT
@pass_context
def detach(ctx: Context, name: str, path: str | None, face: str, ident: str | None) -> None:
    """Take module NAME out of its guest.

    Its connections from that guest end; its keys stay. The guest's kernel must run to let go of the device. Of a guest that has
    ended only the note is forgotten.
    """
    if face == "tpm":
        raise click.UsageError("QEMU cannot take a TPM out: stop the guest, and start it without")
    qmp = str(Path(path).absolute()) if path else ""
    what = FACES[face]
    asked = pb.DetachModuleRequest(request_id=ident or request_id(), name=name, qmp_path=qmp, face=what)
    with ctx.patience(f"waiting for the guest to let go of {name}"):
        found = ctx.modules.DetachModule(asked, timeout=ctx.timeout)
    ctx.result(found, lambda: click.echo(f"module {name} is in no guest" + " as a USB device" * (what == pb.USB)))


@click.command("qemu-args", cls=Command)
@click.argument("name")
@click.option("--memory", default="2G", show_default=True, help="Of the guest, as 512M or 4G.")
@_MACHINE
@_FACE
@_DRIVER
@click.option(
    "--check",
    "line",
    help="A QEMU command line of your own, quoted as one word: says what is wrong with it. Exit code 4: something is.",
)
@pass_context
def qemu_args(ctx: Context, name: str, memory: str, machine: str, face: str, driver: str, line: str | None) -> None:
    """Print the arguments of a QEMU guest that has module NAME from its start; they go beside the guest's own.

    Shared memory of its size, the connection to the module, and a root port so that it can be unplugged. As a TPM: QEMU's emulator
    backend at the module's socket, and the device.

    \b
    Examples:
      qemu-system-x86_64 -machine q35 $(hsmvisor module qemu-args web-1 --memory 4G) ...
      qemu-system-x86_64 -machine q35 $(hsmvisor module qemu-args web-1 --as tpm) ...
      hsmvisor module qemu-args web-1 --check "$(cat start-web-1)"
    """
    if face != "vsock" and line:
        raise click.UsageError("--check is for --as vsock: the others need nothing of the guest")
    asked = pb.DescribeDeviceRequest(
        name=name, memory=memory, machine=machine, command_line=line or "", face=FACES[face], tpm_driver=driver
    )
    found = ctx.modules.DescribeDevice(asked, timeout=ctx.timeout)
    rows = [(f.problem, f.change) for f in found.findings]

    def text() -> None:
        if rows:
            table(("what is wrong", "what to change"), rows)
        elif line:
            click.echo("nothing is wrong with it")
        else:
            words = list(found.qemu_arguments)
            click.echo("\n".join(shlex.join(pair) for pair in zip(words[::2], words[1::2], strict=True)))

    ctx.result(found, text)
    if rows:
        sys.exit(REFUSED)


@click.command("libvirt-xml", cls=Command)
@click.argument("name")
@_MACHINE
@_FACE
@_DRIVER
@pass_context
def libvirt_xml(ctx: Context, name: str, machine: str, face: str, driver: str) -> None:
    """Print the parts of a libvirt domain that has module NAME from its start: put them into it by virsh edit.

    libvirt has no element for a vhost-user-vsock device, so QEMU's arguments stand in its qemu:commandline; the xmlns:qemu of the
    first line is needed. See control_domain/docs/qemu.md for AppArmor.
    """
    asked = pb.DescribeDeviceRequest(name=name, machine=machine, face=FACES[face], tpm_driver=driver)
    found = ctx.modules.DescribeDevice(asked, timeout=ctx.timeout)
    ctx.result(found, lambda: click.echo(found.libvirt_xml, nl=False))


COMMANDS = (attach, detach, qemu_args, libvirt_xml)  #: of the group `module`
