"""Guests' boots as people and real managers meet them: commands, the API, a configuration that is read again, two managers.

Hosts are light ones, with TPMs of a test's own (support/soft_tpm.py), but for one real host.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import ssl
import subprocess
import tomllib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from hsmvisor.manager import limits
from hsmvisor.manager.policy.measured import parse
from hsmvisor_rpc.sealed.attestation import verify_attestation
from hsmvisor_rpc.sealed.endorsement import TpmCertificates
from hsmvisor_rpc.v1 import hsmvisor_pb2 as host_pb
from hsmvisor_rpc.v1 import manager_pb2 as pb
from hsmvisord.wire import tpm2
from support.command import Command
from support.fleet_processes import Manager, Member
from support.host import Module
from support.host_process import new_id, reason, wait_for
from support.light_fleet import LightFleet, Linked
from support.light_host import shared_recipient
from support.postgres import Postgres
from support.soft_tpm import SoftTpm
from support.tpm_guest import PCR_EXTEND, Guest
from support.tpm_host import FIRST, machine, serving, tpm_settings

pytestmark = pytest.mark.slow
GOOD, EVIL = b"kernel 6.1", b"kernel of somebody else"
ROMS = b"option ROMs"
WEB = {"material": "tls", "names": ["dns:{name}.example.net"], "resources": ["h1/web"]}
OK, FAILURE, USAGE, NOT_FOUND, REFUSED = range(5)
POLICY = """
@id("own-resources") permit (principal, action, resource) when { resource.owner == principal };
@id("measured-boot") @reason("here boots what is approved")
forbid (principal, action == Action::"distribute", resource) unless { context.measured.contains("golden") };
"""


def cli(manager: Manager, *words: str | Path, code: int = OK) -> tuple[str, str]:
    """Returns what it printed, and what it said of errors."""
    command = Command("unix:/nowhere", manager.directory / "authority")
    place = {"HSMVISOR_MANAGER": f"unix:{manager.socket}", "XDG_CONFIG_HOME": str(manager.directory)}
    return command(*words, code=code, **place), command.errors


async def told(manager: Manager, *words: str | Path, code: int = OK) -> tuple[str, str]:
    return await asyncio.to_thread(cli, manager, *words, code=code)


async def until(holds: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """The host's side goes on meanwhile."""
    await asyncio.to_thread(wait_for, holds, seconds, what)


def reload(manager: Manager, more: str) -> None:
    """Its configuration has this too from now on."""
    manager.config.write_text(manager.config.read_text() + "\n" + more)
    assert manager.process is not None
    manager.process.send_signal(signal.SIGHUP)


def is_known(manager: Manager, name: str) -> bool:
    try:
        manager.requests.Explain(pb.ExplainRequest(owner="alice", spec=pb.RequestSpec(**WEB, measured=[name])), timeout=20)
    except grpc.RpcError as error:
        assert reason(error)[1] == "MEASURED"
        return False
    return True


def upload(manager: Manager, text: str) -> None:
    manager.policy.Upload(pb.UploadPolicyRequest(request_id=new_id(), text=text), timeout=20)


def played(work: Callable[[LightFleet, Linked, SoftTpm], Awaitable[None]], manager: Manager, joins: Manager | None = None) -> None:
    """With a host that has joined (`joins`: another manager of the fleet), its guest web, and that one's TPM."""

    async def whole() -> None:
        fleet = LightFleet((joins or manager).token, shared_recipient())
        link = await fleet.add("h1", ["web"])
        tpm = link.host.tpms["web"] = SoftTpm().boot(GOOD)
        try:
            await until(lambda: bool(manager.fleet.ListResources(pb.ListResourcesRequest(), timeout=10).resources), "the guest")
            await work(fleet, link, tpm)
        finally:
            await fleet.close()

    asyncio.run(whole())


def current(link: Linked) -> int:
    found = link.host.guests["web"].module.current("tls")
    return found.number if found else 0


