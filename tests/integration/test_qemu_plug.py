"""A device is plugged into a real QEMU and taken out of it; the guest is paused, so what needs its kernel is not shown here."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hsmvisor.host import qemu, qmp
from hsmvisor.host.qemu import Plug, Plugged
from hsmvisor.host.qemu_arguments import arguments, check
from hsmvisor.host.qmp import QemuGone, QemuSilent, Qmp
from hsmvisor.serving.errors import Invalid, ServiceError, WrongState
from support.host_process import wait_for
from support.paused_qemu import NATIVE, PORT, SHARED, PausedQemu, paused_qemu
from support.vhost_backend import GET_CONFIG, GET_FEATURES, GET_PROTOCOL_FEATURES, SET_OWNER, Backend

pytestmark = pytest.mark.slow


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    backend = Backend(tmp_path / "vhost.sock")
    yield backend
    backend.close()


@pytest.fixture
def ours(tmp_path: Path) -> Plug:
    return Plug("web-1", str(tmp_path / "vhost.sock"))


def ask(guest: PausedQemu, work: Callable[[Qmp], Awaitable[Any]]) -> Any:
    async def asked() -> Any:
        async with qmp.connect(str(guest.qmp)) as client:
            return await work(client)

    return asyncio.run(asked())


def plug(guest: PausedQemu, ours: Plug, bus: str = "") -> Plugged:
    found = ask(guest, lambda client: qemu.plug(client, ours, bus))
    assert isinstance(found, Plugged)
    return found


def refusal(guest: PausedQemu, ours: Plug, bus: str = "") -> ServiceError:
    """Returns what keeps the device out; nothing of it is left in QEMU."""
    with pytest.raises(WrongState) as caught:
        plug(guest, ours, bus)
    assert ours.id not in chardevs(guest)
    assert not ask(guest, lambda client: qemu.has(client, ours))
    return caught.value


def chardevs(guest: PausedQemu) -> list[str]:
    return [row["label"] for row in ask(guest, lambda client: client.execute("query-chardev"))]


def execute(guest: PausedQemu, command: str, **arguments: Any) -> Any:
    return ask(guest, lambda client: client.execute(command, **arguments))


def add_chardev(guest: PausedQemu, ident: str, path: str, **more: Any) -> None:
    address = {"type": "unix", "data": {"path": path}}
    execute(guest, "chardev-add", id=ident, backend={"type": "socket", "data": {"addr": address, "server": False, **more}})


# ---- plugged, and taken out ---------------------------------------------------------------------------------------------


def test_plugged_and_unplugged_and_again(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    with paused_qemu(tmp_path, *SHARED, *PORT, *NATIVE) as guest:
        for _ in range(2):
            assert plug(guest, ours) == Plugged("hsmvisor-web-1", "hsmvisor-web-1", "rp0")
            wait_for(lambda: backend.connected, 10, "QEMU's connection")
            assert backend.seen[:2] == [GET_FEATURES, GET_PROTOCOL_FEATURES]
            assert SET_OWNER in backend.seen and backend.seen[-1] == GET_CONFIG
            assert ask(guest, lambda client: qemu.unplug(client, ours)) is True
            backend.wait_gone()
            assert ours.id not in chardevs(guest)
        assert ask(guest, lambda client: qemu.unplug(client, ours)) is False


def test_what_is_plugged_is_left_as_it_is(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    with paused_qemu(tmp_path, *SHARED, *PORT) as guest:
        first = plug(guest, ours)
        seen = list(backend.seen)
        assert plug(guest, ours) == plug(guest, ours, "rp0") == first
        assert backend.seen == seen


def test_one_that_lost_its_module_is_plugged_anew(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    with paused_qemu(tmp_path, *SHARED, *PORT, *NATIVE) as guest:
        plug(guest, ours)
        backend.drop()
        assert ask(guest, lambda client: qemu.has(client, ours))
        assert not backend.connected
        plug(guest, ours)
        wait_for(lambda: backend.connected, 10, "QEMU's connection")


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_a_guest_that_is_started_with_it(tmp_path: Path, backend: Backend, ours: Plug, machine: str) -> None:
    """The arguments that we print, beside the guest's own -machine; and attach finds the device that is there."""
    line = arguments(ours, "64M", machine)
    assert check(ours, " ".join(["-machine", machine, *line])) == []
    with paused_qemu(tmp_path, *line, machine=machine) as guest:
        wait_for(lambda: backend.connected, 10, "QEMU's connection")
        assert plug(guest, ours).device == ours.id


