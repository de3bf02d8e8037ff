"""`hsmvisor module` with a TPM, as an operator types it: made, shown, given to QEMU and libvirt, attested."""

from __future__ import annotations

import hashlib
import itertools
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hsmvisor.cli.context import REFUSED, USAGE
from hsmvisord.wire import tpm2
from support import event_logs as e
from support.command import Command
from support.host import Host, Module
from support.tpm_guest import PCR_EXTEND, Guest
from support.tpm_host import create, machine, serving

NUMBERS = itertools.count()
KERNEL, POLICY = b"a kernel", b"a command line"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture(scope="module")
def hsmvisor(host: Host) -> Command:
    return Command(f"unix:{host.process.socket}", host.authority.directory)


@pytest.fixture
def module(host: Host) -> Iterator[Module]:
    module = create(host, f"tpm-{next(NUMBERS)}")
    yield module
    module.destroy()


def test_a_module_is_made_a_tpm_and_is_none_any_more(host: Host, hsmvisor: Command) -> None:
    hsmvisor("module", "create", "made", "--tpm", "--tpm-key", "0x81800001=ssh", "--tpm-key", "81000002=mail")
    module = Module(host, "made", "")
    state = serving(module)
    keys = {"0x81800001": "ssh", "0x81000002": "mail"}
    assert hsmvisor.json("module", "show", "made")["settings"]["tpm"] == {"enabled": True, "keys": keys, "no_firmware": False}
    shown = hsmvisor("module", "show", "made")
    for word in (
        "serving",
        f"pid {state.pid}",
        "in no machine now",
        "0x81800001 ssh",
        "0x81000002 mail",
        state.socket,
        state.tss_path,
    ):
        assert word in shown, word
    hsmvisor("module", "settings", "made", "--tpm", "--tpm-key", "0x81800001=ssh", "--tpm-no-firmware")
    now = {"enabled": True, "keys": {"0x81800001": "ssh"}, "no_firmware": True}
    assert hsmvisor.json("module", "show", "made")["settings"]["tpm"] == now
    with machine(module):
        hsmvisor("module", "settings", "made", code=REFUSED)
        assert "is that of a machine that runs" in hsmvisor.errors and "keep --tpm and --tpm-key" in hsmvisor.errors
        assert hsmvisor.json("module", "show", "made")["settings"]["tpm"] == now
    hsmvisor("module", "settings", "made")
    assert "tpm" not in hsmvisor.json("module", "show", "made")["settings"]
    module.destroy()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--tpm-key", "0x81800001=ssh"), "go with --tpm"),
        (("--tpm-no-firmware",), "go with --tpm"),
        (("--tpm", "--tpm-key", "0x81800001"), "HANDLE=MATERIAL"),
        (("--tpm", "--tpm-key", "0x81800001=a", "--tpm-key", "0x81800001=b"), "each handle once"),
    ],
)
def test_what_cannot_be_said(hsmvisor: Command, words: tuple[str, ...], why: str) -> None:
    hsmvisor("module", "create", "never", *words, code=USAGE)
    assert why in hsmvisor.errors


def test_arguments_for_qemu_and_a_domain_for_libvirt(hsmvisor: Command, module: Module) -> None:
    socket = module.status().tpm.socket
    for words, driver in (((), "tpm-crb"), (("--tpm-driver", "tpm-tis"), "tpm-tis")):
        arguments = shlex.split(hsmvisor("module", "qemu-args", module.name, "--as", "tpm", *words))
        assert arguments[::2] == ["-chardev", "-tpmdev", "-device"]
        assert arguments[1].startswith("socket,") and arguments[1].endswith(f"path={socket}")
        assert arguments[3].startswith("emulator,") and arguments[5].split(",")[0] == driver
        domain = ElementTree.fromstring(hsmvisor("module", "libvirt-xml", module.name, "--as", "tpm", *words))
        tpm = domain.find("devices/tpm")
        assert tpm is not None and tpm.get("model") == driver
        source = tpm.find("backend[@type='external']/source[@type='unix']")
        assert source is not None and (source.get("mode"), source.get("path")) == ("connect", socket)
    hsmvisor("module", "qemu-args", module.name, "--as", "tpm", "--check", "qemu", code=USAGE)
    hsmvisor("module", "qemu-args", module.name, "--as", "tpm", "--tpm-driver", "tpm-spapr", code=USAGE)


# ---- attest -----------------------------------------------------------------------------------------------------------------


def extend(guest: Guest, pcr: int, data: bytes) -> None:
    values = (1).to_bytes(4, "big") + tpm2.SHA256.to_bytes(2, "big") + hashlib.sha256(data).digest()
    guest.good(PCR_EXTEND, (pcr,), values, tpm2.EMPTY_PASSWORD)


def extended(data: bytes) -> str:
    return hashlib.sha256(bytes(32) + hashlib.sha256(data).digest()).hexdigest()


