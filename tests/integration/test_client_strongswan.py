"""strongSwan's pki with its PKCS#11 plugin: requests, certificates and revocation lists signed with keys of both slots."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from support.certificates import Authority, key_id, new_key
from support.guest import Guest
from support.own_slot import USER, OwnSlot

pytestmark = pytest.mark.real
KINDS = {"rsa": "rsa:2048", "p256": "EC:prime256v1", "p384": "EC:secp384r1", "p521": "EC:secp521r1"}


def pki(guest: Guest, *arguments: str | Path, output: str = "", pin: str = USER) -> str:
    """Runs pki without a terminal: so it reads the PIN, which it always asks for, from its standard input.

    `output`: the file for what it makes; returns what it says.
    """
    library = f"modules {{\n hsmvisor {{\n path = {guest.library.path}\n }}\n }}"
    config = guest.write("strongswan.conf", f"pki {{\n plugins {{\n pkcs11 {{\n {library}\n }}\n }}\n}}\n")
    shell = 'exec setsid -w pki "$@" > "$0"' if output else 'exec setsid -w pki "$@"; "$0"'
    command = ("sh", "-c", shell, output or "true", *arguments)
    return guest.run(*command, stdin=f"{pin}\n".encode(), more={"STRONGSWAN_CONF": str(config)}).stdout.decode()


def made(guest: Guest, name: str) -> bytes:
    return (guest.directory / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_own_keys(own: OwnSlot, kind: str) -> None:
    """A CA in slot 1: its certificate, a request of the same key that it answers, and a revocation list."""
    public, guest = own.generate(KINDS[kind], "mine", "0102"), own.guest
    of_type = "rsa" if kind == "rsa" else "ecdsa"
    said = pki(guest, "--print", "--type", "priv", "--keyid", "0102")
    assert f"{of_type.upper()} {public.key_size} bits" in said and "found key on PKCS#11 token 'hsmvisor':1" in said
    pki(guest, "--self", "--type", of_type, "--keyid", "0102", "--dn", "CN=ca", "--ca", output="ca.der")
    authority = x509.load_der_x509_certificate(made(guest, "ca.der"))
    authority.verify_directly_issued_by(authority)
    assert authority.public_key() == public
    pki(guest, "--req", "--type", of_type, "--keyid", "0102", "--dn", "CN=asked", output="request.der")
    request = x509.load_der_x509_csr(made(guest, "request.der"))
    assert request.is_signature_valid and request.public_key() == public
    pki(
        guest,
        *("--issue", "--cakeyid", "0102", "--cacert", "ca.der", "--in", "request.der", "--type", "pkcs10"),
        output="issued.der",
    )
    x509.load_der_x509_certificate(made(guest, "issued.der")).verify_directly_issued_by(authority)
    pki(guest, "--signcrl", "--cakeyid", "0102", "--cacert", "ca.der", "--serial", "07", output="crl.der")
    revocations = x509.load_der_x509_crl(made(guest, "crl.der"))
    assert revocations.is_signature_valid(public) and len(revocations) == 1


@pytest.mark.parametrize("kind", ["rsa2048", "p256"])
def test_delivered_keys(own: OwnSlot, kind: str) -> None:
    key = new_key(kind)
    assert isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
    own.module.push("vpn", key, Authority().chain(key))
    of_type = "rsa" if kind == "rsa2048" else "ecdsa"
    common = ("--req", "--type", of_type, "--keyid", key_id(key).hex(), "--dn", "CN=asked")
    said = pki(own.guest, *common, output="request.der", pin="any")
    assert "loaded untrusted cert 'vpn'" in said
    request = x509.load_der_x509_csr(made(own.guest, "request.der"))
    assert request.is_signature_valid and request.public_key() == key.public_key()
