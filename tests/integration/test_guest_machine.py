"""The guest that other tests use: commands, files, reset, stop, memory, the driver for a module's device; nothing is left."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError
from support.accelerator import accelerator, boots
from support.guest import REPOSITORY
from support.guest_machine import GuestMachine, image
from support.host_process import gone, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(600)]

CID_ANY = 0xFFFFFFFF
LOCAL_CID = "import fcntl, struct; print(*struct.unpack('I', fcntl.ioctl(open('/dev/vsock'), 0x7b9, bytes(4))))"


@pytest.fixture(scope="module")
def machine() -> Iterator[GuestMachine]:
    with GuestMachine() as machine:
        yield machine


def test_the_image_is_there_in_seconds_when_nothing_changed() -> None:
    first, begin = image(), time.monotonic()
    again = subprocess.run([REPOSITORY / "scripts/guest-image", "--quiet"], capture_output=True, text=True, timeout=60, check=True)
    assert Path(again.stdout.strip()) == first
    assert time.monotonic() - begin < 10


def test_commands_tell_code_output_and_errors(machine: GuestMachine) -> None:
    assert machine.run("echo out; echo err >&2").stdout == b"out\n"
    result = machine.run("cat; echo $WHO >&2; pwd; exit 7", stdin=b"in\n", check=False, more={"WHO": "me"}, directory="/usr")
    assert (result.returncode, result.stdout, result.stderr) == (7, b"in\n/usr\n", b"me\n")
    assert machine.run(["printf", "%s|", "a b", "$HOME"]).stdout == b"a b|$HOME|"
    assert machine.run("kill -9 $$", check=False).returncode == -9
    with pytest.raises(AssertionError, match="ended with 3:\nwhy"):
        machine.run("echo why; exit 3")
    with pytest.raises(OSError, match=r"in the guest: FileNotFoundError.*no-such-program"):
        machine.run(["no-such-program"])


def test_a_command_that_takes_too_long_is_killed_and_tells_what_it_wrote(machine: GuestMachine) -> None:
    with pytest.raises(
        TimeoutError, match="`echo begun; sleep 1234` did not end within 1 s and was killed; it had written:\nbegun"
    ):
        machine.run("echo begun; sleep 1234", timeout=1)
    assert machine.run("pgrep -f 'sleep 123[4]'", check=False).returncode == 1


def test_programs_in_the_background(machine: GuestMachine) -> None:
    process = machine.start("echo begun; trap 'echo asked; exit 5' TERM; while :; do sleep 0.1; done", output="/tmp/output")
    wait_for(lambda: process.output() == b"begun\n")
    assert process.poll() is None
    with pytest.raises(TimeoutError, match=r"did not end within 0\.1 s; it had written:\nbegun"):
        process.wait(0.1)
    assert process.stop() == 5
    assert process.output().endswith(b"asked\n")
    killed = machine.start(["sleep", "1000"])
    killed.kill()
    assert killed.wait() == -signal.SIGKILL


def test_files_both_ways(machine: GuestMachine, tmp_path: Path) -> None:
    for size in (0, 1, 1 << 18, (1 << 20) + 1):
        source, back = tmp_path / "source", tmp_path / "back"
        source.write_bytes(os.urandom(size))
        source.chmod(0o750)
        machine.copy_in(source, "/root/copy")
        assert machine.run("sha256sum </root/copy").stdout[:64].decode() == hashlib.sha256(source.read_bytes()).hexdigest()
        assert machine.run("stat -c %a,%s /root/copy").stdout == b"750,%d\n" % size
        machine.copy_out("/root/copy", back)
        assert back.read_bytes() == source.read_bytes()


def test_what_applications_need_is_installed(machine: GuestMachine) -> None:
    for command in (
        "openssl engine pkcs11",
        "p11-kit list-modules",
        "nginx -V && nginx -t",
        "ssh -V && /usr/sbin/sshd -t",
        "curl --version",
        "python3 -c 'import pkcs11, asn1crypto'",
        "test -e /usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so",
    ):
        machine.run(command)
    assert b"usage" in machine.run("hsmvisor-guest --help 2>&1", check=False).stdout.lower()
    library = "pkcs11-tool --module /usr/local/lib/pkcs11/libhsmvisor-pkcs11.so -I"
    assert b"hsmvisor virtual HSM" in machine.run(library, check=False).stdout


def test_the_driver_of_vsock_is_loaded(machine: GuestMachine) -> None:
    machine.run(["modprobe", "vmw_vsock_virtio_transport"])
    loaded = {line.split()[0] for line in machine.run(["lsmod"]).stdout.decode().splitlines()}
    assert {"vsock", "vmw_vsock_virtio_transport", "vmw_vsock_virtio_transport_common"} <= loaded
    assert int(machine.run(["python3", "-c", LOCAL_CID]).stdout) == CID_ANY  # there is no device


def test_network_both_ways(machine: GuestMachine) -> None:
    server = "import socket; s = socket.create_server(('', 7000)); c, _ = s.accept(); c.sendall(b'guest')"
    process = machine.start(["python3", "-c", server])
    wait_for(lambda: b":1B58 " in machine.run(["cat", "/proc/net/tcp"]).stdout, 20)
    with socket.create_connection(("127.0.0.1", machine.forward(7000)), 20) as connection:
        assert connection.recv(100) == b"guest"
    assert process.wait() == 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = f"import socket; s = socket.create_connection(('10.0.2.2', {listener.getsockname()[1]})); s.sendall(b'me')"
        machine.run(["python3", "-c", client])
        assert listener.accept()[0].recv(100) == b"me"


def test_stop_and_cont(machine: GuestMachine) -> None:
    machine.stop()
    assert machine.qmp("query-status")["status"] == "paused"
    with pytest.raises(TimeoutError, match="the machine is paused"):
        machine.wait_ready(within=1)
    machine.cont()
    assert machine.run(["echo", "on"]).stdout == b"on\n"


def test_reset_by_the_button_and_by_the_guest(machine: GuestMachine) -> None:
    machine.run("echo kept >/root/kept; echo lost >/run/lost; sync")
    process = machine.start(["sleep", "1000"])
    machine.reset()
    assert machine.run("cat /root/kept; cat /run/lost", check=False).stdout == b"kept\n"
    with pytest.raises(OSError, match="in the guest: KeyError"):
        process.poll()
    mark = machine.monitor.mark()
    with pytest.raises(ConnectionError, match="the machine was reset"):
        machine.run("busybox reboot -f; sleep 60", timeout=60)
    machine.monitor.wait("RESET", mark)
    machine.wait_ready()


def test_a_dump_has_what_the_guest_has_in_memory(machine: GuestMachine, tmp_path: Path) -> None:
    half = os.urandom(16).hex()
    machine.start(
        ["python3", "-c", f"import time; held = b'{half}' * 2; print(len(held), flush=True); time.sleep(1000)"], output="/run/o"
    )
    wait_for(lambda: machine.read("/run/o") == b"64\n")
    machine.dump_memory(tmp_path / "dump")
    assert (tmp_path / "dump").stat().st_size >= machine.memory << 20
    assert half.encode() * 2 in (tmp_path / "dump").read_bytes()


def test_qemu_refuses_in_words(machine: GuestMachine) -> None:
    with pytest.raises(ExecuteError, match=r"rp9"):
        machine.qmp("device_add", driver="virtio-rng-pci", id="rng", bus="rp9")
    with pytest.raises(TimeoutError, match="no SHUTDOWN"):
        machine.monitor.wait("SHUTDOWN", machine.monitor.mark(), within=0.1)


def test_plugs_and_unplugs_a_device(machine: GuestMachine) -> None:
    count = "ls /sys/bus/pci/devices | wc -l"
    before, mark = int(machine.run(count).stdout), machine.monitor.mark()
    machine.qmp("device_add", driver="virtio-rng-pci", id="rng", bus="rp1")
    wait_for(lambda: int(machine.run(count).stdout) == before + 1)
    machine.qmp("device_del", id="rng")
    machine.monitor.wait("DEVICE_DELETED", mark, device="rng")
    assert int(machine.run(count).stdout) == before


def test_nothing_is_left(machine: GuestMachine) -> None:
    with GuestMachine(network=False) as other:
        pid, directory = other.pid, other.directory
        assert other.run("ls /sys/class/net").stdout == b"lo\n"
    assert gone(pid) and not directory.exists()
    assert machine.run(["echo", "there"]).stdout == b"there\n"


def test_a_machine_dies_with_its_test() -> None:
    program = "from support.guest_machine import GuestMachine; m = GuestMachine().boot(); print(m.pid, m.directory, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{program}; import time; time.sleep(1000)"],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "tests")},
    ) as parent:
        assert parent.stdout is not None
        pid, directory = parent.stdout.readline().split()
        parent.kill()
    wait_for(lambda: gone(int(pid)))
    subprocess.run(["rm", "-r", directory], check=True)


def test_a_machine_that_qemu_refuses_says_why() -> None:
    machine = GuestMachine(arguments=["-device", "no-such-device"])
    with pytest.raises(AssertionError, match=r"QEMU ended with 1:\n.*no-such-device"):
        machine.boot()
    assert not machine.directory.exists()


def test_the_accelerator_is_one_that_boots_a_guest() -> None:
    assert accelerator(image()) in ("kvm", "tcg")
    assert boots("tcg", image(), limit=60)
    begin = time.monotonic()
    assert not boots("tcg", image(), limit=0.2)
    assert time.monotonic() - begin < 10
