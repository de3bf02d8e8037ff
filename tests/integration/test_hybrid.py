"""Guests whose monitor speaks the hybrid vsock convention: a scripted monitor connects to P_9111, as Firecracker's does, and the
stream begins at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from hsmvisor.host import limits
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import ck
from hsmvisord.wire.calls import Mechanism
from support.certificates import Authority, new_key
from support.command import Command
from support.host import Host, Module
from support.host_process import new_id, refused, wait_for
from support.native_client import NativeClient
from support.wire_client import Closed

DIGEST = bytes(range(32))
KEYS = {name: new_key("p256") for name in ("web-1", "db-2")}
authority = Authority()


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vm")


@pytest.fixture(scope="module")
def host(machines: Path) -> Iterator[Host]:
    host = Host(f'[guests]\nsocket_mode = 0o640\ndirectories = ["{machines}"]\n')
    try:
        yield host.start()
    finally:
        host.clean()


@pytest.fixture(scope="module")
def modules(host: Host) -> dict[str, Module]:
    made = {name: host.create(name) for name in KEYS}
    for name, module in made.items():
        module.push("key", KEYS[name], authority.chain(KEYS[name]))
    return made


@pytest.fixture
def web(modules: dict[str, Module]) -> Iterator[Module]:
    yield modules["web-1"]
    for module in modules.values():
        detach(module)


@pytest.fixture
def vsock(machines: Path, request: pytest.FixtureRequest) -> Path:
    """A monitor's uds_path."""
    directory = machines / str(abs(hash(request.node.name)) % 10**6)
    directory.mkdir(exist_ok=True)
    return directory / "v.sock"


def attach(module: Module, path: Path | str, request_id: str = "", **more: str) -> pb.Attachment:
    asked = pb.AttachModuleRequest(request_id=request_id or new_id(), name=module.name, hybrid_path=str(path), **more)
    return module.host.process.modules.AttachModule(asked, timeout=20).device.attachment


def detach(module: Module, qmp: str = "") -> pb.Device:
    asked = pb.DetachModuleRequest(request_id=new_id(), name=module.name, qmp_path=qmp)
    return module.host.process.modules.DetachModule(asked, timeout=20).device


