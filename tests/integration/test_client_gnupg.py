"""GnuPG with gnupg-pkcs11-scd: OpenPGP keys and S/MIME certificates whose private keys are RSA keys of either slot."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from support.certificates import Authority, chain_pem, new_key
from support.gnupg import Gnupg
from support.own_slot import LABEL, USER, OwnSlot

pytestmark = pytest.mark.real
AUTHORITY = Authority()
MESSAGE = b"a message of the guest"


@pytest.fixture(params=["delivered", "own"])
def card(own: OwnSlot, request: pytest.FixtureRequest) -> Iterator[tuple[Gnupg, str, x509.Certificate]]:
    """GnuPG, the token's label, and the certificate without which gnupg-pkcs11-scd shows no key."""
    if request.param == "own":
        public = own.generate("rsa:2048", "mail", "01")
        certificate = AUTHORITY.issue_for(public, "mail")
        path = own.guest.write("certificate.der", certificate.public_bytes(serialization.Encoding.DER))
        own.as_user("--write-object", path, "--type", "cert", "--label", "mail", "--id", "01")
    else:
        key = new_key("rsa2048")
        certificate = AUTHORITY.issue(key, "mail")
        own.module.push("mail", key, (certificate, AUTHORITY.intermediate))
    home = Path(tempfile.mkdtemp(prefix="gnupg."))
    gnupg = Gnupg(own.guest, USER, home)
    yield gnupg, LABEL if request.param == "own" else own.module.name, certificate
    gnupg.end()
    shutil.rmtree(home)


def test_gpg_signs_and_decrypts(card: tuple[Gnupg, str, x509.Certificate]) -> None:
    gnupg, token, certificate = card
    grip = gnupg.learn()[f"/CN=mail on {token}"]
    lines = (
        "Key-Type: RSA",
        f"Key-Grip: {grip}",
        "Key-Usage: sign,encrypt,cert",
        "Name-Real: the guest",
        "Expire-Date: 0",
        "%commit",
    )
    gnupg.run("gpg", "--batch", "--gen-key", gnupg.guest.write("parameters", "".join(f"{line}\n" for line in lines)))
    assert b"Card serial no." in gnupg.run("gpg", "--list-secret-keys")
    message = gnupg.guest.write("message", MESSAGE)
    gnupg.run("gpg", "--batch", "--detach-sign", message)
    assert b'Good signature from "the guest"' in gnupg.run("gpg", "--verify", "message.sig", message)
    gnupg.run("gpg", "--batch", "--encrypt", "--recipient", "the guest", message)
    assert MESSAGE in gnupg.run("gpg", "--batch", "--decrypt", "message.gpg")
    public = gnupg.run("gpg", "--list-packets", "--verbose", stdin=gnupg.run("gpg", "--export")).decode()
    numbers = certificate.public_key().public_numbers()  # type: ignore[union-attr]
    assert f"{numbers.n:X}" in public  # type: ignore[union-attr]


def test_gpgsm_signs_and_decrypts(card: tuple[Gnupg, str, x509.Certificate]) -> None:
    gnupg, _, certificate = card
    gnupg.learn()
    fingerprint = certificate.fingerprint(hashes.SHA1()).hex().upper()
    root = AUTHORITY.root.fingerprint(hashes.SHA1()).hex().upper()
    (gnupg.home / "trustlist.txt").write_text(f"{root} S\n")
    chain = gnupg.guest.write("chain.pem", chain_pem((AUTHORITY.root, AUTHORITY.intermediate)))
    gnupg.run("gpgsm", "--batch", "--import", chain)
    gnupg.run("gpgsm", "--batch", "--learn-card")
    assert b"card s/n:" in gnupg.run("gpgsm", "--list-secret-keys", fingerprint)
    message = gnupg.guest.write("message", MESSAGE)
    gnupg.run("gpgsm", "--batch", "--yes", "--local-user", fingerprint, "--output", "signed", "--sign", message)
    # by itself: a signature whose first bit is set gets a zero before it from GnuPG 2.2, and then OpenSSL wants none of it
    assert b"Good signature from" in gnupg.run("gpgsm", "--batch", "--verify", "signed")
    recipient = gnupg.guest.write("recipient.pem", chain_pem((certificate,)))
    gnupg.guest.run("openssl", "cms", "-encrypt", "-aes256", "-outform", "DER", "-out", "sealed", recipient, stdin=MESSAGE)
    assert MESSAGE in gnupg.run("gpgsm", "--batch", "--decrypt", "sealed")
