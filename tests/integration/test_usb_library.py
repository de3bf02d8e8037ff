"""Programs of a guest that reach a real module by libhsmvisor-pkcs11.so over USB; bus and libusb are ours (support/usb_bus.py)."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from support.certificates import Authority, chain_pem, key_id, new_key
from support.cryptoki import REPOSITORY
from support.guest import Guest, Library, stop, wait_for
from support.host import Module
from support.nginx import Nginx, client_context, handshake
from support.nss import Nss
from support.usb_bus import CHANNELS, UsbBus, claimed

AUTHORITY = Authority()


@dataclass(frozen=True)
class Plugged:
    """A module on the bus, and the guest that it is plugged into."""

    module: Module
    bus: UsbBus
    node: Path
    guest: Guest


@pytest.fixture
def plugged(module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugged]:
    bus = UsbBus()
    node = bus.plug(module.name, module.address.removeprefix("unix:path="))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(bus.made.libusb))
    monkeypatch.setenv("HSMVISOR_TEST_LIBRARY", str(bus.made.library))
    library = Library("ours", bus.made.library, "HSMVISOR_PKCS11_ADDRESS")
    yield Plugged(module, bus, node, Guest(library, f"usb:serial={module.name}", tmp_path))
    assert not any(claimed(node) for node in bus.nodes.glob("001/*"))


def deliver(plugged: Plugged, name: str = "web", kind: str = "p256") -> ec.EllipticCurvePrivateKey:
    key = new_key(kind)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    plugged.module.push(name, key, AUTHORITY.chain(key))
    return key


@pytest.mark.real
def test_pkcs11_tool_signs(plugged: Plugged) -> None:
    key, guest = deliver(plugged), plugged.guest
    tool = ("pkcs11-tool", "--module", guest.library.path)
    assert f"token label        : {plugged.module.name}" in guest.run(*tool, "--list-slots").stdout.decode()
    source, target = guest.write("in", b"a message"), guest.directory / "signature"
    more = ("--mechanism", "ECDSA-SHA256", "--signature-format", "openssl", "--input-file", source, "--output-file", target)
    guest.run(*tool, "--sign", "--id", key_id(key).hex(), *more)
    key.public_key().verify(target.read_bytes(), b"a message", ec.ECDSA(hashes.SHA256()))


@pytest.mark.real
def test_nss_that_allows_no_threads_asks_again(plugged: Plugged) -> None:
    """certutil tells each library that it must not make threads, and one that has to that it may after all."""
    deliver(plugged)
    assert list(Nss(plugged.guest, {plugged.module.name: "any"}).keys(plugged.module.name)) == ["web"]


@pytest.mark.real
def test_nginx_serves_from_forked_workers(plugged: Plugged) -> None:
    key = deliver(plugged)
    chain = plugged.guest.write("web.pem", chain_pem(AUTHORITY.chain(key)))
    nginx = Nginx(plugged.guest, [(chain, f"pkcs11:token={plugged.module.name};object=web;type=private")], workers=3)
    try:
        context = client_context(AUTHORITY.root_pem)
        workers = {handshake(nginx.port, context)[2] for _ in range(40)}
        assert len(workers) >= 2
        assert len(claimed(plugged.node)) <= 4  # each worker's, and the master's
        victim = workers.pop()
        os.kill(victim, signal.SIGKILL)
        for _ in range(20):
            assert handshake(nginx.port, context)[2] != victim
        before = {handshake(nginx.port, context)[2] for _ in range(10)}
        nginx.reload()
        wait_for(lambda: handshake(nginx.port, context)[2] not in before, "a new worker")
    finally:
        nginx.stop()


SIGNER = """
import sys, time
from ctypes import c_ubyte, c_ulong, create_string_buffer
from hsmvisord import ck
from support.cryptoki import Cryptoki
p11 = Cryptoki()
p11.initialize()
session = p11.open_session()
key = p11.find(session, template=[(ck.CKA_CLASS, ck.CKO_PRIVATE_KEY.to_bytes(8, "little"))])[0]
end, count = time.monotonic() + float(sys.argv[1]), 0
while time.monotonic() < end:
    assert p11.sign_init(session, key) == 0
    rv, signature = p11.sign(session, sys.argv[2].encode())
    assert rv == 0, (rv, count)
    count += 1
    print(signature.hex(), flush=True)
