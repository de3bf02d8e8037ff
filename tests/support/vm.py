"""A virtual machine with Debian's kernel, whose programs are this machine's own, read-only, and that has a disk of its own.

Its root file system is this one's by 9p, so nothing is installed in it.  It can be cut off as by a loss of power: what the
machine inside had not synced is gone, what it had is in the disk's file.
"""

from __future__ import annotations

import gzip
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from support.guest import REPOSITORY

KERNEL = REPOSITORY / ".cache/kernel"  #: Debian's package, unpacked by scripts/setup --dev
DRIVERS = ("virtio_pci", "virtio_blk", "virtio_console", "9p", "9pnet_virtio", "ext4", "crc32c_generic")
DISK = Path("/mnt")  #: where the machine has its disk
SHARED = Path("/media")  #: and the directory that it shares with us
MEMORY = 1536  #: MiB

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for module in $(cat /modules); do insmod $module; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=524288 root /new
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=524288 shared /new{shared}
mount -t ext4 -o commit=300 /dev/vda /new{disk}; echo 0 >/proc/sys/vm/dirty_writeback_centisecs
mount -t tmpfs -o mode=1777 tmpfs /new/run
mkdir /dev/shm; mount -t tmpfs tmpfs /dev/shm
for directory in proc sys dev; do mount --move /$directory /new/$directory; done
exec switch_root /new /bin/sh {shared}/init
"""

_START = """export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run TMPDIR=/run PYTHONDONTWRITEBYTECODE=1
ip link set lo up 2>/dev/null
{command} >/dev/vport0p1 2>/dev/ttyS0
echo "ended $?" >/dev/vport0p1
sync; echo o >/proc/sysrq-trigger; sleep 60
"""


def command(program: str, *arguments: str | Path) -> str:
    """What a machine carries out to run one of tests/integration/programs."""
    paths = ":".join(
        str(REPOSITORY / name) for name in ("daemon", "control_domain", "proto", "tests", "tests/integration/programs")
    )
    where = REPOSITORY / "tests/integration/programs" / program
    return " ".join(["env", f"PYTHONPATH={paths}", sys.executable, str(where), *map(str, arguments)])


def _needed(names: Sequence[str]) -> list[Path]:
    """The modules' files in an order in which they can be loaded."""
    (tree,) = (KERNEL / "lib/modules").iterdir()
    if not (tree / "modules.dep").exists():
        subprocess.run(["busybox", "depmod", "-b", str(KERNEL), tree.name], check=True, capture_output=True)
    needs = {}
    for line in (tree / "modules.dep").read_text().splitlines():
        file, _, before = line.partition(":")
        needs[Path(file).stem.replace("-", "_")] = (file, before.split())
    found: list[Path] = []
    for name in names:
        if name in needs:  # else it is built in
            file, before = needs[name]
            found += [tree / other for other in (*reversed(before), file) if tree / other not in found]
    return found


def _initramfs(directory: Path, more: Sequence[str]) -> Path:
    """A small one: busybox, the drivers and what mounts the rest."""
    root = directory / "initramfs"
    for name in ("bin", "proc", "sys", "dev", "new", "drivers"):
        (root / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin/busybox")
    drivers = _needed((*DRIVERS, *more))
    for driver in drivers:
        shutil.copy(driver, root / "drivers")
    (root / "modules").write_text("".join(f"/drivers/{driver.name}\n" for driver in drivers))
    (root / "init").write_text(_INIT.format(disk=DISK, shared=SHARED))
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    packed = subprocess.run(
        ["busybox", "cpio", "-o", "-H", "newc"], input=names.encode(), cwd=root, check=True, capture_output=True
    ).stdout
    file = directory / "initramfs.gz"
    file.write_bytes(gzip.compress(packed, 1))
    shutil.rmtree(root)
    return file


class VirtualMachine:
    """`directory` holds its disk and is shared with it, read-only, as SHARED.  `drivers` are loaded beside those that it needs."""

    def __init__(self, directory: Path, drivers: Sequence[str] = ()) -> None:
        self.directory = directory
        self.disk, self.console, self._output = directory / "disk", directory / "console", directory / "output"
        self._initramfs = _initramfs(directory, drivers)
        with self.disk.open("wb") as file:
            file.truncate(256 << 20)
        subprocess.run(["/usr/sbin/mke2fs", "-q", "-t", "ext4", str(self.disk)], check=True, capture_output=True)
        self._process: subprocess.Popen[bytes] | None = None

    def boot(self, command: str) -> None:
        """Starts it; it carries out `command` and switches itself off."""
        (self.directory / "init").write_text(_START.format(command=command))
        self._output.write_bytes(b"")
        (kernel,) = (KERNEL / "boot").glob("vmlinuz-*")
        arguments = ["-accel", "tcg", "-machine", "pc", "-cpu", "max", "-smp", "1", "-m", str(MEMORY)]
        arguments += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        arguments += ["-kernel", str(kernel), "-initrd", str(self._initramfs), "-append", "console=ttyS0 quiet panic=-1"]
        arguments += ["-serial", f"file:{self.console}", "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=out"]
        arguments += ["-chardev", f"file,id=out,path={self._output}", "-object", "rng-random,id=rng,filename=/dev/urandom"]
        arguments += ["-device", "virtio-rng-pci,rng=rng", "-drive", f"file={self.disk},format=raw,if=virtio,cache=writeback"]
        for tag, path in (("root", Path("/")), ("shared", self.directory)):
            arguments += ["-fsdev", f"local,id={tag},path={path},security_model=none,readonly=on,multidevs=remap"]
            arguments += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        with (self.directory / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["qemu-system-x86_64", *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def lines(self) -> list[str]:
        """What `command` has written until now, as whole lines."""
        text = self._output.read_text()
        return text[: text.rfind("\n") + 1].splitlines()

    def wait_for(self, prefix: str, count: int = 1, within: float = 400) -> list[str]:
        """Returns the lines that begin with `prefix` once there are `count` of them."""
        assert self._process is not None
        end = time.monotonic() + within
        while len(found := [line for line in self.lines() if line.startswith(prefix)]) < count:
            ended = any(line.startswith("ended ") for line in self.lines()) or self._process.poll() is not None
            assert not ended and time.monotonic() < end, f"no {count} lines {prefix!r}:\n{self._said()}"
            time.sleep(0.02)
        return found

    def _said(self) -> str:
        parts = (self._output, self.console, self.directory / "qemu.log")
        return "\n".join(part.read_text(errors="replace")[-4000:] for part in parts if part.exists())

    def cut_off(self) -> list[str]:
        """Takes its power away; returns the lines that it had written."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
        return self.lines()
