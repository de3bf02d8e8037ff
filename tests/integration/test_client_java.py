"""Java's SunPKCS11: a small program signs with each key of the token and decrypts with the RSA key."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.certificates import Authority, new_key
from support.guest import Guest
from support.host import Module

pytestmark = pytest.mark.real
SOURCE = Path(__file__).parent / "java/SignWithModule.java"


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("classes")
    subprocess.run(["javac", "-d", str(directory), str(SOURCE)], check=True, timeout=60)
    return directory


def run(guest: Guest, classes: Path) -> list[str]:
    config = guest.write("pkcs11.cfg", f"name = hsmvisor\nlibrary = {guest.library.path}\nslotListIndex = 0\n")
    return guest.run("java", "-cp", classes, "SignWithModule", config, "any", timeout=60).stdout.decode().splitlines()


def test_signs_with_every_algorithm_and_decrypts(guest: Guest, module: Module, classes: Path) -> None:
    authority = Authority()
    for name, kind in (("web", "p256"), ("mail", "rsa2048")):
        key = new_key(kind)
        module.push(name, key, authority.chain(key))
    lines = run(guest, classes)
    assert "key web EC chain 2 encoded false" in lines
    assert "key mail RSA chain 2 encoded false" in lines
    # Where p11-kit 0.24.1 cannot carry ECDSA with SHA-2, Java hashes for itself and signs raw
    for algorithm in ("NONEwithECDSA", "SHA1withECDSA", "SHA256withECDSA", "SHA384withECDSA"):
        assert f"  {algorithm} verified" in lines, lines
    for algorithm in ("SHA256withRSA", "SHA512withRSA", "SHA256withRSASSA-PSS"):
        assert f"  {algorithm} verified" in lines, lines
    assert "  decrypt same" in lines


def test_sees_a_bare_key_by_its_self_signed_certificate(guest: Guest, module: Module, classes: Path) -> None:
    module.push("bare", new_key("p256"), self_signed=True)
    module.push("hidden", new_key("p256"))
    lines = run(guest, classes)
    assert "key bare EC chain 1 encoded false" in lines
    assert not any("hidden" in line for line in lines)