def test_from_what_a_guest_is_now_to_a_policy_that_demands_it() -> None:
    async def work(fleet: LightFleet, link: Linked, tpm: SoftTpm) -> None:
        block, _ = await told(manager, "fleet", "resource", "measure", "web", "--pcr", "0,4", "--pcr", "7", "--as", "golden")
        assert block.startswith("[measured.golden]    # h1/web, ")
        known = parse(tomllib.loads(block)["measured"])["golden"]
        assert known.pcrs == {pcr: (tpm.pcrs[pcr],) for pcr in (0, 4, 7)}
        _, errors = await told(manager, "request", "apply", "tls", "--owner", "alice", "--name", "dns:{name}.example.net",
                               "--resource", "h1/web", "--measured", "golden", code=REFUSED)  # fmt: skip
        assert "there is no [measured.golden] in the manager's configuration: none is configured" in errors
        # one PCR more: what was measured just now does not tell of it, and would else count for two minutes
        reload(manager, f'{block}\npcrs.2 = "{tpm.pcrs[2].hex()}"')
        await asyncio.to_thread(wait_for, lambda: is_known(manager, "golden"), 20, "the configuration")
        await asyncio.to_thread(upload, manager, POLICY)
        tpm.boot(EVIL)
        told_of, _ = await told(manager, "request", "explain", "tls", "--owner", "alice", "--name", "dns:{name}.example.net",
                                "--resource", "h1/web", "--json")  # fmt: skip
        (expected,) = json.loads(told_of)["resources"]
        assert expected["allowed"] and expected["measured"] == ["golden"]
        assert expected["outcome"].endswith("; each delivery where the guest's boot is measured as golden")
        _, errors = await told(manager, "request", "apply", "tls", "--owner", "alice", "--name", "dns:{name}.example.net",
                               "--resource", "h1/web", "--wait", code=FAILURE)  # fmt: skip
        wanted = f"golden: PCR 4 is {tpm.pcrs[4].hex()}, wanted {known.pcrs[4][0].hex()}"
        assert wanted in errors and "forbidden by measured-boot: here boots what is approved" in errors
        shown, _ = await told(manager, "request", "show", "tls", "--owner", "alice")
        assert wanted in shown and "unmeasured" in shown and "active, failing" in shown
        (line,) = json.loads((await told(manager, "request", "show", "tls", "--owner", "alice", "--json"))[0])["lines"]
        (holding,) = line["holdings"]
        assert (line["stage"], holding["state"]) == ("unmeasured", "unmeasured") and wanted in holding["why"]
        shown, _ = await told(manager, "fleet", "status", "--json")
        assert json.loads(shown)["failing"] == 1
        events, _ = await told(manager, "fleet", "events", "--kind", "not_measured")
        assert events.count("\n") == 1 and "h1/web" in events
        tpm.boot(GOOD)
        await until(lambda: len(manager.events("delivered")) == 1, "the delivery")
        (event,) = await asyncio.to_thread(manager.events, "delivered")
        assert json.loads(event.detail)["measured"] == "golden"
        block, _ = await told(manager, "fleet", "resource", "measure", "h1/web")
        assert block.splitlines()[1] == "# it fits golden, which is configured already" and block.count("pcrs.") == 8

    with Manager() as manager:
        played(work, manager)


def test_a_reload_counts_at_once_and_a_wrong_one_changes_nothing() -> None:
    async def work(fleet: LightFleet, link: Linked, tpm: SoftTpm) -> None:
        right, wrong = SoftTpm().boot(GOOD).pcrs[4].hex(), SoftTpm().boot(EVIL).pcrs[4].hex()
        asked = await asyncio.to_thread(lambda: manager.apply(**WEB, measured=["golden"]))
        await until(lambda: manager.request(asked.id).lines[0].stage == "unmeasured", "the refusal")
        await asyncio.sleep(8)  # it is at longer pauses
        assert manager.request(asked.id).spec.measured == ["golden"]
        text = manager.config.read_text()
        reload(manager, "[measured.golden2]\npcrs.24 = 'x'")
        await until(lambda: "measured.golden2.pcrs.24: a PCR is 0 to 23" in manager.log.read_text(), "the word for it")
        assert current(link) == 0
        manager.config.write_text(text.replace(f'pcrs.4 = "{wrong}"', f'pcrs.4 = ["{wrong}", "{right.upper()}"]'))
        reload(manager, "")
        await until(lambda: current(link) == 1, "the delivery", 20)

    wrong = SoftTpm().boot(EVIL).pcrs[4].hex()
    with Manager(f'[measured.golden]\npcrs.4 = "{wrong}"\n') as manager:
        played(work, manager)


