"""hsmvisor module attest, move-tpm: a module as its guest's TPM."""

from __future__ import annotations

import dataclasses
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import click
from hsmvisor.attestation import event_log
from hsmvisor.attestation.event_log import BadLog
from hsmvisor.cli.context import REFUSED, Command, CommandError, Context, pass_context, table
from hsmvisor.cli.parameters import HexBytes
from hsmvisor_rpc.sealed.attestation import verify_attestation
from hsmvisor_rpc.sealed.commands import MOVE_IDENT, MOVE_KEY
from hsmvisor_rpc.sealed.endorsement import TpmCertificates, verify_certificates
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import manager_pb2 as manager_pb

NONCE = 32  #: bytes
DIGEST = 32  #: bytes of a PCR of the SHA-256 bank
PCRS = 24  #: of a TPM

save_option = click.option(
    "--save",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for the TPM's certificates, in PEM: endorsement-rsa, endorsement-p256, platform, and ca, which issued them.",
)


class PcrValue(click.ParamType[tuple[int, bytes]]):
    """PCR=DIGEST."""

    name = "PCR=DIGEST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, bytes]:
        if isinstance(value, tuple):
            return value
        number, equals, digest = str(value).partition("=")
        try:
            found = bytes.fromhex(digest)
            pcr = int(number)
        except ValueError:
            found, pcr = b"", -1
        if not equals or len(found) != DIGEST or not 0 <= pcr < PCRS:
            self.fail(f"{value!r} is not PCR=DIGEST, a number from 0 to {PCRS - 1} and 64 hexadecimal digits", param, ctx)
        return pcr, found


@click.command(cls=Command)
@click.argument("name")
@click.option(
    "--pcr", "wanted", multiple=True, type=PcrValue(), help="What a PCR is to be; may be repeated. Exit code 4: it is not."
)
@click.option(
    "--event-log",
    "log",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The guest's /sys/kernel/security/tpm0/binary_bios_measurements: what was measured, held against the PCRs.",
)
@click.option("--host-key", type=HexBytes(32), help="Hexadecimal identity key of the host; default: the pinned key of --host.")
@save_option
@pass_context
def attest(
    ctx: Context, name: str, wanted: tuple[tuple[int, bytes], ...], log: Path | None, host_key: bytes | None, save: Path | None
) -> None:
    """Have the TPM of module NAME sign what its guest's boot was measured as, and verify it.

    The host's key says whose attestation key it is, that key has signed the PCRs with a nonce of this very call, and the event log,
    if it is given, leads to the PCRs. The guest has to have started, but is not asked, and cannot refuse.

    Which PCRs: those of --pcr and those that the event log has to lead to; without either 0 to 9 and 14.

    \b
    Exit code 4: a PCR is not as --pcr says, or the event log is not what the firmware's PCRs are made of.
    Examples:
      hsmvisor module attest web-1
      hsmvisor module attest web-1 --event-log log.bin --pcr 7=65caf8dd1e0ea7a6347b635d2b379c93b9a1351edc2afc3ecda700e534eb3068
    """
    nonce, listed = secrets.token_bytes(NONCE), None if log is None else _event_log(log)
    pcrs = sorted({*(pcr for pcr, _ in wanted), *(event_log.compared(listed, range(PCRS)) if listed else ())})
    found = ctx.modules.AttestTpm(pb.AttestTpmRequest(name=name, nonce=nonce, pcrs=pcrs), timeout=ctx.timeout)
    key, pinned = _host_key(ctx, host_key)
    module_id = ctx.modules.GetModule(pb.GetModuleRequest(name=name), timeout=ctx.timeout).module_id
    attested = verify_attestation(found.attestation, key, module_id, nonce)
    wrong = [(pcr, value, attested.pcrs.get(pcr, b"")) for pcr, value in wanted if attested.pcrs.get(pcr) != value]
    events = list(listed.events) if listed else []
    vouched = event_log.compared(listed, attested.pcrs) if listed else []
    differing = event_log.compare(listed, attested.pcrs) if listed else []
    if save is not None:
        told = ctx.modules.GetTpmIdentity(pb.GetTpmIdentityRequest(name=name), timeout=ctx.timeout)
        rsa, p256 = told.endorsement_certificates
        certificates = TpmCertificates(rsa, p256, told.platform_certificate, told.ca_certificate)
        verify_certificates(certificates.encode(), attested.identity)
        save_certificates(save, told)
    result = {
        "module": name,
        "pcrs": {str(pcr): value.hex() for pcr, value in attested.pcrs.items()},
        "resets": attested.resets,
        "restarts": attested.restarts,
        "host_key_pinned": pinned,
        "wrong": [{"pcr": pcr, "wanted": value.hex(), "found": is_.hex()} for pcr, value, is_ in wrong],
        "events": [dataclasses.asdict(event) | {"digest": event.digest.hex()} for event in events],
        "log_compared_in": vouched,
        "log_differs_in": differing,
    }

    def text() -> None:
        said = dict.fromkeys(attested.pcrs, "") | {pcr: f"NOT {value.hex()}" for pcr, value, _ in wrong}
        said |= {pcr: (said[pcr] + " NOT what the event log leads to").strip() for pcr in differing}
        table(("PCR", "SHA-256", ""), [(str(pcr), value.hex(), said[pcr]) for pcr, value in sorted(attested.pcrs.items())])
        if events:
            table(("PCR", "event", "of"), [(str(event.pcr), event.type, _said(event, vouched)) for event in events])
        click.echo(f"verified: the TPM of module {name}, started {attested.resets} times; its quote is of this moment")
        if not pinned:
            click.echo("the host's key is as the host itself says: enrol the host, or give --host-key, to know that it is this one")

    ctx.result(result, text)
    if wrong or differing:
        sys.exit(REFUSED)


