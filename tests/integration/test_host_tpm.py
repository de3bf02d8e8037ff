"""A host whose master key its own TPM keeps: moved there from a file, lost with another machine, brought back with the copy."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord.keyprovider.tpm import TpmSource
from support.certificates import new_key
from support.command import Command
from support.guest import Guest, library
from support.host import SETTINGS, Host
from support.host_process import wait_for
from support.shell import Shell
from support.tpm_rig import TpmProcess

REFUSED = 4


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[TpmProcess]:
    process = TpmProcess(tmp_path / "tpm")
    yield process
    process.close()


def settings(tpm: TpmProcess) -> str:
    return f'{SETTINGS}[provider]\nkind = "tpm"\ndevice = "tcp:127.0.0.1:{tpm.port}"\n[workers]\nstop_with_host = true\n'


def says(host: Host, text: str) -> None:
    """Returns when the host's log has it."""
    wait_for(lambda: text in host.process.log.read_text(), 20, text)


def test_a_host_begins_with_its_tpm(tpm: TpmProcess) -> None:
    with Host(settings(tpm)) as host:
        key, module = new_key("p256"), host.create("web-1")
        module.push("tls", key)
        assert not (host.process.state / "master.key").exists()
        assert host.process.host.GetHost(pb.GetHostRequest(), timeout=10).key_provider.startswith("tpm ")
        says(host, "a master key was made and sealed to this machine's TPM")
        host.stop(signal.SIGTERM)
        host.start()
        assert module.serving().state == "serving" and module.states("tls") == {1: "current"}


def test_a_key_in_a_file_moves_into_the_tpm_and_a_machine_that_is_lost_comes_back(tpm: TpmProcess, tmp_path: Path) -> None:
    with Host(f"{SETTINGS}[workers]\nstop_with_host = true\n") as host:
        process = host.process
        key, module = new_key("p256"), host.create("web-1")
        module.push("tls", key)
        fingerprint = process.host.GetHost(pb.GetHostRequest(), timeout=10).key_provider
        host.stop(signal.SIGTERM)
        process.configure(settings(tpm))
        host.start()
        module.serving()
        assert process.host.GetHost(pb.GetHostRequest(), timeout=10).key_provider == fingerprint.replace("file", "tpm")
        says(host, "take ")
        plain, safe = process.state / "master.key", tmp_path / "safe.key"
        shutil.move(plain, safe)

        host.stop(signal.SIGTERM)
        host.start()
        with Shell(Guest(library("ours"), module.address, tmp_path)) as shell:
            module.serving()
            shell.tell("open")
            assert shell.signs_with(shell.private("tls"), key), "without the file"

        host.stop(signal.SIGTERM)
        other = TpmProcess(tmp_path / "other")  # the disk is in another machine
        try:
            process.configure(settings(other))
            process.process = process.launch()
            says(host, "another one sealed it, or it was cleared; put your copy of the master key to master.key beside it")
            host.stop(signal.SIGTERM)
            (process.state / "master.tpm").unlink()  # as it says
            shutil.copy(safe, plain)
            host.start()
            module.serving()
            with Shell(Guest(library("ours"), module.address, tmp_path)) as shell:
                shell.tell("open")
                assert shell.signs_with(shell.private("tls"), key)
        finally:
            other.close()


def test_without_either_nothing_is_begun_anew(tpm: TpmProcess) -> None:
    with Host(settings(tpm)) as host:
        host.create("web-1")
        host.stop(signal.SIGTERM)
        (host.process.state / "master.tpm").unlink()
        host.process.process = host.process.launch()
        says(host, "put your copy of it to")
        assert host.process.process.wait(20) != 0 and not (host.process.state / "master.tpm").exists()


def test_a_backup_is_restored_on_a_machine_with_another_tpm(tpm: TpmProcess, tmp_path: Path) -> None:
    """With a wrong copy, and where the TPM has sealed another one before: what to do is said, and works."""
    file = tmp_path / "host.backup"
    with Host(f"{SETTINGS}[workers]\nstop_with_host = true\n") as host:
        process = host.process
        hsmvisor = Command(f"unix:{process.socket}", process.directory / "authority")
        key, module = new_key("p256"), host.create("web-1")
        module.push("tls", key)
        hsmvisor("backup", "--out", file)
        plain = process.state / "master.key"
        master_key = plain.read_bytes()
        host.stop(signal.SIGTERM)
        shutil.rmtree(process.state)
        process.configure(settings(tpm))
        process.state.mkdir(mode=0o700)
        put(plain, bytes(32))
        hsmvisor("restore", file, "--config", process.config, code=REFUSED)
        sealed = process.state / "master.tpm"
        assert f"put your copy of the right one to {plain}\n" in hsmvisor.errors and not sealed.exists()
        put(sealed.with_name("other"), bytes(32))
        TpmSource(sealed, f"tcp:127.0.0.1:{tpm.port}", sealed.with_name("other"), lambda text: None)
        hsmvisor("restore", file, "--config", process.config, code=REFUSED)
        assert f"put your copy of the right one to {plain}, and take {sealed} away" in hsmvisor.errors and sealed.exists()
        put(plain, master_key)
        sealed.unlink()
        hsmvisor("restore", file, "--config", process.config)
        plain.unlink()
        host.start()
        assert module.serving().state == "serving" and module.states("tls") == {1: "current"}


def put(path: Path, key: bytes) -> None:
    path.write_bytes(key)
    path.chmod(0o600)
