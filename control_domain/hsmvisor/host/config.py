"""The host's configuration: one TOML file, every value with a default, so that no file is needed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from hsmvisor import addresses
from hsmvisor.host.limits import NAME
from hsmvisor.host.roles import Role
from hsmvisor.serving import config as reading
from hsmvisor.serving.config import Audit, Demand, Log
from hsmvisor.serving.errors import BadConfig

__all__ = ["Allow", "Audit", "BadConfig", "Config", "Hsm", "Log", "RequestKey", "TlsClient"]

DEFAULT_PATH = Path("/etc/hsmvisor/host.toml")
SOFTWARE = "software"  #: the cryptoprocessor of a module that has no HSM
UNIX = "unix:"  #: begins a signed.address that is a socket's path
MODULES_APART = 10_000  #: users between those of workers and those of TPMs
_TOKEN_LABEL = 32  #: bytes of a token's label (PKCS#11 3.1, CK_TOKEN_INFO)


@dataclass(frozen=True)
class Allow:
    """Local callers, by exactly one of user, uid, group, gid, and what they may be."""

    roles: tuple[Role, ...]
    user: str = ""
    uid: int = -1
    group: str = ""
    gid: int = -1


@dataclass(frozen=True)
class Control:
    """The control socket: its callers are known by their peer credentials."""

    socket: str = ""  #: default RUNTIME/control.sock
    socket_mode: int = 0o660
    socket_group: str = ""
    allow: tuple[Allow, ...] = ()


@dataclass(frozen=True)
class TlsClient:
    """A client certificate, by exactly one of subject (RFC 4514) and SAN, and what it may be."""

    roles: tuple[Role, ...]
    subject: str = ""
    san: str = ""


@dataclass(frozen=True)
class Tls:
    """The control API on TCP with mutual TLS; off while `address` is empty."""

    address: str = ""
    certificate: str = "/etc/hsmvisor/host.crt"
    key: str = "/etc/hsmvisor/host-tls.key"
    client_ca: str = "/etc/hsmvisor/client-ca.crt"
    clients: tuple[TlsClient, ...] = ()


@dataclass(frozen=True)
class RequestKey:
    """A key that signs requests: `hmac` (a shared secret in hexadecimal) or `ed25519` (a public key in PEM)."""

    name: str
    kind: str
    file: str
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class Signed:
    """The control API for signed requests: a unix socket (unix:/path) or TCP with the host's TLS certificate; off while empty."""

    address: str = ""
    certificate: str = "/etc/hsmvisor/host.crt"
    key: str = "/etc/hsmvisor/host-tls.key"
    skew_seconds: int = 60  #: how far the caller's clock may be off
    keys: tuple[RequestKey, ...] = ()


@dataclass(frozen=True)
class Guests:
    """The sockets that guests reach their modules by."""

    socket_mode: int = 0o660
    socket_group: str = ""
    backlog: int = 1024
    directories: tuple[str, ...] = ()  #: where attach --hybrid may make sockets
    vsock: bool = False  #: an AF_VSOCK socket for guests of vhost_vsock


@dataclass(frozen=True)
class Workers:
    """How workers are run."""

    uid_base: int = 460_000  #: as root: module number n runs as uid_base + n, the key provider as the one below
    tpm_uid_base: int = 560_000  #: as root: the TPM of module number n runs as tpm_uid_base + n
    stop_with_host: bool = False  #: otherwise they go on serving, and the next host service adopts them
    start_timeout_seconds: float = 10.0
    command_timeout_seconds: float = 30.0
    drain_seconds: float = 5.0

    @property
    def provider_uid(self) -> int:
        return self.uid_base - 1


@dataclass(frozen=True)
class Provider:
    """Where storage keys come from."""

    kind: str = "file"  #: or tpm: sealed to this machine's TPM
    path: str = ""  #: default STATE/master.key; what a TPM has sealed: STATE/master.tpm
    device: str = "/dev/tpmrm0"  #: the TPM; tcp:HOST:PORT for one in software


@dataclass(frozen=True)
class Hsm:
    """A hardware security module in which modules' keys may live."""

    name: str
    library: str  #: the maker's PKCS#11 module
    token: str  #: label
    pin_file: str  #: one line: the token's user PIN
    user: str = ""  #: whom the helpers become that load the library; "" = the service's own
    environment: tuple[str, ...] = ()  #: NAME=VALUE, for the library; no secrets: ps shows them
    writes: tuple[str, ...] = ()  #: directories, files and devices that the library changes
    network: bool = False  #: the library connects by TCP


@dataclass(frozen=True)
class Manager:
    """How the host reaches a management plane that it joins (hsmvisor host join)."""

    ports: tuple[int, ...] = (8471, 8472)  #: TCP, to which the service may connect; those of a joined manager are added


@dataclass(frozen=True)
class Metrics:
    """Prometheus over HTTP, on a loopback address; off while empty."""

    address: str = ""
    timeout_seconds: float = 2.0


