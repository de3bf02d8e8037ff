"""A module is a PCI device of a virtual machine: Debian's own driver and programs, and whatever happens to either side."""

from __future__ import annotations

import os
import shlex
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord.limits import VSOCK_PORT
from support.certificates import Authority, PrivateKey, chain_pem, key_id, new_key
from support.command import Command
from support.guest import Guest
from support.guest import library as host_library
from support.guest_machine import GuestMachine
from support.host import Host, Module
from support.host_process import new_id
from support.leaks import Needles
from support.load import Made, fits
from support.machine_guest import ADDRESS, OURS, STOCK, GuestLibrary, MachineSigner, device_socket, engine, tool
from support.machine_rotation import rotate_in_machine
from support.nginx import client_context, handshake
from support.sshd import Sshd

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]

MESSAGE = b"what a guest has to sign"
KEYS: dict[str, PrivateKey] = {}
authority = Authority()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture(scope="module")
def module(host: Host) -> Module:
    module = host.create("web-1")
    for name, kind in (("web", "p256"), ("mail", "rsa2048")):
        KEYS[name] = new_key(kind)
        module.push(name, KEYS[name], authority.chain(KEYS[name]))
    return module


@pytest.fixture(scope="module")
def machine(module: Module) -> Iterator[GuestMachine]:
    """Booted without the device, which is plugged in then."""
    with GuestMachine() as machine:
        machine.plug(device_socket(module))
        yield machine


@pytest.fixture(params=[OURS, STOCK], ids=lambda library: library.name)
def library(request: pytest.FixtureRequest) -> GuestLibrary:
    library: GuestLibrary = request.param
    return library


