"""What a guest is started with, and what is found wrong with a command line."""

from __future__ import annotations

import shlex
from xml.etree import ElementTree

import pytest
from hsmvisor.host import qemu_arguments
from hsmvisor.host.qemu import Plug
from hsmvisor.serving.errors import Invalid

PLUG = Plug("web-1", "/run/hsmvisor/modules/web-1/vhost.sock")
CHARDEV = f"-chardev socket,id=c0,path={PLUG.socket}"
MEMORY = "-object memory-backend-memfd,id=m,size=2G -machine q35,memory-backend=m"
ROOM = "-device pcie-root-port,id=rp0,chassis=1 -qmp unix:/q,server=on,wait=off"


def reasons(line: str) -> list[str]:
    return [finding.reason for finding in qemu_arguments.check(PLUG, "qemu-system-x86_64 " + line)]


@pytest.mark.parametrize("machine", qemu_arguments.MACHINES)
def test_nothing_is_wrong_with_our_own(machine: str) -> None:
    assert reasons(f"-machine {machine} " + shlex.join(qemu_arguments.arguments(PLUG, "2G", machine))) == []


def test_a_comma_in_a_path_is_doubled_and_read_again() -> None:
    plug = Plug("web-1", "/run/a,b/vhost.sock")
    line = qemu_arguments.arguments(plug, "2G", "q35")
    assert any("path=/run/a,,b/vhost.sock" in word for word in line)
    assert qemu_arguments.check(plug, "-machine q35 " + shlex.join(line)) == []


def test_an_unknown_machine() -> None:
    with pytest.raises(Invalid):
        qemu_arguments.arguments(PLUG, "2G", "microvm")


@pytest.mark.parametrize(
    "line",
    [
        f"{MEMORY} {ROOM}",
        f"{MEMORY} {CHARDEV} -device pcie-root-port,id=rp0 -device vhost-user-vsock-pci,chardev=c0,bus=rp0",
        f"{MEMORY} {CHARDEV},reconnect=0 -device pcie-root-port,id=rp0 -device vhost-user-vsock-pci,chardev=c0,bus=rp0",
        f"-object memory-backend-file,id=m,mem-path=/dev/shm,share=on,size=2G -machine pc -numa node,memdev=m {ROOM}",
        f"""-object '{{"qom-type":"memory-backend-memfd","id":"m","share":true}}' -M q35,memory-backend=m {ROOM}""",
        f"{MEMORY} -device pcie-root-port,id=rp0 -chardev socket,id=q,path=/q,server=on -mon chardev=q,mode=control",
    ],
)
def test_what_works(line: str) -> None:
    assert reasons(line) == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (f"-m 2G -machine q35 {ROOM}", ["GUEST_MEMORY"]),
        (f"-mem-path /dev/shm -machine q35 {ROOM}", ["GUEST_MEMORY"]),
        (f"{MEMORY.replace('size', 'share=off,size')} {ROOM}", ["GUEST_MEMORY"]),
        (f"{MEMORY.replace('memfd', 'ram')} {ROOM}", ["GUEST_MEMORY"]),
        (f"-object memory-backend-file,id=m,size=2G -machine q35,memory-backend=m {ROOM}", ["GUEST_MEMORY"]),
        (f"-machine q35,memory-backend=absent {ROOM}", ["GUEST_MEMORY"]),
        (MEMORY, ["PCI_PORT", "QMP"]),
        (f"{MEMORY} {ROOM} -device virtio-rng-pci,bus=rp0", ["PCI_PORT"]),
        (f"{MEMORY} {ROOM} -device vhost-vsock-pci,guest-cid=3", ["VSOCK_TAKEN"]),
        (f"{MEMORY} {CHARDEV}", ["CHARDEV"]),
        (f"{MEMORY} {CHARDEV} -device vhost-user-vsock-pci,chardev=c0", ["PCI_PORT"]),
        (f"{MEMORY} {CHARDEV},reconnect=5 -device pcie-root-port,id=r -device vhost-user-vsock-pci,chardev=c0,bus=r", ["CHARDEV"]),
        (
            f"{MEMORY} {CHARDEV},reconnect-ms=5 -device pcie-root-port,id=r -device vhost-user-vsock-pci,chardev=c0,bus=r",
            ["CHARDEV"],
        ),
        (f"{MEMORY} {CHARDEV},server=on -device pcie-root-port,id=r -device vhost-user-vsock-pci,chardev=c0,bus=r", ["CHARDEV"]),
    ],
)
def test_what_does_not(line: str, wrong: list[str]) -> None:
    assert reasons(line) == wrong


@pytest.mark.parametrize(
    "line", ["", "-", "--", "-object", "-object '{'", "-object '{}'", "-device ,,,", "-machine =", "a b c", "# x"]
)
def test_what_is_no_command_line_is_borne(line: str) -> None:
    assert "GUEST_MEMORY" in reasons(line)


def test_an_open_quote() -> None:
    with pytest.raises(Invalid):
        qemu_arguments.check(PLUG, "qemu 'half")


@pytest.mark.parametrize("machine", qemu_arguments.MACHINES)
def test_the_domain_is_xml_that_says_the_same(machine: str) -> None:
    plug = Plug("web-1", "/run/<&'\">/vhost.sock")
    domain = ElementTree.fromstring(qemu_arguments.libvirt_xml(plug, machine))
    space = "{http://libvirt.org/schemas/domain/qemu/1.0}"
    words = [arg.get("value") for arg in domain.findall(f"{space}commandline/{space}arg")]
    assert words == qemu_arguments.device(plug, machine)
    source, access = domain.find("memoryBacking/source"), domain.find("memoryBacking/access")
    assert source is not None and access is not None
    assert (source.get("type"), access.get("mode")) == ("memfd", "shared")
