"""python-pkcs11's own test-suite in a virtual machine, through our library by USB: the same passes as by the module's socket."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import parameterized
import pytest
from support import suite
from support.guest import Guest, library
from support.guest_machine import GuestMachine
from support.host import Host
from support.machine_guest import OURS
from support.usb_guest import USBIP, USBREDIR, CardGuest, Plug, until

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]

LABEL, PIN, SO_PIN = "own", "1234", "5678"


def in_guest(guest: CardGuest, token: str, pin: str, **more: str) -> dict[str, str]:
    """As suite.run, in a machine."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(suite.directory() / "tests", "suite/tests")
        archive.add(Path(parameterized.__file__).parent, "suite/parameterized")  # another release names tests otherwise
    guest.machine.write("/root/suite.tar", packed.getvalue())
    guest.run("rm -rf suite; tar -xf suite.tar")
    variables = {"PKCS11_MODULE": OURS.path, "PKCS11_TOKEN_LABEL": token, "PKCS11_TOKEN_PIN": pin, "PYTHONPATH": "/root/suite"}
    variables |= {"HSMVISOR_PKCS11_ADDRESS": "usb:", "HOME": "/root"} | more
    command = "python3 -m pytest -v --tb=no -p no:cacheprovider /root/suite/tests --rootdir /root/suite -c /dev/null"
    return suite.results(guest.run(command, check=False, timeout=500, **variables))


@pytest.mark.parametrize("protocol", [USBREDIR, USBIP])
def test_the_suite_says_by_usb_what_it_says_by_the_socket(protocol: str, tmp_path: Path) -> None:
    """With delivered keys (slot 0), and with the guest's own token (slot 1)."""
    with Host() as host, GuestMachine() as machine:
        module = host.create("web-1", guest_token=True, policy={"legacy": True})
        near, far = Guest(library("ours"), module.address, tmp_path), CardGuest(machine)
        tool = ("pkcs11-tool", "--module", near.library.path, "--slot", "1")
        near.run(*tool, "--init-token", "--label", LABEL, "--so-pin", SO_PIN)
        near.run(*tool, "--login", "--login-type", "so", "--so-pin", SO_PIN, "--init-pin", "--new-pin", PIN)
        far.run("modprobe xhci_pci")  # udev does it where it runs
        Plug(host, module, machine, protocol).plug_in()
        until(far.seen, "the device")
        for token, pin, more in (
            (module.name, "1234", {}),
            (LABEL, PIN, {"PKCS11_TOKEN_SO_PIN": SO_PIN, "HSMVISOR_PKCS11_SLOTS": "1,0"}),
        ):
            by_socket = suite.passed(suite.run(near, near.library.path, token, pin, **more))
            by_usb = suite.passed(in_guest(far, token, pin, **more))
            print(f"passed in {token}: by the socket {len(by_socket)}, by USB {len(by_usb)}")
            assert by_usb == by_socket
            assert len(by_usb) > (100 if token == LABEL else 5)
