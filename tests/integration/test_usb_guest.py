"""A module is a USB device of a virtual machine, by usbredir and by USB/IP: Debian's programs and our library, on one device."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from hsmvisor import usb_import
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import Authority, PrivateKey, key_id, new_key
from support.guest_machine import GuestMachine
from support.host import Host, Module
from support.host_process import new_id
from support.leaks import Needles
from support.load import fits
from support.machine_guest import OURS, MachineSigner, device_socket
from support.usb_guest import IDS, OPENSC, PIN, USBIP, USBREDIR, CardGuest, Plug, until

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

MESSAGE = b"what a guest has to sign"
KEYS: dict[str, PrivateKey] = {}
SLOTS = {"9a": "web", "9c": "mail", "9d": "seal", "9e": "door"}
BY_USB = replace(OURS, address="usb:serial=web-1")
authority = Authority()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture(scope="module")
def module(host: Host) -> Module:
    module = host.create("web-1", card={"slots": SLOTS})
    for name, kind, profile in (
        ("web", "p256", "tls"),
        ("mail", "rsa2048", "card"),
        ("seal", "rsa2048", "card"),
        ("door", "p384", "card"),
    ):
        KEYS[name] = new_key(kind)
        module.push(name, KEYS[name], authority.chain(KEYS[name]), profile=profile)
    return module


@pytest.fixture(scope="module", params=[USBREDIR, USBIP])
def plug(request: pytest.FixtureRequest, host: Host, module: Module) -> Iterator[Plug]:
    """Booted without a USB controller: the host adds it with the device, or the guest's kernel has one of its own."""
    with GuestMachine() as machine:
        plug = Plug(host, module, machine, request.param)
        guest = CardGuest(machine)
        guest.start_pcscd()
        plug.plug_in()
        guest.wait_for_card()
        yield plug
        plug.pull_out()


@pytest.fixture
def guest(plug: Plug) -> CardGuest:
    return CardGuest(plug.machine)


def verify(name: str, signature: bytes, message: bytes = MESSAGE) -> None:
    key = KEYS[name].public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    else:
        assert isinstance(key, rsa.RSAPublicKey)
        key.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())


def test_the_guest_sees_the_device(guest: CardGuest, plug: Plug, module: Module) -> None:
    said = guest.run(f"lsusb -v -d {IDS}", check=False)
    assert "iSerial" in said and "web-1" in said
    assert said.count("bInterfaceClass        11") == 1 and said.count("bInterfaceClass       255") == 24
    assert "480M" in guest.run("lsusb -t")
    usb = module.status().device.usb
    assert (usb.protocol, usb.serial, usb.usb_id) == (plug.protocol, "web-1", IDS)
    assert bool(usb.attachment.qmp_path) == (plug.protocol == USBREDIR)


def test_opensc_lists_signs_and_decrypts(guest: CardGuest) -> None:
    listed = guest.opensc("--list-objects", "--type", "cert")
    assert listed.count("Certificate Object") == 4
    for slot, name, mechanism in (
        ("01", "web", "ECDSA-SHA256"),
        ("02", "mail", "SHA256-RSA-PKCS"),
        ("04", "door", "ECDSA-SHA256"),
    ):
        verify(name, guest.sign(slot, MESSAGE, mechanism))
    seal = KEYS["seal"]
    assert isinstance(seal, rsa.RSAPrivateKey)
    guest.machine.write("/root/sealed", seal.public_key().encrypt(MESSAGE, padding.PKCS1v15()))
    words = ["--login", "--pin", PIN, "--decrypt", "--id", "03", "--mechanism", "RSA-PKCS", "--input-file", "/root/sealed"]
    guest.opensc(*words, "--output-file", "/root/opened")
    assert guest.machine.read("/root/opened") == MESSAGE


def test_piv_tool_reads_the_card(guest: CardGuest) -> None:
    assert guest.run("piv-tool --name").strip().endswith("Personal Identity Verification Card") or "PIV" in guest.run("piv-tool -n")
    assert len(guest.card_id()) == 16


def test_ssh_keys_of_the_card_log_in(guest: CardGuest) -> None:
    """ssh-keygen -D shows the card's keys, and sshd lets their holder in."""
    keys = guest.run("ssh-keygen -D /usr/lib/x86_64-linux-gnu/opensc-pkcs11.so 2>/dev/null")
    assert len([line for line in keys.splitlines() if line.startswith(("ssh-rsa", "ecdsa-"))]) >= 3
    guest.machine.write("/root/authorized", keys)
    guest.run("[ -f /root/hostkey ] || ssh-keygen -q -t ed25519 -N '' -f /root/hostkey")
    guest.machine.write(
        "/root/sshd_config",
        "Port 2222\nListenAddress 127.0.0.1\nHostKey /root/hostkey\nAuthorizedKeysFile /root/authorized\nStrictModes no\n"
        "PermitRootLogin prohibit-password\nUsePAM no\nPidFile none\n",
    )
    server = guest.machine.start(["/usr/sbin/sshd", "-D", "-e", "-f", "/root/sshd_config"], output="/root/sshd.log")
    guest.machine.write("/root/askpass", f"#!/bin/sh\necho {PIN}\n", 0o755)
    until(lambda: "listening" in guest.run("cat /root/sshd.log"), "sshd")
    options = "-o PKCS11Provider=/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so -o IdentityAgent=none -o StrictHostKeyChecking=no"
    try:
        said = guest.run(
            f"ssh -F none {options} -p 2222 root@127.0.0.1 echo logged in",
            SSH_ASKPASS="/root/askpass",
            SSH_ASKPASS_REQUIRE="force",
            DISPLAY=":0",
        )
        assert "logged in" in said
    finally:
        server.stop()