def connect(path: Path, port: int = limits.VSOCK_PORT) -> socket.socket:
    """As the monitor does for a guest that connects to (CID 2, port)."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(f"{path}_{port}")
    except BaseException:
        sock.close()
        raise
    return sock


class Program:
    """Of the guest."""

    def __init__(self, path: Path) -> None:
        self.client = NativeClient(connect(path))
        self.client.hello()
        self.session = self.client.open_session()
        (self.key,) = self.client.find(self.session, (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), (ck.CKA_LABEL, b"key"))

    def sign(self) -> bytes:
        signature: bytes = self.client.sign_once(self.session, Mechanism(ck.CKM_ECDSA), self.key, DIGEST)
        return signature


def signs_with(signature: bytes, key: ec.EllipticCurvePrivateKey) -> None:
    r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
    key.public_key().verify(encode_dss_signature(r, s), DIGEST, ec.ECDSA(Prehashed(hashes.SHA256())))


def test_a_guest_signs(web: Module, vsock: Path) -> None:
    shown = attach(web, vsock)
    assert (shown.hybrid_path, shown.listening, shown.qmp_path) == (str(vsock), True, "")
    assert stat.S_IMODE(os.stat(f"{vsock}_9111").st_mode) == 0o640
    programs = [Program(vsock) for _ in range(5)]
    for program in programs:
        for _ in range(20):  # lanes too
            signs_with(program.sign(), KEYS["web-1"])  # type: ignore[arg-type]
    assert web.status().connections >= 5
    with pytest.raises(FileNotFoundError):
        connect(vsock, 9112)
    for program in programs:
        program.client.close()
    wait_for(lambda: any(f"hybrid path={vsock}" in line for line in web.host.process.audit_lines()))


def test_two_modules_are_apart(web: Module, modules: dict[str, Module], vsock: Path) -> None:
    other = vsock.with_name("w.sock")
    attach(web, vsock)
    attach(modules["db-2"], other)
    for path, name in ((vsock, "web-1"), (other, "db-2")):
        program = Program(path)
        signs_with(program.sign(), KEYS[name])  # type: ignore[arg-type]
        program.client.close()
    precondition = grpc.StatusCode.FAILED_PRECONDITION
    assert refused(attach, web, other) == (precondition, "ATTACHED")
    detach(web)
    assert refused(attach, web, other) == (precondition, "HYBRID_TAKEN")
    assert refused(attach, web, f"{vsock.parent}/./w.sock") == (precondition, "HYBRID_TAKEN"), "the same by another name"


def test_detaching_closes_all_of_it(web: Module, vsock: Path) -> None:
    attach(web, vsock)
    idle, laned = Program(vsock), Program(vsock)
    for _ in range(50):
        laned.sign()
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(web.address.removeprefix("unix:path="))
    unix = NativeClient(sock)
    unix.hello()
    assert not detach(web).HasField("attachment")
    assert not os.path.lexists(f"{vsock}_9111")
    for program in (idle, laned):
        with pytest.raises((Closed, OSError)):
            program.sign()
    unix.open_session()  # of another way, and untouched
    unix.close()
    assert not detach(web).HasField("attachment")


def test_it_outlives_the_service(web: Module, vsock: Path) -> None:
    attached = attach(web, vsock)
    program = Program(vsock)
    for number in (signal.SIGTERM, signal.SIGKILL):
        web.host.stop(number)
        signs_with(program.sign(), KEYS["web-1"])  # type: ignore[arg-type]
        with pytest.raises(OSError):
            connect(vsock)
        web.host.start()
        web.serving()
        assert web.status().device.attachment == attached
        fresh = Program(vsock)
        signs_with(fresh.sign(), KEYS["web-1"])  # type: ignore[arg-type]
        fresh.client.close()
    signs_with(program.sign(), KEYS["web-1"])  # type: ignore[arg-type]
    program.client.close()


def test_workers_change_behind_it(web: Module, vsock: Path) -> None:
    attach(web, vsock)
    program = Program(vsock)
    request = pb.UpgradeModuleRequest(request_id=new_id(), name=web.name)
    assert web.host.process.modules.UpgradeModule(request, timeout=30).connections == 1
    signs_with(program.sign(), KEYS["web-1"])  # type: ignore[arg-type]
    pid = web.pid
    os.kill(pid, signal.SIGKILL)
    fresh = Program(vsock)  # waits for the next worker
    signs_with(fresh.sign(), KEYS["web-1"])  # type: ignore[arg-type]
    detach(web)
    for one in (program, fresh):
        with pytest.raises((Closed, OSError)):
            one.sign()


def test_a_stale_socket_is_replaced_and_nothing_else(web: Module, vsock: Path) -> None:
    place = Path(f"{vsock}_9111")
    precondition = grpc.StatusCode.FAILED_PRECONDITION
    for make in (place.touch, place.mkdir, lambda: place.symlink_to("/etc/passwd")):
        make()
        assert refused(attach, web, vsock) == (precondition, "HYBRID_PATH")
        place.rmdir() if place.is_dir() else place.unlink()
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(place))
        living.listen()
        assert refused(attach, web, vsock) == (precondition, "HYBRID_TAKEN")
    assert place.is_socket()
    attach(web, vsock)
    Program(vsock).client.close()
    place.unlink()  # by somebody else: attaching again mends it
    assert attach(web, vsock).listening
    Program(vsock).client.close()


def test_paths_that_cannot_be(web: Module, vsock: Path, tmp_path: Path) -> None:
    invalid, precondition = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
    longest = str(vsock.parent / "p").ljust(limits.MAX_HYBRID_PATH, "p")
    assert len(f"{longest}_{limits.VSOCK_PORT}") == 107
    for path in ("relative", "/ends/", "/line\nfeed", longest + "p"):
        assert refused(attach, web, path) == (invalid, "HYBRID_PATH")
    assert refused(attach, web, vsock, bus="rp0") == (invalid, "HYBRID_PATH")
    assert refused(attach, web, vsock.parent / "absent" / "v") == (precondition, "HYBRID_PATH")
    assert refused(attach, web, tmp_path / "v") == (precondition, "HYBRID_PATH"), "not in the configuration"
    (vsock.parent / "link").symlink_to(tmp_path)
    assert refused(attach, web, vsock.parent / "link" / "v") == (precondition, "HYBRID_PATH"), "by a link neither"
    assert attach(web, longest).listening
    Program(Path(longest)).client.close()
    assert refused(detach, web, "/run/qmp") == (precondition, "NOT_ATTACHED")


def test_a_repeated_call_and_the_audit_log(web: Module, vsock: Path) -> None:
    ident = new_id()
    assert attach(web, vsock, ident) == attach(web, vsock, ident) == attach(web, vsock)
    detach(web)
    lines = [json.loads(line) for line in web.host.process.audit_lines()]
    mine = [line for line in lines if line.get("hybrid") == str(vsock)]
    assert [(line["kind"], line["result"]) for line in mine] == [
        ("module.attach", "ok"), ("module.attach", "repeated"), ("module.attach", "ok"), ("module.detach", "ok")
    ]  # fmt: skip


def test_break_glass_keeps_it(host: Host, vsock: Path) -> None:
    module = host.create("lost-3")
    attached = attach(module, vsock)
    request = pb.BreakGlassRequest(request_id=new_id(), name="lost-3", new_root=host.authority.root_public, empty_it=True)
    host.process.modules.BreakGlass(request, metadata=(("hsmvisor-why", "lost"),), timeout=20)
    assert module.status().device.attachment == attached
    client = NativeClient(connect(vsock))
    client.hello()
    module.destroy()
    wait_for(lambda: not os.path.lexists(f"{vsock}_9111"))


def test_the_command_line(web: Module, vsock: Path, tmp_path: Path) -> None:
    cli = Command(f"unix:{web.host.process.socket}", tmp_path)
    assert f"{vsock}_9111" in cli("module", "attach", "web-1", "--hybrid", vsock)
    assert f"{vsock}, port 9111" in cli("module", "show", "web-1")
    assert "is in no guest" in cli("module", "detach", "web-1")
    cli("module", "attach", "web-1", code=2)
    cli("module", "attach", "web-1", "--hybrid", vsock, "--qmp", "/q", code=2)
    cli("module", "attach", "web-1", "--hybrid", tmp_path / "v", code=4)
    assert "guests.directories" in cli.errors


def test_a_module_with_a_monitor_is_in_no_qemu(web: Module, vsock: Path) -> None:
    attach(web, vsock)
    asked = pb.AttachModuleRequest(request_id=new_id(), name=web.name, qmp_path="/run/vm/qmp")
    assert refused(web.host.process.modules.AttachModule, asked, timeout=20) == (grpc.StatusCode.FAILED_PRECONDITION, "ATTACHED")
    assert web.status().device.attachment.listening


def test_a_directory_that_is_gone_keeps_nobody_from_the_module(web: Module, vsock: Path) -> None:
    attach(web, vsock)
    web.host.stop(signal.SIGTERM)
    vsock.parent.rename(vsock.parent.with_suffix(".away"))
    web.host.start()
    assert web.serving().device.attachment.listening is False
    assert "there is no directory" in web.host.process.log.read_text()
    vsock.parent.mkdir()
    assert attach(web, vsock).listening
    Program(vsock).client.close()
