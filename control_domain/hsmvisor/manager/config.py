"""The manager's configuration: one TOML file, every value with a default, so that no file is needed."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from hsmvisor import addresses
from hsmvisor.addresses import LOOPBACK, is_address
from hsmvisor.manager import limits
from hsmvisor.manager.authority_rows import Acme, Authority, Builtin, Command, check_authorities
from hsmvisor.manager.ca import names
from hsmvisor.manager.ca.names import BadName
from hsmvisor.manager.notify.channels import Channel, Mail, Webhook, check_channels
from hsmvisor.manager.policy import measured
from hsmvisor.manager.policy.measured import BadMeasured, Measured
from hsmvisor.manager.roles import GIVEN, Role
from hsmvisor.serving import config as reading
from hsmvisor.serving.config import Audit, Demand, Log
from hsmvisor.serving.errors import BadConfig

__all__ = ["Acme", "Allow", "Audit", "Authority", "BadConfig", "Builtin", "Client", "Command", "Config", "JoinCertificate", "Log"]

DEFAULT_PATH = Path("/etc/hsmvisor/manager.toml")
BUILTIN = "builtin"  #: the authority of a manager that has no other
_HOST_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class Allow:
    """Local callers, by exactly one of user, uid, group, gid; as whom they ask, and what they may be."""

    roles: tuple[Role, ...]
    user: str = ""
    uid: int = -1
    group: str = ""
    gid: int = -1
    owner: str = ""  #: default: the user's name
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Control:
    """The control socket: its callers are known by their peer credentials."""

    socket: str = ""  #: default RUNTIME/control.sock
    socket_mode: int = 0o660
    socket_group: str = ""
    allow: tuple[Allow, ...] = ()


@dataclass(frozen=True)
class Database:
    url: str = ""  #: default sqlite:///STATE/manager.db
    password_file: str = ""  #: one line; for a URL without a password


@dataclass(frozen=True)
class Tls:
    """Where hosts that have joined come, and owners with a certificate: mutual TLS; off while `address` is empty."""

    address: str = ""
    public: tuple[str, ...] = ()  #: as hosts reach it; default: this host's name and the address's port
    names: tuple[str, ...] = ()  #: what the manager's own certificate is for, besides the hosts of the public addresses
    certificate: str = ""  #: somebody else's certificate, in the place of the manager's own
    key: str = ""
    authorities: str = ""  #: and whom hosts believe then: a file of certificates in PEM
    client_ca: str = ""  #: who certifies owners, and hosts of [[join_certificates]]; a file of certificates in PEM


@dataclass(frozen=True)
class Join:
    """Where callers without a certificate come: hosts that join, owners with an access token; off while `address` is empty."""

    address: str = ""
    public: tuple[str, ...] = ()  #: as it stands in join tokens; default as of [tls]


@dataclass(frozen=True)
class Client:
    """A client certificate, by exactly one of subject (RFC 4514) and SAN; as whom it asks, and what it may be."""

    owner: str
    subject: str = ""
    san: str = ""
    groups: tuple[str, ...] = ()
    roles: tuple[Role, ...] = (Role.OWNER,)


@dataclass(frozen=True)
class JoinCertificate:
    """A client certificate with which a host joins without a token."""

    host: str
    subject: str = ""
    san: str = ""


@dataclass(frozen=True)
class Console:
    """The web console; off while `address` is empty.  Without a certificate of its own it shows the one of [tls]."""

    address: str = ""
    plain: bool = False  #: without TLS, on a loopback address alone
    certificate: str = ""
    key: str = ""
    session_seconds: int = 8 * 3600  #: after which one logs in again in any case,
    idle_seconds: int = 1800  #: and without doing anything


@dataclass(frozen=True)
class Pki:
    """Revocation lists and OCSP of the built-in authorities, over plain HTTP; off while `address` is empty."""

    address: str = ""


@dataclass(frozen=True)
class Issuer:
    """The process that makes keys which several modules share; `escrow`: how it wraps those that owners ask to keep."""

    escrow: str = ""  #: "": none is kept; file, pkcs11
    file: str = ""  #: default STATE/fleet/issuer/escrow.key
    library: str = ""
    token: str = ""
    pin_file: str = ""
    label: str = "hsmvisor-escrow"
    environment: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    network: bool = False


@dataclass(frozen=True)
class Health:
    """A check that a request may name: a program, which ends with 0 while the resource is well."""

    name: str
    command: tuple[str, ...]
    seconds: float = 30.0


@dataclass(frozen=True)
class Renewal:
    workers: int = 8  #: lines that one manager looks at at once


@dataclass(frozen=True)
class Config:
    name: str = ""  #: of this manager; default: the host's
    state_directory: str = "/var/lib/hsmvisor-manager"
    runtime_directory: str = "/run/hsmvisor-manager"
    writes: tuple[str, ...] = ()
    database: Database = field(default_factory=Database)
    control: Control = field(default_factory=Control)
    tls: Tls = field(default_factory=Tls)
    join: Join = field(default_factory=Join)
    clients: tuple[Client, ...] = ()
    join_certificates: tuple[JoinCertificate, ...] = ()
    console: Console = field(default_factory=Console)
    authorities: tuple[Builtin | Acme | Command, ...] = ()
    pki: Pki = field(default_factory=Pki)
    issuer: Issuer = field(default_factory=Issuer)
    health: tuple[Health, ...] = ()
    measured: dict = field(default_factory=dict)  # type: ignore[type-arg]  #: tables by their names: policy/measured.py reads them
    renewal: Renewal = field(default_factory=Renewal)
    webhooks: tuple[Webhook, ...] = ()
    mails: tuple[Mail, ...] = ()
    audit: Audit = field(default_factory=Audit)
    log: Log = field(default_factory=Log)

    @property
    def manager(self) -> str:
        return self.name or _node()

    @property
    def state(self) -> Path:
        return Path(self.state_directory)

    @property
    def fleet(self) -> Path:
        """What all managers of a fleet have the same: its root, its authorities' keys, what tokens are made of."""
        return self.state / "fleet"

    @property
    def runtime(self) -> Path:
        return Path(self.runtime_directory)

    @property
    def control_socket(self) -> Path:
        return Path(self.control.socket) if self.control.socket else self.runtime / "control.sock"

    @property
    def audit_file(self) -> Path:
        return Path(self.audit.file) if self.audit.file else self.state / "audit.log"

    @property
    def database_url(self) -> str:
        """With its password.  Raises BadConfig."""
        url = self.database.url or f"sqlite:///{self.state / 'manager.db'}"
        if not self.database.password_file:
            return url
        try:
            password = Path(self.database.password_file).read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
            raise BadConfig("database.password_file", f"{self.database.password_file}: {why}") from None
        head, at, rest = url.partition("@")
        return f"{head}:{quote(password, safe='')}{at}{rest}"

    @property
    def database_file(self) -> Path | None:
        """SQLite's; None: another database."""
        url = self.database.url or f"sqlite:///{self.state / 'manager.db'}"
        return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None

    def written(self) -> list[Path]:
        """The directories in which it makes and changes files."""
        files = [self.audit_file, self.control_socket, *([self.database_file] if self.database_file else [])]
        files += [Path(row.account_key) for row in self.authorities if isinstance(row, Acme) and row.account_key]
        files += [Path(self.issuer.file)] if self.issuer.file else []
        keys = [Path(row.keys) for row in self.authorities if isinstance(row, Builtin) and row.keys]
        return [self.state, self.runtime, *keys, *(file.parent for file in files)]

    def without_callers(self) -> Config:
        """What a running manager does not take over when it reads its configuration again."""
        return replace(self, control=replace(self.control, allow=()), clients=(), join_certificates=(), measured={})

    @property
    def measurements(self) -> dict[str, Measured]:
        """What a guest's boot may have to be, by name."""
        return measured.parse(self.measured)

    # ---- where the manager is reached ----------------------------------------------------------------------------

    def addresses(self) -> dict[str, str]:
        """Where it listens by TCP, by the keys that say so."""
        found = {f"{name}.address": getattr(self, name).address for name in ("tls", "join", "console", "pki")}
        found |= {f"authorities[{i}].http": row.http for i, row in enumerate(self.authorities) if isinstance(row, Acme)}
        return {key: address for key, address in found.items() if address}

    @property
    def tls_addresses(self) -> tuple[str, ...]:
        return self.tls.public or _public(self.tls.address)

    @property
    def join_addresses(self) -> tuple[str, ...]:
        return self.join.public or _public(self.join.address)

    @property
    def served_names(self) -> tuple[str, ...]:
        """What the manager's own certificate is for."""
        console = () if self.console.plain or self.console.certificate else _public(self.console.address)
        hosts = (addresses.split(address)[0] for address in (*self.tls_addresses, *self.join_addresses, *console))
        return tuple(dict.fromkeys((*self.tls.names, *hosts))) or (_node_name(),)

    @property
    def all_authorities(self) -> tuple[Authority, ...]:
        return self.authorities or (Builtin(BUILTIN, default=True),)

    @property
    def channels(self) -> list[Channel]:
        """Who is told of what happens."""
        return [*self.webhooks, *self.mails]