def test_what_one_manager_asks_the_host_may_tell_another_one(postgres: Postgres) -> None:
    """The policy's manager looks at the line; the host has the other one."""
    url, golden = postgres.database(), f'[measured.golden]\npcrs.4 = "{SoftTpm().boot(GOOD).pcrs[4].hex()}"\n'

    async def work(fleet: LightFleet, link: Linked, tpm: SoftTpm) -> None:
        asked = await asyncio.to_thread(lambda: one.apply(**WEB, measured=["golden"]))
        await until(lambda: current(link) == 1, "the delivery")
        assert {line.stage for line in one.request(asked.id).lines} <= {"delivering", "serving"}
        found = await asyncio.to_thread(one.fleet.MeasureResource, pb.MeasureResourceRequest(id="h1/web", pcrs=[4, 9]), 40)
        attested = verify_attestation(found.attestation, link.host.public, link.host.guests["web"].module.module_id, found.nonce)
        assert attested.pcrs == {4: tpm.pcrs[4], 9: bytes(32)} and list(found.fits) == ["golden"]
        assert [(pcr.number, pcr.value) for pcr in found.pcrs] == sorted(attested.pcrs.items())
        certificates = tpm.certificates(link.host.key, link.host.guests["web"].module.module_id, "web")
        assert list(found.endorsement_certificates) == [certificates.rsa, certificates.p256]
        assert (found.platform_certificate, found.ca_certificate) == (certificates.platform, certificates.ca)

    with Manager(golden, url=url) as one, Manager(golden, url=url, fleet=one.state / "fleet") as other:
        played(work, one, joins=other)


def refused(manager: Manager, **asked: Any) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        manager.fleet.MeasureResource(pb.MeasureResourceRequest(**asked), timeout=40)
    return *reason(caught.value), caught.value.details() or ""


def test_who_asks_for_a_boot_that_cannot_be_told_is_told_why() -> None:
    async def work(fleet: LightFleet, link: Linked, tpm: SoftTpm) -> None:
        def look() -> None:
            assert refused(manager, id="h1/web", pcrs=[24])[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "PCR")
            assert refused(manager, id="h1/none")[:2] == (grpc.StatusCode.NOT_FOUND, "RESOURCE")
            link.host.old = True
            code, why, detail = refused(manager, id="h1/web")
            assert (code, why) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_MEASURED")
            assert "the release of its host (light) is too old to attest a guest's boot: upgrade host h1" in detail
            link.host.old = False
            link.host.tpms.clear()
            assert "module web is no TPM" in refused(manager, id="h1/web")[2]
            link.host.tpms["web"] = tpm
            link.host.lie = lambda data, asked: data[:-1] + bytes([data[-1] ^ 1])
            assert "its host's attestation is not taken: ALTERED" in refused(manager, id="web")[2]
            link.host.lie = lambda data, asked: data
            link.host.certify = lambda made: replace(made, p256=made.platform).encode()
            wrong = "MALFORMED: the P-256 endorsement certificate is for another purpose"
            assert f"its host's attestation is not taken: {wrong}" in refused(manager, id="web")[2]
            link.host.certify = TpmCertificates.encode
            assert refused(manager, id="h1/web", pcrs=[0, 7, 7, 40])[1] == "PCR"
            for _ in range(limits.MOST_MEASURED - 4):
                manager.fleet.MeasureResource(pb.MeasureResourceRequest(id="h1/web", pcrs=[7]), timeout=40)
            assert refused(manager, id="h1/web")[:2] == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MEASURED")

        await asyncio.to_thread(look)

    with Manager() as manager:
        played(work, manager)
        _, errors = cli(manager, "fleet", "resource", "measure", "h1/web", "--pcr", "3-1", code=USAGE)
        assert "PCRs are 0 to 23, as 4, 0-7 or 0,4,7" in errors
        _, errors = cli(manager, "fleet", "resource", "measure", "h1/web", "--as", "no good", code=USAGE)


def test_an_owner_measures_its_own_guests_alone(tmp_path: Path) -> None:
    async def work(fleet: LightFleet, link: Linked, tpm: SoftTpm) -> None:
        for owner, code in (("alice", OK), ("bob", NOT_FOUND)):
            token, place = manager.directory / f"{owner}.token", manager.directory / f"{owner}.toml"
            await told(manager, "fleet", "token", "create", "--owner", owner, "--out", token)
            where = f"127.0.0.1:{manager.join_port}"
            place.write_text(f'address = "{where}"\nca = "{manager.state}/authorities.pem"\ntoken_file = "{token}"\n')
            words = ("--manager-file", place, "--manager", where, "fleet", "resource", "measure", "h1/web")
            out, _ = await told(manager, *words, "--save", tmp_path / owner, code=code)
            assert (tpm.pcrs[4].hex() in out) == (code == OK) == (tmp_path / owner / "endorsement-rsa.pem").exists()

    with Manager() as manager:
        played(work, manager)


