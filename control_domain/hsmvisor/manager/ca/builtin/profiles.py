"""What the built-in authority makes of an order: one profile a purpose.  An operator may add some (the manager's configuration)."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.x509.oid import ExtendedKeyUsageOID as Use
from cryptography.x509.oid import ObjectIdentifier

HOUR, DAY = 3600, 86400
ALL_KEYS = ("P-256", "P-384", "P-521", "RSA-2048", "RSA-3072", "RSA-4096", "Ed25519", "Ed448")


@dataclass(frozen=True)
class Profile:
    name: str
    uses: tuple[ObjectIdentifier, ...]  #: extended key usage
    lifetime: int = 30 * DAY  #: seconds, where the order says nothing
    shortest: int = 60
    longest: int = 398 * DAY
    key_types: tuple[str, ...] = ALL_KEYS
    kinds: tuple[str, ...] = ("dns", "ip")  #: of names
    encipherment: bool = False  #: RSA keys decrypt too (TLS 1.2 without forward secrecy, S/MIME)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("server", (Use.SERVER_AUTH,)),
        Profile("client", (Use.CLIENT_AUTH,), kinds=("dns", "ip", "uri", "email")),
        Profile("peer", (Use.SERVER_AUTH, Use.CLIENT_AUTH), kinds=("dns", "ip", "uri")),
        Profile("email", (Use.EMAIL_PROTECTION,), kinds=("email",), encipherment=True),
        Profile("signing", (Use.CODE_SIGNING,), kinds=("dns", "uri", "email"), longest=3 * 365 * DAY),
        Profile("host", (Use.CLIENT_AUTH, Use.SERVER_AUTH), lifetime=7 * DAY, longest=90 * DAY, kinds=("uri", "dns", "ip")),
    )
}