def test_the_probe_finds_nothing_wrong_while_pcscd_holds_the_card(guest: CardGuest) -> None:
    """pyusb on a channel, beside pcscd on the reader."""
    found = guest.probe()
    assert {step: one["result"] for step, one in found.items() if one["result"] != "ok"} == {}, found
    assert set(found) == {"bus", "device", "libccid", "pcscd", "card", "library"}
    assert "web-1" in found["device"]["found"] and "another program" in found["card"]["found"]


def test_our_library_reaches_the_whole_token_by_usb(guest: CardGuest) -> None:
    """With the address usb:serial=NAME, and with usb: alone, while pcscd holds the card."""
    guest.machine.write("/root/message", MESSAGE)
    for address in ("usb:serial=web-1", "usb:"):
        listed = guest.run(f"pkcs11-tool --module {OURS.path} --list-objects --type privkey", HSMVISOR_PKCS11_ADDRESS=address)
        assert all(f"label:      {name}" in listed for name in KEYS)
        words = f"--sign --id {key_id(KEYS['web']).hex()} --mechanism ECDSA-SHA256 --signature-format openssl"
        guest.run(
            f"pkcs11-tool --module {OURS.path} {words} --input-file /root/message --output-file /root/signature",
            HSMVISOR_PKCS11_ADDRESS=address,
        )
        verify("web", guest.machine.read("/root/signature"))
    elsewhere = {"HSMVISOR_PKCS11_ADDRESS": "usb:serial=other", "HSMVISOR_PKCS11_DEBUG": "1"}
    assert "other" in guest.run(f"pkcs11-tool --module {OURS.path} --list-slots", check=False, **elsewhere)


SIGNING = (
    f"while [ ! -e /root/enough ]; do rm -f /root/load.new; pkcs11-tool --module {OPENSC} --login --pin {PIN} --sign --id 01 "
    "--mechanism ECDSA-SHA256 --signature-format openssl --input-file /root/message --output-file /root/load.new >/dev/null 2>&1 "
    "&& { base64 -w0 /root/load.new; echo; } >>/root/load.out; done"
)


def test_unplugged_and_plugged_in_again_under_load(plug: Plug, module: Module, guest: CardGuest) -> None:
    """Whoever signs meanwhile gets an error or a signature that verifies; afterwards all is as before."""
    guest.run("rm -f /root/enough; : >/root/load.out")
    guest.machine.write("/root/message", MESSAGE)
    load = guest.machine.start(SIGNING)

    def made() -> int:
        return int(guest.run("wc -l </root/load.out"))

    try:
        for _ in range(3):
            before = made()
            until(lambda before=before: made() > before, "a signature")  # type: ignore[misc]
            plug.pull_out()
            guest.wait_gone()
            assert module.status().device.usb.protocol == ""
            plug.plug_in()
            until(guest.seen, "the device to come back")
            guest.wait_for_card()
        before = made()
        until(lambda: made() > before, "a signature at the end")
    finally:
        guest.run("touch /root/enough")
        load.wait(60)
    for coded in guest.machine.read("/root/load.out").splitlines():
        verify("web", base64.b64decode(coded))


def test_a_worker_that_is_killed_comes_back_as_the_same_device(plug: Plug, module: Module, guest: CardGuest) -> None:
    before, pid = guest.card_id(), module.pid
    os.kill(pid, signal.SIGKILL)
    module.serving(not_pid=pid)
    plug.come_back()
    guest.wait_for_card()
    assert guest.card_id() == before
    verify("web", guest.sign("01", MESSAGE))


def test_our_library_finds_a_module_again_whose_worker_was_killed(plug: Plug, module: Module, guest: CardGuest) -> None:
    """One application, before and after: it looks for the device by itself."""
    signer = MachineSigner(guest.machine, BY_USB, "web")
    until(lambda: len(signer.made()) > 20, "signatures")
    pid = module.pid
    os.kill(pid, signal.SIGKILL)
    module.serving(not_pid=pid)
    plug.come_back()
    before = len(signer.made())
    until(lambda: len([one for one in signer.made()[before:] if not one.error]) > 20, "signatures afterwards")
    made = signer.stop()
    assert all(fits(KEYS["web"], one) for one in made if not one.error)
    guest.wait_for_card()


