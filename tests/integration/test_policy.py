"""A module's policy as guests and operators meet it: set at creation, changed in service, refused with its code and told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.certificates import new_key
from support.command import Command
from support.guest import Guest, Library
from support.host import Host, Module, wait_for

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def cli(host: Host) -> Command:
    return Command(f"unix:{host.process.socket}", host.process.directory / "authority")


def told(host: Host, module: str) -> list[dict[str, Any]]:
    lines = map(json.loads, host.process.audit_lines())
    return [line["detail"] for line in lines if line["kind"] == "module.policy-refused" and line["module"] == module]


SIGNS = """
import sys, pkcs11
session = pkcs11.lib(sys.argv[1]).get_token().open()
key = session.get_key(pkcs11.ObjectClass.PRIVATE_KEY, label=sys.argv[2])
for _ in range(int(sys.argv[4])):
    try:
        key.sign(b"d" * 32, mechanism=getattr(pkcs11.Mechanism, sys.argv[3]))
        print("signed")
    except pkcs11.PKCS11Error as error:
        print(type(error).__name__)
"""


def signed(guest: Guest, label: str, mechanism: str, times: int = 1) -> list[str]:
    result = guest.run(sys.executable, "-c", SIGNS, guest.library.path, label, mechanism, str(times))
    return result.stdout.decode().split()


def test_mechanisms_and_sizes(host: Host, cli: Command, library: Library, tmp_path: Path) -> None:
    name = f"strict-{library.name}"
    cli("module", "create", name, "--mechanism", "ECDSA", "--mechanism", "sha256-rsa-pkcs", "--min-rsa-bits", "3072")
    module = host.process.get(name)
    assert list(module.settings.policy.mechanisms) == ["ECDSA", "SHA256_RSA_PKCS"]
    assert "mechanisms ECDSA, SHA256_RSA_PKCS; RSA from 3072 bits" in cli("module", "show", name)
    delivered = Module(host, name, module.address)
    delivered.push("ec", new_key("p256"))
    delivered.push("small", new_key("rsa2048"))
    guest = Guest(library, module.address, tmp_path)
    assert signed(guest, "ec", "ECDSA", 20) == ["signed"] * 20
    assert signed(guest, "small", "SHA256_RSA_PKCS") == ["KeySizeRange"]
    assert signed(guest, "small", "SHA512_RSA_PKCS") == ["MechanismInvalid"]
    wait_for(lambda: len(told(host, name)) == 2, what="the audit log")
    assert {(t["what"], t["mechanism"], t["key"]) for t in told(host, name)} == {
        ("key size", "CKM_SHA256_RSA_PKCS", "RSA 2048"),
        ("mechanism", "CKM_SHA512_RSA_PKCS", "RSA 2048"),
    }
    listed = pkcs11_mechanisms(guest)
    assert "ECDSA," in listed and "SHA256-RSA-PKCS," in listed and "SHA512-RSA-PKCS," not in listed
    cli("module", "settings", name)
    assert signed(guest, "small", "SHA512_RSA_PKCS") == ["signed"]
    assert "SHA512-RSA-PKCS," in pkcs11_mechanisms(guest)


def pkcs11_mechanisms(guest: Guest) -> str:
    return guest.run("pkcs11-tool", "--module", guest.library.path, "--list-mechanisms").stdout.decode()


ASKED = """
import sys, pkcs11
session = pkcs11.lib(sys.argv[1]).get_token().open()
key = session.get_key(pkcs11.ObjectClass.PRIVATE_KEY, label="ec")
for line in sys.stdin:
    results = set()
    for _ in range(200):
        try:
            key.sign(b"d" * 32, mechanism=pkcs11.Mechanism.ECDSA)
            results.add("signed")
        except pkcs11.PKCS11Error as error:
            results.add(type(error).__name__)
    print(*sorted(results), flush=True)
"""


def test_a_policy_that_changes_under_load(host: Host, cli: Command, library: Library, tmp_path: Path) -> None:
    """Also for connections that have lanes: what was allowed before is asked for anew."""
    module = host.create(f"changes-{library.name}")
    module.push("ec", new_key("p256"))
    guest = Guest(library, module.address, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", ASKED, str(library.path)],
        env=guest.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def ask() -> str:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    try:
        assert ask() == "signed"
        cli("module", "settings", module.name, "--mechanism", "ECDSA_SHA256")
        assert ask() == "MechanismInvalid"
        cli("module", "settings", module.name, "--rate", "20", "--burst", "50")
        assert ask() == "FunctionRejected signed"
        cli("module", "settings", module.name)
        assert ask() == "signed"
    finally:
        process.stdin.close()
        assert process.wait(10) == 0
    wait_for(lambda: {t["what"] for t in told(host, module.name)} == {"mechanism", "rate"}, what="the audit log")


def test_what_cannot_be_is_refused_and_nothing_changes(host: Host, cli: Command) -> None:
    cli("module", "create", "never", "--mechanism", "NO-SUCH", code=2)
    assert "is not a mechanism of a module; known are RSA_PKCS" in cli.errors
    cli("module", "create", "never", "--burst", "5", code=4)
    assert "a burst needs a rate" in cli.errors
    assert "never" not in cli("module", "list")
    words = "hsmvisor module create x --mechanism ECDSA_SHA2"
    assert "ECDSA_SHA256" in cli(_HSMVISOR_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD="5")
