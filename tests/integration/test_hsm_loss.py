"""A host with an HSM loses its state, or its HSM: what a restore brings back, and what the authority has to send again."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisord import ck
from support.certificates import PrivateKey, new_key, private_pem
from support.command import Command
from support.guest import Guest, library
from support.host import SETTINGS, Host, Module
from support.host_hsm import HostHsm
from support.shell import CkFailure, Shell

pytestmark = pytest.mark.slow


class Place:
    def __init__(self, directory: Path) -> None:
        self.directory, self.hsm = directory, HostHsm(directory / "hsm")
        self.host = Host(SETTINGS + self.hsm.settings())
        self.hsmvisor = Command(f"unix:{self.host.process.socket}", self.host.process.directory / "authority")

    def create(self) -> Module:
        self.hsmvisor("module", "create", "web-1", "--cryptoprocessor", "rack")
        return Module(self.host, "web-1", self.host.process.get("web-1").address)

    def push(self, key: PrivateKey, *more: str) -> None:
        file = self.directory / "key.pem"
        file.write_bytes(private_pem(key))
        self.hsmvisor("material", "push", "web-1", "tls", "--key", file, "--profile", "any", *more)

    def keys(self, module: Module) -> set[str]:
        return {row["id"] for row in self.hsm.keys(module.status().module_id)}

    def restore(self, backup: Path) -> None:
        self.host.stop(signal.SIGTERM)
        done = self.host.process.launch(["--stop-workers"])
        assert done.wait(20) == 0
        self.hsmvisor("restore", backup, "--config", self.host.process.config, "--why", "a test", "--force")
        self.host.start()

    def lose_hsm(self) -> None:
        """Another one is put in its place."""
        self.host.stop(signal.SIGTERM)
        assert self.host.process.launch(["--stop-workers"]).wait(20) == 0
        shutil.rmtree(self.hsm.directory)
        self.hsm = HostHsm(self.hsm.directory)
        self.host.start()

    def signs(self, module: Module, key: PrivateKey) -> bool:
        with Shell(Guest(library("ours"), module.address, self.directory)) as shell:
            try:
                return shell.signs_with(shell.private("tls"), key)
            except CkFailure as error:
                assert str(error) == f"C_Sign {ck.CKR_DEVICE_ERROR:#x}"
                return False


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    with place.host:
        yield place


def test_a_state_as_old_as_the_hsm_has_everything(place: Place, tmp_path: Path) -> None:
    module, key = place.create(), new_key("p256")
    place.push(key)
    there = place.keys(module)
    place.hsmvisor("backup", "--out", tmp_path / "backup")
    place.restore(tmp_path / "backup")
    assert module.serving().settings.cryptoprocessor == "rack"
    assert place.keys(module) == there and place.signs(module, key)


def test_an_older_state_is_brought_up_to_date_and_the_hsm_with_it(place: Place, tmp_path: Path) -> None:
    module, old, new = place.create(), new_key("p256"), new_key("p256")
    place.push(old)
    (first,) = place.keys(module)
    place.hsmvisor("backup", "--out", tmp_path / "backup")
    place.push(new)
    (second,) = place.keys(module) - {first}
    module.destroy_generation("tls", 1)
    assert place.keys(module) == {second}
    place.restore(tmp_path / "backup")
    module.serving()
    assert place.keys(module) == set(), "what this state does not know is destroyed, and what it knows was before"
    assert not place.signs(module, old)
    place.hsmvisor("material", "redeliver", "web-1")
    assert len(place.keys(module)) == 1 and place.signs(module, new)


def test_a_new_hsm_in_the_place_of_a_lost_one(place: Place) -> None:
    module, key = place.create(), new_key("p256")
    place.push(key)
    place.lose_hsm()
    module.serving()
    assert not place.signs(module, key)
    place.push(key, "--again")
    assert not place.signs(module, key), "the same key again is a renewal of its certificate"
    for generation in "12":
        place.hsmvisor("material", "retire", "web-1", "tls", generation)
        place.hsmvisor("material", "destroy", "web-1", "tls", generation, "--yes")
    place.push(key, "--again")
    assert len(place.keys(module)) == 1 and place.signs(module, key)


def test_a_module_that_is_emptied_begins_anew_on_a_new_hsm(place: Place) -> None:
    module, key = place.create(), new_key("p256")
    place.push(key)
    place.lose_hsm()
    module.serving()
    place.hsmvisor("module", "break-glass", "web-1", "--why", "the HSM burnt", "--yes-empty-it")
    place.hsmvisor("material", "redeliver", "web-1")
    assert len(place.keys(module)) == 1 and place.signs(module, key)
