"""What is asked for, as options and as a file say it: both become the same RequestSpec."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from hsmvisor.cli.context import REFUSED, USAGE, CommandError
from hsmvisor.cli.fleet.parameters import AUTHORITY_NAME, RESOURCE_NAME
from hsmvisor.cli.guests import Attribute
from hsmvisor.cli.parameters import MAX_DURATION, Duration, seconds
from hsmvisor_rpc.v1 import manager_pb2 as pb

SOURCES = ("module", "issuer", "imported")
KEY_TYPES = ("P-256", "P-384", "P-521", "RSA-2048", "RSA-3072", "RSA-4096", "Ed25519")
USAGES = ("tls", "ssh", "request-signing", "decrypt", "card", "any")
KINDS = ("dns", "ip", "uri", "email")


@dataclass(frozen=True)
class Asked:
    """`owner`: for whom; empty: oneself.  `where`: what an error calls it."""

    spec: pb.RequestSpec
    owner: str = ""
    where: str = ""


class CertificateName(click.ParamType[str]):
    """dns:..., ip:..., uri:..., email:..., with places such as {name} in it."""

    name = "kind:name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        kind, separator, rest = text.partition(":")
        if not separator or not rest or kind not in KINDS:
            self.fail(f"{text!r}: a name begins with {', '.join(f'{k}:' for k in KINDS)} as in dns:www.example.net", param, ctx)
        return text


# ---- options --------------------------------------------------------------------------------------------------------

_RULE_OPTIONS = (
    click.option("--no-renewal", "off", is_flag=True, help="It is not renewed."),
    click.option(
        "--same-key/--new-key", default=False, help="Renewing makes a certificate for the same key, or a new key too (default)."
    ),
    click.option(
        "--renew-lead", "lead", type=Duration(), default=0, help="Renew so long before the end; default: by the lifetime."
    ),
    click.option("--cron", default="", help="Renew by this schedule: five fields as in crontab(5), UTC."),
    click.option("--period", type=Duration(), default=0, help="Renew so long after each activation."),
    click.option("--days", type=click.FloatRange(0), default=0.0, help="Renew a key that served so many days."),
    click.option("--signatures", type=click.IntRange(0, 10**12), default=0, help="Renew a key that made so many signatures."),
)

_SPEC_OPTIONS = (
    click.option("--name", "names", multiple=True, type=CertificateName(),
                 help="Of the certificate: dns:, ip:, uri: or email:; {name}, {host}, {ATTRIBUTE} are the resource's own."),
    click.option("--resource", "resources", multiple=True, type=RESOURCE_NAME, help="HOST/NAME that gets it; may be repeated."),
    click.option("--select", "selector", multiple=True, type=Attribute(),
                 help="ATTRIBUTE=VALUE: all that have it get it, also those that come later; kind, owner and host count too. "
                 "Given twice: both are demanded."),
    click.option("--source", type=click.Choice(SOURCES), default="module", show_default=True,
                 help="module: each makes a key of its own, which never leaves it; issuer: one key for all; imported: yours."),
    click.option("--key-type", type=click.Choice(KEY_TYPES), default="P-256", show_default=True, help="What key."),
    click.option("--authority", default="", type=AUTHORITY_NAME, help="Who certifies it; default: the manager's default."),
    click.option("--profile", default="", help="Of the authority: server (default), client, peer, email, signing."),
    click.option("--usage", type=click.Choice(USAGES), default="tls", show_default=True, help="What guests may do with the key."),
    click.option("--lifetime", type=Duration(), default=0, help="Of a certificate: 12h, 30d; default: the profile's."),
    click.option("--two-step", is_flag=True, help="Staged everywhere first, then activated everywhere."),
    click.option("--health", default="", help="A check that the manager knows: where it fails, the one before serves again."),
    click.option("--escrow", is_flag=True, help="An issuer's or imported key is kept, wrapped, for modules that come later."),
    click.option("--bare", is_flag=True, help="A key without a certificate."),
    click.option("--measured", multiple=True, metavar="NAME",
                 help="Only to guests whose boot is measured as NAME ([measured.NAME] of the manager); given twice: as either."),
    click.option("--mode", type=click.Choice(["pin", "follow"]), default="pin", show_default=True,
                 help="follow: a bare key whose handle signs with the newest generation."),
    click.option("--drain", "drain_seconds", type=Duration(), default=0,
                 help="How long the generation before serves on; default: until its certificate expires."),
    click.option("--after-drain", type=click.Choice(["extend", "refuse"]), default="extend", show_default=True,
                 help="Whether who holds it may go on when that time is over, as long as it is used."),
    click.option("--on-expiry", type=click.Choice(["keep", "refuse"]), default="keep", show_default=True,
                 help="Whether the key signs on after its certificate expired."),
)  # fmt: skip


def rule_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_RULE_OPTIONS):
        command = option(command)
    return command


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """MATERIAL and all that can be said of it, or --file."""
    command = rule_options(command)
    for option in reversed(_SPEC_OPTIONS):
        command = option(command)
    command = click.option("--owner", default="", help="For whom, where that is not you.")(command)
    command = click.option(
        "--file",
        "file",
        type=click.File("rb"),
        help="Take it from a TOML file with [[request]] tables instead; - reads standard input.",
    )(command)
    return click.argument("material", required=False, default="")(command)


def rule_of(values: Mapping[str, Any]) -> pb.Rule:
    """`values`: as rule_options name them."""
    return pb.Rule(
        off=values["off"],
        same_key=values["same_key"],
        lead_seconds=values["lead"],
        cron=values["cron"],
        period_seconds=values["period"],
        days=values["days"],
        signatures=values["signatures"],
    )


_RULE = ("off", "same_key", "lead", "cron", "period", "days", "signatures")


def asked_of(material: str, file: Any, owner: str, options: dict[str, Any]) -> list[Asked]:
    """Returns what is asked for by MATERIAL and options, or by a file.  Raises CommandError, click.UsageError."""
    if file is not None:
        ctx = click.get_current_context()
        named = [name for name in options if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
        if material or named:
            given = "MATERIAL" if material else next(p.opts[0] for p in ctx.command.params if p.name == named[0])
            raise click.UsageError(f"--file says all of it: {given} stands there instead")
        return [Asked(one.spec, one.owner or owner, one.where) for one in read_requests(file.read(), getattr(file, "name", "-"))]
    if not material:
        raise click.UsageError("give MATERIAL, or --file")
    rule = rule_of({name: options.pop(name) for name in _RULE})
    options["lifetime_seconds"] = options.pop("lifetime")
    options["selector"] = dict(options["selector"])
    return [Asked(pb.RequestSpec(material=material, renewal=rule, **options), owner, material)]


# ---- a file ---------------------------------------------------------------------------------------------------------

_TEXT, _TEXTS, _FLAG, _SPAN, _TABLE, _COUNT, _NUMBER = (
    "a text",
    "a list of texts",
    "true or false",
    "a duration",
    "a table",
    "a count",
    "a number",
)
_FIELDS: dict[str, tuple[str, str]] = {
    "material": ("material", _TEXT),
    "source": ("source", _TEXT),
    "key_type": ("key_type", _TEXT),
    "authority": ("authority", _TEXT),
    "profile": ("profile", _TEXT),
    "usage": ("usage", _TEXT),
    "names": ("names", _TEXTS),
    "lifetime": ("lifetime_seconds", _SPAN),
    "resources": ("resources", _TEXTS),
    "select": ("selector", _TABLE),
    "two_step": ("two_step", _FLAG),
    "health": ("health", _TEXT),
    "escrow": ("escrow", _FLAG),
    "mode": ("mode", _TEXT),
    "drain": ("drain_seconds", _SPAN),
    "after_drain": ("after_drain", _TEXT),
    "on_expiry": ("on_expiry", _TEXT),
    "bare": ("bare", _FLAG),
    "measured": ("measured", _TEXTS),
}
_RULE_FIELDS: dict[str, tuple[str, str]] = {
    "off": ("off", _FLAG),
    "same_key": ("same_key", _FLAG),
    "lead": ("lead_seconds", _SPAN),
    "cron": ("cron", _TEXT),
    "period": ("period_seconds", _SPAN),
    "days": ("days", _NUMBER),
    "signatures": ("signatures", _COUNT),
}


def read_requests(data: bytes, name: str) -> list[Asked]:
    """Returns what the [[request]] tables of a file ask for.  Raises CommandError, which says where."""
    origin = "standard input" if name in ("-", "<stdin>") else str(Path(name))
    try:
        told = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CommandError(f"{origin}: {error}", USAGE, "hsmvisor request apply --help shows a file") from None
    for key in told:
        if key != "request":
            raise CommandError(f"{origin}: {key} is not known: a file has [[request]] tables", USAGE)
    tables = told.get("request")
    if not isinstance(tables, list) or not tables or not all(isinstance(one, dict) for one in tables):
        raise CommandError(f"{origin}: there is no [[request]] table in it", USAGE, "hsmvisor request apply --help shows a file")
    found = [_request(table, f"{origin}: request {number}") for number, table in enumerate(tables, 1)]
    seen: dict[tuple[str, str], int] = {}
    for number, one in enumerate(found, 1):
        first = seen.setdefault((one.owner, one.spec.material), number)
        if first != number:
            raise CommandError(f"{origin}: requests {first} and {number} are both for {one.spec.material}", REFUSED)
    return found


def _request(table: dict[str, Any], where: str) -> Asked:
    if isinstance(table.get("material"), str):
        where = f"{where} ({table['material']})"
    rest = dict(table)
    owner, renewal = rest.pop("owner", ""), rest.pop("renewal", {})
    _demand(isinstance(owner, str), f"{where}: owner is {_TEXT}")
    _demand(isinstance(renewal, dict), f"{where}: renewal is {_TABLE}")
    spec = pb.RequestSpec(**_values(rest, _FIELDS, where, ("owner", "renewal")))
    _demand(bool(spec.material), f"{where}: material is missing: the name that the key has in modules")
    spec.renewal.CopyFrom(pb.Rule(**_values(renewal, _RULE_FIELDS, f"{where}: renewal", ())))
    return Asked(spec, owner, where)


def _values(table: dict[str, Any], fields: Mapping[str, tuple[str, str]], where: str, also: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for key, value in table.items():
        if key not in fields:
            raise CommandError(f"{where}: {key} is not known", USAGE, f"known are {', '.join([*fields, *also])}")
        name, kind = fields[key]
        found[name] = _value(value, kind, f"{where}: {key}")
    return found


def _value(value: Any, kind: str, where: str) -> Any:
    flag, number = isinstance(value, bool), isinstance(value, int | float) and not isinstance(value, bool)
    if kind == _SPAN:
        span = value if isinstance(value, int) and not flag else seconds(value) if isinstance(value, str) else None
        _demand(span is not None and 0 <= span <= MAX_DURATION, f"{where} is {_SPAN}: 90, '30m', '2h' or '7d'")
        return span
    right = {
        _TEXT: isinstance(value, str),
        _TEXTS: isinstance(value, list) and all(isinstance(one, str) for one in value),
        _FLAG: flag,
        _TABLE: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()),
        _COUNT: number and isinstance(value, int) and 0 <= value < 2**63,
        _NUMBER: number and value >= 0,
    }
    more = " of texts" if kind == _TABLE else ""
    _demand(right[kind], f"{where} is {kind}{more}")
    return value


def _demand(right: bool, what: str) -> None:
    if not right:
        raise CommandError(what, USAGE, "hsmvisor request apply --help shows a file")
