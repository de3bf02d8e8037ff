"""The channels by which events are told, and their configuration: lists of sections [[notify.webhooks]] and [[notify.mails]]."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from hsmvisor.manager.history.happened import Kind
from hsmvisor.manager.notify import limits

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|[0-9A-Fa-f:.]{2,45}")
_PORTS = {"starttls": 587, "tls": 465, "none": 25}


class BadChannels(ValueError):
    """The message names the key and what may stand there."""


@dataclass(frozen=True)
class Channel:
    name: str
    kinds: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)  #: empty: all
    owners: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)  #: whose events; empty: everybody's and nobody's

    def wants(self, kind: str, owner: str) -> bool:
        return (not self.kinds or kind in self.kinds) and (not self.owners or owner in self.owners)


@dataclass(frozen=True)
class Webhook(Channel):
    """Events as POST requests, signed as Standard Webhooks does it."""

    url: str  #: https, or http to a loopback address
    secret_file: str  #: whsec_ and 24-64 bytes in base64; a line each for a new secret and the old one
    ca_file: str = ""  #: roots for the receiver's certificate; the system's where it is empty

    @property
    def parts(self) -> SplitResult:
        return urlsplit(self.url)


@dataclass(frozen=True)
class Mail(Channel):
    """Events as plain mails; many of one kind as one."""

    host: str
    sender: str
    to: tuple[str, ...]
    port: int = 0  #: 587 with starttls, 465 with tls, 25 with none
    tls: str = "starttls"  #: starttls, tls or none
    user: str = ""
    password_file: str = ""
    ca_file: str = ""

    @property
    def real_port(self) -> int:
        return self.port or _PORTS[self.tls]


def from_config(untrusted_mapping: Mapping[str, Any], where: str = "notify") -> list[Channel]:
    """Returns the channels of the section `where`.  Raises BadChannels."""
    classes: dict[str, type[Channel]] = {"webhooks": Webhook, "mails": Mail}
    if not isinstance(untrusted_mapping, Mapping):
        raise BadChannels(f"{where} is a section with {' and '.join(f'[[{where}.{name}]]' for name in classes)}")
    if unknown := sorted(set(untrusted_mapping) - set(classes)):
        raise BadChannels(f"unknown key {where}.{unknown[0]}; known here: {', '.join(sorted(classes))}")
    made: list[Channel] = []
    inside = f"{where}." if where else ""
    for kind, cls in classes.items():
        listed = untrusted_mapping.get(kind, [])
        if not isinstance(listed, list | tuple):
            raise BadChannels(f"{inside}{kind} is a list of sections: [[{inside}{kind}]]")
        for i, section in enumerate(listed):
            made.append(_channel(cls, section, f"{inside}{kind}[{i}]"))
    if len(made) > limits.MOST_CHANNELS:
        raise BadChannels(f"{where}: at most {limits.MOST_CHANNELS} channels, not {len(made)}")
    names = [channel.name for channel in made]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadChannels(f"{where}: each name stands once, {twice[0]!r} does not")
    return made


def _channel(cls: type[Channel], untrusted_section: Any, where: str) -> Channel:
    if not isinstance(untrusted_section, Mapping):
        raise BadChannels(f"{where} is a section")
    fields, hints = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    if unknown := sorted(set(untrusted_section) - set(fields)):
        raise BadChannels(f"unknown key {where}.{unknown[0]}; known here: {', '.join(sorted(fields))}")
    for name, row in fields.items():
        if row.default is dataclasses.MISSING and name not in untrusted_section:
            raise BadChannels(f"{where}.{name} is missing")
    values = {name: _value(hints[name], value, f"{where}.{name}") for name, value in untrusted_section.items()}
    channel = cls(**values)

    def demand(holds: bool, key: str, what: str) -> None:
        if not holds:
            raise BadChannels(f"{where}.{key} {what}")

    _check(channel, demand)
    if isinstance(channel, Webhook):
        _check_webhook(channel, demand)
    if isinstance(channel, Mail):
        _check_mail(channel, demand)
    return channel


def _value(hint: Any, value: Any, where: str) -> Any:
    if hint in (str, int):
        if type(value) is not hint:
            raise BadChannels(f"{where} is {'a text' if hint is str else 'a whole number'}, not {type(value).__name__}")
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise BadChannels(f"{where} is a list of texts")
    return tuple(value)


Demand = Callable[[bool, str, str], None]


def _check(channel: Channel, demand: Demand) -> None:
    demand(_NAME.fullmatch(channel.name) is not None, "name", "is 1-64 of a-z 0-9 . _ - and begins with a letter or digit")
    for kind in channel.kinds:
        demand(kind in list(Kind), "kinds", f"has {kind[:40]!r}, which is no kind of event: there are {', '.join(sorted(Kind))}")
    demand(len(channel.owners) <= limits.MOST_OWNERS, "owners", f"are at most {limits.MOST_OWNERS}")
    for owner in channel.owners:
        demand(
            0 < len(owner) <= limits.MAX_OWNER and owner.isprintable(), "owners", f"are 1-{limits.MAX_OWNER} printable characters"
        )


def _check_webhook(channel: Webhook, demand: Demand) -> None:
    url = channel.url
    demand(url.isascii() and url.isprintable() and " " not in url, "url", "is printable ASCII without spaces")
    demand(len(url) <= limits.MAX_URL, "url", f"has at most {limits.MAX_URL} characters")
    try:
        parts, port = channel.parts, channel.parts.port
    except ValueError:
        parts, port = SplitResult("", "", "", "", ""), None
    demand(parts.scheme in ("https", "http") and bool(parts.hostname), "url", "is https://HOST/PATH")
    demand(parts.username is None and parts.password is None, "url", "has no user and no password: the request is signed instead")
    demand(not parts.fragment, "url", "has no fragment (#)")
    demand(port != 0, "url", "has a port of 1 to 65535")
    demand(_HOST.fullmatch(parts.hostname or "") is not None, "url", "names a host")
    what = "is https: http is for loopback addresses alone, others could read it"
    demand(parts.scheme == "https" or is_loopback(parts.hostname or ""), "url", what)
    _check_file(channel.secret_file, "secret_file", demand, is_secret=True)
    _check_file(channel.ca_file, "ca_file", demand)


def _check_mail(channel: Mail, demand: Demand) -> None:
    demand(_HOST.fullmatch(channel.host) is not None, "host", "is a name or an address")
    demand(channel.tls in _PORTS, "tls", f"is starttls, tls or none, not {channel.tls[:40]!r}")
    demand(0 <= channel.port <= 65535, "port", "is 1 to 65535")
    demand(_is_address(channel.sender), "sender", "is an address, as hsmvisor@example.net")
    demand(1 <= len(channel.to) <= limits.MOST_RECIPIENTS, "to", f"has 1 to {limits.MOST_RECIPIENTS} addresses")
    for address in channel.to:
        demand(_is_address(address), "to", f"has {address[:40]!r}, which is no address: as ops@example.net, without a name")
    demand(bool(channel.user) == bool(channel.password_file), "user", "and password_file stand together")
    demand(channel.user.isascii() and channel.user.isprintable(), "user", "is printable ASCII")
    what = "is none, and a password would be sent so that others can read it: use starttls or tls"
    demand(not channel.user or channel.tls != "none" or is_loopback(channel.host), "tls", what)
    if channel.password_file:
        _check_file(channel.password_file, "password_file", demand, is_secret=True)
    _check_file(channel.ca_file, "ca_file", demand)


def _check_file(path: str, key: str, demand: Demand, is_secret: bool = False) -> None:
    if path or is_secret:
        demand(path.startswith("/") and path.isprintable(), key, "is an absolute path")
    if is_secret:
        demand(not others_read(Path(path)), key, f"can be read by others: chmod 600 {path}")


def others_read(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & 0o077)
    except OSError:  # said when it is to be read
        return False


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(text: str) -> bool:
    return len(text) <= limits.MAX_ADDRESS and _ADDRESS.fullmatch(text) is not None
