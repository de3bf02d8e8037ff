"""The channels by which events are told, as they stand in the configuration: lists of sections [[webhooks]] and [[mails]]."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from hsmvisor.addresses import is_loopback
from hsmvisor.manager.history.happened import Kind
from hsmvisor.manager.notify import limits
from hsmvisor.serving import config as reading
from hsmvisor.serving.config import Demand

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|[0-9A-Fa-f:.]{2,45}")
_PORTS = {"starttls": 587, "tls": 465, "none": 25}


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


def check_channels(webhooks: Sequence[Webhook], mails: Sequence[Mail], demand: Demand) -> None:
    for i, hook in enumerate(webhooks):
        _check(hook, f"webhooks[{i}]", demand)
        _check_webhook(hook, f"webhooks[{i}]", demand)
    for i, mail in enumerate(mails):
        _check(mail, f"mails[{i}]", demand)
        _check_mail(mail, f"mails[{i}]", demand)
    names = [channel.name for channel in (*webhooks, *mails)]
    demand(len(names) <= limits.MOST_CHANNELS, f"webhooks and mails are at most {limits.MOST_CHANNELS}, not {len(names)}")
    reading.once(names, "webhooks and mails", demand)


def _check(channel: Channel, where: str, demand: Demand) -> None:
    demand(_NAME.fullmatch(channel.name) is not None, f"{where}.name is 1-64 of a-z 0-9 . _ - and begins with a letter or digit")
    for kind in channel.kinds:
        known = f"there are {', '.join(sorted(Kind))}"
        demand(kind in list(Kind), f"{where}.kinds has {kind[:40]!r}, which is no kind of event: {known}")
    demand(len(channel.owners) <= limits.MOST_OWNERS, f"{where}.owners are at most {limits.MOST_OWNERS}")
    for owner in channel.owners:
        good = 0 < len(owner) <= limits.MAX_OWNER and owner.isprintable()
        demand(good, f"{where}.owners are 1-{limits.MAX_OWNER} printable characters")


def _check_webhook(channel: Webhook, where: str, demand: Demand) -> None:
    url = channel.url
    demand(url.isascii() and url.isprintable() and " " not in url, f"{where}.url is printable ASCII without spaces")
    demand(len(url) <= limits.MAX_URL, f"{where}.url has at most {limits.MAX_URL} characters")
    try:
        parts, port = channel.parts, channel.parts.port
    except ValueError:
        parts, port = SplitResult("", "", "", "", ""), None
    demand(parts.scheme in ("https", "http") and bool(parts.hostname), f"{where}.url is https://HOST/PATH")
    anonymous = parts.username is None and parts.password is None
    demand(anonymous, f"{where}.url has no user and no password: the request is signed instead")
    demand(not parts.fragment, f"{where}.url has no fragment (#)")
    demand(port != 0, f"{where}.url has a port of 1 to 65535")
    demand(_HOST.fullmatch(parts.hostname or "") is not None, f"{where}.url names a host")
    private = parts.scheme == "https" or is_loopback(parts.hostname or "")
    demand(private, f"{where}.url is https: http is for loopback addresses alone, others could read it")
    _check_secret(channel.secret_file, f"{where}.secret_file", demand)
    _check_file(channel.ca_file, f"{where}.ca_file", demand)


def _check_mail(channel: Mail, where: str, demand: Demand) -> None:
    demand(_HOST.fullmatch(channel.host) is not None, f"{where}.host is a name or an address")
    demand(channel.tls in _PORTS, f"{where}.tls is starttls, tls or none, not {channel.tls[:40]!r}")
    demand(0 <= channel.port <= 65535, f"{where}.port is 1 to 65535")
    demand(_is_address(channel.sender), f"{where}.sender is an address, as hsmvisor@example.net")
    demand(1 <= len(channel.to) <= limits.MOST_RECIPIENTS, f"{where}.to has 1 to {limits.MOST_RECIPIENTS} addresses")
    for address in channel.to:
        what = f"{where}.to has {address[:40]!r}, which is no address: as ops@example.net, without a name"
        demand(_is_address(address), what)
    demand(bool(channel.user) == bool(channel.password_file), f"{where}.user and password_file stand together")
    demand(channel.user.isascii() and channel.user.isprintable(), f"{where}.user is printable ASCII")
    private = not channel.user or channel.tls != "none" or is_loopback(channel.host)
    demand(private, f"{where}.tls is none, and a password would be sent so that others can read it: use starttls or tls")
    if channel.password_file:
        _check_secret(channel.password_file, f"{where}.password_file", demand)
    _check_file(channel.ca_file, f"{where}.ca_file", demand)


def _check_secret(path: str, key: str, demand: Demand) -> None:
    demand(bool(path), f"{key} is an absolute path")
    _check_file(path, key, demand)
    demand(not reading.others_read(path), f"{key} can be read by others: chmod 600 {path}")


def _check_file(path: str, key: str, demand: Demand) -> None:
    demand(not path or (path.startswith("/") and path.isprintable()), f"{key} is an absolute path")


def _is_address(text: str) -> bool:
    return len(text) <= limits.MAX_ADDRESS and _ADDRESS.fullmatch(text) is not None
