"""hsmvisor fleet ...: the whole fleet as one manager sees it."""

from __future__ import annotations

import click
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.cli.context import Context, pass_context, plain, table
from hsmvisor.cli.fleet import hosts, records, resources, tokens
from hsmvisor.cli.fleet.reach import ManagerGroup, manager_of, words
from hsmvisor_rpc.v1 import manager_pb2 as pb


@click.group(cls=ManagerGroup)
def fleet() -> None:
    """A fleet: its hosts, their guests, who may call, and what happened, as its manager (hsmvisor-manager) tells it.

    \b
    How a manager is reached: --manager ADDRESS, or HSMVISOR_MANAGER, or the file ~/.config/hsmvisor/manager.toml
    (--manager-file, HSMVISOR_MANAGER_FILE), all of which may be left out:
      address     = "manager.example.net:8472"  default: unix:/run/hsmvisor-manager/control.sock
      ca          = "manager-ca.pem"            whom to believe as manager; --tls-ca instead
      certificate = "ann.pem"                   who you are: a certificate and its key; --tls-cert, --tls-key instead
      key         = "ann.key"
      token_file  = "ann.token"                 or an access token; --token-file, HSMVISOR_TOKEN_FILE instead
      root        = "9f3c..."                   the fleet's root, where keys are imported; --root instead
      server_name = "manager"                   in the manager's certificate, where it is not the address

    \b
    An operator, on the manager:
      hsmvisor fleet host token --for rack1-host7 --out host7.token    there: hsmvisor host join --name rack1-host7 host7.token
      hsmvisor fleet status                                            hosts, guests, certificates, what fails
      hsmvisor fleet token create --owner alice --out alice.token      with which alice comes from elsewhere
    An owner:
      hsmvisor fleet resources                                         your guests
      hsmvisor request apply web --name 'dns:{name}.example.net' --select env=prod
    An auditor:
      hsmvisor fleet events --limit 0
      hsmvisor fleet audit export > manager.audit
    """


for command in (*hosts.COMMANDS, *resources.COMMANDS, *tokens.COMMANDS, *records.COMMANDS):
    fleet.add_command(command)


@fleet.command()
@pass_context
def status(ctx: Context) -> None:
    """How the fleet is: hosts, guests, certificates, and what fails, waits or is denied.

    Example: hsmvisor fleet status --json | jq .failing
    """
    manager = manager_of(ctx)
    found = manager.fleet.GetFleet(pb.GetFleetRequest(), timeout=manager.timeout)
    away = f", {found.hosts_away} of them away" if found.hosts_away else ""
    rows = [
        ("managers", words(found.managers)),
        ("version", found.version),
        ("policies", f"version {found.policy_version}"),
        ("authorities", words(found.authorities)),
        ("hosts", f"{found.hosts}{away}"),
        ("resources", found.resources),
        ("requests", found.requests),
        ("certificates", f"{found.certificates} serve, {found.expiring} expire soon, {found.expired} expired"),
        ("deliveries", f"{found.pending} are not done"),
        ("failing", found.failing),
        ("denied", found.denied),
    ]
    ctx.result(found, lambda: table(("", ""), rows))


@fleet.command()
@pass_context
def whoami(ctx: Context) -> None:
    """Who you are to the manager, and what you may do there.

    Example: hsmvisor --manager manager.example.net:8472 --tls-ca ca.pem --token-file ann.token fleet whoami
    """
    manager = manager_of(ctx)
    found = manager.fleet.WhoAmI(pb.WhoAmIRequest(), timeout=manager.timeout)
    rows = [
        ("you are", found.name),
        ("owner", found.owner or "-"),
        ("groups", words(found.groups)),
        ("roles", words(found.roles)),
        ("manager", manager.at.address),
        ("the fleet's root", found.root.hex()),
        ("its audit log's key", found.audit_key.hex()),
    ]
    ctx.result(found, lambda: table(("", ""), rows))


@fleet.command()
@click.option(
    "--pem", is_flag=True, help="Print the authorities' root certificates instead, in PEM, for those who are to trust them."
)
@pass_context
def authorities(ctx: Context, pem: bool) -> None:
    """The certificate authorities that requests may name, and how much each has issued.

    Example: hsmvisor fleet authorities --pem > roots.pem
    """
    manager = manager_of(ctx)
    found = manager.authorities.ListAuthorities(pb.ListAuthoritiesRequest(), timeout=manager.timeout).authorities
    columns = ("authority", "kind", "", "root", "issued", "revoked")
    rows = [
        (one.name, one.kind, "default" if one.default else "", words(map(_root, one.roots)), one.issued, one.revoked)
        for one in found
    ]

    def text() -> None:
        if not pem:
            table(columns, rows)
            return
        for one in found:
            for der in one.roots:
                click.echo(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM).decode(), nl=False)

    ctx.result({"authorities": [plain(one) for one in found]}, text)


@fleet.command()
@pass_context
def metrics(ctx: Context) -> None:
    """Metrics of the manager that answers, and of what all managers share, in Prometheus' text format.

    Example: hsmvisor fleet metrics > /var/lib/node_exporter/fleet.prom
    """
    manager = manager_of(ctx)
    text = manager.fleet.GetMetrics(pb.GetFleetMetricsRequest(), timeout=manager.timeout).text
    ctx.result({"text": text}, lambda: click.echo(text, nl=False))


def _root(der: bytes) -> str:
    try:
        root = x509.load_der_x509_certificate(der)
        return f"{root.subject.rfc4514_string()} until {root.not_valid_after_utc:%Y-%m-%d}"
    except (ValueError, UnsupportedAlgorithm):
        return "a certificate that cannot be read"
