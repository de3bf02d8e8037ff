"""hsmvisor module ...: the secure modules of a host."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from typing import Any, BinaryIO, TextIO

import click
import grpc
from hsmvisor.cli.context import REFUSED, USAGE, CommandError, Context, Group, pass_context, plain, table, when
from hsmvisor.cli.parameters import CryptoprocessorName, HexBytes, MechanismName
from hsmvisor.host.config import SOFTWARE
from hsmvisor_rpc.internal.mechanisms import FORBIDDABLE
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb


@click.group(cls=Group)
def module() -> None:
    """The secure modules of a host, one for each guest."""


class SlotMaterial(click.ParamType[tuple[str, str]]):
    """SLOT=MATERIAL of a smart card."""

    name = "SLOT=MATERIAL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        slot, equals, material = str(value).partition("=")
        if not (slot and equals and material):
            self.fail(f"{value!r} is not SLOT=MATERIAL, as 9a=web", param, ctx)
        return slot.lower(), material


class HandleMaterial(click.ParamType[tuple[str, str]]):
    """HANDLE=MATERIAL of a TPM."""

    name = "HANDLE=MATERIAL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        handle, equals, material = str(value).partition("=")
        if not (handle and equals and material):
            self.fail(f"{value!r} is not HANDLE=MATERIAL, as 0x81800001=web", param, ctx)
        return handle.lower(), material


def request_id() -> str:
    return str(uuid.uuid4())


def _settings(
    log_signatures: bool,
    max_sessions: int,
    max_connections: int,
    guest_token: bool,
    mechanisms: tuple[str, ...],
    forbidden: tuple[str, ...],
    card_slots: tuple[tuple[str, str], ...],
    yubikey: bool,
    usb_id: str,
    card_replug: bool,
    tpm: bool,
    tpm_keys: tuple[tuple[str, str], ...],
    tpm_no_firmware: bool,
    cryptoprocessor: str = SOFTWARE,
    **policy: Any,
) -> pb.ModuleSettings:
    if len(dict(card_slots)) != len(card_slots):
        raise click.UsageError("--card-slot names each slot once")
    card = pb.Card(slots=dict(card_slots), yubikey=yubikey, usb_id=usb_id, replug=card_replug)
    if len(dict(tpm_keys)) != len(tpm_keys):
        raise click.UsageError("--tpm-key names each handle once")
    if (tpm_keys or tpm_no_firmware) and not tpm:
        raise click.UsageError("--tpm-key and --tpm-no-firmware go with --tpm")
    by_tpm = pb.Tpm(enabled=tpm, keys=dict(tpm_keys), no_firmware=tpm_no_firmware)
    allowed = pb.Policy(mechanisms=sorted(set(mechanisms)), forbidden=sorted(set(forbidden)), **policy)
    return pb.ModuleSettings(
        log_signatures=log_signatures,
        max_sessions=max_sessions,
        max_connections=max_connections,
        policy=allowed if allowed.ByteSize() else None,
        guest_token=guest_token,
        cryptoprocessor="" if cryptoprocessor == SOFTWARE else cryptoprocessor,
        card=card if card.ByteSize() else None,
        tpm=by_tpm if by_tpm.ByteSize() else None,
    )


def _settings_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--max-connections", default=0, help="Connections of the guest at the same time; 0 = 256."),
        click.option("--max-sessions", default=0, help="PKCS#11 sessions; 0 = 4096."),
        click.option("--burst", default=0, help="Operations at once; 0 = as many as --rate."),
        click.option("--rate", default=0, help="Operations with keys a second; 0 = no limit."),
        click.option("--min-ec-bits", default=0, help="The smallest curve (Ed25519 and X25519 count as 256); 0 = no limit."),
        click.option("--min-rsa-bits", default=0, help="The smallest RSA (DSA, Diffie-Hellman) key; 0 = no limit."),
        click.option(
            "--mechanism",
            "mechanisms",
            multiple=True,
            type=MechanismName(),
            help="What keys may be used for; may be repeated. None = all.",
        ),
        click.option(
            "--legacy",
            is_flag=True,
            help="Slot 1 has what is old or weak: triple DES, DSA, Diffie-Hellman over primes, AES_MAC, P-192, short RSA keys.",
        ),
        click.option("--min-pin", default=0, help="Bytes of a new PIN in slot 1, 4 to 64; 0 = 4."),
        click.option(
            "--forbid",
            "forbidden",
            multiple=True,
            type=click.Choice(FORBIDDABLE),
            help="What the guest may not do in slot 1; may be repeated.",
        ),
        click.option(
            "--usb-id",
            default="",
            metavar="VVVV:PPPP",
            help="Ids of the USB device (control_domain/docs/usb.md).",
        ),
        click.option("--yubikey", is_flag=True, help="The smart card answers what ykcs11 and ykman ask of a YubiKey."),
        click.option(
            "--card-replug",
            is_flag=True,
            help="With another key the whole USB device goes, and comes back under another serial number: for guests in which "
            "several programs share the card. Whatever has the module over USB is cut off then.",
        ),
        click.option(
            "--card-slot",
            "card_slots",
            multiple=True,
            type=SlotMaterial(),
            help="What the smart card has in a PIV slot (9a, 9c, 9d, 9e, 82 to 95); may be repeated. "
            "None = materials fill 9a, then 82 to 95, as they come.",
        ),
        click.option(
            "--tpm-no-firmware",
            is_flag=True,
            help="The guest's kernel is started without firmware: nobody gets the password of the TPM's platform hierarchy.",
        ),
        click.option(
            "--tpm-key",
            "tpm_keys",
            multiple=True,
            type=HandleMaterial(),
            help="What the TPM has at a persistent handle (0x81800000 to 0x8180ffff; or of its owner, who may take it away, "
            "0x81000000 to 0x8100ffff); may be repeated.",
        ),
        click.option("--tpm", is_flag=True, help="The module is a TPM 2.0 too; the guest is started with it (qemu-args --as tpm)."),
        click.option("--guest-token", is_flag=True, help="Slot 1: a token where the guest makes and keeps keys of its own."),
        click.option("--log-signatures", is_flag=True, help="An audit line for each signature."),
    ):
        command = option(command)
    return command


def show_module(m: pb.Module) -> None:
    rows = [
        ("name", m.name),
        ("id", m.module_id.hex()),
        ("state", m.state),
        ("address", m.address),
        ("created", when(m.created_at)),
        ("worker", f"pid {m.pid}, {m.restarts} restarts" if m.pid else "-"),
        ("root", m.root.hex()[:16]),
        ("PIN", "set" if m.pin_set else "-"),
        ("token", "attached" if m.token_present else "detached"),
        ("in use", f"{m.connections} connections, {m.sessions} sessions, {m.materials} materials"),
    ]
    rows.append(("cryptoprocessor", _cryptoprocessor(m)))
    rows.append(("guest's own keys", "slot 1" if m.settings.guest_token else "-"))
    rows.append(("policy", _policy(m.settings.policy)))
    rows.append(("guest", _guest(m.device)))
    rows.append(("USB", _usb(m.device.usb)))
    rows.append(("smart card", _card(m.settings.card)))
    rows.append(("TPM", _tpm(m)))
    if m.failure:
        rows.append(("failure", m.failure))
    table(("", ""), rows)
    if m.measures:
        click.echo("sandbox:")
        table(("measure", "", "detail"), [(x.name, "yes" if x.applied else "NO", x.detail) for x in m.measures])


def _cryptoprocessor(m: pb.Module) -> str:
    if not m.settings.cryptoprocessor:
        return SOFTWARE
    helper = f"helper pid {m.hsm_helper.pid}, {m.hsm_helper.restarts} restarts" if m.hsm_helper.pid else "no helper now"
    return f"{m.settings.cryptoprocessor} ({m.hsm_helper.token or 'token not known'}), {helper}"


def _policy(policy: pb.Policy) -> str:
    told = [f"mechanisms {', '.join(policy.mechanisms)}"] if policy.mechanisms else []
    told += [f"RSA from {policy.min_rsa_bits} bits"] if policy.min_rsa_bits else []
    told += [f"curves from {policy.min_ec_bits} bits"] if policy.min_ec_bits else []
    told += [f"{policy.rate} operations/s, {policy.burst or policy.rate} at once"] if policy.rate else []
    told += [f"forbidden: {', '.join(policy.forbidden)}"] if policy.forbidden else []
    told += [f"PINs from {policy.min_pin} bytes"] if policy.min_pin else []
    told += ["legacy mechanisms and keys"] if policy.legacy else []
    return "; ".join(told) or "-"


def _usb(usb: pb.Usb) -> str:
    """Who has the module as a USB device."""
    told = [f"{usb.protocol}, {usb.peer}"] if usb.protocol else []
    if usb.HasField("attachment"):
        if usb.attachment.listen:
            deaf = "" if usb.attachment.listening else " (not listening: see the host's log, then attach it again)"
            told.append(f"USB/IP at {usb.attachment.listen}{deaf} for {', '.join(usb.attachment.peers)}")
        else:
            told.append(f"in the guest at {usb.attachment.qmp_path}, since {when(usb.attachment.attached_at)}")
        if not usb.protocol:
            told.append("not imported now")
    return "; ".join(told) or "-"


def _card(card: pb.Card) -> str:
    told = [f"{slot} {material}" for slot, material in sorted(card.slots.items())]
    told += ["as a YubiKey"] if card.yubikey else []
    told += [f"ids {card.usb_id}"] if card.usb_id else []
    told += ["replugged for another key"] if card.replug else []
    return ", ".join(told) or "-"


def _tpm(m: pb.Module) -> str:
    if not m.HasField("tpm"):
        return "-"
    told = [f"{m.tpm.state}, pid {m.tpm.pid}, {m.tpm.restarts} restarts" if m.tpm.pid else m.tpm.state]
    told += [m.tpm.failure] if m.tpm.failure else []
    told += [f"QEMU {m.tpm.peer}" if m.tpm.peer else "in no machine now"]
    told += [f"for QEMU at {m.tpm.socket}", f"for the TSS, where no machine has it, at {m.tpm.tss_path}"] if m.tpm.socket else []
    told += [f"{handle} {material}" for handle, material in sorted(m.settings.tpm.keys.items())]
    told += [f"NOT AS IT SHOULD BE: {m.tpm.keys_failure}"] if m.tpm.keys_failure else []
    return "\n".join(told)


def _guest(device: pb.Device) -> str:
    """Where the module is plugged in."""
    if not device.HasField("attachment"):
        return f"started with it, CID {device.guest_cid}" if device.plugged else "-"
    attached = device.attachment
    if attached.hybrid_path:
        deaf = "" if attached.listening else "; not listening: see the host's log, then attach it again"
        return f"{attached.hybrid_path}, port {device.port}, since {when(attached.attached_at)}{deaf}"
    lost = "" if device.plugged else "; its QEMU is not connected now"
    return f"{attached.qmp_path}, bus {attached.bus}, CID {device.guest_cid}, since {when(attached.attached_at)}{lost}"


@module.command()
@click.argument("name")
@_settings_options
@click.option(
    "--cryptoprocessor",
    default=SOFTWARE,
    show_default=True,
    type=CryptoprocessorName(),
    help="Where its keys live, for good: software, or an HSM of the host's configuration (hsmvisor host show).",
)
@click.option("--root", type=HexBytes(32), help="Hexadecimal root key that the module obeys; default: this authority's.")
@click.option("--request-id", "ident", help="Makes a repeated call the same call.")
@pass_context
def create(ctx: Context, /, name: str, root: bytes | None, ident: str | None, **settings: Any) -> None:
    """Make a module for guest NAME; a module that is there with the same root and settings is left as it is.

    Example: hsmvisor module create web-1
    """
    found = None
    if ident is None:  # with an id it is the host that knows whether this very call was carried out
        try:
            found = ctx.modules.GetModule(pb.GetModuleRequest(name=name), timeout=ctx.timeout)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
    key, wanted = root or ctx.authority(create=True).root_public, _settings(**settings)
    if found is None:
        request = pb.CreateModuleRequest(request_id=ident or request_id(), name=name, root=key, settings=wanted)
        found = ctx.modules.CreateModule(request, timeout=ctx.timeout)
    elif found.root != hashlib.sha256(key).digest():
        raise CommandError(f"module {name} exists and obeys another root", REFUSED, "choose another name, or give its authority")
    elif wanted.cryptoprocessor not in (found.settings.cryptoprocessor, ""):
        where = found.settings.cryptoprocessor or SOFTWARE
        raise CommandError(f"module {name} exists and its keys live in {where}, for good", REFUSED, "choose another name")
    elif wanted not in (found.settings, pb.ModuleSettings()):
        raise CommandError(f"module {name} exists with other settings", REFUSED, f"hsmvisor module settings {name} changes them")
    ctx.result(found, lambda: click.echo(f"module {found.name} serves at {found.address}"))


@module.command("list")
@pass_context
def list_(ctx: Context) -> None:
    """The modules of the host."""
    found = ctx.all_modules()
    columns = ("name", "state", "cryptoprocessor", "materials", "connections", "pid", "restarts", "address")
    rows = [
        (m.name, m.state, m.settings.cryptoprocessor or SOFTWARE, m.materials, m.connections, m.pid or "-", m.restarts, m.address)
        for m in found
    ]
    ctx.result({"modules": [plain(m) for m in found]}, lambda: table(columns, rows))


@module.command()
@click.argument("name")
@pass_context
def show(ctx: Context, name: str) -> None:
    """One module with the measures of its sandbox."""
    found = ctx.modules.GetModule(pb.GetModuleRequest(name=name), timeout=ctx.timeout)
    ctx.result(found, lambda: show_module(found))


@module.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--request-id", "ident", help="Makes a repeated call the same call.")
@pass_context
def destroy(ctx: Context, name: str, yes: bool, ident: str | None) -> None:
    """End a module and forget its keys; this cannot be undone."""
    if not yes:
        click.confirm(f"Destroy module {name} with all its keys?", abort=True, err=True)
    done = ctx.modules.DestroyModule(pb.DestroyModuleRequest(request_id=ident or request_id(), name=name), timeout=ctx.timeout)

    def text() -> None:
        click.echo(f"module {name} is destroyed")
        if done.keys_left:
            click.echo(f"its keys are still in its HSM ({done.keys_left}); the host destroys them there when that is possible")

    ctx.result({"destroyed": name, "keys_left": done.keys_left}, text)


@module.command()
@click.argument("name", required=False, default="")
@pass_context
def watch(ctx: Context, name: str) -> None:
    """Follow the modules' changes until Ctrl-C."""
    for change in ctx.modules.WatchModules(pb.WatchModulesRequest(name=name)):
        ctx.line(change, f"{change.kind:10} {change.module.name} {change.module.state}")


