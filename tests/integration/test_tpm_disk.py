"""A guest's encrypted disk whose key its TPM keeps for a boot that is measured as it was then: Debian's cryptsetup and systemd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.boot_disk import SEABIOS, boot_disk
from support.host import Host
from support.tpm_vm import TpmMachine, VmTpm

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]

SIZE = 32 << 20
CRYPTSETUP = "/lib/systemd/systemd-cryptsetup"
TEXT = b"what is on the disk"

Boot = Callable[[], TpmMachine]


@pytest.fixture(scope="module")
def tpm(shared_host: Host) -> Iterator[VmTpm]:
    tpm = VmTpm(shared_host, "with-disk")
    yield tpm
    tpm.close()


@pytest.fixture(scope="module")
def boot(tpm: VmTpm, tmp_path_factory: pytest.TempPathFactory) -> Boot:
    """Starts a machine that has the disk: another QEMU each time."""
    directory = tmp_path_factory.mktemp("disk")
    firmware, disk = boot_disk(SEABIOS, directory), directory / "vault.img"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    arguments = ["-drive", f"file={disk},format=raw,if=virtio"]
    return lambda: TpmMachine(tpm, firmware=SEABIOS, boot_disk=firmware, arguments=arguments)


@pytest.fixture(scope="module")
def enrolled(boot: Boot) -> Boot:
    """And the disk is encrypted, its key with the TPM, and a text on it."""
    with boot() as machine:
        machine.write("/root/word", b"word")
        machine.run(
            "modprobe dm_crypt && cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /dev/vdb /root/word"
        )
        enrol = "PASSWORD=word systemd-cryptenroll --tpm2-device=auto --tpm2-pcrs=7 /dev/vdb && systemd-cryptenroll /dev/vdb"
        assert b"tpm2" in machine.run(enrol, timeout=60).stdout
        machine.run("cryptsetup open /dev/vdb vault --key-file /root/word && cat >/dev/mapper/vault", stdin=TEXT)
        machine.run("cryptsetup close vault && cryptsetup luksRemoveKey /dev/vdb /root/word")
        machine.switch_off()
    return boot


def attach(machine: TpmMachine) -> tuple[int, str]:
    """By the TPM alone: returns the exit code and what was said."""
    done = machine.run(
        f"modprobe dm_crypt && {CRYPTSETUP} attach vault /dev/vdb - tpm2-device=auto,headless=true 2>&1", check=False, timeout=60
    )
    return done.returncode, done.stdout.decode()


def text(machine: TpmMachine) -> bytes:
    code, said = attach(machine)
    assert code == 0, said
    return machine.run(["head", "-c", str(len(TEXT)), "/dev/mapper/vault"]).stdout


def test_after_a_start_it_opens_without_a_word(enrolled: Boot, tpm: VmTpm) -> None:
    """Also with another process that has the TPM's state."""
    tpm.kill()
    with enrolled() as machine:
        assert text(machine) == TEXT
        machine.switch_off()


def test_after_another_boot_it_does_not(enrolled: Boot) -> None:
    """And with that one again it does."""
    with enrolled() as machine:
        machine.run(f"tpm2_pcrextend 7:sha256={'01' * 32}")
        code, said = attach(machine)
        assert code != 0 and "policy" in said.lower(), said
        assert machine.run("ls /dev/mapper").stdout.split() == [b"control"]
        machine.switch_off()
    with enrolled() as machine:
        assert text(machine) == TEXT
        machine.switch_off()


def test_another_guests_tpm_does_not_open_it(enrolled: Boot, shared_host: Host) -> None:
    theirs, other = enrolled(), VmTpm(shared_host, "without-disk")
    with TpmMachine(other, firmware=SEABIOS, boot_disk=theirs.boot_disk, arguments=theirs.more[-2:]) as thief:
        code, said = attach(thief)
        assert code != 0 and "integrity" in said.lower(), said
    other.close()


def test_without_its_tpm_it_is_nothing(enrolled: Boot) -> None:
    path = Path(enrolled().more[-1].split(",")[0].removeprefix("file="))
    assert TEXT not in path.read_bytes()
