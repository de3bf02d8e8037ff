"""Authorities in the configuration: one dataclass a kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier
from hsmvisor.manager.ca.builtin.profiles import ALL_KEYS, DAY, PROFILES, Profile
from hsmvisor.serving import config as reading
from hsmvisor.serving.config import Demand

FLEET = "fleet"  #: the manager's own authority, for hosts and managers: no other one has its name
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KINDS = ("dns", "ip", "uri", "email")

#: Extended key usages by the names that they have in a configuration; others are written as OIDs.
USES = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
    "code-signing": ExtendedKeyUsageOID.CODE_SIGNING,
    "email": ExtendedKeyUsageOID.EMAIL_PROTECTION,
    "time-stamping": ExtendedKeyUsageOID.TIME_STAMPING,
    "ipsec": ExtendedKeyUsageOID.IPSEC_IKE,
}


@dataclass(frozen=True)
class ProfileRow:
    """A profile of a built-in authority besides those that it has, or in the place of one."""

    name: str
    uses: tuple[str, ...]
    lifetime: int = 30 * DAY
    shortest: int = 60
    longest: int = 398 * DAY
    key_types: tuple[str, ...] = ALL_KEYS
    kinds: tuple[str, ...] = ("dns", "ip")
    encipherment: bool = False

    def profile(self) -> Profile:
        uses = tuple(USES[use] if use in USES else ObjectIdentifier(use) for use in self.uses)
        return Profile(self.name, uses, self.lifetime, self.shortest, self.longest, self.key_types, self.kinds, self.encipherment)


@dataclass(frozen=True)
class Builtin:
    name: str
    kind: str = "builtin"
    default: bool = False
    keys: str = ""  #: their directory; default STATE/fleet/authorities/NAME
    library: str = ""  #: of a PKCS #11 token, in which the keys are instead
    token: str = ""
    pin_file: str = ""
    crl_url: str = ""
    ocsp_url: str = ""
    profiles: tuple[ProfileRow, ...] = ()
    orders_per_second: float = 0.0  #: 0: no limit

    def check(self, where: str, demand: Demand) -> None:
        told = bool(self.library), bool(self.token), bool(self.pin_file)
        demand(all(told) or not any(told), f"{where}: library, token and pin_file stand together, or none does")
        demand(not (self.library and self.keys), f"{where}: keys are in a directory (keys) or in a token (library), not in both")
        for key in ("keys", "library"):
            path = getattr(self, key)
            demand(not path or Path(path).is_absolute(), f"{where}.{key} is an absolute path")
        demand(
            not self.pin_file or not reading.others_read(self.pin_file),
            f"{where}.pin_file: others may read {self.pin_file}: chmod 600 it",
        )
        for key in ("crl_url", "ocsp_url"):
            url = getattr(self, key)
            demand(not url or _is_url(url, "http", "https"), f"{where}.{key} is a URL, as http://pki.example.net/fleet.crl")
        for k, row in enumerate(self.profiles):
            _check_profile(row, f"{where}.profiles[{k}]", demand)
        reading.once([row.name for row in self.profiles], f"{where}.profiles", demand)

    def all_profiles(self) -> dict[str, Profile]:
        """Without the one for hosts and managers, which the manager's own authority alone has."""
        usual = {name: profile for name, profile in PROFILES.items() if name != "host"}
        return usual | {row.name: row.profile() for row in self.profiles}


