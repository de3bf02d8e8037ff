"""HOST:PORT, as configurations name where something listens or is reached."""

from __future__ import annotations

import ipaddress
import re

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")  #: as they stand before a port, and in an HTTP request
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/]+):([0-9]{1,5})")


def split(text: str) -> tuple[str, int]:
    """Returns the host, an IPv6 address without its brackets, and the port of HOST:PORT.  Raises ValueError."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match[2]) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return match[1].strip("[]"), int(match[2])


def is_address(text: str) -> bool:
    try:
        split(text)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Says whether nobody but this machine reaches it; another name than localhost is not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
