"""Names in certificates, as modules read them too: both sides have one parser."""

from __future__ import annotations

from hsmvisor_rpc.sealed.names import (
    BadName,
    Name,
    dns,
    email,
    general,
    ip,
    of_extension,
    parse,
    parse_all,
    request,
    subject,
    told_by,
    uri,
)

__all__ = [
    "BadName", "Name", "dns", "email", "general", "ip", "of_extension", "parse", "parse_all", "request", "subject", "told_by",
    "uri",
]  # fmt: skip