@dataclass(frozen=True)
class Acme:
    name: str
    directory: str
    kind: str = "acme"
    default: bool = False
    contact: tuple[str, ...] = ()  #: mail addresses
    ca_file: str = ""  #: roots that the authority's own server is verified with, where the system's are not
    http: str = ""  #: address at which http-01 is answered; port 80 of the names has to come there
    http_hook: tuple[str, ...] = ()  #: or a program that sees to it
    dns_hook: tuple[str, ...] = ()  #: a program that sees to TXT records, for dns-01
    hook_seconds: float = 300.0
    account_key: str = ""  #: default STATE/fleet/authorities/NAME/account.key
    orders_per_second: float = 0.0

    def check(self, where: str, demand: Demand) -> None:
        demand(_is_url(self.directory, "https"), f"{where}.directory is the URL of an ACME directory, https://...")
        for k, contact in enumerate(self.contact):
            demand("@" in contact and ":" not in contact, f"{where}.contact[{k}] is a mail address")
        demand(not (self.http and self.http_hook), f"{where}: http-01 is answered at an address (http) or by a program (http_hook)")
        demand(
            bool(self.http or self.http_hook or self.dns_hook),
            f"{where}: http, http_hook or dns_hook says how names are shown to be ours",
        )
        for key in ("http_hook", "dns_hook"):
            hook = getattr(self, key)
            demand(not hook or Path(hook[0]).is_absolute(), f"{where}.{key} is a program's absolute path, and arguments")
        demand(self.hook_seconds > 0, f"{where}.hook_seconds is greater than 0")
        demand(not self.account_key or Path(self.account_key).is_absolute(), f"{where}.account_key is an absolute path")


@dataclass(frozen=True)
class Command:
    name: str
    command: tuple[str, ...]
    kind: str = "command"
    default: bool = False
    seconds: float = 300.0
    environment: tuple[str, ...] = ()  #: NAME=VALUE; no secrets: ps shows them
    orders_per_second: float = 0.0

    def check(self, where: str, demand: Demand) -> None:
        absolute = bool(self.command) and Path(self.command[0]).is_absolute()
        demand(absolute, f"{where}.command is a program's absolute path, and arguments")
        demand(self.seconds > 0, f"{where}.seconds is greater than 0")
        reading.check_environment(self.environment, where, demand)


Authority = Builtin | Acme | Command


def check_authorities(rows: Sequence[Authority], demand: Demand) -> None:
    for i, row in enumerate(rows):
        where = f"authorities[{i}]"
        demand(_NAME.fullmatch(row.name) is not None, f"{where}.name is 1-64 of a-z 0-9 . _ - and begins with a letter or digit")
        demand(row.name != FLEET, f"{where}.name is not {FLEET!r}: that is the manager's own authority, for hosts")
        demand(row.orders_per_second >= 0, f"{where}.orders_per_second is not negative; 0 is no limit")
        row.check(where, demand)
    reading.once([row.name for row in rows], "authorities", demand)
    defaults = [row.name for row in rows if row.default]
    demand(len(defaults) <= 1, f"authorities: one is the default, not {' and '.join(defaults)}")
    demand(len(rows) <= 1 or bool(defaults), "authorities: one of several is the default (default = true)")


def _check_profile(row: ProfileRow, where: str, demand: Demand) -> None:
    demand(_NAME.fullmatch(row.name) is not None, f"{where}.name is 1-64 of a-z 0-9 . _ - and begins with a letter or digit")
    demand(row.name != "host", f"{where}.name is not 'host': that profile is for hosts and managers")
    demand(bool(row.uses), f"{where}.uses has one use at least")
    for use in row.uses:
        known = use in USES or re.fullmatch(r"[0-2](\.(0|[1-9][0-9]*))+", use) is not None
        demand(known, f"{where}.uses: {use!r} is none of {', '.join(USES)}, and no OID")
    demand(0 < row.shortest <= row.lifetime <= row.longest, f"{where}: shortest, lifetime and longest are seconds, in this order")
    for key_type in row.key_types:
        demand(key_type in ALL_KEYS, f"{where}.key_types: {key_type!r} is none of {', '.join(ALL_KEYS)}")
    for kind in row.kinds:
        demand(kind in _KINDS, f"{where}.kinds: {kind!r} is none of {', '.join(_KINDS)}")


def _is_url(text: str, *schemes: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in schemes and bool(parts.netloc) and text.isascii() and text.isprintable()