@module.command()
@click.argument("name")
@pass_context
def identity(ctx: Context, name: str) -> None:
    """The module's identity, checked against the pinned key of its host."""
    target = ctx.pusher().target(name)
    known = target.identity
    report = {
        "name": known.name,
        "module_id": known.module_id.hex(),
        "host_id": known.host_id.hex(),
        "root": known.root.hex(),
        "recipient": known.recipient.hex(),
        "sequence": target.sequence,
    }
    ctx.result(report, lambda: table(("", ""), [(k, v if k != "recipient" else str(v)[:32] + "...") for k, v in report.items()]))


@module.command("set-pin")
@click.argument("name")
@click.option("--pin-file", type=click.File("rb"), help="File with the PIN; - reads standard input. Default: a prompt.")
@click.option("--clear", is_flag=True, help="Take the PIN away.")
@pass_context
def set_pin(ctx: Context, name: str, pin_file: BinaryIO | None, clear: bool) -> None:
    """Set the PIN that applications must log in with; without one, any login is accepted."""
    if clear:
        pin = b""
    elif pin_file is not None:
        pin = pin_file.read().strip()
    else:
        pin = click.prompt("PIN", hide_input=True, confirmation_prompt=True, err=True).encode()
    found = ctx.modules.SetPin(pb.SetPinRequest(request_id=request_id(), name=name, pin=pin), timeout=ctx.timeout)
    ctx.result(found, lambda: click.echo(f"the PIN of {name} is {'set' if found.pin_set else 'taken away'}"))


