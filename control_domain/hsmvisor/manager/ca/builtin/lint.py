"""Whether a certificate is well made, before it is signed: RFC 5280 by pkilint, and what this authority promises besides."""

from __future__ import annotations

import functools
import re
from typing import Any

from cryptography import x509
from hsmvisor.manager.ca import names
from pkilint import loader, validation
from pkilint.pkix import certificate, extension, name

_QUOTED = re.compile(r'"([^"]+)"')
_LEAST = validation.ValidationFindingSeverity.WARNING  #: what is more severe has a smaller number


@functools.cache
def _linter() -> Any:
    return certificate.create_pkix_certificate_validator_container(
        certificate.create_decoding_validators(name.ATTRIBUTE_TYPE_MAPPINGS, extension.EXTENSION_MAPPINGS),
        [
            certificate.create_issuer_validator_container([]),
            certificate.create_validity_validator_container(),
            certificate.create_subject_validator_container([]),
            certificate.create_extensions_validator_container([]),
            certificate.create_spki_validator_container([]),
        ],
    )


def findings(der: bytes) -> tuple[str, ...]:
    """Returns what is wrong with a certificate, in the linter's words; nothing when it is well made."""
    document = loader.RFC5280CertificateDocumentLoader().load_der_document(der, "certificate")
    found = []
    for result in _linter().validate(document.root):
        for finding in result.finding_descriptions:
            if finding.finding.severity <= _LEAST and not _is_good_name(finding):
                found.append(f"{finding.finding.code}{f': {finding.message}' if finding.message else ''}")
    return tuple(found) + _promises(x509.load_der_x509_certificate(der))


def _is_good_name(finding: Any) -> bool:
    """RFC 5280 leaves wildcards open (4.2.1.6), private networks have names of one label, and not every URI is a web page's: the
    linter finds none of them right.  Ours were checked by names.py."""
    told = _QUOTED.search(finding.message or "")
    if told is None:
        return False
    try:
        match finding.finding.code:
            case "pkix.invalid_domain_name_syntax":
                return (told[1].startswith("*.") or "." not in told[1]) and names.dns(told[1]).value == told[1]
            case "pkix.invalid_uri_syntax":
                return names.uri(told[1]).value == told[1]
    except names.BadName:
        pass
    return False


def _promises(made: x509.Certificate) -> tuple[str, ...]:
    wrong = []
    if made.serial_number.bit_length() < 64:
        wrong.append("hsmvisor.serial_number: fewer than 64 bits")
    if made.not_valid_after_utc <= made.not_valid_before_utc:
        wrong.append("hsmvisor.validity: it ends before it begins")
    present = {extension.oid for extension in made.extensions}
    if x509.SubjectAlternativeName.oid not in present and not _is_authority(made):
        wrong.append("hsmvisor.names: a certificate without names")
    return tuple(wrong)


def _is_authority(made: x509.Certificate) -> bool:
    try:
        return made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False
