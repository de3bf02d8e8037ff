"""The command's entry: options that all commands share, and the list of commands."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import BinaryIO

import click
from click.shell_completion import get_completion_class
from hsmvisor.cli import context, devices, requests, tpm_tcp, tpms
from hsmvisor.cli.backups import backup, restore
from hsmvisor.cli.context import USAGE, CommandError, Context, Group
from hsmvisor.cli.doctor import doctor
from hsmvisor.cli.fleet import policies as fleet_policies
from hsmvisor.cli.fleet.overview import fleet
from hsmvisor.cli.fleet.reach import Manager, ManagerOptions
from hsmvisor.cli.fleet.requests import request
from hsmvisor.cli.guests import guest
from hsmvisor.cli.hosts import audit, authority, events, host
from hsmvisor.cli.materials import material
from hsmvisor.cli.modules import module
from hsmvisor.cli.policies import policy
from hsmvisor.cli.usb import usb
from hsmvisor.client import SigningKey, TlsFiles

INTERRUPTED_WITHIN = 3.0  #: seconds that a command has after Ctrl-C to end by itself


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hsmvisor", prog_name="hsmvisor")
@click.option(
    "--host",
    "address",
    default=context.DEFAULT_HOST,
    envvar="HSMVISOR_HOST",
    show_default=True,
    show_envvar=True,
    help="unix:/path or host:port.",
)
@click.option("--timeout", default=30.0, show_default=True, help="Seconds for one call.")
@click.option("--json", "as_json", is_flag=True, help="Results for programs.")
@click.option(
    "--authority",
    "directory",
    type=click.Path(path_type=Path, readable=False),
    default=None,
    envvar="HSMVISOR_AUTHORITY",
    show_envvar=True,
    help="Directory of the authority's keys.",
)
@click.option("--root-passphrase-file", type=click.File("rb"), help="Passphrase of the root key.")
@click.option(
    "--tls-ca", type=click.Path(exists=True, path_type=Path), envvar="HSMVISOR_TLS_CA", show_envvar=True,
    help="CA of a host or manager that is reached by TCP.",
)  # fmt: skip
@click.option(
    "--tls-cert", type=click.Path(exists=True, path_type=Path), envvar="HSMVISOR_TLS_CERT", show_envvar=True,
    help="Our certificate, for mutual TLS.",
)  # fmt: skip
@click.option(
    "--tls-key", type=click.Path(exists=True, path_type=Path), envvar="HSMVISOR_TLS_KEY", show_envvar=True, help="And its key."
)
@click.option(
    "--manager", envvar="HSMVISOR_MANAGER", show_envvar=True, help="Of a fleet: unix:/path or host:port; see hsmvisor fleet --help."
)
@click.option(
    "--manager-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), envvar="HSMVISOR_MANAGER_FILE",
    show_envvar=True, help="Says how the manager is reached; default ~/.config/hsmvisor/manager.toml.",
)  # fmt: skip
@click.option(
    "--token-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), envvar="HSMVISOR_TOKEN_FILE", show_envvar=True,
    help="Access token for the manager.",
)  # fmt: skip
@click.option("--why", default="", envvar="HSMVISOR_WHY", show_envvar=True, help="A reason, for the audit log.")
@click.option(
    "--sign-key", type=click.Path(exists=True, path_type=Path), envvar="HSMVISOR_SIGN_KEY", show_envvar=True,
    help="Sign each request with this key (Ed25519 in PEM, or a shared secret in hexadecimal) instead of mutual TLS.",
)  # fmt: skip
@click.pass_context
def cli(
    ctx: click.Context, address: str, timeout: float, as_json: bool, directory: Path | None, root_passphrase_file: BinaryIO | None,
    tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None, manager: str | None, manager_file: Path | None,
    token_file: Path | None, why: str, sign_key: Path | None,
) -> None:  # fmt: skip
    """Secure modules for the guests of a hypervisor: make them, deliver keys to them sealed, renew them in service.

    \b
    A first tour on a host (root):
      hsmvisor doctor                           is this machine ready?
      hsmvisor module create web-1              a module for guest web-1
      hsmvisor material push web-1 tls --key tls.key --cert chain.pem
      hsmvisor module env web-1                 what the guest's applications need
      hsmvisor material list web-1              who holds which generation

    \b
    With a manager, which does all of that by policy, for many hosts, and renews it (hsmvisor fleet --help):
      hsmvisor request apply tls --name 'dns:{name}.example.net' --select env=prod
      hsmvisor request show tls

    \b
    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 refused, 5 not permitted, 6 unreachable, 7 not done in time.
    """
    tls = TlsFiles(tls_ca, tls_cert, tls_key) if tls_ca else None
    passphrase = root_passphrase_file.read().rstrip(b"\r\n") if root_passphrase_file else None
    try:
        signing = SigningKey.load(sign_key) if sign_key else None
    except (ValueError, OSError) as error:
        raise CommandError(str(error), USAGE) from None
    found = Context(address, timeout, as_json, directory or context.default_authority(), passphrase, tls, signing, why)
    found.manager = Manager(ManagerOptions.of(ctx), timeout, why)
    ctx.obj = found


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell: hsmvisor completion bash > /etc/bash_completion.d/hsmvisor"""
    completion_class = get_completion_class(shell)
    assert completion_class is not None
    click.echo(completion_class(cli, {}, "hsmvisor", "_HSMVISOR_COMPLETE").source())


for of_material in requests.COMMANDS:
    material.add_command(of_material)
for of_policy in fleet_policies.COMMANDS:
    policy.add_command(of_policy)
for of_module in (*devices.COMMANDS, *tpms.COMMANDS, *tpm_tcp.COMMANDS):
    module.add_command(of_module)
for command in (module, guest, material, fleet, request, host, authority, events, audit, backup, restore, policy, usb, doctor):
    cli.add_command(command)


def interrupted(number: int, frame: object) -> None:
    """Ctrl-C, as Python has it; but a library's lock that was taken at that moment keeps nobody waiting."""
    last = threading.Timer(INTERRUPTED_WITHIN, os._exit, (128 + number,))
    last.daemon = True
    last.start()
    raise KeyboardInterrupt


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not of a job in the background, which it does not concern
        signal.signal(signal.SIGINT, interrupted)
    cli.main(prog_name="hsmvisor")


if __name__ == "__main__":
    main()
