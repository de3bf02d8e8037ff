"""What a caller's proof says of it: a local user's groups, the names in a certificate."""

from __future__ import annotations

import grp
import os
import pwd

from cryptography import x509
from hsmvisor.serving.relay import Credentials


def groups_of(credentials: Credentials) -> set[int]:
    """Returns the user's groups; SO_PEERCRED tells only the effective one."""
    try:
        name = pwd.getpwuid(credentials.uid).pw_name
    except KeyError:
        return {credentials.gid}
    return {credentials.gid, *os.getgrouplist(name, credentials.gid)}


def uid_of(user: str) -> int:
    """Returns -1 for a user that there is not, which no caller has."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return -1


def gid_of(group: str) -> int:
    """Returns -1 for a group that there is not."""
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return -1


def alternative_names(certificate: x509.Certificate) -> set[str]:
    """Returns the DNS names, URIs and mail addresses that it is for."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    names: set[str] = set()
    for kind in (x509.DNSName, x509.UniformResourceIdentifier, x509.RFC822Name):
        names.update(extension.get_values_for_type(kind))
    return names