@module.command()
@click.argument("name")
@click.argument("action", type=click.Choice(["attach", "detach"]))
@pass_context
def token(ctx: Context, name: str, action: str) -> None:
    """Attach or detach the token: applications see it by C_WaitForSlotEvent."""
    request = pb.SetTokenPresentRequest(request_id=request_id(), name=name, present=action == "attach")
    found = ctx.modules.SetTokenPresent(request, timeout=ctx.timeout)
    ctx.result(found, lambda: click.echo(f"the token of {name} is {action}ed"))


@module.command()
@click.argument("name")
@_settings_options
@pass_context
def settings(ctx: Context, /, name: str, **values: Any) -> None:
    """Replace a module's settings, in service."""
    request = pb.UpdateModuleRequest(request_id=request_id(), name=name, settings=_settings(**values))
    found = ctx.modules.UpdateModule(request, timeout=ctx.timeout)
    ctx.result(found, lambda: show_module(found))


@module.command()
@click.argument("name")
@pass_context
def stats(ctx: Context, name: str) -> None:
    """What a module has done."""
    found = ctx.modules.GetStatistics(pb.GetStatisticsRequest(name=name), timeout=ctx.timeout)
    rows = [
        (o.operation, o.mechanism or "-", o.count, o.errors, f"{o.seconds / o.count * 1e6:.0f}" if o.count else "-")
        for o in found.operations
    ]

    def text() -> None:
        table(("operation", "mechanism", "count", "errors", "mean µs"), rows)
        click.echo(
            f"{found.connections} connections ({found.connections_total} in all, {found.connections_refused} refused), "
            f"{found.sessions} sessions, {found.resident_bytes / 2**20:.1f} MiB, up {found.uptime_seconds:.0f} s"
        )

    ctx.result(found, text)