def test_a_real_host_says_of_a_module_that_it_is_no_tpm() -> None:
    with Manager() as manager, Member(manager) as host:
        host.join("rack", manager.token("rack"))
        host.register("web-1")
        wait_for(lambda: len(manager.fleet.ListResources(pb.ListResourcesRequest(), timeout=10).resources) == 1, 20, "the guest")
        code, why, detail = refused(manager, id="rack/web-1")
        assert (code, why) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_MEASURED")
        assert "module web-1 is no TPM" in detail


def boots(module: Module, kernel: bytes) -> AbstractContextManager[Guest]:
    """A machine that has the module as its TPM, and whose firmware measures this."""

    @contextmanager
    def machine_of() -> Iterator[Guest]:
        with machine(module) as (_, guest):
            for pcr, measured in ((0, b"firmware"), (2, ROMS), (4, kernel), (7, b"secure boot")):
                values = b"\0\0\0\x01" + tpm2.SHA256.to_bytes(2, "big") + hashlib.sha256(measured).digest()
                guest.good(PCR_EXTEND, (pcr,), values, tpm2.EMPTY_PASSWORD)
            yield guest

    return machine_of()


def certificates_are_as_the_host_says(host: Member, saved: Path) -> None:
    told = host.modules.GetTpmIdentity(host_pb.GetTpmIdentityRequest(name="web-1"), timeout=20)
    rsa, p256 = told.endorsement_certificates
    wanted = {"endorsement-rsa": rsa, "endorsement-p256": p256, "platform": told.platform_certificate, "ca": told.ca_certificate}
    files = {path.name: ssl.PEM_cert_to_DER_cert(path.read_text()) for path in saved.iterdir()}
    assert files == {f"{name}.pem": der for name, der in wanted.items()}
    for name in ("endorsement-rsa", "endorsement-p256", "platform"):
        words = ["openssl", "verify", "-CAfile", saved / "ca.pem", saved / f"{name}.pem"]
        run = subprocess.run(words, capture_output=True, text=True, check=False)
        assert run.returncode == 0 and run.stdout.endswith(": OK\n"), run.stderr


def test_a_real_tpm_on_a_real_host(tmp_path: Path) -> None:
    """A key comes to its guest's faces once that has booted what it should, and not before."""
    apply = ("request", "apply", "tls", "--owner", "alice", "--name", "dns:{name}.example.net", "--resource", "rack/web-1")
    with Manager() as manager, Member(manager) as host:
        host.join("rack", manager.token("rack"))
        host.register("web-1")
        settings = host_pb.ModuleSettings(tpm=tpm_settings(h0="tls"))
        host.modules.UpdateModule(host_pb.UpdateModuleRequest(request_id=new_id(), name="web-1", settings=settings), timeout=20)
        module = Module(SimpleNamespace(process=host), "web-1", "")  # type: ignore[arg-type]
        serving(module)
        wait_for(lambda: len(manager.fleet.ListResources(pb.ListResourcesRequest(), timeout=10).resources) == 1, 20, "the guest")
        with boots(module, GOOD):
            words = ("fleet", "resource", "measure", "rack/web-1", "--pcr", "0,4,7", "--as", "golden")
            block, _ = cli(manager, *words, "--save", tmp_path / "saved")
            certificates_are_as_the_host_says(host, tmp_path / "saved")
        # one PCR more, as above: what was measured just now does not tell of it
        reload(manager, f'{block}\npcrs.2 = "{hashlib.sha256(bytes(32) + hashlib.sha256(ROMS).digest()).hexdigest()}"')
        wait_for(lambda: is_known(manager, "golden"), 20, "the configuration")
        upload(manager, POLICY)
        with boots(module, EVIL) as guest:
            _, errors = cli(manager, *apply, "--wait", code=FAILURE)
            assert "golden: PCR 4 is " in errors and "here boots what is approved" in errors
            assert module.status().materials == 0 and guest.handles(FIRST) == []
            assert len(manager.events("not_measured")) == 1
        with boots(module, GOOD) as guest:
            wait_for(lambda: manager.events("delivered"), 90, "the delivery")
            assert module.status().materials == 1
            wait_for(lambda: guest.handles(FIRST) == [FIRST], 20, "the key in the TPM")
            result, signature = guest.sign(FIRST, bytes(32))
            assert result == 0 and signature
