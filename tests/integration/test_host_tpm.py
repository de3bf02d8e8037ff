"""A host whose master key its own TPM keeps: moved there from a file, lost with another machine, brought back with the copy."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import new_key
from support.guest import Guest, library
from support.host import SETTINGS, Host
from support.host_process import wait_for
from support.shell import Shell
from support.tpm_rig import TpmProcess


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
