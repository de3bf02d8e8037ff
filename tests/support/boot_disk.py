"""Disks from which a firmware starts the guest's kernel: by a boot sector and SYSLINUX, and as an EFI program (systemd's stub)."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.guest import REPOSITORY, system_file
from support.guest_machine import COMMAND_LINE, image

SEABIOS, OVMF = "bios-256k.bin", "/usr/share/ovmf/OVMF.fd"  #: as QEMU's -bios takes them

_SIZE = 64 << 20
_MENU = f"DEFAULT linux\nPROMPT 0\nLABEL linux\nKERNEL /vmlinuz\nINITRD /initrd\nAPPEND {COMMAND_LINE}\n"
#: Where the parts of an EFI program come to lie (systemd-stub(7), and the example of ukify before there was one).
_PLACES = {".cmdline": 0x30000, ".linux": 0x2000000, ".initrd": 0x3000000}


def boot_disk(firmware: str, directory: Path) -> Path:
    """Returns a new disk for SEABIOS or OVMF, in `directory`."""
    disk = directory / f"boot-{Path(firmware).stem}.img"
    with disk.open("wb") as file:
        file.truncate(_SIZE)
    _do("mformat", "-i", disk, "-F", "::")
    if firmware == SEABIOS:
        menu = directory / "syslinux.cfg"
        menu.write_text(_MENU)
        for source, name in ((_kernel(), "vmlinuz"), (image() / "initramfs", "initrd"), (menu, "syslinux.cfg")):
            _do("mcopy", "-i", disk, source, f"::/{name}")
        _do("syslinux", "--install", disk)
    else:
        _do("mmd", "-i", disk, "::/EFI", "::/EFI/BOOT")
        _do("mcopy", "-i", disk, _efi_program(directory), "::/EFI/BOOT/BOOTX64.EFI")
    return disk


def _kernel() -> Path:
    (found,) = (REPOSITORY / ".cache/kernel/boot").glob("vmlinuz-*")
    return found


def _efi_program(directory: Path) -> Path:
    line, program = directory / "cmdline", directory / "linux.efi"
    line.write_text(COMMAND_LINE)
    parts = {".cmdline": line, ".linux": _kernel(), ".initrd": image() / "initramfs"}
    words = [w for name, file in parts.items() for w in _section(name, file)]
    _do("objcopy", *words, system_file("systemd/boot/efi/linuxx64.efi.stub"), program)
    return program


def _section(name: str, file: Path) -> list[str]:
    return ["--add-section", f"{name}={file}", "--change-section-vma", f"{name}={_PLACES[name]:#x}"]


def _do(*words: str | Path) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{words[0]}: {done.stderr}"