def _node() -> str:
    return os.uname().nodename


def _node_name() -> str:
    """As it can stand in a certificate."""
    try:
        return names.dns(_node()).value
    except BadName:
        return "localhost"


def _public(address: str) -> tuple[str, ...]:
    """Returns what others reach a listening address by, as far as it is to be guessed."""
    if not address:
        return ()
    host, _, port = address.rpartition(":")
    return (f"{_node_name() if host in ('0.0.0.0', '[::]', '*') else host}:{port}",)


def load(path: Path | None) -> Config:
    """Reads `path`; None: DEFAULT_PATH if there is one, else all defaults.  Raises BadConfig."""
    return reading.load(path, DEFAULT_PATH, parse)


def parse(text: str, origin: str) -> Config:
    """Returns the checked configuration that `text` is; raises BadConfig."""
    config = reading.parse(Config, text, origin)
    _check(config, reading.demanding(origin))
    return config


# ---- the rules that go beyond a type ----------------------------------------------------------------------------------


def _check(config: Config, demand: Demand) -> None:
    demand(not config.name or _NAME.fullmatch(config.name) is not None, "name is 1-64 of A-Z a-z 0-9 . _ @ -")
    for name in ("state_directory", "runtime_directory"):
        demand(Path(getattr(config, name)).is_absolute(), f"{name} is an absolute path")
    reading.check_absolute(config.writes, "writes", demand)
    _check_database(config.database, demand)
    _check_listeners(config, demand)
    _check_callers(config, demand)
    check_authorities(config.authorities, demand)
    _check_issuer(config.issuer, demand)
    for i, check in enumerate(config.health):
        demand(_NAME.fullmatch(check.name) is not None, f"health[{i}].name is 1-64 of A-Z a-z 0-9 . _ @ -")
        demand(
            bool(check.command) and Path(check.command[0]).is_absolute(),
            f"health[{i}].command is a program's absolute path, and arguments",
        )
        demand(check.seconds > 0, f"health[{i}].seconds is greater than 0")
    reading.once([check.name for check in config.health], "health", demand)
    try:
        measured.parse(config.measured)
    except BadMeasured as error:
        demand(False, str(error))
    check_channels(config.webhooks, config.mails, demand)
    demand(1 <= config.renewal.workers <= 256, "renewal.workers is 1 to 256")
    reading.check_records(config.audit, config.log, demand)