@pytest.fixture
def booted(module: Module) -> Iterator[Module]:
    """Its guest has measured a kernel (PCR 4) and a command line (PCR 12)."""
    with machine(module) as (_, guest):
        extend(guest, 4, KERNEL)
        extend(guest, 12, POLICY)
        yield module


def test_what_a_guest_was_booted_as(hsmvisor: Command, booted: Module) -> None:
    told = hsmvisor("module", "attest", booted.name)
    assert extended(KERNEL) in told and f"verified: the TPM of module {booted.name}" in told
    assert "the host's key is as the host itself says" in told
    found = hsmvisor.json("module", "attest", booted.name, "--host-key", booted.host.key.hex())
    assert found["host_key_pinned"] is True and found["wrong"] == [] and found["events"] == []
    assert list(found["pcrs"]) == [*map(str, range(10)), "14"] and found["pcrs"]["4"] == extended(KERNEL)
    hsmvisor("module", "attest", booted.name, "--host-key", os.urandom(32).hex(), code=REFUSED)
    assert "WRONG_HOST" in hsmvisor.errors or "another host" in hsmvisor.errors, hsmvisor.errors


def test_what_a_pcr_is_to_be(hsmvisor: Command, booted: Module) -> None:
    right = f"4={extended(KERNEL)}"
    assert list(hsmvisor.json("module", "attest", booted.name, "--pcr", right, "--pcr", f"23={'00' * 32}")["pcrs"]) == ["4", "23"]
    wrong = f"12={extended(KERNEL)}"
    told = hsmvisor("module", "attest", booted.name, "--pcr", right, "--pcr", wrong, code=REFUSED)
    assert f"NOT {extended(KERNEL)}" in told and told.count("NOT") == 1
    for impossible in ("24=" + "00" * 32, "4", "4=00", "x=" + "00" * 32, "4=" + "00" * 33):
        hsmvisor("module", "attest", booted.name, "--pcr", impossible, code=USAGE)
        assert "is not PCR=DIGEST" in hsmvisor.errors


def test_what_was_measured(hsmvisor: Command, booted: Module, tmp_path: Path) -> None:
    """The log is held against each PCR that it has to lead to, and those that --pcr names are told as well."""
    log = tmp_path / "log"
    log.write_bytes(e.begun() + e.event(4, e.IPL, KERNEL) + e.event(12, e.ACTION, POLICY))
    right = f"12={extended(POLICY)}"
    found = hsmvisor.json("module", "attest", booted.name, "--event-log", str(log), "--pcr", right, "--pcr", f"14={'00' * 32}")
    assert found["log_compared_in"] == [*range(8), 12] and found["log_differs_in"] == [] and found["wrong"] == []
    assert [(event["pcr"], event["digest"]) for event in found["events"] if event["pcr"] in (4, 12)] == [
        (pcr, hashlib.sha256(data).hexdigest()) for pcr, data in ((4, KERNEL), (12, POLICY))
    ]
    assert "EV_ACTION" in hsmvisor("module", "attest", booted.name, "--event-log", str(log))
    for other, differs in (
        (e.begun() + e.event(4, e.IPL, KERNEL), []),  # what it says nothing of is compared in the firmware's PCRs alone
        (e.begun() + e.event(12, e.ACTION, POLICY), [4]),
        (e.begun() + e.event(4, e.IPL, KERNEL) + e.event(12, e.ACTION, POLICY + b" "), [12]),
        (e.begun() + e.event(4, e.IPL, KERNEL) + e.event(3, e.ACTION, b"more"), [3]),
    ):
        log.write_bytes(other)
        code = REFUSED if differs else 0
        hsmvisor("module", "attest", booted.name, "--event-log", str(log), code=code)
        told = hsmvisor("--json", "module", "attest", booted.name, "--event-log", str(log), code=code)
        assert f'"log_differs_in": {differs}'.replace(" ", "") in told.replace(" ", "").replace("\n", "")
    log.write_bytes(b"no log")
    hsmvisor("module", "attest", booted.name, "--event-log", str(log), code=REFUSED)
    assert "is no event log" in hsmvisor.errors
    hsmvisor("module", "attest", booted.name, "--event-log", str(tmp_path / "none"), code=USAGE)


@pytest.mark.real
def test_its_certificates_are_saved(hsmvisor: Command, booted: Module, tmp_path: Path) -> None:
    hsmvisor("module", "attest", booted.name, "--save", str(tmp_path / "of-it"))
    for name in ("endorsement-rsa", "endorsement-p256", "platform"):
        words = ["openssl", "verify", "-CAfile", tmp_path / "of-it/ca.pem", "-ignore_critical", tmp_path / f"of-it/{name}.pem"]
        subprocess.run(words, check=True, capture_output=True)


def test_a_guest_that_has_not_started(hsmvisor: Command, module: Module) -> None:
    hsmvisor("module", "attest", module.name, code=REFUSED)
    assert "has not started its TPM" in hsmvisor.errors
