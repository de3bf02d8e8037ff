"""Modules whose keys live in an HSM of the host (SoftHSM2 in its place): used by clients, rotated, killed, upgraded, destroyed."""

from __future__ import annotations

import itertools
import os
import pwd
import signal
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import Authority, PrivateKey, new_key
from support.command import Command
from support.guest import Guest
from support.guest import library as library_named
from support.host import SETTINGS, Host, Module, wait_for
from support.host_hsm import HostHsm
from support.host_process import gone, new_id, reason
from support.load import Made, Signer, fits
from support.processes import status

pytestmark = pytest.mark.real
AUTHORITY = Authority()
SO, USER = "87654321", "135790"
KINDS = {"p256": "ec", "rsa2048": "rsa"}


class Rack:
    """A host with an HSM, and an application of a guest that reaches its module through our library."""

    def __init__(self, directory: Path) -> None:
        self.hsm = HostHsm(directory / "hsm")
        self.host = Host(SETTINGS + self.hsm.settings())
        self.directory = directory

    def create(self, name: str, **settings: Any) -> Module:
        return self.host.create(name, **{"cryptoprocessor": "rack"} | settings)

    def guest(self, module: Module) -> Guest:
        directory = self.directory / module.name
        directory.mkdir(exist_ok=True)
        return Guest(library_named("ours"), module.address, directory)

    def keys(self, module: Module) -> list[dict[str, Any]]:
        return self.hsm.keys(module.status().module_id)

    def upgrade(self, module: Module) -> pb.UpgradeModuleResponse:
        request = pb.UpgradeModuleRequest(request_id=new_id(), name=module.name)
        return self.host.process.modules.UpgradeModule(request, timeout=30)

    def again(self, number: int = signal.SIGTERM) -> None:
        self.host.stop(number)
        self.host.start()


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    rack = Rack(tmp_path_factory.mktemp("rack"))
    with rack.host:
        yield rack


@pytest.fixture
def module(rack: Rack, request: pytest.FixtureRequest) -> Iterator[Module]:
    module = rack.create(f"hsm-{abs(hash(request.node.name)) % 10**8}", guest_token=True)
    yield module
    module.destroy()


def helper(module: Module, not_pid: int = 0) -> int:
    """Returns the pid of the module's helper, once there is one (another one than `not_pid`)."""
    return int(wait_for(lambda: (p := module.status().hsm_helper.pid) not in (0, not_pid) and p, what="a helper"))


def used(rack: Rack, module: Module, label: str, kind: str, seconds: float = 0.3) -> list[Made]:
    """An application's signatures."""
    signer = Signer(rack.guest(module), label, KINDS[kind], name=f"used-{new_id()}")
    time.sleep(seconds + 0.5)  # it starts
    return signer.stop()


def demand(made: list[Made], *keys: PrivateKey, errors: tuple[str, ...] = ()) -> None:
    """Each signature is good under one of the keys; what failed is one of `errors`."""
    failed = {m.error for m in made if m.error}
    assert all(error.startswith(errors) if errors else False for error in failed), failed
    good = [m for m in made if not m.error]
    assert good and all(any(fits(key, m) for key in keys) for m in good)


# ---- delivered keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_delivered_key_lives_in_the_hsm_and_signs(rack: Rack, module: Module, kind: str) -> None:
    key = new_key(kind)
    module.push("web", key, AUTHORITY.chain(key))
    (there,) = rack.keys(module)
    assert there["class"] == "PRIVATE_KEY" and there["type"] == {"p256": "EC", "rsa2048": "RSA"}[kind]
    assert (there["sensitive"], there["extractable"]) == (True, False)
    demand(used(rack, module, "web", kind), key)


def test_a_rotation_destroys_the_old_key_in_the_hsm(rack: Rack, module: Module) -> None:
    old, new = new_key("p256"), new_key("p256")
    first = module.push("web", old, AUTHORITY.chain(old))
    (before,) = rack.keys(module)
    second = module.stage("web", new, AUTHORITY.chain(new))
    assert len(rack.keys(module)) == 2
    module.activate("web", second)
    assert module.states("web") == {first: "retiring", second: "current"}
    assert before in rack.keys(module), "who holds it signs with it"
    module.destroy_generation("web", first)
    (after,) = wait_for(lambda: len(found := rack.keys(module)) == 1 and found, what="the end of the old key")
    assert after["id"] != before["id"]
    demand(used(rack, module, "web", "p256"), new)
    rack.host.pusher.retire(module.name, "web", second)
    module.destroy_generation("web", second)
    wait_for(lambda: rack.keys(module) == [], what="the end of the last key")


