"""The identifier of a certificate that renewal information is asked by (RFC 9773, 4.1)."""

from __future__ import annotations

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hsmvisor.manager.ca.acme.session import certificate_id

KEY = ec.generate_private_key(ec.SECP256R1())
AUTHORITY = bytes.fromhex("69885b6b87464041e1b37b847ba0ae2cde01c8d4")


def certificate(serial: int, authority: x509.AuthorityKeyIdentifier | None) -> x509.Certificate:
    now, name = datetime.datetime.now(datetime.UTC), x509.Name([])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(KEY.public_key()).serial_number(serial)
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    if authority is not None:
        builder = builder.add_extension(authority, critical=False)
    return builder.sign(KEY, hashes.SHA256())


@pytest.mark.parametrize(
    ("serial", "text"),
    [
        (0x87654321, "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE"),  # the example of RFC 9773, 4.1: with the byte that makes it positive
        (0x07654321, "aYhba4dGQEHhs3uEe6CuLN4ByNQ.B2VDIQ"),
        (0x7F, "aYhba4dGQEHhs3uEe6CuLN4ByNQ.fw"),
        (0x80, "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIA"),
    ],
)
def test_an_identifier(serial: int, text: str) -> None:
    assert certificate_id(certificate(serial, x509.AuthorityKeyIdentifier(AUTHORITY, None, None))) == text


def test_a_certificate_that_names_no_authority_key_has_none() -> None:
    assert certificate_id(certificate(1, None)) == ""
    issuer = [x509.DirectoryName(x509.Name([]))]
    assert certificate_id(certificate(1, x509.AuthorityKeyIdentifier(None, issuer, 5))) == ""
