"""Modules are attached to guests by the control API and the command line: what is shown, kept, audited and refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hsmvisor.host import limits
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.command import Command
from support.host_process import HostProcess, new_id, reason, wait_for
from support.paused_qemu import NATIVE, PORT, SHARED, PausedQemu, paused_qemu

pytestmark = pytest.mark.slow
WITHIN = 30


@pytest.fixture(scope="module")
def host() -> Iterator[HostProcess]:
    with HostProcess() as host:
        yield host


@pytest.fixture
def name(host: HostProcess, request: pytest.FixtureRequest) -> str:
    name = request.node.name.replace("_", "-")[5:50]
    host.create(name)
    return name


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[PausedQemu]:
    with paused_qemu(tmp_path, *SHARED, *PORT, *NATIVE) as guest:
        yield guest


def attach(host: HostProcess, name: str, qmp: Path, bus: str = "", request_id: str = "") -> pb.Module:
    asked = pb.AttachModuleRequest(request_id=request_id or new_id(), name=name, qmp_path=str(qmp), bus=bus)
    return host.modules.AttachModule(asked, timeout=WITHIN)


def detach(host: HostProcess, name: str, qmp: Path | str = "", request_id: str = "") -> pb.Module:
    asked = pb.DetachModuleRequest(request_id=request_id or new_id(), name=name, qmp_path=str(qmp))
    return host.modules.DetachModule(asked, timeout=WITHIN)


def audited(host: HostProcess, kind: str, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in host.audit_lines()]
    return [line for line in lines if line["kind"] == kind and line.get("module") == name]


def hint(error: grpc.RpcError) -> str:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    assert status is not None and status.details[0].Unpack(info)
    return info.metadata["hint"]


def test_attached_shown_and_detached(host: HostProcess, name: str, guest: PausedQemu) -> None:
    before = host.get(name).device
    assert before.socket.endswith(f"/modules/{name}/vhost.sock")
    assert (before.guest_cid >= limits.FIRST_CID, before.port, before.plugged) == (True, limits.VSOCK_PORT, False)
    assert not before.HasField("attachment")
    shown = attach(host, name, guest.qmp)
    device = host.get(name).device
    assert device == shown.device
    assert device.plugged
    attached = device.attachment
    assert (attached.qmp_path, attached.bus) == (str(guest.qmp), "rp0")
    assert (attached.device_id, attached.chardev_id) == (f"hsmvisor-{name}", f"hsmvisor-{name}")
    assert attached.attached_at.seconds > 0
    gone = detach(host, name).device
    assert not gone.plugged and not gone.HasField("attachment")
    assert gone == host.get(name).device == before


def test_who_did_it_stands_in_the_audit_log(host: HostProcess, name: str, guest: PausedQemu) -> None:
    attach(host, name, guest.qmp, "rp0", request_id="why-not")
    attach(host, name, guest.qmp, "rp0", request_id="why-not")
    detach(host, name)
    first, again = audited(host, "module.attach", name)
    assert (first["result"], again["result"]) == ("ok", "repeated")
    assert (first["qmp"], first["bus"], first["device"]) == (str(guest.qmp), "rp0", f"hsmvisor-{name}")
    (end,) = audited(host, "module.detach", name)
    assert (end["result"], end["qmp"], end["was_plugged"]) == ("ok", str(guest.qmp), True)
    assert first["who"] == end["who"] != ""
    with pytest.raises(grpc.RpcError) as caught:
        attach(host, name, guest.qmp, "rp1", request_id="why-not")
    assert reason(caught.value) == (grpc.StatusCode.ABORTED, "REQUEST_ID_REUSED")


def test_both_can_be_said_twice(host: HostProcess, name: str, guest: PausedQemu) -> None:
    assert attach(host, name, guest.qmp).device.attachment.bus == attach(host, name, guest.qmp).device.attachment.bus == "rp0"
    assert not detach(host, name).device.plugged
    assert not detach(host, name).device.plugged


def test_it_outlives_the_service(host: HostProcess, name: str, guest: PausedQemu) -> None:
    """The next supervisor knows where the module belongs; attaching again brings it back."""
    attached = attach(host, name, guest.qmp).device.attachment
    host.restart()
    host.serving(name)
    device = host.get(name).device
    assert device.attachment == attached
    assert attach(host, name, guest.qmp).device.plugged
    detach(host, name)


def test_it_outlives_the_modules_keys(host: HostProcess, name: str, guest: PausedQemu) -> None:
    """Break-glass: the module has a new id, and stays where it is plugged in."""
    attached = attach(host, name, guest.qmp).device.attachment
    request = pb.BreakGlassRequest(request_id=new_id(), name=name, new_root=bytes(31) + b"r", empty_it=True)
    host.modules.BreakGlass(request, metadata=(("hsmvisor-why", "lost"),), timeout=WITHIN)
    assert host.get(name).device.attachment == attached
    assert attach(host, name, guest.qmp).device.plugged
    host.restart()
    host.serving(name)
    assert host.get(name).device.HasField("attachment")


def test_a_guest_that_has_ended_is_forgotten(host: HostProcess, name: str, guest: PausedQemu) -> None:
    attach(host, name, guest.qmp)
    guest.end()
    wait_for(lambda: not host.get(name).device.plugged)
    assert host.get(name).device.HasField("attachment")
    assert not detach(host, name).device.HasField("attachment")
    (end,) = audited(host, "module.detach", name)
    assert end["was_plugged"] is False


def test_a_module_is_in_one_guest(host: HostProcess, name: str, guest: PausedQemu, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with paused_qemu(tmp_path / "other", *SHARED, *PORT) as other:
        attach(host, name, guest.qmp)
        for act in (attach, detach):
            with pytest.raises(grpc.RpcError) as caught:
                act(host, name, other.qmp)
            assert reason(caught.value)[0] == grpc.StatusCode.FAILED_PRECONDITION
        assert host.get(name).device.attachment.qmp_path == str(guest.qmp)
        guest.end()
        wait_for(lambda: not host.get(name).device.plugged)
        assert attach(host, name, other.qmp).device.attachment.qmp_path == str(other.qmp)


def test_a_guest_that_was_started_with_it(host: HostProcess, name: str, tmp_path: Path) -> None:
    line = host.modules.DescribeDevice(pb.DescribeDeviceRequest(name=name, memory="64M")).qemu_arguments
    with paused_qemu(tmp_path, *line) as guest:
        device = host.get(name).device
        assert device.plugged and not device.HasField("attachment")
        with pytest.raises(grpc.RpcError) as caught:
            detach(host, name)
        assert reason(caught.value) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_ATTACHED")
        assert "--qmp" in hint(caught.value)
        assert attach(host, name, guest.qmp).device.attachment.bus == "hsmvisor-port"


def test_what_is_missing_is_said(host: HostProcess, name: str, tmp_path: Path) -> None:
    with paused_qemu(tmp_path, "-m", "64M") as guest:
        with pytest.raises(grpc.RpcError) as caught:
            attach(host, name, guest.qmp)
        assert reason(caught.value) == (grpc.StatusCode.FAILED_PRECONDITION, "GUEST_MEMORY")
        assert "memory-backend-memfd" in hint(caught.value) and "pcie-root-port" in hint(caught.value)
    (line,) = audited(host, "module.attach", name)
    assert (line["result"], line["reason"]) == ("refused", "GUEST_MEMORY")
    assert not host.get(name).device.HasField("attachment")


def test_calls_that_cannot_be(host: HostProcess, name: str, tmp_path: Path) -> None:
    cases = [
        (lambda: attach(host, "absent", tmp_path / "qmp"), grpc.StatusCode.NOT_FOUND, "MODULE"),
        (lambda: attach(host, name, tmp_path / "qmp"), grpc.StatusCode.FAILED_PRECONDITION, "QEMU_GONE"),
        (lambda: attach(host, name, Path("relative")), grpc.StatusCode.INVALID_ARGUMENT, "QMP_PATH"),
        (lambda: attach(host, name, Path("/q"), "no bus"), grpc.StatusCode.INVALID_ARGUMENT, "BUS"),
        (lambda: detach(host, "absent"), grpc.StatusCode.NOT_FOUND, "MODULE"),
        (lambda: detach(host, name, "relative"), grpc.StatusCode.INVALID_ARGUMENT, "QMP_PATH"),
    ]
    for call, *expected in cases:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert list(reason(caught.value)) == expected


def test_the_command_line(host: HostProcess, name: str, guest: PausedQemu, tmp_path: Path) -> None:
    cli = Command(f"unix:{host.socket}", tmp_path)
    assert "vsock:cid=2;port=9111" in cli("module", "attach", name, "--qmp", guest.qmp)
    assert f"{guest.qmp}, bus rp0, CID" in cli("module", "show", name)
    assert json.loads(cli("module", "show", name, "--json"))["device"]["attachment"]["bus"] == "rp0"
    assert "is in no guest" in cli("module", "detach", name)
    printed = cli("module", "qemu-args", name, "--memory", "64M")
    assert printed.splitlines()[0] == "-m 64M"
    assert "nothing is wrong" in cli("module", "qemu-args", name, "--check", f"-machine q35 {printed}")
    assert "memory-backend-memfd" in cli("module", "qemu-args", name, "--check", "qemu-system-x86_64 -m 1G", code=4)
    assert "<qemu:commandline>" in cli("module", "libvirt-xml", name)
    cli("module", "attach", name, "--qmp", "/nowhere/qmp", code=4)
    assert "QEMU_GONE" in cli.errors and "-qmp unix:PATH" in cli.errors
    assert cli(_HSMVISOR_COMPLETE="bash_complete", COMP_WORDS="hsmvisor module qemu", COMP_CWORD="2") == "plain,qemu-args\n"