def _check_database(database: Database, demand: Demand) -> None:
    if not database.url:
        demand(not database.password_file, "database.password_file is for a database.url, which is missing")
        return
    sqlite, postgresql = database.url.startswith("sqlite:///"), database.url.startswith("postgresql://")
    demand(sqlite or postgresql, "database.url is sqlite:///PATH or postgresql://USER@HOST/NAME")
    if sqlite:
        demand(database.url.startswith("sqlite:////"), "database.url names its file by an absolute path: sqlite:////var/lib/...")
        demand("?" not in database.url, "database.url of an SQLite database has no options")
        demand(not database.password_file, "database.password_file is for PostgreSQL")
    if database.password_file:
        head, at, _ = database.url.removeprefix("postgresql://").partition("@")
        demand(bool(at) and bool(head) and ":" not in head, "database.url is postgresql://USER@HOST/NAME, without a password")
        demand(
            not reading.others_read(database.password_file),
            f"database.password_file: others may read {database.password_file}: chmod 600 it",
        )


def _check_listeners(config: Config, demand: Demand) -> None:
    tls, join, console = config.tls, config.join, config.console
    demand(0 <= config.control.socket_mode <= 0o777, "control.socket_mode is 0o000 to 0o777")
    listening = config.addresses()
    for key, address in listening.items():
        demand(is_address(address), f"{key} is HOST:PORT, as 0.0.0.0:8471, not {address!r}")
    for one, other in itertools.combinations(listening, 2):
        same = listening[one] == listening[other] and not listening[one].endswith(":0")
        demand(not same, f"{one} and {other} are different ones, not both {listening[one]}")
    for name, public in (("tls", tls.public), ("join", join.public)):
        for i, address in enumerate(public):
            demand(is_address(address), f"{name}.public[{i}] is HOST:PORT, as manager.example.net:8471, not {address!r}")
    for name, pair in (("tls", tls), ("console", console)):
        demand(bool(pair.certificate) == bool(pair.key), f"{name}.certificate and {name}.key stand together, or neither does")
    demand(
        bool(tls.certificate) == bool(tls.authorities),
        "tls.authorities goes with tls.certificate: hosts believe those alone",
    )
    demand(
        bool(tls.address) or not join.address,
        "join.address is of no use without tls.address: there hosts come once they have joined",
    )
    for i, name in enumerate(tls.names):
        try:
            found = names.parse(name)
        except BadName as error:
            demand(False, f"tls.names[{i}]: {error}")
        else:
            demand(found.kind in ("dns", "ip"), f"tls.names[{i}] is a host name or an address")
    demand(console.session_seconds >= 60, "console.session_seconds is at least 60")
    demand(console.idle_seconds >= 60, "console.idle_seconds is at least 60")
    if console.plain:
        local = console.address.rpartition(":")[0] in LOOPBACK
        demand(local, "console.plain is for console.address 127.0.0.1, [::1] or localhost alone")
        demand(not console.certificate, "console.plain goes without console.certificate")