def test_a_device_under_names_of_its_own(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    with paused_qemu(tmp_path, *SHARED, *PORT, *NATIVE) as guest:
        add_chardev(guest, "c0", ours.socket)
        execute(guest, "device_add", driver="vhost-user-vsock-pci", chardev="c0", bus="rp0")
        assert plug(guest, ours) == Plugged("/machine/peripheral-anon/device[0]", "c0", "rp0")
        assert ask(guest, lambda client: qemu.unplug(client, ours)) is True
        assert "c0" not in chardevs(guest)


def test_a_pc_takes_it_on_its_one_bus(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    with paused_qemu(tmp_path, *SHARED, machine="pc") as guest:
        assert plug(guest, ours).bus == "pci.0"


def test_the_bus_that_is_asked_for(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    more = ("-device", "pcie-root-port,id=rp1,chassis=2")
    with paused_qemu(tmp_path, *SHARED, *PORT, *more) as guest:
        assert plug(guest, ours, "rp1").bus == "rp1"


def test_memory_of_numa_nodes_and_of_files(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    memory = (
        *("-m", "64M", "-object", "memory-backend-memfd,id=a,size=32M", "-numa", "node,memdev=a"),
        *("-object", f"memory-backend-file,id=b,size=32M,mem-path={tmp_path / 'ram'},share=on", "-numa", "node,memdev=b"),
    )
    with paused_qemu(tmp_path, *memory, *PORT) as guest:
        plug(guest, ours)


# ---- a guest that does not let go ---------------------------------------------------------------------------------------


def test_a_guest_that_does_not_run_keeps_it(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    """With ACPI's hot-plug, q35's own, only the guest's kernel can let go of a device."""
    with paused_qemu(tmp_path, *SHARED, *PORT) as guest:
        plug(guest, ours)
        for _ in range(2):  # asked again, QEMU says that it has asked already
            with pytest.raises(WrongState) as caught:
                ask(guest, lambda client: qemu.unplug(client, ours, within=0.5))
            assert caught.value.reason == "GUEST"
            assert "(prelaunch)" in caught.value.hint
        wait_for(lambda: backend.connected, 10, "QEMU's connection")


def test_what_can_never_be_unplugged(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    device = ("-chardev", f"socket,id=c0,path={ours.socket}", "-device", "vhost-user-vsock-pci,id=v,chardev=c0")
    with paused_qemu(tmp_path, *SHARED, *device) as guest:
        with pytest.raises(WrongState) as caught:
            ask(guest, lambda client: qemu.unplug(client, ours))
        assert caught.value.reason == "PCI_PORT"
        assert "pcie.0" in caught.value.detail and "pcie-root-port" in caught.value.hint


# ---- preconditions ------------------------------------------------------------------------------------------------------

RAM = ("-m", "64M", "-machine", "memory-backend=ram0", "-object")


@pytest.mark.parametrize(
    ("memory", "hint"),
    [
        (("-m", "64M"), "memory-backend-memfd,id=hsmvisor-ram,size=64M,share=on -machine memory-backend=hsmvisor-ram"),
        ((*RAM, "memory-backend-memfd,id=ram0,size=64M,share=off"), "share=on in its -object memory-backend-memfd"),
        ((*RAM, "memory-backend-ram,id=ram0,size=64M"), "memory-backend-memfd"),
        ((*RAM, "memory-backend-ram,id=ram0,size=64M,share=on"), "memory-backend-memfd"),
        ((*RAM, "memory-backend-file,id=ram0,size=64M,mem-path=/dev/shm"), "share=on in its -object memory-backend-file"),
        (("-m", "64M", "-mem-path", "/dev/shm"), "share=on"),
    ],
)
def test_memory_that_no_other_process_sees(
    tmp_path: Path, backend: Backend, ours: Plug, memory: tuple[str, ...], hint: str
) -> None:
    with paused_qemu(tmp_path, *memory, *PORT) as guest:
        error = refusal(guest, ours)
        assert error.reason == "GUEST_MEMORY"
        assert hint in error.hint


@pytest.mark.parametrize(
    ("ports", "bus", "said"),
    [
        ((), "", "there is no root port"),
        ((), "rp0", "nothing can be plugged into rp0"),
        ((*PORT, "-device", "virtio-rng-pci,bus=rp0"), "", "all root ports are taken (rp0)"),
        ((*PORT, "-device", "virtio-rng-pci,bus=rp0"), "rp0", "the root port rp0 is taken"),
        (("-device", "pcie-root-port,id=rp0,chassis=1,hotplug=off"), "rp0", "hotplug=off"),
        (PORT, "pcie.0", "nothing can be plugged into pcie.0"),
    ],
)
def test_no_port_that_is_free(tmp_path: Path, backend: Backend, ours: Plug, ports: tuple[str, ...], bus: str, said: str) -> None:
    with paused_qemu(tmp_path, *SHARED, *ports) as guest:
        error = refusal(guest, ours, bus)
        assert error.reason == "PCI_PORT"
        assert said in error.detail
        assert ("free here: rp0" if ports == PORT else "-device pcie-root-port,id=hsmvisor-port") in error.hint


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    with paused_qemu(tmp_path, "-m", "64M") as guest:
        error = refusal(guest, ours)
        assert error.reason == "GUEST_MEMORY"
        assert "memory" in error.detail and "root port" in error.detail
        assert "memory-backend-memfd" in error.hint and "pcie-root-port" in error.hint


def test_a_second_vsock_device(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    other = Backend(tmp_path / "other.sock")
    device = ("-chardev", f"socket,id=c0,path={other.path}", "-device", "vhost-user-vsock-pci,id=v,chardev=c0")
    with paused_qemu(tmp_path, *SHARED, *PORT, *device) as guest:
        error = refusal(guest, ours)
        assert error.reason == "VSOCK_TAKEN"
        assert "(v)" in error.detail
    other.close()


def test_ids_that_are_taken(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    with paused_qemu(tmp_path, *SHARED, *PORT, "-device", f"virtio-rng-pci,id={ours.id}") as guest:
        error = refusal(guest, ours)
        assert (error.reason, f"device_del {ours.id}" in error.hint) == ("ID_TAKEN", True)
    with paused_qemu(tmp_path, *SHARED, *PORT, "-chardev", f"null,id={ours.id}") as guest:
        with pytest.raises(WrongState) as caught:
            plug(guest, ours)
        assert (caught.value.reason, f"chardev-remove {ours.id}" in caught.value.hint) == ("ID_TAKEN", True)


def test_a_chardev_that_reconnects_to_the_modules_socket(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    """Under another name it is refused; under ours it is what is left of a plug, and taken away."""
    with paused_qemu(tmp_path, *SHARED, *PORT) as guest:
        add_chardev(guest, "c0", ours.socket, reconnect=1)
        error = refusal(guest, ours)
        assert error.reason == "CHARDEV"
        assert "chardev-remove c0" in error.hint and "reconnect=" in error.hint
        execute(guest, "chardev-remove", id="c0")
        add_chardev(guest, ours.id, ours.socket, reconnect=1)
        plug(guest, ours)
        backend.drop()
        assert not backend.connected


# ---- faults -------------------------------------------------------------------------------------------------------------


def test_a_module_that_does_not_listen(tmp_path: Path, ours: Plug) -> None:
    with paused_qemu(tmp_path, *SHARED, *PORT) as guest:
        error = refusal(guest, ours)
        assert "cannot use the module's socket" in error.detail and "socket_group" in error.hint


def test_a_module_that_hangs_up(tmp_path: Path, ours: Plug) -> None:
    """device_add fails, and its chardev is taken away again."""
    backend = Backend(tmp_path / "vhost.sock", refuse=True)
    with paused_qemu(tmp_path, *SHARED, *PORT) as guest:
        error = refusal(guest, ours)
        assert "does not take the device" in error.detail and "module show" in error.hint
        backend.refuse = False
        plug(guest, ours)
    backend.close()


def test_a_module_that_says_nothing(tmp_path: Path, ours: Plug, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU itself waits for it; when the module is ended, QEMU goes on without the device."""
    monkeypatch.setattr(qemu, "_PLUG_WITHIN", 0.5)
    backend = Backend(tmp_path / "vhost.sock", mute=True)
    with paused_qemu(tmp_path, *SHARED, *PORT) as guest:
        with pytest.raises(QemuSilent) as caught:
            plug(guest, ours)
        assert "waits for the module" in caught.value.detail and "module upgrade web-1" in caught.value.hint
        backend.mute = False
        backend.drop()
        plug(guest, ours)
    backend.close()


def test_a_path_where_no_qemu_is(tmp_path: Path, ours: Plug) -> None:
    with paused_qemu(tmp_path, *SHARED, *PORT) as guest:
        pass
    with pytest.raises(QemuGone) as caught:
        plug(guest, ours)
    assert "has ended" in caught.value.detail
    guest.qmp.unlink()
    with pytest.raises(QemuGone) as caught:
        plug(guest, ours)
    assert "there is no socket" in caught.value.detail
    guest.qmp = Path("relative")
    with pytest.raises(Invalid):
        plug(guest, ours)


def test_a_socket_that_is_not_qmp(tmp_path: Path, ours: Plug) -> None:
    """The human monitor of the same QEMU."""
    with paused_qemu(tmp_path, "-monitor", f"unix:{tmp_path / 'hmp'},server=on,wait=off") as guest:
        guest.qmp = tmp_path / "hmp"
        with pytest.raises(WrongState) as caught:
            plug(guest, ours)
        assert caught.value.reason == "NOT_QMP"


def test_a_qmp_socket_that_another_client_holds(tmp_path: Path, ours: Plug, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "_GREETING_WITHIN", 0.3)
    with paused_qemu(tmp_path, *SHARED, *PORT) as guest, socket.socket(socket.AF_UNIX) as other:
        other.connect(str(guest.qmp))
        assert b"QMP" in other.recv(4096)
        with pytest.raises(WrongState) as caught:
            plug(guest, ours)
        assert caught.value.reason == "QMP_BUSY"


def test_a_qemu_that_dies_in_the_middle(tmp_path: Path, ours: Plug) -> None:
    """While device_add waits for the module."""
    backend = Backend(tmp_path / "vhost.sock", mute=True)
    with paused_qemu(tmp_path, *SHARED, *PORT) as guest:

        def kill() -> None:
            while not backend.seen:
                pass
            guest.process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(QemuGone) as caught:
            plug(guest, ours)
        killer.join()
        assert caught.value.reason == "QEMU_GONE"
    backend.close()


def test_a_qemu_that_dies_while_the_guest_is_waited_for(tmp_path: Path, backend: Backend, ours: Plug) -> None:
    with paused_qemu(tmp_path, *SHARED, *PORT) as guest:
        plug(guest, ours)

        async def work(client: Qmp) -> None:
            asyncio.get_running_loop().call_later(0.3, guest.process.kill)
            await qemu.unplug(client, ours, within=5)

        with pytest.raises(QemuGone):
            ask(guest, work)
