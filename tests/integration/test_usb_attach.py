"""Where a module may be imported by USB/IP, and by whom: what is asked for, what is refused, and what a restart finds."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator

import pytest
from grpc import StatusCode
from hsmvisor.host import limits
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.guest import free_port
from support.host import Host, Module, wait_for
from support.host_process import new_id, refused
from support.usb_importers import Usbip

INVALID, WRONG_STATE = StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def module(host: Host) -> Iterator[Module]:
    module = host.create(f"usb-{free_port()}")
    yield module
    module.destroy()


def attach(module: Module, address: str, *peers: str, **more: object) -> pb.Module:
    asked = pb.AttachModuleRequest(request_id=new_id(), name=module.name, face=pb.USB, usbip_listen=address, **more)  # type: ignore[arg-type]
    asked.usbip_peers.extend(peers)
    return module.host.process.modules.AttachModule(asked, timeout=10)


def detach(module: Module) -> pb.Module:
    asked = pb.DetachModuleRequest(request_id=new_id(), name=module.name, face=pb.USB)
    return module.host.process.modules.DetachModule(asked, timeout=10)


def local() -> tuple[str, int]:
    return "127.0.0.1", free_port()


def imports(module: Module, where: tuple[str, int]) -> Usbip:
    importer: Usbip = wait_for(lambda: not module.status().device.usb.protocol and Usbip(where, module.name))
    assert importer.control(0x80, 6, 0x0100, 0, 18)[:2] == b"\x12\x01"
    return importer


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:3240", "[::]:3240", "[::0]:3240", "[0:0:0:0:0:0:0:0]:3240", "[::ffff:0.0.0.0]:3240", "[::ffff:127.0.0.1]:3240",
        "224.0.0.1:3240", "[ff02::1]:3240", "*:3240", ":3240", "3240", "0:3240", "localhost:3240", "127.0.0.1", "127.0.0.1:",
        "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:x", "::1:3240", "[::1]", "127.0.0.1:3240 ", "127.0.0.1:3240\n", "unix:/x:1",
    ],
)  # fmt: skip
def test_where_it_does_not_listen(module: Module, address: str) -> None:
    assert refused(attach, module, address, "127.0.0.1") == (INVALID, "USBIP_ADDRESS")
    assert not module.status().device.usb.HasField("attachment")


@pytest.mark.parametrize(
    "peers",
    [[], [""], ["guest"], ["127.0.0.1/33"], ["127.0.0.1/24"], ["127.0.0.1-9"], ["127.0.0.1", "x" * 5000], ["127.0.0.1:1"]],
    ids=range(8),
)
def test_peers_that_are_none(module: Module, peers: list[str]) -> None:
    host, port = local()
    assert refused(attach, module, f"{host}:{port}", *peers) == (INVALID, "USBIP_PEERS")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port), 5)


def test_how_many_peers_there_may_be(module: Module) -> None:
    host, port = local()
    peers = [f"127.0.0.{n}" for n in range(1, limits.MAX_USBIP_PEERS + 2)]
    assert refused(attach, module, f"{host}:{port}", *peers) == (INVALID, "USBIP_PEERS")
    attach(module, f"{host}:{port}", *peers[:-1])
    imports(module, (host, port)).close()


def test_ipv6(module: Module) -> None:
    port = free_port()
    attach(module, f"[::1]:{port}", "::/64")
    imports(module, ("::1", port)).close()


def test_it_is_asked_for_in_one_way(module: Module) -> None:
    host, port = local()
    assert refused(attach, module, "") == (INVALID, "FACE")
    assert refused(attach, module, f"{host}:{port}", "127.0.0.1", qmp_path="/run/qmp") == (INVALID, "FACE")
    assert refused(attach, module, f"{host}:{port}", "127.0.0.1", bus="pcie.1") == (INVALID, "FACE")


def test_a_face_that_there_is_not(module: Module) -> None:
    modules, face = module.host.process.modules, max(pb.Face.values()) + 1
    for call, asked in (
        (modules.AttachModule, pb.AttachModuleRequest(request_id=new_id(), name=module.name, qmp_path="/x", face=face)),  # type: ignore[arg-type]
        (modules.DetachModule, pb.DetachModuleRequest(request_id=new_id(), name=module.name, face=face)),  # type: ignore[arg-type]
        (modules.DescribeDevice, pb.DescribeDeviceRequest(name=module.name, face=face)),  # type: ignore[arg-type]
    ):
        assert refused(call, asked, timeout=10) == (StatusCode.INVALID_ARGUMENT, "FACE")


def test_an_address_that_is_not_to_be_had(host: Host, module: Module) -> None:
    where, other = local(), host.create(f"other-{free_port()}")
    with socket.create_server(where):
        assert refused(attach, module, f"{where[0]}:{where[1]}", "127.0.0.1") == (WRONG_STATE, "USBIP_ADDRESS")
    assert refused(attach, module, f"192.0.2.1:{where[1]}", "127.0.0.1") == (WRONG_STATE, "USBIP_ADDRESS")
    attach(other, f"{where[0]}:{where[1]}", "127.0.0.1")
    assert refused(attach, module, f"{where[0]}:{where[1]}", "127.0.0.1") == (WRONG_STATE, "USBIP_ADDRESS")
    assert not module.status().device.usb.HasField("attachment")
    imports(other, where).close()
    other.destroy()
    attach(module, f"{where[0]}:{where[1]}", "127.0.0.1")
    imports(module, where).close()


def test_another_address_in_the_place_of_the_first(module: Module) -> None:
    """Who has imported it keeps it; and where that fails it listens where it did."""
    first, second = local(), local()
    attach(module, f"{first[0]}:{first[1]}", "127.0.0.1")
    importer = imports(module, first)
    attach(module, f"{second[0]}:{second[1]}", "127.0.0.0/8")
    assert importer.control(0x80, 8, 0, 0, 1) == b"\0"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(first, 5)
    told = module.status().device.usb.attachment
    assert (told.listen, list(told.peers), told.listening) == (f"{second[0]}:{second[1]}", ["127.0.0.0/8"], True)
    importer.close()
    with socket.create_server(first):
        assert refused(attach, module, f"{first[0]}:{first[1]}", "127.0.0.1") == (WRONG_STATE, "USBIP_ADDRESS")
    assert module.status().device.usb.attachment.listen == f"{second[0]}:{second[1]}"
    imports(module, second).close()


def test_a_restart_finds_it_again_and_what_was_detached_not(host: Host, module: Module) -> None:
    where = local()
    attach(module, f"{where[0]}:{where[1]}", "127.0.0.1")
    for number in (signal.SIGTERM, signal.SIGKILL):
        host.stop(number)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(where, 5)
        host.start()
        module.serving()
        assert module.status().device.usb.attachment.listening
        imports(module, where).close()
    assert not detach(module).device.usb.HasField("attachment")
    host.stop(signal.SIGTERM)
    host.start()
    module.serving()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(where, 5)


def test_detaching_what_is_not_attached(module: Module) -> None:
    assert not detach(module).device.usb.HasField("attachment")
    assert not detach(module).device.usb.HasField("attachment")