def waited(holds: Callable[[], bool], what: str, within: float = 60) -> float:
    """Returns after how many seconds it held."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < within, f"waited {within} s in vain for {what}"
        time.sleep(0.1)
    return time.monotonic() - began


def found(machine: GuestMachine, library: GuestLibrary) -> bool:
    return b"web-1" in tool(machine, library, "--list-slots", check=False)


def check(made: list[Made], key: PrivateKey, least: int = 1) -> None:
    assert not [one.error for one in made if one.error]
    assert all(fits(key, one) for one in made)
    assert len(made) >= least


def test_a_module_is_found_after_it_was_plugged_in(machine: GuestMachine, library: GuestLibrary) -> None:
    print(f"boot {machine.boot_seconds:.1f} s; found after {waited(lambda: found(machine, library), 'the module'):.1f} s")
    objects = tool(machine, library, "--list-objects", "--type", "privkey")
    assert b"web" in objects and b"mail" in objects


def test_a_guest_signs_verifies_and_decrypts(machine: GuestMachine, library: GuestLibrary) -> None:
    web, mail = KEYS["web"], KEYS["mail"]
    assert isinstance(web, ec.EllipticCurvePrivateKey) and isinstance(mail, rsa.RSAPrivateKey)
    machine.write("/root/message", MESSAGE)
    for label, mechanism in (("web", "ECDSA-SHA256"), ("mail", "SHA256-RSA-PKCS")):
        if library is STOCK and label == "web":
            continue  # its wire has no such mechanism
        where = ("--id", key_id(KEYS[label]).hex(), "--mechanism", mechanism, "--input-file", "/root/message")
        more = ("--signature-format", "openssl") if label == "web" else ()
        tool(machine, library, "--sign", *where, "--output-file", "/root/signature", *more)
        signature = machine.read("/root/signature")
        if label == "web":
            web.public_key().verify(signature, MESSAGE, ec.ECDSA(hashes.SHA256()))
        else:
            mail.public_key().verify(signature, MESSAGE, padding.PKCS1v15(), hashes.SHA256())
            assert b"Signature is valid" in tool(machine, library, "--verify", *where, "--signature-file", "/root/signature")
    machine.write("/root/sealed", mail.public_key().encrypt(MESSAGE, padding.PKCS1v15()))
    where = ("--id", key_id(mail).hex(), "--mechanism", "RSA-PKCS", "--input-file", "/root/sealed")
    tool(machine, library, "--decrypt", *where, "--output-file", "/root/opened")
    assert machine.read("/root/opened") == MESSAGE


NGINX = """\
daemon off; worker_processes 2; error_log /root/nginx.log; pid /root/nginx.pid; user root; env {variable}; env OPENSSL_CONF;
events {{ }}
http {{ access_log off; server {{ listen 443 ssl; ssl_certificate /root/chain.pem;
ssl_certificate_key "engine:pkcs11:pkcs11:object=web;type=private"; location / {{ return 200 "$pid\\n"; }} }} }}
"""


def test_nginx_in_the_guest_serves_tls_to_the_host(machine: GuestMachine, library: GuestLibrary) -> None:
    machine.write("/root/chain.pem", chain_pem(authority.chain(KEYS["web"])))
    machine.write("/root/nginx.conf", NGINX.format(variable=library.variable))
    server = machine.start(["nginx", "-c", "/root/nginx.conf"], output="/root/nginx.out", more=engine(machine, library))
    port, context = machine.forward(443), client_context(authority.root_pem)

    def answers() -> bool:
        try:
            return handshake(port, context)[2] > 0
        except (OSError, ssl.SSLError):
            return False

    try:
        waited(answers, f"nginx: {machine.run('cat /root/nginx.*', check=False).stdout.decode()}")
        for _ in range(10):
            handshake(port, context)
    finally:
        server.stop()


def test_ssh_out_of_the_guest(machine: GuestMachine, module: Module, library: GuestLibrary, tmp_path: Path) -> None:
    public = KEYS["web"].public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    server = Sshd(Guest(host_library("ours"), module.address, tmp_path), public)
    try:
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes", f"PKCS11Provider={library.path}")
        flags = [part for option in options for part in ("-o", option)]
        command = ["ssh", "-F", "none", *flags, "-p", str(server.port), f"{server.user}@10.0.2.2", "echo", "in"]
        assert machine.run(command, more=library.environment, timeout=60).stdout == b"in\n", server.log.read_text()
    finally:
        server.stop()


def test_a_stopped_machine_goes_on(machine: GuestMachine, library: GuestLibrary) -> None:
    signer = MachineSigner(machine, library, "web", f"stopped-{library.name}")
    waited(lambda: len(signer.made()) > 20, "signatures")
    for _ in range(3):
        machine.stop()
        time.sleep(0.5)
        machine.cont()
        time.sleep(0.5)
    check(signer.stop(), KEYS["web"], 30)


def test_no_call_fails_while_workers_are_replaced(machine: GuestMachine, module: Module, library: GuestLibrary) -> None:
    signer = MachineSigner(machine, library, "web", f"upgraded-{library.name}")
    waited(lambda: len(signer.made()) > 20, "signatures")
    for _ in range(3):
        pid = module.pid
        request = pb.UpgradeModuleRequest(request_id=new_id(), name=module.name)
        module.host.process.modules.UpgradeModule(request, timeout=30)
        assert module.pid != pid
        before = len(signer.made())
        waited(lambda before=before: len(signer.made()) > before + 5, "signatures of the successor")  # type: ignore[misc]
    check(signer.stop(), KEYS["web"], 30)


def test_a_killed_worker_is_replaced_without_the_guest_noticing(machine: GuestMachine, module: Module) -> None:
    signer = MachineSigner(machine, OURS, "web", "killed")
    waited(lambda: len(signer.made()) > 20, "signatures")
    for _ in range(3):
        pid = module.pid
        os.kill(pid, signal.SIGKILL)
        module.serving(pid)
        before = len(signer.made())
        print(f"signs again after {waited(lambda b=before: len(signer.made()) > b + 5, 'signatures'):.2f} s")  # type: ignore[misc]
    check(signer.stop(), KEYS["web"], 30)
    assert found(machine, STOCK), "a new stock client"


def test_the_supervisor_is_restarted_under_load(machine: GuestMachine, module: Module) -> None:
    signer = MachineSigner(machine, OURS, "web", "restarted")
    waited(lambda: len(signer.made()) > 20, "signatures")
    for number in (signal.SIGTERM, signal.SIGKILL):
        module.host.stop(number)
        module.host.start()
        pid = module.serving().pid
        os.kill(pid, signal.SIGKILL)  # the new supervisor has what its successor needs
        module.serving(pid)
        before = len(signer.made())
        waited(lambda b=before: len(signer.made()) > b + 5, "signatures")  # type: ignore[misc]
    check(signer.stop(), KEYS["web"], 30)


def test_the_guest_reboots(machine: GuestMachine, library: GuestLibrary) -> None:
    signer = MachineSigner(machine, OURS, "web", f"rebooted-{library.name}")
    waited(lambda: len(signer.made()) > 5, "signatures")
    print(f"boots again in {machine.reset():.1f} s")
    waited(lambda: found(machine, library), "the module after a reboot")


def test_a_module_is_unplugged_and_plugged_in_again(machine: GuestMachine, module: Module, library: GuestLibrary) -> None:
    signer = MachineSigner(machine, OURS, "web", f"unplugged-{library.name}")
    waited(lambda: len(signer.made()) > 5, "signatures")
    machine.unplug()
    waited(lambda: not found(machine, library), "the module to be gone")
    machine.plug(device_socket(module))
    waited(lambda: found(machine, library), "the module")
    before = len([one for one in signer.made() if one.signature])
    waited(lambda: len([one for one in signer.made() if one.signature]) > before + 5, "signatures after it was plugged in again")
    made = signer.stop()
    assert all(fits(KEYS["web"], one) for one in made if one.signature)


@pytest.mark.parametrize("mebibytes", [1, 64])
def test_large_transfers_are_intact(machine: GuestMachine, library: GuestLibrary, mebibytes: int) -> None:
    program = (
        "import hashlib, sys, pkcs11\n"
        "session = pkcs11.lib(sys.argv[1]).get_token().open()\n"
        "part = bytes(range(256)) * 1024\n"
        "parts = [part] * (4 * int(sys.argv[2]))\n"
        "assert session.digest(iter(parts), mechanism=pkcs11.Mechanism.SHA256) == hashlib.sha256(b''.join(parts)).digest()\n"
    )
    machine.write("/root/digest.py", program)
    machine.run(["python3", "/root/digest.py", library.path, str(mebibytes)], more=library.environment, timeout=240)


def test_the_guests_memory_holds_no_key(machine: GuestMachine, module: Module, tmp_path: Path) -> None:
    for one in (OURS, STOCK):
        which = ("--id", key_id(KEYS["mail"]).hex(), "--mechanism", "SHA256-RSA-PKCS")
        tool(machine, one, "--sign", *which, "--input-file", "/etc/passwd", "--output-file", "/root/signed")
    needles = Needles(KEYS.values())
    dump = tmp_path / "memory"
    machine.dump_memory(dump)
    assert dump.stat().st_size > machine.memory << 20
    with dump.open("rb") as file:
        while part := file.read(64 << 20):
            assert needles.found_in(part) == set()
            if len(part) == 64 << 20:
                file.seek(-4096, os.SEEK_CUR)
    assert needles.in_process(module.host.pid()) == set()
    assert needles.in_process(machine.pid) == set()
    assert needles.in_process(module.pid), "the worker has them, and the search finds them"


def test_two_guests_reach_their_own_modules_alone(host: Host, machine: GuestMachine) -> None:
    other = host.create("db-2")
    key = new_key("p256")
    other.push("db", key, authority.chain(key))
    with GuestMachine(device_socket=device_socket(other), memory=192) as second:
        waited(lambda: b"db-2" in tool(second, OURS, "--list-slots", check=False), "the other module")
        for one, mine, foreign in ((machine, b"web-1", b"db-2"), (second, b"db-2", b"web-1")):
            said = tool(one, OURS, "--list-slots")
            assert mine in said and foreign not in said
        cids = sorted({host.process.get(name).device.guest_cid for name in ("web-1", "db-2")})
        assert len(cids) == 2
        for cid, port in [(2, VSOCK_PORT - 1), (2, VSOCK_PORT + 1), *((cid, VSOCK_PORT) for cid in (1, 3, *cids))]:
            address = {OURS.variable: f"vsock:cid={cid};port={port}"}
            command = ["pkcs11-tool", "--module", OURS.path, "--list-slots"]
            said = machine.run(command, more=address, check=False, timeout=60)
            assert b"No slots" in said.stdout + said.stderr, (cid, port)
    waited(lambda: found(machine, OURS), "the first one, still")


def test_rotations_with_client_and_server_in_the_guest(
    host: Host, machine: GuestMachine, module: Module, library: GuestLibrary
) -> None:
    report = rotate_in_machine(library, machine, module, rotations=6, interval=1.0)
    print(report.summary())
    assert (report.failed_handshakes, report.failed_signatures, report.wrong_signatures) == ([], [], 0)
    assert report.foreign_certificates == 0
    assert report.certificates_seen >= 2, "the first one and, waited for, the last"
    assert report.generations_that_signed > 4
    assert report.handshakes > 20 and report.signatures > 100


# ---- the operator's way: by the command line


@pytest.fixture
def cli(host: Host) -> Command:
    return Command(f"unix:{host.process.socket}", host.process.directory / "authority")


def slots(machine: GuestMachine, library: GuestLibrary) -> bytes:
    return tool(machine, library, "--list-slots", check=False)


def test_an_operator_attaches_and_detaches(host: Host, cli: Command) -> None:
    key = new_key("p256")
    host.create("op-1").push("web", key, authority.chain(key))
    with GuestMachine(memory=192) as machine:
        assert b"op-1" not in slots(machine, OURS) + slots(machine, STOCK)
        for _ in range(2):
            told = cli("module", "attach", "op-1", "--qmp", machine.qmp_socket)
            assert "is plugged in (bus rp0)" in told and ADDRESS in told
            for library in (OURS, STOCK):
                waited(lambda one=library: b"op-1" in slots(machine, one), "the module")  # type: ignore[misc]
                assert b"web" in tool(machine, library, "--list-objects", "--type", "privkey")
            device = cli.json("module", "show", "op-1")["device"]
            assert device["plugged"] is True and device["attachment"]["qmp_path"] == str(machine.qmp_socket)
            assert "is plugged in (bus rp0)" in cli("module", "attach", "op-1", "--qmp", machine.qmp_socket), "said twice"
            signer = MachineSigner(machine, OURS, "web", "attached")
            waited(lambda one=signer: len(one.made()) > 5, "signatures")  # type: ignore[misc]
            check(signer.stop(), key, 5)
            assert "is in no guest" in cli("module", "detach", "op-1")
            for library in (OURS, STOCK):
                waited(lambda one=library: b"op-1" not in slots(machine, one), "the module to be gone")  # type: ignore[misc]
            device = cli.json("module", "show", "op-1")["device"]
            assert not device.get("plugged") and "attachment" not in device
            assert "is in no guest" in cli("module", "detach", "op-1"), "said twice"


def test_a_lost_device_comes_back_by_itself(host: Host, cli: Command) -> None:
    """Worker and supervisor die at once: nobody has the connection any more, so the device is plugged in anew by QMP."""
    key = new_key("p256")
    module = host.create("op-5")
    module.push("web", key, authority.chain(key))
    with GuestMachine(memory=192) as machine:
        cli("module", "attach", "op-5", "--qmp", machine.qmp_socket)
        waited(lambda: b"op-5" in slots(machine, OURS), "the module")
        signer = MachineSigner(machine, OURS, "web", "lost")
        waited(lambda: len(signer.made()) > 5, "signatures")
        worker = module.pid
        os.kill(host.pid(), signal.SIGSTOP)  # else it would give the device to the next worker
        os.kill(worker, signal.SIGKILL)
        host.stop(signal.SIGKILL)
        host.start()
        before = len([one for one in signer.made() if one.signature])
        back = waited(lambda: len([one for one in signer.made() if one.signature]) > before + 5, "signatures with the new device")
        print(f"signs again {back:.1f} s after the service was there")
        assert all(fits(key, one) for one in signer.stop() if one.signature)
        assert b"op-5" in slots(machine, STOCK)
        assert '"kind":"module.replug"' in "".join(host.process.audit_lines()).replace(" ", "")


def test_a_module_is_destroyed_in_its_guest(host: Host, cli: Command) -> None:
    """The guest runs on without it, and without its device: another module has its place."""
    with GuestMachine(memory=192) as machine:
        for name in ("op-2", "op-2", "op-4"):
            host.create(name)
            cli("module", "attach", name, "--qmp", machine.qmp_socket)
            waited(lambda name=name: name.encode() in slots(machine, OURS), "the module")  # type: ignore[misc]
            cli("module", "destroy", name, "--yes")
            waited(lambda name=name: name.encode() not in slots(machine, OURS), "the destroyed module to be gone")  # type: ignore[misc]
            assert name.encode() not in slots(machine, STOCK)
            assert machine.qmp("query-status")["status"] == "running"


def test_qemus_arguments_boot_a_guest_that_has_the_module(host: Host, cli: Command) -> None:
    key = new_key("p256")
    host.create("op-3").push("web", key, authority.chain(key))
    words = shlex.split(cli("module", "qemu-args", "op-3", "--memory", "192M"))
    with GuestMachine(memory=192, share=False, arguments=words) as machine:  # so the shared memory is that of the arguments
        for library in (OURS, STOCK):
            waited(lambda one=library: b"op-3" in slots(machine, one), "the module")  # type: ignore[misc]
            assert b"web" in tool(machine, library, "--list-objects", "--type", "privkey")
        assert cli.json("module", "show", "op-3")["device"]["plugged"] is True
        cli("module", "detach", "op-3", code=4)
        assert "--qmp" in cli.errors
        cli("module", "detach", "op-3", "--qmp", machine.qmp_socket)
        waited(lambda: b"op-3" not in slots(machine, OURS), "the module to be gone")
        cli("module", "attach", "op-3", "--qmp", machine.qmp_socket)
        waited(lambda: b"op-3" in slots(machine, OURS), "the module")
