"""Measured boot: firmware measures into a TPM of ours what it starts, and the guest's log of it leads to what the TPM signs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisor.attestation import event_log
from support.boot_disk import OVMF, SEABIOS, boot_disk
from support.host import Host
from support.tpm_vm import CRB, TIS, TpmMachine, VmTpm

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]

LOG = "/sys/kernel/security/tpm0/binary_bios_measurements"
STARTS = [(SEABIOS, CRB), (SEABIOS, TIS), (OVMF, CRB)]
FIRMWARE = range(8)  #: PCRs that are its own
#: An event of each firmware's log: the program that it starts, which it measures as it reads it (PFP, 3.3.4.5).
STARTED = {SEABIOS: "EV_IPL", OVMF: "EV_EFI_BOOT_SERVICES_APPLICATION"}


@pytest.fixture(scope="module", params=STARTS, ids=["seabios-crb", "seabios-tis", "ovmf-crb"])
def machine(request: pytest.FixtureRequest, shared_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TpmMachine]:
    firmware, driver = request.param
    tpm = VmTpm(shared_host, f"measured-{request.param_index}")
    disk = boot_disk(firmware, tmp_path_factory.mktemp("boot"))
    with TpmMachine(tpm, driver, firmware=firmware, boot_disk=disk) as machine:
        machine.run("mount -t securityfs none /sys/kernel/security")
        yield machine
    tpm.close()


def test_each_part_of_the_firmware_is_measured(machine: TpmMachine) -> None:
    said = machine.run("tpm2_pcrread sha256:0,1,2,3,4,5,6,7").stdout.decode()
    found = {int(pcr): bytes.fromhex(value) for pcr, value in re.findall(r"(\d+) *: 0x([0-9A-F]{64})", said)}
    assert found == {pcr: value for pcr, value in machine.pcrs().items() if pcr in FIRMWARE}
    assert bytes(32) not in found.values() and found.keys() == set(FIRMWARE)


def test_the_log_leads_to_what_the_tpm_signs(machine: TpmMachine) -> None:
    """And so does none in which a byte of what is compared is another one."""
    data = machine.read(LOG)
    log, attested = event_log.parse(data), machine.tpm.attested(*range(10))
    assert attested.pcrs == {pcr: value for pcr, value in machine.pcrs().items() if pcr < 10}
    assert event_log.compare(log, attested.pcrs) == []
    digest = next(event.digest for event in log.events if event.pcr == 4)
    other = data.replace(digest, hashlib.sha256(digest).digest())
    assert event_log.compare(event_log.parse(other), attested.pcrs) == [4]


def test_what_was_started_is_in_it(machine: TpmMachine) -> None:
    log = event_log.parse(machine.read(LOG))
    started = [event for event in log.events if event.type == STARTED[machine.firmware]]
    assert started and {event.pcr for event in started} == {4}
    if machine.firmware == SEABIOS:
        assert machine.boot_disk is not None
        assert started[0].digest == hashlib.sha256(sector(machine.boot_disk)).digest()


def sector(disk: Path) -> bytes:
    """What SeaBIOS measures as PCR 4's MBR: its code, and not the table of partitions (PFP for BIOS systems 1.21, 8.2.5)."""
    return disk.read_bytes()[:440]


@pytest.mark.parametrize("machine", STARTS[:1], ids=["seabios-crb"], indirect=True)
def test_a_guest_that_starts_anew_is_measured_anew(machine: TpmMachine) -> None:
    """The same disk, the same PCRs; and what was extended since is gone."""
    before = {pcr: value for pcr, value in machine.pcrs().items() if pcr < 10}
    resets = machine.tpm.attested(7).resets
    machine.run(f"tpm2_pcrextend 7:sha256={'01' * 32}")
    assert machine.tpm.attested(7).pcrs[7] != before[7]
    machine.reset()
    after = machine.tpm.attested(*range(10))
    assert after.pcrs == before and after.resets > resets