@dataclass(frozen=True)
class Config:
    state_directory: str = "/var/lib/hsmvisor"
    runtime_directory: str = "/run/hsmvisor"
    control: Control = field(default_factory=Control)
    tls: Tls = field(default_factory=Tls)
    signed: Signed = field(default_factory=Signed)
    guests: Guests = field(default_factory=Guests)
    workers: Workers = field(default_factory=Workers)
    provider: Provider = field(default_factory=Provider)
    hsms: tuple[Hsm, ...] = ()
    manager: Manager = field(default_factory=Manager)
    audit: Audit = field(default_factory=Audit)
    metrics: Metrics = field(default_factory=Metrics)
    log: Log = field(default_factory=Log)

    @property
    def state(self) -> Path:
        return Path(self.state_directory)

    @property
    def runtime(self) -> Path:
        return Path(self.runtime_directory)

    @property
    def control_socket(self) -> Path:
        return Path(self.control.socket) if self.control.socket else self.runtime / "control.sock"

    @property
    def master_key(self) -> Path:
        names = {"file": "master.key", "tpm": "master.tpm"}
        return Path(self.provider.path) if self.provider.path else self.state / names[self.provider.kind]

    @property
    def plain_master_key(self) -> Path:
        """Where a copy in the clear is put: of it a TPM's is made."""
        return self.master_key if self.provider.kind == "file" else self.master_key.with_name("master.key")

    @property
    def audit_file(self) -> Path:
        return Path(self.audit.file) if self.audit.file else self.state / "audit.log"

    def addresses(self) -> dict[str, str]:
        """Where it listens by TCP, by the keys that say so."""
        found = {f"{name}.address": getattr(self, name).address for name in ("tls", "signed", "metrics")}
        return {key: address for key, address in found.items() if address and not address.startswith(UNIX)}

    def without_callers(self) -> Config:
        """What a running service does not take over when it reads its configuration again."""
        control, tls = replace(self.control, allow=()), replace(self.tls, clients=())
        return replace(self, control=control, tls=tls, signed=replace(self.signed, keys=(), skew_seconds=0))


def load(path: Path | None) -> Config:
    """Reads `path`; None: DEFAULT_PATH if there is one, else all defaults.  Raises BadConfig."""
    return reading.load(path, DEFAULT_PATH, parse)


def parse(text: str, origin: str) -> Config:
    """Returns the checked configuration that `text` is; raises BadConfig."""
    config = reading.parse(Config, text, origin)
    _check(config, origin)
    return config


def _check(config: Config, origin: str) -> None:
    """The rules that go beyond a type."""
    demand = reading.demanding(origin)
    for name in ("state_directory", "runtime_directory"):
        demand(Path(getattr(config, name)).is_absolute(), f"{name} is an absolute path")
    for name, section in (("control", config.control), ("guests", config.guests)):
        demand(0 <= section.socket_mode <= 0o777, f"{name}.socket_mode is 0o000 to 0o777")
    demand(1 <= config.guests.backlog <= 65535, "guests.backlog is 1 to 65535")
    reading.check_absolute(config.guests.directories, "guests.directories", demand)
    reading.check_local(config.control.allow, "control.allow", demand)
    reading.check_certificates(config.tls.clients, "tls.clients", demand)
    for where, address in config.addresses().items():
        demand(addresses.is_address(address), f"{where} is HOST:PORT, as 127.0.0.1:8470, not {address!r}")
    demand(config.signed.skew_seconds >= 1, "signed.skew_seconds is at least 1")
    for i, key in enumerate(config.signed.keys):
        demand(key.kind in ("hmac", "ed25519"), f"signed.keys[{i}].kind is hmac or ed25519, not {key.kind!r}")
        demand(key.name.isascii() and key.name.isprintable() and key.name != "", f"signed.keys[{i}].name is printable ASCII")
    reading.once([key.name for key in config.signed.keys], "signed.keys", demand)
    demand(config.workers.uid_base >= 1000, "workers.uid_base is at least 1000")
    apart = abs(config.workers.tpm_uid_base - config.workers.uid_base)
    demand(config.workers.tpm_uid_base >= 1000, "workers.tpm_uid_base is at least 1000")
    demand(apart >= MODULES_APART, f"workers.tpm_uid_base and uid_base are {MODULES_APART} apart, so that no two share a user")
    for name in ("start_timeout_seconds", "command_timeout_seconds"):
        demand(getattr(config.workers, name) > 0, f"workers.{name} is greater than 0")
    demand(config.workers.drain_seconds >= 0, "workers.drain_seconds is not negative")
    demand(config.provider.kind in ("file", "tpm"), f"provider.kind is file or tpm, not {config.provider.kind!r}")
    _check_hsms(config.hsms, demand)
    demand(all(0 < port < 65536 for port in config.manager.ports), "manager.ports are 1 to 65535")
    demand(config.metrics.timeout_seconds > 0, "metrics.timeout_seconds is greater than 0")
    if config.metrics.address:
        host, _ = addresses.split(config.metrics.address)
        demand(addresses.is_loopback(host), "metrics.address is a loopback address, as 127.0.0.1:9470")
    reading.check_records(config.audit, config.log, demand)


def _check_hsms(hsms: tuple[Hsm, ...], demand: Demand) -> None:
    for i, hsm in enumerate(hsms):
        demand(NAME.fullmatch(hsm.name) is not None, f"hsms[{i}].name is 1-64 of a-z 0-9 . _ - and begins with a letter or digit")
        demand(hsm.name != SOFTWARE, f"hsms[{i}].name is not {SOFTWARE!r}: that is what modules without an HSM are")
        demand(Path(hsm.library).is_absolute(), f"hsms[{i}].library is an absolute path")
        demand(1 <= len(hsm.token.encode()) <= _TOKEN_LABEL, f"hsms[{i}].token is a label of 1-{_TOKEN_LABEL} bytes")
        demand(Path(hsm.pin_file).is_absolute(), f"hsms[{i}].pin_file is an absolute path")
        demand(not reading.others_read(hsm.pin_file), f"hsms[{i}].pin_file: others may read {hsm.pin_file}: chmod 600 it")
        reading.check_environment(hsm.environment, f"hsms[{i}]", demand)
        reading.check_absolute(hsm.writes, f"hsms[{i}].writes", demand)
    reading.once([hsm.name for hsm in hsms], "hsms", demand)
