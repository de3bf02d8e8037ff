"""Names in certificates: each has a kind and one spelling (RFC 5280, 4.2.1.6)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.x509.oid import NameOID
from hsmvisor_rpc.sealed.limits import MAX_DNS_NAME, MAX_NAME_TEXT, MAX_NAMES

MAX_COMMON_NAME = 64  #: characters (RFC 5280, appendix A.1, ub-common-name)

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}")


class BadName(ValueError):
    """The message says which name, and what is wrong with it."""


@dataclass(frozen=True, order=True)
class Name:
    """Made by `parse`, or by one of the functions below, which check it."""

    kind: str  #: dns, ip, uri, email
    value: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"


def dns(value: str) -> Name:
    """A host name, or one with `*` as its leftmost label (RFC 6125, 6.4.3).  Other letters than ASCII's: as A-labels (xn--)."""
    name = value.removesuffix(".").lower()
    labels = name.removeprefix("*.").split(".")
    if not name.isascii():
        raise BadName(f"{value!r}: write it with A-labels (xn--...)")
    if len(name) > MAX_DNS_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        raise BadName(f"{value!r} is no host name")
    if labels[-1].isdigit():
        raise BadName(f"{value!r}: the last label has a letter; an address is written ip:{value}")
    if name.startswith("*.") and len(labels) < 2:
        raise BadName(f"{value!r}: a wildcard stands before two labels at least")
    return Name("dns", name)


def ip(value: str) -> Name:
    try:
        if "%" in value:  # a zone is of one machine (RFC 4007, 11)
            raise ValueError
        return Name("ip", str(ipaddress.ip_address(value)))
    except ValueError:
        raise BadName(f"{value!r} is no IP address") from None


def uri(value: str) -> Name:
    try:
        parts = urlsplit(value)
    except ValueError:
        raise BadName(f"{value!r} is no URI") from None
    printable = value.isascii() and value.isprintable() and " " not in value
    if not printable or not parts.scheme or not (parts.netloc or parts.path) or len(value) > MAX_NAME_TEXT:
        raise BadName(f"{value!r} is no URI with a scheme")
    return Name("uri", value)


def email(value: str) -> Name:
    local, _, host = value.rpartition("@")
    if not _LOCAL.fullmatch(local) or host.startswith("*"):
        raise BadName(f"{value!r} is no e-mail address")
    return Name("email", f"{local}@{dns(host).value}")


_KINDS = {"dns": dns, "ip": ip, "uri": uri, "email": email}


def parse(text: str) -> Name:
    """From `kind:value`; without a kind it is an address if it is one, and else a host name.  Raises BadName."""
    kind, colon, value = text.partition(":")
    if colon and kind in _KINDS:
        return _KINDS[kind](value)
    try:
        return ip(text)
    except BadName:
        return dns(text)


def parse_all(texts: Iterable[str]) -> tuple[Name, ...]:
    """In the order in which they came, each once.  Raises BadName."""
    names = tuple(dict.fromkeys(map(parse, texts)))
    if not names:
        raise BadName("a certificate has one name at least")
    if len(names) > MAX_NAMES:
        raise BadName(f"{len(names)} names, a certificate has at most {MAX_NAMES}")
    return names


def exact(texts: Iterable[str]) -> tuple[Name, ...]:
    """As a signed command has them: each with its kind, in its one spelling, and once; there may be none.  Raises BadName."""
    names: dict[Name, None] = {}
    for text in texts:
        name = parse(text)
        if str(name) != text:
            raise BadName(f"{text!r}: a command has it as {str(name)!r}")
        if name in names:
            raise BadName(f"{text!r} is there twice")
        names[name] = None
    return tuple(names)


def general(name: Name) -> x509.GeneralName:
    match name.kind:
        case "dns":
            return x509.DNSName(name.value)
        case "ip":
            return x509.IPAddress(ipaddress.ip_address(name.value))
        case "uri":
            return x509.UniformResourceIdentifier(name.value)
    return x509.RFC822Name(name.value)


def common_name(names: Iterable[Name]) -> str:
    """Returns the first host name that fits there, or an empty text."""
    return next((name.value for name in names if name.kind == "dns" and len(name.value) <= MAX_COMMON_NAME), "")


def subject(names: Iterable[Name]) -> x509.Name:
    """With a common name, or empty."""
    common = common_name(names)
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)] if common else [])


def request(names: Sequence[Name]) -> x509.CertificateSigningRequestBuilder:
    """A certificate request (PKCS #10) for these names, to be signed; there may be none."""
    named = subject(names)
    builder = x509.CertificateSigningRequestBuilder().subject_name(named)
    if names:  # critical where they alone say whose it is (RFC 5280, 4.2.1.6)
        builder = builder.add_extension(x509.SubjectAlternativeName(map(general, names)), critical=not named)
    return builder


def of_extension(names: x509.SubjectAlternativeName) -> tuple[Name, ...]:
    """Raises BadName for kinds that are not here."""
    found = []
    for entry in names:
        match entry:
            case x509.DNSName():
                found.append(dns(entry.value))
            case x509.IPAddress():
                found.append(ip(str(entry.value)))
            case x509.UniformResourceIdentifier():
                found.append(uri(entry.value))
            case x509.RFC822Name():
                found.append(email(entry.value))
            case _:
                raise BadName(f"a name of kind {type(entry).__name__}")
    return tuple(dict.fromkeys(found))


def told_by(what: x509.Certificate | x509.CertificateSigningRequest) -> tuple[Name, ...]:
    """Its subject's alternative names; without the extension: none.

    Raises BadName for kinds that are not here, another ValueError where extensions cannot be read.
    """
    try:
        return of_extension(what.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return ()
    except (x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise ValueError(str(error)) from None