def _host_key(ctx: Context, given: bytes | None) -> tuple[bytes, bool]:
    """Returns the host's key, and whether it was known before."""
    if given is not None:
        return given, True
    if (ctx.authority_directory / "root.pub").exists() and (known := ctx.authority().hosts.get(ctx.host)) is not None:
        return known, True
    return ctx.hosts.GetHost(pb.GetHostRequest(), timeout=ctx.timeout).host_key, False


def _said(event: event_log.Event, vouched: list[int]) -> str:
    """What an event is of; what nobody has signed is said to be the guest's word."""
    signed = event.pcr in vouched and event.description_measured
    return event.description if signed else f"{event.description} (the guest says)"


def _event_log(path: Path) -> event_log.Log:
    """Raises CommandError."""
    try:
        with path.open("rb") as file:
            return event_log.parse(file.read(event_log.MAX_LOG + 1))
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from None
    except BadLog as error:
        raise CommandError(f"{path} is no event log: {error}", REFUSED) from None


def save_certificates(directory: Path, found: pb.TpmIdentity | manager_pb.Measurement) -> None:
    """Raises CommandError."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    rsa, p256 = found.endorsement_certificates
    certificates = {
        "endorsement-rsa": rsa,
        "endorsement-p256": p256,
        "platform": found.platform_certificate,
        "ca": found.ca_certificate,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, der in certificates.items():
            (directory / f"{name}.pem").write_bytes(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM))
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from None


@click.command("move-tpm", cls=Command)
@click.argument("name")
@click.option("--to", "address", required=True, metavar="HOST", help="Where the guest goes: an address as --host takes it.")
@click.option("--as", "there", default="", metavar="NAME", help="What its module is called there; default: the same.")
@click.option("--cancel", is_flag=True, help="It does not go, after all: what was permitted is not any more.")
@pass_context
def move_tpm(ctx: Context, name: str, address: str, there: str, cancel: bool) -> None:
    """Permit the guest of module NAME to take its TPM along to another host.

    Both hosts' modules obey this authority and are TPMs, and the module at the other end has the keys that are to be in its TPM
    (hsmvisor material push). The authority gives both a key for this one move; then the guest's machine is migrated, as by QEMU's
    migrate, within 15 minutes. State that QEMU asks for meanwhile is for the other end alone, and is taken there once.

    A host that is reached by TCP is reached with --tls-ca, --tls-cert and --tls-key, and is enrolled (hsmvisor host enrol).

    \b
    Examples, on the host where the guest runs:
      hsmvisor --tls-ca ca.pem --tls-cert me.pem --tls-key me.key module move-tpm web-1 --to host-b:8470
      hsmvisor --tls-ca ca.pem --tls-cert me.pem --tls-key me.key module move-tpm web-1 --to host-b:8470 --cancel
    """
    ident, key = os.urandom(MOVE_IDENT), b"" if cancel else os.urandom(MOVE_KEY)
    here, other = ctx.at(ctx.host), ctx.at(address)
    with ctx.patience(f"telling both ends of the move of {name}"):
        other.pusher().move_tpm(there or name, False, ident, key)
        here.pusher().move_tpm(name, True, ident, key)
    result = {"move": ident.hex(), "leaves": name, "arrives": there or name, "to": address, "cancelled": cancel}
    said = "does not go, after all" if cancel else f"may go to {address} within 15 minutes: migrate its guest now"
    ctx.result(result, lambda: click.echo(f"the TPM of module {name} {said}"))


COMMANDS = (attest, move_tpm)  #: of the group `module`
