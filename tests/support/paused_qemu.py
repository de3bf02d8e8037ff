"""A QEMU that never runs a guest (-S): for what its monitor says and does."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from support.host_process import wait_for

SHARED = ("-m", "64M", "-object", "memory-backend-memfd,id=ram0,size=64M,share=on", "-machine", "memory-backend=ram0")
PORT = ("-device", "pcie-root-port,id=rp0,chassis=1")
#: The port's own hot-plug instead of ACPI's: it needs no guest to let go of a device that no guest has seen.
NATIVE = ("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")


class PausedQemu:
    def __init__(self, directory: Path, *arguments: str, machine: str = "q35") -> None:
        self.qmp, self.log = directory / "qmp", directory / "qemu.log"
        self.qmp.unlink(missing_ok=True)
        fixed = ["-accel", "tcg", "-machine", machine, "-S", "-nodefaults", "-display", "none"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["qemu-system-x86_64", *fixed, "-qmp", f"unix:{self.qmp},server=on,wait=off", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: self._listens() or self.process.poll() is not None, 20, "the start of QEMU")
        assert self.process.poll() is None, self.log.read_text()

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.qmp)) == 0

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextlib.contextmanager
def paused_qemu(directory: Path, *arguments: str, machine: str = "q35") -> Iterator[PausedQemu]:
    qemu = PausedQemu(directory, *arguments, machine=machine)
    try:
        yield qemu
    finally:
        qemu.end()
