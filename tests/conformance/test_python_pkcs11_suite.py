"""python-pkcs11's own test-suite through our library: with delivered keys (slot 0), and with the guest's own token (slot 1).

Each list names every test that does not pass there, and why.  A test that begins to pass has to leave its list, and one that stops
passing is a failure.  What passes with SoftHSM2 in the application passes with slot 1, but for what its list names.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.guest import Guest, library, system_file
from support.host import Module
from support.suite import passed, run

HERE = Path(__file__).parent
LABEL, PIN, SO_PIN = "own", "1234", "5678"


def listed(name: str) -> set[str]:
    lines = (line.strip() for line in (HERE / name).read_text().splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def check_list(results: dict[str, str], name: str) -> None:
    assert set(results) - passed(results) == listed(name) & set(results)
    assert not listed(name) - set(results), "the list names tests that the suite does not have"


def test_delivered_keys(module: Module, tmp_path: Path) -> None:
    guest = Guest(library("ours"), module.address, tmp_path)
    check_list(run(guest, guest.library.path, module.name, "1234"), "python_pkcs11_not_yet.txt")


@pytest.fixture
def own(new_module: Callable[..., Module], tmp_path: Path) -> Iterator[Guest]:
    """A guest whose slot 1 is initialized, and has what is old."""
    module = new_module(guest_token=True, policy={"legacy": True})
    guest = Guest(library("ours"), module.address, tmp_path)
    tool = ("pkcs11-tool", "--module", guest.library.path, "--slot", "1")
    guest.run(*tool, "--init-token", "--label", LABEL, "--so-pin", SO_PIN)
    guest.run(*tool, "--login", "--login-type", "so", "--so-pin", SO_PIN, "--init-pin", "--new-pin", PIN)
    yield guest
    module.destroy()


def softhsm(guest: Guest) -> dict[str, str]:
    """Makes a token of SoftHSM2 in the application; returns what programs need to find it."""
    (guest.directory / "tokens").mkdir()
    (guest.directory / "softhsm2.conf").write_text(f"directories.tokendir = {guest.directory}/tokens\nlog.level = ERROR\n")
    variables = {"SOFTHSM2_CONF": str(guest.directory / "softhsm2.conf")}
    command = ["softhsm2-util", "--init-token", "--free", "--label", LABEL, "--pin", PIN, "--so-pin", SO_PIN]
    subprocess.run(command, check=True, capture_output=True, env=guest.environment | variables)
    return variables


def test_keys_of_the_guests_own(own: Guest) -> None:
    named = own.directory / "libsofthsm2.so"
    named.symlink_to(own.library.path)
    library, variables = system_file("softhsm/libsofthsm2.so"), softhsm(own)
    theirs = run(own, library, LABEL, PIN, SO_PIN, **variables, PKCS11_MODULE2=str(named))
    # Software that takes the first slot is to find the guest's own.
    ours = run(own, named, LABEL, PIN, SO_PIN, **variables, PKCS11_MODULE2=str(library), HSMVISOR_PKCS11_SLOTS="1,0")
    print(f"passed: SoftHSM2 {len(passed(theirs))}, ours {len(passed(ours))} of {len(ours)}")
    print("with SoftHSM2 alone:", *sorted(passed(theirs) - passed(ours)), sep="\n  ")
    check_list(ours, "python_pkcs11_own_token.txt")
