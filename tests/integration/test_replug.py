"""A device whose module is lost while QEMU runs is plugged in anew by itself; what a destroyed module leaves is cleared."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hsmvisor.host import qemu_survey, qmp
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.host_process import HostProcess, new_id, wait_for
from support.paused_qemu import NATIVE, PORT, SHARED, PausedQemu, paused_qemu

pytestmark = [pytest.mark.slow, pytest.mark.real]
NAME = "web-1"


@pytest.fixture
def host() -> Iterator[HostProcess]:
    with HostProcess() as host:
        host.create(NAME)
        yield host


def attach(host: HostProcess, guest: PausedQemu) -> None:
    host.modules.AttachModule(pb.AttachModuleRequest(request_id=new_id(), name=NAME, qmp_path=str(guest.qmp)), timeout=30)


def lose_device(host: HostProcess) -> None:
    """Worker and supervisor at once, so that nobody has the connection any more; then the service is there again."""
    worker = host.serving(NAME).pid
    assert host.process is not None
    host.process.send_signal(signal.SIGSTOP)  # else it would give the device to the next worker
    os.kill(worker, signal.SIGKILL)
    host.stop(signal.SIGKILL)
    host.restart()
    host.serving(NAME)


def audited(host: HostProcess) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in host.audit_lines()]
    return [line for line in lines if line["kind"] == "module.replug"]


def ask(guest: PausedQemu, work: Callable[[qmp.Qmp], Awaitable[Any]]) -> Any:
    async def asked() -> Any:
        async with qmp.connect(str(guest.qmp)) as client:
            return await work(client)

    return asyncio.run(asked())


def devices(guest: PausedQemu) -> tuple[list[str], list[str]]:
    """The ids of vsock devices and of chardevs that lead to a module."""
    found = ask(guest, qemu_survey.survey)
    return [vsock.id for vsock in found.vsocks], [chardev.id for chardev in found.chardevs if "vhost" in chardev.path]


def test_a_lost_device_is_plugged_in_again(host: HostProcess, tmp_path: Path) -> None:
    with paused_qemu(tmp_path, *SHARED, *PORT, *NATIVE) as guest:
        attach(host, guest)
        before = host.get(NAME).device.attachment
        for count in (1, 2):
            lose_device(host)
            wait_for(lambda: host.get(NAME).device.plugged, what="the module in its guest")
            wait_for(lambda n=count: len(audited(host)) == n, what="the audit log")  # type: ignore[misc]
            assert (audited(host)[-1]["result"], audited(host)[-1]["bus"]) == ("ok", "rp0")
        after = host.get(NAME).device.attachment
        assert (after.qmp_path, after.bus, after.device_id) == (before.qmp_path, before.bus, before.device_id)


def test_what_the_guest_keeps_is_tried_again(host: HostProcess, tmp_path: Path) -> None:
    """Here nobody lets go of the device: the guest has not booted.  QEMU lets go of it when the guest is gone."""
    with paused_qemu(tmp_path, *SHARED, *PORT) as guest:
        attach(host, guest)
        lose_device(host)
        wait_for(lambda: audited(host), 30, "an attempt")
        assert (audited(host)[0]["result"], audited(host)[0]["reason"]) == ("failed", "GUEST")
        assert "did not let go" in audited(host)[0]["detail"]
        assert not host.get(NAME).device.plugged
        assert devices(guest) == ([f"hsmvisor-{NAME}"], [f"hsmvisor-{NAME}"])
    wait_for(lambda: not host.get(NAME).device.plugged)
    assert host.serving(NAME).restarts == 0


def test_what_was_taken_out_by_hand_stays_out(host: HostProcess, tmp_path: Path) -> None:
    with paused_qemu(tmp_path, *SHARED, *PORT, *NATIVE) as guest:
        attach(host, guest)
        ident = f"hsmvisor-{NAME}"

        async def take_out(connection: qmp.Qmp) -> None:
            await connection.execute("device_del", id=ident)
            while True:  # who holds the monitor keeps the service away meanwhile
                try:
                    return await connection.execute("chardev-remove", id=ident)
                except qmp.QmpError:
                    await asyncio.sleep(0.05)

        ask(guest, take_out)
        wait_for(lambda: not host.get(NAME).device.plugged, what="the end of the device")
        with pytest.raises(AssertionError):
            wait_for(lambda: host.get(NAME).device.plugged, 3)
        assert devices(guest) == ([], [])
        assert [line["result"] for line in audited(host) if line["result"] == "ok"] == []


def test_a_guest_that_has_ended_is_left_alone(host: HostProcess, tmp_path: Path) -> None:
    with paused_qemu(tmp_path, *SHARED, *PORT, *NATIVE) as guest:
        attach(host, guest)
    wait_for(lambda: not host.get(NAME).device.plugged)
    with pytest.raises(AssertionError):
        wait_for(lambda: audited(host), 2)


def test_a_destroyed_module_leaves_its_guest(host: HostProcess, tmp_path: Path) -> None:
    with paused_qemu(tmp_path, *SHARED, *PORT, *NATIVE) as guest:
        attach(host, guest)
        host.modules.DestroyModule(pb.DestroyModuleRequest(request_id=new_id(), name=NAME), timeout=30)
        assert devices(guest) == ([], [])


def test_a_guest_that_keeps_it_does_not_keep_a_module_alive(host: HostProcess, tmp_path: Path) -> None:
    with paused_qemu(tmp_path, *SHARED, *PORT) as guest:
        attach(host, guest)
        host.modules.DestroyModule(pb.DestroyModuleRequest(request_id=new_id(), name=NAME), timeout=30)
        assert guest.process.poll() is None
    assert [module.name for module in host.modules.ListModules(pb.ListModulesRequest(), timeout=10).modules] == []
    assert "its device is still in the guest" in host.log.read_text()