def test_no_key_is_in_the_guests_memory(guest: CardGuest, tmp_path_factory: pytest.TempPathFactory) -> None:
    for slot, mechanism in (("01", "ECDSA-SHA256"), ("02", "SHA256-RSA-PKCS")):
        guest.sign(slot, MESSAGE, mechanism)
    dump = tmp_path_factory.mktemp("memory") / "dump"
    guest.machine.dump_memory(dump)
    data = dump.read_bytes()
    dump.unlink()
    assert MESSAGE in data  # it is the memory that the programs used
    assert Needles(KEYS.values()).found_in(data) == set()


def test_two_guests_have_their_own_modules_and_nothing_of_each_others(host: Host, plug: Plug, guest: CardGuest) -> None:
    """Side by side, with the same kind of device; one guest's module is detached and the other one does not notice."""
    key = new_key("p256")
    other = host.create(f"db-{plug.protocol}")
    other.push("web", key, authority.chain(key))
    with GuestMachine() as machine:
        beside, second = CardGuest(machine), Plug(host, other, machine, plug.protocol)
        beside.start_pcscd()
        second.plug_in()
        beside.wait_for_card()
        assert f"db-{plug.protocol}" in beside.run("opensc-tool --list-readers")
        assert "web-1" not in beside.run(f"lsusb -v -d {IDS}", check=False)
        signature = beside.sign("01", MESSAGE)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        key.public_key().verify(signature, MESSAGE, ec.ECDSA(hashes.SHA256()))
        verify("web", guest.sign("01", MESSAGE))
        second.pull_out()
        until(lambda: not beside.seen(), "the other guest's device to go")
        verify("web", guest.sign("01", MESSAGE))
    other.destroy()


def test_a_pin_is_asked_for_and_locks_both_faces(plug: Plug, module: Module, guest: CardGuest) -> None:
    """The card's PIN is slot 0's, and so are its counters."""
    modules = module.host.process.modules
    modules.SetPin(pb.SetPinRequest(request_id=new_id(), name=module.name, pin=b"24680135"), timeout=10)
    try:
        words = "--sign --id 01 --mechanism ECDSA-SHA256 --signature-format openssl --input-file /root/message"
        guest.machine.write("/root/message", MESSAGE)
        sign = f"pkcs11-tool --module {OPENSC} --login --pin {{}} {words} --output-file /root/signature"
        assert "CKR_PIN_INCORRECT" in guest.run(sign.format("11111111"), check=False)
        guest.run(sign.format("24680135"))
        verify("web", guest.machine.read("/root/signature"))
        wrong = 0
        while wrong < 6:  # from the third one on it is locked for a while that doubles
            wrong += "CKR_PIN_INCORRECT" in guest.run(sign.format("11111111"), check=False)
        assert "CKR_PIN_LOCKED" in guest.run(sign.format("24680135"), check=False)
        by_usb = f"pkcs11-tool --module {OURS.path} --login --pin 24680135 {words} --label web"
        assert "CKR_PIN_LOCKED" in guest.run(by_usb, check=False, HSMVISOR_PKCS11_ADDRESS="usb:")
    finally:
        modules.SetPin(pb.SetPinRequest(request_id=new_id(), name=module.name, pin=b""), timeout=10)


def test_a_guests_kernel_imports_its_device_over_its_own_vsock(host: Host) -> None:
    """No network, and nothing of USB in QEMU: the vsock device says which guest it is."""
    key = new_key("p256")
    own = host.create("vm-3")
    own.push("web", key, authority.chain(key))
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    with GuestMachine(device_socket(own), network=False) as machine:
        guest = CardGuest(machine)
        guest.start_pcscd()
        machine.copy_in(Path(usb_import.__file__), "/root/usb_import.py")
        assert "no device 'vm-4'" in guest.run("modprobe vhci-hcd; python3 usb_import.py vm-4", check=False)
        assert "imported" in guest.run("python3 usb_import.py vm-3")
        guest.wait_for_card()
        usb = own.status().device.usb
        assert (usb.protocol, usb.peer) == (USBIP, "vsock of its own guest")
        for _ in range(2):
            signature = guest.sign("01", MESSAGE)
            key.public_key().verify(signature, MESSAGE, ec.ECDSA(hashes.SHA256()))
        assert "already" in guest.run("python3 usb_import.py vm-3", check=False)  # a second importer
        pid = own.pid
        os.kill(pid, signal.SIGKILL)
        own.serving(not_pid=pid)
        guest.wait_gone()
        until(lambda: "imported" in guest.run("python3 usb_import.py vm-3", check=False), "the device to come back")
        guest.wait_for_card()
        key.public_key().verify(guest.sign("01", MESSAGE), MESSAGE, ec.ECDSA(hashes.SHA256()))
    own.destroy()
