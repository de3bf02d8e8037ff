"""The host's part of a module whose keys live in an HSM, with HSMs that fail: who logs in, how often, what an operator is told."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.host_process import HostProcess, gone, new_id, reason, wait_for

C = grpc.StatusCode


class Rack:
    """A host whose configuration has the HSM `rack`."""

    def __init__(self, directory: Path) -> None:
        self.host = HostProcess(module="support.host_with_fake_hsm")
        self.pin, self.board = directory / "pin", directory / "board"
        self.be()
        self.enter("1234")
        self.configure("rack")

    def configure(self, *names: str) -> None:
        text = "[workers]\nstart_timeout_seconds = 2\n"
        for name in names:
            text += f'[[hsms]]\nname = "{name}"\nlibrary = "/lib/none.so"\ntoken = "prod"\npin_file = "{self.pin}"\n'
            text += f'environment = ["HSM={self.board}"]\nwrites = ["{self.board.parent}"]\n'
        self.host.configure(text)

    def be(self, *words: str) -> None:
        self.board.write_text(" ".join(words))

    def enter(self, pin: str) -> None:
        self.pin.write_text(pin)
        self.pin.chmod(0o600)

    def log(self, word: str = "") -> list[str]:
        path = self.board.with_suffix(".log")
        return [line for line in path.read_text().splitlines() if word in line] if path.exists() else []

    def create(self, name: str, **settings: Any) -> pb.Module:
        return self.host.create(name, **{"cryptoprocessor": "rack"} | settings)

    def refused(self, name: str, **settings: Any) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as caught:
            self.create(name, **settings)
        return caught.value

    def destroy(self, name: str) -> pb.DestroyModuleResponse:
        return self.host.modules.DestroyModule(pb.DestroyModuleRequest(request_id=new_id(), name=name), timeout=20)

    def upgrade(self, name: str) -> pb.UpgradeModuleResponse:
        return self.host.modules.UpgradeModule(pb.UpgradeModuleRequest(request_id=new_id(), name=name), timeout=20)

    def failed(self, name: str, *words: str) -> pb.Module:
        module: pb.Module = wait_for(lambda: (m := self.host.get(name)).state == "failed" and m, 20, "the failure")
        assert all(word in module.failure for word in words), module.failure
        return module

    def helper(self, name: str, not_pid: int = 0) -> int:
        """Returns the pid of its helper, once there is one (another one than `not_pid`)."""
        return int(wait_for(lambda: (p := self.host.get(name).hsm_helper.pid) not in (0, not_pid) and p, what="a helper"))

    def audited(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.host.audit_lines()) if line["kind"] == kind]

    def shown(self) -> pb.Hsm:
        (hsm,) = self.host.host.GetHost(pb.GetHostRequest(), timeout=10).hsms
        return hsm


@pytest.fixture
def rack(tmp_path: Path) -> Iterator[Rack]:
    rack = Rack(tmp_path)
    with rack.host:
        yield rack


def hint(error: grpc.RpcError) -> str:
    metadata = {entry.key: entry.value for entry in error.trailing_metadata()}  # type: ignore[attr-defined]
    return bytes(metadata["grpc-status-details-bin"]).decode(errors="replace")


# ---- life ---------------------------------------------------------------------------------------------------------------


def test_a_module_has_its_helper_and_says_so(rack: Rack) -> None:
    made = rack.create("kept")
    assert (made.settings.cryptoprocessor, made.hsm_helper.token) == ("rack", "Maker Model 0001")
    assert rack.log() == [f"login {made.module_id.hex()}", "serve"]
    assert rack.audited("module.create")[-1]["cryptoprocessor"] == "rack"
    assert (rack.shown().name, rack.shown().modules) == ("rack", 1)
    plain = rack.host.create("plain", cryptoprocessor="software")
    assert (plain.settings.cryptoprocessor, plain.HasField("hsm_helper")) == ("", False)
    assert rack.audited("module.create")[-1]["cryptoprocessor"] == "software"
    assert rack.destroy("kept").keys_left == ""
    assert rack.log()[2:] == [f"purge {made.module_id.hex()}"]
    assert gone(made.hsm_helper.pid)
    assert rack.audited("module.purge")[-1]["module_id"] == made.module_id.hex()


def test_a_cryptoprocessor_is_for_good(rack: Rack) -> None:
    error = rack.refused("elsewhere", cryptoprocessor="other")
    assert reason(error) == (C.INVALID_ARGUMENT, "CRYPTOPROCESSOR")
    assert "no HSM other" in str(error.details()) and "known are rack" in hint(error)
    assert reason(rack.refused("elsewhere", cryptoprocessor="Über")) == (C.INVALID_ARGUMENT, "CRYPTOPROCESSOR")
    rack.create("fixed")
    for name, refused in (("fixed", "software"), ("fixed", "other")):
        settings = pb.ModuleSettings(cryptoprocessor=refused)
        with pytest.raises(grpc.RpcError) as caught:
            rack.host.modules.UpdateModule(pb.UpdateModuleRequest(request_id=new_id(), name=name, settings=settings))
        assert reason(caught.value) == (C.INVALID_ARGUMENT, "CRYPTOPROCESSOR")
        assert f"rack for good, not {refused}" in str(caught.value.details())


def test_a_helper_that_dies_is_replaced_and_the_worker_stays(rack: Rack) -> None:
    made = rack.create("dies")
    os.kill(made.hsm_helper.pid, signal.SIGKILL)
    assert rack.helper("dies", not_pid=made.hsm_helper.pid)
    after = rack.host.get("dies")
    assert (after.state, after.pid, after.restarts, after.hsm_helper.restarts) == ("serving", made.pid, 0, 1)
    wait_for(lambda: len(rack.log("serve")) == 2)
    os.kill(made.pid, signal.SIGKILL)  # and a worker that dies gets an end of the same helper
    rack.host.serving("dies", not_pid=made.pid)
    assert (len(rack.log("serve")), len(rack.log("login"))) == (3, 2)


def test_a_helper_that_dies_again_and_again_is_given_a_rest(rack: Rack) -> None:
    rack.be("dies")
    rack.create("weak")
    failed = rack.failed("weak", "its helper ends again and again")
    assert failed.pid, "its worker goes on"
    count = len(rack.log("login"))
    assert 4 <= count <= 6
    time.sleep(2)
    assert len(rack.log("login")) == count


def test_the_next_service_connects_adopted_workers_with_helpers_of_its_own(rack: Rack) -> None:
    made = rack.create("adopted")
    assert rack.host.process is not None
    rack.host.stop(signal.SIGKILL)
    rack.host.start()
    helper = rack.helper("adopted", not_pid=made.hsm_helper.pid)
    # the fake worker is none that can be adopted: it is another process, and so is its helper
    assert rack.host.serving("adopted").state == "serving"
    assert helper != made.hsm_helper.pid
    wait_for(lambda: gone(made.hsm_helper.pid), what="the end of a helper that serves nobody")


# ---- PINs ---------------------------------------------------------------------------------------------------------------


def test_a_wrong_pin_is_tried_once_and_again_when_somebody_asks(rack: Rack) -> None:
    for name in ("one", "two", "three"):
        rack.create(name)
    rack.enter("4711")
    rack.host.stop()
    assert rack.host.launch(["--stop-workers"]).wait(20) == 0
    rack.host.start()
    for name in ("one", "two", "three"):
        rack.failed(name, "HSM rack: the PIN is not taken", "put the right PIN into", "hsmvisor module upgrade")
    time.sleep(1.5)
    assert len(rack.log("WRONG")) == 1, "three modules, one try"
    assert "the PIN is not taken" in rack.shown().failure
    error = rack.refused("four")
    assert reason(error) == (C.UNAVAILABLE, "HSM")
    assert len(rack.log("WRONG")) == 1, "the same file is not tried again for a new module either"
    with pytest.raises(grpc.RpcError) as caught:
        rack.upgrade("one")
    assert "the PIN is not taken" in str(caught.value.details())
    wait_for(lambda: len(rack.log("WRONG")) == 2, what="the try that was asked for")
    time.sleep(0.5)
    assert len(rack.log("WRONG")) == 2
    rack.enter("1234")
    time.sleep(0.5)
    assert rack.host.get("two").state == "failed", "a file that changes is nobody who asks"
    answer = rack.upgrade("two")
    assert (answer.old_pid, answer.pid > 0) == (0, True)
    for name in ("one", "two", "three"):
        rack.host.serving(name)
    assert len(rack.log("WRONG")) == 2
    assert rack.shown().failure == ""


def test_a_creation_may_try_another_pin_file(rack: Rack) -> None:
    rack.enter("4711")
    error = rack.refused("first")
    assert reason(error) == (C.UNAVAILABLE, "HSM")
    assert "the PIN is not taken" in str(error.details()) and str(rack.pin) in hint(error)
    assert rack.log("purge") == [], "nothing was ever there"
    rack.refused("first")
    assert len(rack.log("WRONG")) == 1
    rack.enter("1234")
    rack.create("first")
    assert rack.host.serving("first")


# ---- libraries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("absent", "there is no token with the label 'prod'"),
        ("ends", "the library has no mouth"),
        ("mute", "did not answer within 2 s"),
    ],
)
def test_a_helper_that_does_not_start_says_why(rack: Rack, word: str, told: str) -> None:
    rack.create("before")
    rack.be(word)
    error = rack.refused("never")
    assert reason(error) == (C.UNAVAILABLE, "HSM")
    assert told in str(error.details())
    with pytest.raises(grpc.RpcError):
        rack.host.get("never")
    os.kill(rack.host.get("before").hsm_helper.pid, signal.SIGKILL)
    failed = rack.failed("before", told)
    assert failed.pid, "its worker goes on"
    rack.be()
    with pytest.raises(grpc.RpcError):  # the fake worker has no successor; but somebody has asked
        rack.upgrade("before")
    rack.host.serving("before")


def test_an_hsm_that_is_not_configured_any_more_is_named(rack: Rack) -> None:
    rack.create("orphan")
    rack.host.stop()
    assert rack.host.launch(["--stop-workers"]).wait(20) == 0
    rack.configure("another")
    rack.host.start()
    rack.failed("orphan", "HSM rack: it is not in the host's configuration", "known are another")
    assert "not in the host's configuration" in rack.destroy("orphan").keys_left
    rack.host.stop()
    rack.configure("rack")
    rack.host.start()
    wait_for(lambda: rack.log("purge"), what="the purge")


# ---- the end ------------------------------------------------------------------------------------------------------------


def test_keys_that_cannot_be_destroyed_are_destroyed_later(rack: Rack) -> None:
    made = rack.create("stuck")
    rack.be("stuck")
    left = rack.destroy("stuck").keys_left
    assert "its helper ended with 1" in left
    assert rack.audited("module.destroy")[-1]["keys_left_in"] == "rack"
    assert rack.shown().purges == 1
    tries = len(rack.log(f"purge {made.module_id.hex()}"))
    assert tries == 4, "three quick ones more"
    rack.host.stop(signal.SIGKILL)
    rack.be()
    rack.host.start()
    wait_for(lambda: rack.shown().purges == 0, what="the purge")
    assert len(rack.log(f"purge {made.module_id.hex()}")) == tries + 1
    rack.host.restart()
    time.sleep(0.5)
    assert len(rack.log("purge")) == tries + 1, "once it is done it is done"


def test_a_creation_that_was_cut_off_leaves_no_keys(rack: Rack) -> None:
    made = rack.create("half")
    rack.host.stop(signal.SIGKILL)
    with sqlite3.connect(rack.host.state / "state.db") as connection:
        connection.execute("UPDATE modules SET intent = 'creating'")
    connection.close()
    rack.host.start()
    wait_for(lambda: rack.log(f"purge {made.module_id.hex()}"), what="the purge")
    assert rack.host.modules.ListModules(pb.ListModulesRequest()).modules == []