def test_a_compromised_key_is_gone_and_so_are_the_processes_that_saw_it(rack: Rack, module: Module) -> None:
    old, new = new_key("p256"), new_key("p256")
    first = module.push("web", old, AUTHORITY.chain(old))
    module.push("web", new, AUTHORITY.chain(new))
    worker, saw = module.pid, helper(module)
    rack.host.pusher.destroy(module.name, "web", first, compromised=True)
    wait_for(lambda: gone(worker) and gone(saw), what="the end of both")
    module.serving(not_pid=worker)
    wait_for(lambda: len(rack.keys(module)) == 1, what="the end of the key")
    demand(used(rack, module, "web", "p256"), new)


# ---- the guest's own keys -----------------------------------------------------------------------------------------------


def tool(guest: Guest, *arguments: object) -> str:
    return guest.run("pkcs11-tool", "--module", guest.library.path, "--slot", "1", *map(str, arguments)).stdout.decode()


def with_pin(guest: Guest, *arguments: object) -> str:
    return tool(guest, "--login", "--pin", USER, *arguments)


def own_pair(guest: Guest) -> ec.EllipticCurvePublicKey:
    """Makes a pair in slot 1 and returns its public key."""
    tool(guest, "--init-token", "--label", "own", "--so-pin", SO)
    tool(guest, "--login", "--login-type", "so", "--so-pin", SO, "--init-pin", "--new-pin", USER)
    with_pin(guest, "--keypairgen", "--key-type", "EC:prime256v1", "--label", "mine", "--id", "07", "--usage-sign")
    with_pin(guest, "--read-object", "--type", "pubkey", "--id", "07", "--output-file", guest.directory / "public")
    public = serialization.load_der_public_key((guest.directory / "public").read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return public


def own_signature(guest: Guest, public: ec.EllipticCurvePublicKey) -> None:
    data, out = guest.directory / "data", guest.directory / "out"
    data.write_bytes(digest := os.urandom(32))
    files = ("--input-file", data, "--output-file", out, "--signature-format", "openssl")
    with_pin(guest, "--sign", "--mechanism", "ECDSA", "--id", "07", *files)
    public.verify(out.read_bytes(), digest, ec.ECDSA(Prehashed(hashes.SHA256())))


def test_a_key_of_the_guests_own_is_made_in_the_hsm(rack: Rack, module: Module) -> None:
    guest = rack.guest(module)
    public = own_pair(guest)
    (there,) = [row for row in rack.keys(module) if row["class"] == "PRIVATE_KEY"]
    assert (there["sensitive"], there["extractable"]) == (True, False)
    assert (there["never_extractable"], there["local"]) == (True, True), "it was made there"
    own_signature(guest, public)
    pid = module.pid
    os.kill(pid, signal.SIGKILL)
    module.serving(not_pid=pid)
    own_signature(guest, public)
    with_pin(guest, "--delete-object", "--type", "privkey", "--id", "07")
    wait_for(lambda: rack.keys(module) == [], what="the end of the key")


# ---- kills, restarts, upgrades under load -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_signatures_go_on_when_the_worker_or_its_helper_is_killed(rack: Rack, module: Module, kind: str) -> None:
    key = new_key(kind)
    module.push("web", key, AUTHORITY.chain(key))
    signer = Signer(rack.guest(module), "web", KINDS[kind])
    time.sleep(1)
    worker, before = module.pid, helper(module)
    os.kill(worker, signal.SIGKILL)
    module.serving(not_pid=worker)
    time.sleep(0.5)
    assert helper(module) == before, "it serves the next worker"
    os.kill(before, signal.SIGKILL)
    after = helper(module, not_pid=before)
    time.sleep(1)
    back = time.monotonic()
    time.sleep(0.5)
    made = signer.stop()
    demand(made, key, errors=("DeviceError",))
    assert [m for m in made if m.began > back] and not [m for m in made if m.began > back and m.error]
    assert (helper(module), module.status().restarts, module.status().hsm_helper.restarts) == (after, 1, 1)
    assert len(rack.keys(module)) == 1


def test_what_needs_the_hsm_waits_for_the_next_helper(rack: Rack, module: Module) -> None:
    """A delivery and a destruction that find the helper dead: the worker asks the next one."""
    first, second = new_key("p256"), new_key("p256")
    number = module.push("web", first)
    for act, left in (
        (lambda: module.push("web", second), 2),
        (lambda: module.destroy_generation("web", number), 1),
    ):
        before = helper(module)
        os.kill(before, signal.SIGKILL)
        wait_for(lambda pid=before: gone(pid))  # type: ignore[misc]
        act()
        helper(module, not_pid=before)
        wait_for(lambda count=left: len(rack.keys(module)) == count, what=f"{left} keys")  # type: ignore[misc]
    demand(used(rack, module, "web", "p256"), second)


def test_an_hsm_that_is_away_is_said_and_comes_back(rack: Rack, module: Module) -> None:
    key, new = new_key("p256"), new_key("p256")
    module.push("web", key)
    away, worker = rack.hsm.tokens.with_name("away"), module.pid
    rack.hsm.tokens.rename(away)
    rack.hsm.tokens.mkdir()
    os.kill(helper(module), signal.SIGKILL)
    failed = wait_for(lambda: (m := module.status()).state == "failed" and m, what="the failure")
    assert f"there is no token with the label {rack.hsm.label!r}" in failed.failure
    assert (failed.pid, failed.materials, failed.hsm_helper.pid) == (worker, 1, 0), "the rest of it serves"
    with pytest.raises(grpc.RpcError) as caught:
        module.push("web", new)
    assert reason(caught.value) == (grpc.StatusCode.UNAVAILABLE, "HSM"), caught.value.details()
    made = used(rack, module, "web", "p256", seconds=4)
    assert made and {m.error.split()[0] for m in made} == {"DeviceError"}
    rack.hsm.tokens.rmdir()
    away.rename(rack.hsm.tokens)
    rack.upgrade(module)
    assert (module.serving().failure, module.status().restarts) == ("", 0)
    module.push("web", new)
    demand(used(rack, module, "web", "p256"), new)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signatures_go_on_while_the_service_is_away(rack: Rack, module: Module, number: int) -> None:
    key = new_key("p256")
    module.push("web", key, AUTHORITY.chain(key))
    signer = Signer(rack.guest(module), "web", "ec")
    time.sleep(1)
    worker, before = module.pid, helper(module)
    rack.host.stop(number)
    away = time.monotonic()
    time.sleep(1)
    assert not gone(worker) and not gone(before)
    rack.host.start()
    back = time.monotonic()
    after = helper(module, not_pid=before)
    assert module.pid == worker
    wait_for(lambda: gone(before), what="the end of the helper that serves nobody")
    time.sleep(0.5)
    made = signer.stop()
    demand(made, key)
    assert [m for m in made if away < m.began < back], "without a supervisor too"
    assert (helper(module), len(rack.keys(module))) == (after, 1)
    os.kill(after, signal.SIGKILL)
    helper(module, not_pid=after)
    demand(used(rack, module, "web", "p256"), key)


def test_an_upgrade_under_load_loses_nothing(rack: Rack, module: Module) -> None:
    key, guest = new_key("p256"), rack.guest(module)
    module.push("web", key, AUTHORITY.chain(key))
    public = own_pair(guest)
    signer = Signer(guest, "web", "ec")
    time.sleep(1)
    for _ in range(3):
        before = helper(module)
        done = rack.upgrade(module)
        assert done.old_pid != done.pid == module.pid
        assert helper(module) != before, "the new worker has a helper of its own"
        wait_for(lambda before=before: gone(before), 20, "the end of the helper that serves nobody")  # type: ignore[misc]
        time.sleep(0.3)
    demand(signer.stop(), key)
    own_signature(guest, public)
    assert len([row for row in rack.keys(module) if row["class"] == "PRIVATE_KEY"]) == 2


# ---- the end of a module ------------------------------------------------------------------------------------------------


def test_two_modules_on_one_hsm_know_nothing_of_each_other(rack: Rack) -> None:
    one, two = rack.create("first", guest_token=True), rack.create("second", guest_token=True)
    keys = {module.name: new_key("p256") for module in (one, two)}
    for module in (one, two):
        module.push("web", keys[module.name], AUTHORITY.chain(keys[module.name]))
    publics = {module.name: own_pair(rack.guest(module)) for module in (one, two)}
    for module in (one, two):
        assert with_pin(rack.guest(module), "--list-objects").count("Private Key Object") == 1
    ids = {module.name: {row["id"] for row in rack.keys(module)} for module in (one, two)}
    assert (len(ids["first"]), len(ids["second"])) == (2, 2) and not ids["first"] & ids["second"]
    demand(used(rack, one, "web", "p256"), keys["first"])
    demand(used(rack, two, "web", "p256"), keys["second"])
    for module in (one, two):
        own_signature(rack.guest(module), publics[module.name])
    gone_id, last = one.status().module_id, helper(one)
    one.destroy()
    assert rack.hsm.keys(gone_id) == [] and gone(last)
    assert {row["id"] for row in rack.keys(two)} == ids["second"]
    demand(used(rack, two, "web", "p256"), keys["second"])
    two.destroy()
    assert rack.hsm.objects() == [], "whoever is gone leaves nothing"


def test_an_emptied_module_leaves_nothing_in_the_hsm(rack: Rack, module: Module) -> None:
    module.push("web", new_key("p256"))
    before = module.status().module_id
    request = pb.BreakGlassRequest(request_id=new_id(), name=module.name, new_root=rack.host.authority.root_public, empty_it=True)
    rack.host.process.modules.BreakGlass(request, timeout=30, metadata=(("hsmvisor-why", "a test"),))
    assert rack.hsm.keys(before) == []
    assert module.serving().settings.cryptoprocessor == "rack"
    key = new_key("p256")
    module.push("web", key)
    assert len(rack.keys(module)) == 1
    demand(used(rack, module, "web", "p256"), key)


def test_a_creation_that_was_cut_off_leaves_nothing_in_the_hsm(rack: Rack) -> None:
    made = rack.create("half")
    made.push("web", new_key("p256"))
    module_id = made.status().module_id
    assert len(rack.hsm.keys(module_id)) == 1
    rack.host.stop(signal.SIGKILL)
    with sqlite3.connect(rack.host.process.state / "state.db") as connection:
        connection.execute("UPDATE modules SET intent = 'creating' WHERE name = 'half'")
    connection.close()
    rack.host.start()
    wait_for(lambda: rack.hsm.keys(module_id) == [], what="the purge")


# ---- what an operator sees ----------------------------------------------------------------------------------------------


def test_a_wrong_pin_is_said_and_tried_once(rack: Rack) -> None:
    kept, key = rack.create("kept"), new_key("p256")
    kept.push("web", key)
    rack.hsm.enter("wrong-pin-7")
    rack.host.stop(signal.SIGTERM)
    rack.host.start()
    failed = wait_for(lambda: (m := kept.status()).state == "failed" and m, what="the failure")
    assert "HSM rack: the PIN is not taken: PinIncorrect" in failed.failure and str(rack.hsm.pin_file) in failed.failure
    demand(used(rack, kept, "web", "p256"), key)  # the helper before has not ended
    with pytest.raises(grpc.RpcError) as caught:
        rack.create("never")
    assert reason(caught.value) == (grpc.StatusCode.UNAVAILABLE, "HSM")
    assert "the PIN is not taken" in str(caught.value.details())
    log = rack.host.process.log.read_text()
    assert log.count("nothing is tried there before you ask") == 1
    with pytest.raises(grpc.RpcError) as caught:
        rack.upgrade(kept)
    assert "the PIN is not taken" in str(caught.value.details())
    demand(used(rack, kept, "web", "p256"), key)
    rack.hsm.enter()
    rack.upgrade(kept)
    assert kept.serving().failure == ""
    demand(used(rack, kept, "web", "p256"), key)
    kept.destroy()
    assert "wrong-pin-7" not in rack.host.process.log.read_text() + "".join(rack.host.process.audit_lines())


def test_a_token_that_is_not_there_is_named(rack: Rack, tmp_path: Path) -> None:
    for changes, told in (
        ({"token": '"another"'}, "there is no token with the label 'another'"),
        ({"library": '"/none/p11.so"'}, "/none/p11.so"),
        ({"pin_file": f'"{tmp_path}/none"'}, f"{tmp_path}/none"),
        ({"user": '"no-such-user"'}, "there is no user 'no-such-user'"),
    ):
        rack.host.process.configure(SETTINGS + rack.hsm.settings(**changes))
        rack.again()
        with pytest.raises(grpc.RpcError) as caught:
            rack.create("never")
        assert reason(caught.value) == (grpc.StatusCode.UNAVAILABLE, "HSM")
        assert told in str(caught.value.details())
    rack.host.process.configure(SETTINGS + rack.hsm.settings())
    rack.again()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a helper another user")
def test_a_helper_is_somebody_of_its_own(rack: Rack) -> None:
    nobody = pwd.getpwnam("nobody")
    rack.host.process.configure(SETTINGS + rack.hsm.settings(user='"nobody"'))

    def give_token(uid: int) -> None:
        for path in (rack.hsm.tokens, *rack.hsm.tokens.rglob("*")):
            os.chown(path, uid, -1)

    give_token(nobody.pw_uid)
    for parent in itertools.takewhile(lambda path: path != Path(tempfile.gettempdir()), rack.hsm.directory.parents):
        parent.chmod(parent.stat().st_mode | 0o711)
    rack.again()
    module, key = rack.create("nobodys"), new_key("p256")
    module.push("web", key)
    demand(used(rack, module, "web", "p256"), key)
    said = status(pid := helper(module))
    assert said["Uid"].split() == [str(nobody.pw_uid)] * 4
    assert (said["NoNewPrivs"], [int(said[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")]) == ("1", [0, 0, 0])
    assert "Max core file size        0                    0" in Path(f"/proc/{pid}/limits").read_text()
    shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    assert rack.hsm.pin_file.read_bytes().strip() not in shown
    listed = {m.name: m.applied for m in module.status().measures}
    assert listed["HSM helper: own-user"] and listed["HSM helper: core-dumps"] and listed["HSM helper: no-new-privileges"]
    module.destroy()
    assert rack.hsm.objects() == []
    rack.host.process.configure(SETTINGS + rack.hsm.settings())
    give_token(0)
    rack.again()


def test_the_command_line_has_it(rack: Rack) -> None:
    cli = Command(f"unix:{rack.host.process.socket}", rack.host.process.directory / "authority")
    said = cli("module", "create", "by-hand", "--cryptoprocessor", "nonesuch", code=4)
    assert said == "" and "no HSM nonesuch" in cli.errors and "known are rack" in cli.errors
    cli("module", "create", "by-hand", "--cryptoprocessor", "rack")
    cli("module", "create", "by-hand", "--cryptoprocessor", "rack")
    cli("module", "create", "by-hand")
    cli("module", "create", "in-software")
    cli("module", "create", "in-software", "--cryptoprocessor", "rack", code=4)
    assert "live in software, for good" in cli.errors
    shown = cli("module", "show", "by-hand")
    assert "rack (" in shown and "helper pid" in shown and "HSM helper: core-dumps" in shown
    assert cli.json("module", "show", "by-hand")["settings"]["cryptoprocessor"] == "rack"
    listed = cli("module", "list")
    assert "cryptoprocessor" in listed and " rack " in listed and " software " in listed
    cli("module", "settings", "by-hand", "--max-sessions", "9")
    assert cli.json("module", "show", "by-hand")["settings"]["cryptoprocessor"] == "rack"
    assert rack.hsm.library in cli("host", "show")
    (hsm,) = cli.json("host", "show")["hsms"]
    assert (hsm["name"], hsm["token"], hsm["modules"]) == ("rack", rack.hsm.label, 1)
    words = {"_HSMVISOR_COMPLETE": "bash_complete", "COMP_CWORD": "5", "COMP_WORDS": "hsmvisor module create x --cryptoprocessor "}
    assert [line.split(",")[1] for line in cli(**words).split()] == ["software", "rack"]
    assert "is destroyed" in cli("module", "destroy", "by-hand", "--yes")
    assert cli.json("module", "destroy", "in-software", "--yes") == {"destroyed": "in-software", "keys_left": ""}