def _check_callers(config: Config, demand: Demand) -> None:
    reading.check_local(config.control.allow, "control.allow", demand)
    reading.check_certificates(config.clients, "clients", demand)
    reading.check_certificates(config.join_certificates, "join_certificates", demand)
    for i, allow in enumerate(config.control.allow):
        _check_identity(f"control.allow[{i}]", allow.owner, allow.groups, allow.roles, demand)
    for i, client in enumerate(config.clients):
        demand(bool(client.owner), f"clients[{i}].owner is not empty")
        _check_identity(f"clients[{i}]", client.owner, client.groups, client.roles, demand)
    for i, known in enumerate(config.join_certificates):
        demand(
            _HOST_NAME.fullmatch(known.host) is not None,
            f"join_certificates[{i}].host is 1-64 of a-z 0-9 . _ - and begins with a letter or digit",
        )
    needs = config.clients or config.join_certificates
    demand(
        not needs or bool(config.tls.client_ca), "tls.client_ca is missing: who certifies [[clients]] and [[join_certificates]]?"
    )


def _check_identity(where: str, owner: str, groups: Sequence[str], roles: Iterable[Role], demand: Demand) -> None:
    for text in (owner, *groups):
        good = len(text) <= limits.MAX_OWNER and text.isprintable()
        demand(good, f"{where}: an owner's or group's name has at most {limits.MAX_OWNER} printable characters")
    demand(all(groups), f"{where}.groups: a group's name is not empty")
    demand(len(groups) <= limits.MAX_GROUPS, f"{where}.groups are at most {limits.MAX_GROUPS}")
    demand(set(roles) <= GIVEN, f"{where}.roles are out of {', '.join(sorted(GIVEN))}: a host has its own certificate")


def _check_issuer(issuer: Issuer, demand: Demand) -> None:
    demand(issuer.escrow in ("", "file", "pkcs11"), f"issuer.escrow is file, pkcs11 or empty, not {issuer.escrow!r}")
    token = bool(issuer.library), bool(issuer.token), bool(issuer.pin_file)
    if issuer.escrow == "pkcs11":
        demand(all(token), "issuer.library, issuer.token and issuer.pin_file say where the escrow's key is")
        demand(Path(issuer.library).is_absolute(), "issuer.library is an absolute path")
        demand(not reading.others_read(issuer.pin_file), f"issuer.pin_file: others may read {issuer.pin_file}: chmod 600 it")
    else:
        demand(not any(token), 'issuer.library, issuer.token and issuer.pin_file are for escrow = "pkcs11"')
    demand(not issuer.file or issuer.escrow == "file", 'issuer.file is for escrow = "file"')
    reading.check_environment(issuer.environment, "issuer", demand)
    reading.check_absolute(issuer.writes, "issuer.writes", demand)
