"""Says by what QEMU runs guests here: KVM only where a guest was seen to boot with it, as /dev/kvm alone promises nothing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

from support.guest import REPOSITORY

CACHE = REPOSITORY / ".cache/accelerator"
LIMIT = 10  #: seconds for a kernel to come up and restart; KVM takes less than one


def boots(accelerator: str, image: Path, limit: float = LIMIT) -> bool:
    """Says whether the kernel of `image` starts its first process, which restarts the machine, within `limit` seconds."""
    with tempfile.TemporaryDirectory(prefix="hsmg.") as directory:
        console = Path(directory, "console")
        arguments = ["-accel", accelerator, "-machine", "q35", "-cpu", "max", "-m", "256", "-bios", "qboot.rom"]
        arguments += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", f"file:{console}"]
        arguments += ["-kernel", str(image / "vmlinux"), "-initrd", str(image / "initramfs")]
        arguments += ["-append", "console=ttyS0 quiet rdinit=/bin/busybox -- reboot -f"]
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return False
        finally:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: it dies when that lets go of it
                process.wait(5)
        return "Restarting system" in console.read_text(errors="replace")  # a machine that broke down ends as well


def accelerator(image: Path) -> str:
    """Returns "kvm" or "tcg"; what was found is kept for each kernel of this machine."""
    release = os.uname().release
    try:
        known = json.loads(CACHE.read_text())
    except (OSError, ValueError):
        known = {}
    if release not in known:
        usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
        known[release] = "kvm" if usable and boots("kvm", image) else "tcg"
        new = CACHE.with_name(f"accelerator.{os.getpid()}")
        new.write_text(json.dumps(known))
        new.replace(CACHE)
    return str(known[release])