p11.finalize()
"""


def signatures(output: str, key: ec.EllipticCurvePrivateKey, message: bytes) -> int:
    """How many there are; each is verified."""
    lines = output.split()
    for line in lines:
        both = bytes.fromhex(line)
        r, s = (int.from_bytes(part, "big") for part in (both[:32], both[32:]))
        encoded = utils.encode_dss_signature(r, s)
        key.public_key().verify(encoded, message, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
    return len(lines)


def test_signing_goes_on_over_a_worker_that_is_killed_and_a_plug_that_is_pulled(plugged: Plugged) -> None:
    key, digest = deliver(plugged), "0123456789abcdef0123456789abcdef"
    pulled: list[int] = []

    def disturb() -> None:
        time.sleep(1)
        os.kill(plugged.module.pid, signal.SIGKILL)
        plugged.bus.unplug()
        time.sleep(2)  # as long as QEMU takes to come back
        plugged.bus.plug(plugged.module.name, plugged.module.address.removeprefix("unix:path="), port="1-4")
        pulled.append(1)

    thread = threading.Thread(target=disturb)
    thread.start()
    said = plugged.guest.run(*program(SIGNER, "5", digest), more=paths()).stdout.decode()
    thread.join()
    assert pulled and signatures(said, key, digest.encode()) > 20


def test_processes_side_by_side_sign_with_one_key(plugged: Plugged) -> None:
    key = deliver(plugged)
    digests = [hashlib.md5(bytes((n,))).hexdigest() for n in range(CHANNELS)]
    outputs = [plugged.guest.directory / f"signer-{n}" for n in range(CHANNELS)]
    running = [
        plugged.guest.start(*program(SIGNER, "2", digest), output=path, more=paths())
        for digest, path in zip(digests, outputs, strict=True)
    ]
    for process, path, digest in zip(running, outputs, digests, strict=True):
        assert process.wait(60) == 0, path.read_text()
        assert signatures(path.read_text(), key, digest.encode()) > 3


LARGE = """
from ctypes import create_string_buffer
from support.cryptoki import Cryptoki
p11 = Cryptoki()
p11.initialize()
session = p11.open_session()
for size in (1, 512, 65536, 1 << 20):
    room = create_string_buffer(size)
    p11.good("C_GenerateRandom", session, room, size)
    assert size < 512 or len(set(room.raw)) > 200
p11.finalize()
"""


def test_the_largest_answers(plugged: Plugged) -> None:
    plugged.guest.run(*program(LARGE), more=paths())


def test_hsmvisor_guest_follows_rotations(plugged: Plugged) -> None:
    deliver(plugged)
    out, log = plugged.guest.directory / "web.pem", plugged.guest.directory / "log"
    tool = REPOSITORY / "pkcs11_shim/build/hsmvisor-guest"
    options = ("--module", plugged.guest.library.path, "--settle", "0")
    process = plugged.guest.start(tool, "sync", "--label", "web", "--out", out, *options, output=log)
    try:
        wait_for(out.exists, "the certificate")
        for _ in range(3):
            wait_for(partial(holds, out, deliver(plugged)), "the next certificate")
        # one for calls, one waits for the next rotation; the first is let go of and taken again around each
        wait_for(lambda: len(claimed(plugged.node)) == 2, "both channels")
    finally:
        stop(process)
    assert process.returncode == 0, log.read_text()


def holds(path: Path, key: ec.EllipticCurvePrivateKey) -> bool:
    return x509.load_pem_x509_certificate(path.read_bytes()).public_key() == key.public_key()


def program(script: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", script, *arguments)


def paths() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(str(REPOSITORY / name) for name in ("tests", "daemon", "proto"))}
