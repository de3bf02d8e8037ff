"""OpenSSH: ssh-keygen -D lists the module's keys; ssh logs in with them to an sshd of the test's own."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from support.certificates import new_key
from support.guest import Guest
from support.host import Module
from support.sshd import Sshd

pytestmark = pytest.mark.real
OPENSSH = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
#: Debian's OpenSSH 9.2 knows RSA and ECDSA keys of tokens; Ed25519 ones it passes over
KINDS = ["p256", "p384", "rsa2048"]


@pytest.mark.parametrize("kind", KINDS)
def test_keygen_lists_the_key(guest: Guest, module: Module, kind: str) -> None:
    key = new_key(kind)
    module.push("login", key, profile="ssh")
    listed = guest.run("ssh-keygen", "-D", guest.library.path).stdout
    assert listed.split()[:2] == key.public_key().public_bytes(*OPENSSH).split()
    assert b"login" in listed


@pytest.mark.parametrize("kind", KINDS)
def test_logs_in(guest: Guest, module: Module, kind: str) -> None:
    key = new_key(kind)
    module.push("login", key, profile="ssh")
    sshd = Sshd(guest, key.public_key().public_bytes(*OPENSSH))
    try:
        assert guest.run(*sshd.command("echo in as $USER")).stdout.strip().endswith(f"in as {sshd.user}".encode())
        assert "Accepted publickey" in sshd.log.read_text()
    finally:
        sshd.stop()


def test_another_key_does_not_log_in(guest: Guest, module: Module) -> None:
    module.push("login", new_key("p256"), profile="ssh")
    sshd = Sshd(guest, new_key("p256").public_key().public_bytes(*OPENSSH))
    try:
        result = guest.run(*sshd.command("true"), check=False)
        assert result.returncode == 255
        assert b"Permission denied" in result.stdout
    finally:
        sshd.stop()