@module.command()
@click.argument("name")
@pass_context
def env(ctx: Context, name: str) -> None:
    """The variables that point a guest's applications to the module: with our library, and with p11-kit's."""
    found = ctx.modules.GetModule(pb.GetModuleRequest(name=name), timeout=ctx.timeout)
    variables = {"HSMVISOR_PKCS11_ADDRESS": found.address, "P11_KIT_SERVER_ADDRESS": found.address}
    ctx.result(variables, lambda: click.echo("\n".join(f"export {k}='{v}'" for k, v in variables.items())))


@module.command()
@click.argument("names", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All modules of the host, one after the other.")
@click.option("--keep-launcher", is_flag=True, help="Fork from the launcher as it is; default: start it anew first.")
@pass_context
def upgrade(ctx: Context, names: tuple[str, ...], every: bool, keep_launcher: bool) -> None:
    """Replace the worker processes of modules, in service.

    The new process runs the code that is installed now. State, connections, sessions and open operations go along; guests notice
    nothing. A module that failed is tried again at once, also where a wrong PIN of its HSM stood in the way.

    Example: hsmvisor module upgrade --all
    """
    if every == bool(names):
        raise click.UsageError("give the names of modules, or --all")
    done: list[pb.UpgradeModuleResponse] = []
    for name in [m.name for m in ctx.all_modules()] if every else names:
        request = pb.UpgradeModuleRequest(request_id=request_id(), name=name, renew_launcher=not keep_launcher and not done)
        with ctx.patience(f"replacing the worker of {name}"):
            done.append(ctx.modules.UpgradeModule(request, timeout=ctx.timeout))
        if not ctx.json:
            what = "replaced" if done[-1].old_pid else "it had failed, and was started"
            click.echo(f"{name}: {what} in {done[-1].seconds * 1000:.0f} ms", err=True)
    columns = ("name", "pid", "was", "connections", "applications", "lingering", "paused ms")
    rows = [(u.name, u.pid, u.old_pid, u.connections, u.applications, u.lingering, f"{u.paused_seconds * 1000:.1f}") for u in done]
    ctx.result({"upgraded": [plain(u) for u in done]}, lambda: table(columns, rows))


@module.command("break-glass")
@click.argument("name")
@click.option("--why", required=True, help="The reason; it stands in the audit log.")
@click.option(
    "--new-root",
    type=click.File("r"),
    help="File with the new root key in hexadecimal (an authority's root.pub); default: this authority's.",
)
@click.option("--yes-empty-it", "empty", is_flag=True, help="Every key of the module is lost, and you know it.")
@click.option("--request-id", "ident", help="Makes a repeated call the same call.")
@pass_context
def break_glass(ctx: Context, name: str, why: str, new_root: TextIO | None, empty: bool, ident: str | None) -> None:
    """For a root that is lost: empty module NAME and have it obey another one. This cannot be undone.

    The module keeps its name, its address and its settings. All its keys are forgotten, and it has a new id and recipient key: what
    was signed or sealed for the old one fits it no more. Only on the host itself. Deliver the keys again afterwards.
    """
    if not empty:
        raise CommandError(f"every key of module {name} would be lost", USAGE, "give --yes-empty-it if that is what you want")
    try:
        root = bytes.fromhex(new_root.read().strip()) if new_root else ctx.authority(create=True).root_public
    except ValueError:
        raise CommandError("the new root is not a key in hexadecimal", USAGE, "give the new authority's root.pub") from None
    request = pb.BreakGlassRequest(request_id=ident or request_id(), name=name, new_root=root, empty_it=True)
    found = ctx.modules.BreakGlass(request, timeout=ctx.timeout, metadata=(("hsmvisor-why", why),))
    ctx.result(found, lambda: click.echo(f"module {name} is empty and obeys the root {found.root.hex()[:16]}: deliver its keys"))
