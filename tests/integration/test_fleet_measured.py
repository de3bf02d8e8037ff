"""What a guest's boot has to be before anything is delivered to it: the real engine, on both databases.

Quotes are really signed and really verified (support/soft_tpm.py); time is the test's.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hsmvisor.manager import limits
from hsmvisor.manager.engine.seen import LONGEST_REST, REST
from hsmvisor.manager.policies import look_again
from hsmvisor.manager.policy.engine import Policies
from hsmvisor.manager.policy.measured import Measured
from hsmvisor.manager.renewal.decisions import Rule
from hsmvisor.manager.store import commands, inventory, measurements, tables
from hsmvisor.manager.store.rows import DeliveryRow, MeasurementRow, RequestRow
from hsmvisor.serving.errors import Invalid
from hsmvisor_rpc.sealed.attestation import Attestation
from hsmvisor_rpc.sealed.endorsement import MAX_TPM_CERTIFICATES, TpmCertificates
from hsmvisor_rpc.sealed.fleet import AttestationAsked
from sqlalchemy import insert
from support.attacks import rotate
from support.fleet import POLICY, Fleet
from support.light_host import LightGuest, LightHost
from support.scenarios import SHARED, WEB, Play, held
from support.soft_tpm import SoftTpm

GOOD, EVIL = b"kernel 6.1", b"kernel of somebody else"
ONE = ("h1/web",)
DEMANDING = (
    POLICY
    + """
@id("measured-boot") @reason("here boots what is approved")
forbid (principal, action == Action::"distribute", resource)
when { resource.hasTag("env") && resource.getTag("env") == "prod" }
unless { context.measured.contains("golden") };
"""
)


def golden(*pcrs: int, boots: tuple[bytes, ...] = (GOOD,)) -> Measured:
    """`boots`: kernels, each of which is right."""
    found = [SoftTpm().boot(kernel).pcrs for kernel in boots]
    return Measured("golden", {pcr: tuple(dict.fromkeys(values[pcr] for values in found)) for pcr in pcrs or (0, 4, 7)})


async def one_guest(fleet: Fleet, kernel: bytes = GOOD) -> tuple[LightHost, LightGuest, SoftTpm]:
    fleet.measured = {"golden": golden()}
    host = await fleet.host("h1")
    guest = host.add("web", env="prod")
    tpm = host.tpms["web"] = SoftTpm().boot(kernel)
    await fleet.settle()
    return host, guest, tpm


async def delivery(fleet: Fleet, request: RequestRow) -> DeliveryRow:
    (found,) = await fleet.deliveries(await fleet.line(request))
    return found


async def whys(fleet: Fleet) -> list[str]:
    """Of what was told of boots that were not right."""
    return [event.detail["why"] for event in await fleet.events("not_measured")]


# ---- what is right, and what is not ---


def test_a_guest_whose_boot_is_right_gets_its_key_and_another_nothing(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, _ = await one_guest(fleet)
        evil = host.add("db", env="prod")
        host.tpms["db"] = SoftTpm().boot(EVIL)
        other = host.add("free", env="test")  # its boot matters nobody
        await fleet.settle()
        request = await fleet.ask(**WEB, selector={"kind": "VM"})
        await fleet.settle()
        assert (held(guest), held(evil), held(other)) == (1, 0, 1)
        assert evil.module.materials == {}, "not even a key was made"
        line = await fleet.line(request, "h1/db")
        wanted, found = SoftTpm().boot(GOOD).pcrs[4].hex(), SoftTpm().boot(EVIL).pcrs[4].hex()
        assert line.stage == "unmeasured"
        assert line.why == (f"golden: PCR 4 is {found}, wanted {wanted}; forbidden by measured-boot: here boots what is approved")
        (row,) = await fleet.deliveries(line)
        assert (row.state, row.why, row.held) == ("unmeasured", line.why, "")
        (event,) = await fleet.events("not_measured")
        assert (event.resource_id, event.material, event.owner, event.detail["why"]) == ("h1/db", "tls", "alice", line.why)
        told = {e.resource_id: e.detail for e in await fleet.events("delivered")}
        assert told["h1/web"]["measured"] == "golden" and "measured" not in told["h1/free"]
        assert {asked.pcrs for asked in host.asked} == {(0, 4, 7)}
        assert await fleet.denials(request) == []

    play(scenario, policy=DEMANDING)


def test_a_request_itself_may_demand_it_where_policy_does_not(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, _ = await one_guest(fleet, EVIL)
        request = await fleet.ask(**WEB, resources=ONE, measured=("golden",))
        await fleet.settle()
        assert held(guest) == 0
        assert (await fleet.line(request)).why.endswith("its request is for guests whose boot is measured as golden")
        assert await fleet.ask(**WEB, resources=ONE, measured=("golden",)) == request, "the same again changes nothing"
        await fleet.ask(**WEB, resources=ONE)
        await fleet.settle()
        assert held(guest) == 1, "its owner does not demand it any more"
        assert [e.detail["why"] for e in await fleet.events("recovered")] == ["its guest's boot does not matter any more"]
        asked = len(host.asked)
        await fleet.ask(**WEB, resources=ONE, measured=("golden",))
        await fleet.settle()
        assert held(guest) == 1 and len(host.asked) == asked, "what is there stays, and nothing is to be delivered"
        with pytest.raises(Invalid, match=r"there is no \[measured.silver\]"):
            await fleet.ask(**WEB, resources=ONE, measured=("golden", "silver"))

    play(scenario)


def test_any_of_several_values_and_of_several_boots_will_do(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        _, guest, _ = await one_guest(fleet, b"kernel 6.2")
        fleet.measured = {"golden": golden(4, boots=(GOOD, b"kernel 6.2")), "silver": Measured("silver", {4: (bytes(32),)})}
        await fleet.ask(**WEB, resources=ONE, measured=("silver", "golden"))
        await fleet.settle()
        assert held(guest) == 1

    play(scenario)


def test_a_policy_may_demand_several_at_once(play: Play) -> None:
    policy = (
        POLICY
        + """
@id("both") @reason("firmware and kernel are approved")
forbid (principal, action, resource) unless { context.measured.containsAll(["firmware", "kernel"]) };
"""
    )

    async def scenario(fleet: Fleet) -> None:
        _, guest, tpm = await one_guest(fleet, EVIL)
        right = SoftTpm().boot(GOOD).pcrs
        fleet.measured = {"firmware": Measured("firmware", {0: (right[0],)}), "kernel": Measured("kernel", {4: (right[4],)})}
        request = await fleet.ask(**WEB, resources=ONE)  # although it is forbidden as long as nothing is known
        await fleet.settle()
        assert held(guest) == 0 and (await fleet.line(request)).why.startswith("kernel: PCR 4 is ")
        tpm.boot(GOOD)
        await fleet.pass_(60)
        assert held(guest) == 1

    play(scenario, policy=policy)


# ---- each delivery ---


def test_a_renewal_asks_anew_and_what_the_guest_has_stays(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, tpm = await one_guest(fleet)
        request = await fleet.ask(**WEB, resources=ONE)
        await fleet.settle()
        assert held(guest) == 1 and len(host.asked) == 1
        await fleet.pass_(2000, 60)
        assert held(guest) == 2 and len(host.asked) == 2
        tpm.boot(EVIL)
        await fleet.pass_(1800, 60)
        current = guest.module.current("tls")
        assert current is not None and current.number == 2, "it goes on with what it has"
        assert set(guest.module.materials["tls"]) == {1, 2}, "and gets nothing"
        line = await fleet.line(request)
        assert line.stage == "unmeasured" and line.why.startswith("golden: PCR 4 is ")
        assert len(await whys(fleet)) == 1, "it is told once, however often it is tried"
        assert len(host.asked) > 4 and len({asked.nonce for asked in host.asked}) == len(host.asked)
        tpm.boot(GOOD)
        await fleet.pass_(LONGEST_REST + 30, 15)
        assert held(guest) == 3
        assert [e.detail["why"] for e in await fleet.events("recovered")] == ["its guest's boot is what it has to be"]
        assert (await fleet.line(request)).stage == "serving"
        assert (await delivery(fleet, request)).state == "active"

    play(scenario, policy=DEMANDING)


def test_a_renewal_of_the_certificate_alone_is_ordered_for_a_right_boot_only(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        _, guest, tpm = await one_guest(fleet)
        await fleet.ask(**WEB, resources=ONE, renewal=Rule(rekey=False))
        await fleet.settle()
        tpm.boot(EVIL)
        await fleet.pass_(3000, 60)
        assert held(guest) == 1 and len(await fleet.events("issued")) == 1
        tpm.boot(GOOD)
        await fleet.pass_(LONGEST_REST, 60)
        assert held(guest) == 2 and len(guest.module.keys) == 1

    play(scenario, policy=DEMANDING)


def test_a_condition_of_renewals_alone_holds_for_them_alone(play: Play) -> None:
    policy = DEMANDING.replace('action == Action::"distribute"', 'action == Action::"renew"')

    async def scenario(fleet: Fleet) -> None:
        host, guest, tpm = await one_guest(fleet, EVIL)
        await fleet.ask(**WEB, resources=ONE)
        await fleet.settle()
        assert held(guest) == 1 and host.asked == []
        await fleet.pass_(2000, 60)
        assert held(guest) == 1 and len(await whys(fleet)) == 1
        tpm.boot(GOOD)
        await fleet.pass_(LONGEST_REST, 60)
        assert held(guest) == 2

    play(scenario, policy=policy)


def test_a_module_that_was_set_back_gets_nothing_again_for_another_boot(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        _, guest, tpm = await one_guest(fleet)
        request = await fleet.ask(**SHARED, resources=ONE, escrow=True)
        await fleet.settle()
        assert held(guest) == 1
        fleet.clock.pass_(limits.ATTESTATION_GOOD)
        tpm.boot(EVIL)
        guest.module.materials.clear()
        await fleet.settle()
        assert not guest.module.materials
        assert (await fleet.line(request)).stage == "unmeasured"
        tpm.boot(GOOD)
        await fleet.pass_(60)
        assert held(guest) >= 1

    play(scenario, policy=DEMANDING)


def test_of_a_shared_key_one_boot_that_is_wrong_keeps_it_from_nobody_else(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, _ = await one_guest(fleet)
        others = [host.add(f"web-{n}", env="prod") for n in range(3)]
        for n, kernel in enumerate((GOOD, EVIL, GOOD)):
            host.tpms[f"web-{n}"] = SoftTpm().boot(kernel)
        await fleet.settle()
        request = await fleet.ask(**SHARED, selector={"env": "prod"})
        await fleet.settle()
        assert [held(one) for one in (guest, *others)] == [1, 1, 0, 1]
        line = await fleet.line(request)
        assert line.stage == "unmeasured" and line.why.startswith("golden: PCR 4 is ")
        host.tpms["web-1"].boot(GOOD)
        await fleet.pass_(30)
        assert held(others[1]) == 1 and (await fleet.line(request)).stage == "serving"

    play(scenario, policy=DEMANDING)


def test_one_attestation_is_good_for_all_that_is_delivered_to_a_module_for_a_while(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, tpm = await one_guest(fleet)
        for number in range(4):
            await fleet.ask(**WEB | {"material": f"m{number}"}, resources=ONE)
        await fleet.settle()
        assert all(held(guest, f"m{number}") == 1 for number in range(4))
        assert len(host.asked) <= 4  # those that were looked at at once
        asked = len(host.asked)
        fleet.clock.pass_(limits.ATTESTATION_GOOD - 1)
        tpm.boot(EVIL)  # a restart meanwhile is no matter
        await fleet.ask(**WEB | {"material": "m5"}, resources=ONE)
        await fleet.settle()
        assert held(guest, "m5") == 1 and len(host.asked) == asked
        fleet.clock.pass_(1)
        await fleet.ask(**WEB | {"material": "m6"}, resources=ONE)
        await fleet.settle()
        assert held(guest, "m6") == 0 and len(host.asked) == asked + 1

    play(scenario, policy=DEMANDING)


# ---- answers that count for nothing ---


def _forged(host: LightHost, other: LightHost, data: bytes, asked: AttestationAsked) -> bytes:
    told = Attestation.decode(data)
    evil = SoftTpm().boot(GOOD)
    again = Attestation.decode(evil.attestation(host.key, host.guests["web"].module.module_id, "web", asked.nonce, asked.pcrs))
    return Attestation(told.identity, again.attest, again.signature, again.pcrs, again.values).encode()


def _values_changed(host: LightHost, other: LightHost, data: bytes, asked: AttestationAsked) -> bytes:
    told = Attestation.decode(data)
    right = SoftTpm().boot(GOOD).pcrs
    return Attestation(told.identity, told.attest, told.signature, told.pcrs, tuple(right[n] for n in told.pcrs)).encode()


def _another_time(host: LightHost, other: LightHost, data: bytes, asked: AttestationAsked) -> bytes:
    module = host.guests["web"].module
    return SoftTpm().boot(GOOD).attestation(host.key, module.module_id, "web", os.urandom(32), asked.pcrs)


def _another_module(host: LightHost, other: LightHost, data: bytes, asked: AttestationAsked) -> bytes:
    module = host.guests["good"].module
    return SoftTpm().boot(GOOD).attestation(host.key, module.module_id, "good", asked.nonce, asked.pcrs)


def _another_host(host: LightHost, other: LightHost, data: bytes, asked: AttestationAsked) -> bytes:
    module = host.guests["web"].module
    return SoftTpm().boot(GOOD).attestation(other.key, module.module_id, "web", asked.nonce, asked.pcrs)


def _nobody_s_host(host: LightHost, other: LightHost, data: bytes, asked: AttestationAsked) -> bytes:
    module = host.guests["web"].module
    return SoftTpm().boot(GOOD).attestation(Ed25519PrivateKey.generate(), module.module_id, "web", asked.nonce, asked.pcrs)


def _fewer_pcrs(host: LightHost, other: LightHost, data: bytes, asked: AttestationAsked) -> bytes:
    module = host.guests["web"].module
    return host.tpms["web"].attestation(host.key, module.module_id, "web", asked.nonce, (0, 7))


def _too_much(host: LightHost, other: LightHost, data: bytes, asked: AttestationAsked) -> bytes:
    return data + bytes(limits.MAX_ATTESTATION)


def _nothing(host: LightHost, other: LightHost, data: bytes, asked: AttestationAsked) -> bytes:
    return b""


Lie = Callable[[LightHost, LightHost, bytes, AttestationAsked], bytes]


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (_forged, "ALTERED: the quote is not signed by the TPM's attestation key"),
        (_values_changed, "ALTERED: the PCRs are not those that were quoted"),
        (_another_time, "REPLAY: the quote was made for another nonce"),
        (_another_module, "WRONG_MODULE: the attestation is of another module's TPM"),
        (_another_host, "WRONG_HOST: the TPM's identity is not signed by the pinned host key"),
        (_nobody_s_host, "WRONG_HOST: the TPM's identity is not signed by the pinned host key"),
        (_fewer_pcrs, "says nothing of PCR 4"),
        (_too_much, "at most 16384 are taken"),
        (_nothing, "MALFORMED: not an hsmvisor record"),
    ],
)
def test_an_attestation_that_is_not_this_guest_s_of_now_counts_for_nothing(play: Play, lie: Lie, why: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, _ = await one_guest(fleet, EVIL)
        host.add("good")
        other = await fleet.host("h2")
        await fleet.settle()
        host.lie = lambda data, asked: lie(host, other, data, asked)
        request = await fleet.ask(**WEB, resources=ONE)
        await fleet.settle()
        assert held(guest) == 0 and guest.module.materials == {}
        line = await fleet.line(request)
        assert line.stage == "unmeasured" and why in line.why
        assert await whys(fleet) == [line.why]
        host.lie = lambda data, asked: data
        host.tpms["web"].boot(GOOD)
        await fleet.pass_(30)
        assert held(guest) == 1

    play(scenario, policy=DEMANDING)


async def only_measurement(fleet: Fleet) -> MeasurementRow:
    async with fleet.database.reading() as connection:
        (found,) = (await measurements.recent(connection, ["h1/web"], 0.0))["h1/web"]
    return found


def test_the_tpm_s_certificates_are_kept_with_its_attestation(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, tpm = await one_guest(fleet)
        told = tpm.certificates(host.key, guest.module.module_id, "web").encode()
        await fleet.ask(**WEB, resources=ONE)
        await fleet.settle()
        assert held(guest) == 1
        assert (await only_measurement(fleet)).certificates == told

    play(scenario, policy=DEMANDING)


def test_what_a_manager_of_the_release_before_asks_is_answered_with_certificates(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        await one_guest(fleet)
        row = MeasurementRow("0" * 32, "h1/web", "", b"", "", fleet.clock())
        before = {name: value for name, value in vars(row).items() if name != "certificates"}
        async with fleet.database.transaction() as connection:
            await connection.execute(insert(tables.measurements).values(before))
        assert await only_measurement(fleet) == row
        async with fleet.database.transaction() as connection:
            await measurements.tell(connection, row.id, certificates=b"c")
        assert (await only_measurement(fleet)).certificates == b"c"

    play(scenario)


def _wrong_certificates(what: str, host: LightHost, other: LightHost, made: TpmCertificates) -> bytes:
    module_id, tpm = host.guests["web"].module.module_id, host.tpms["web"]
    match what:
        case "another key":
            return SoftTpm().certificates(host.key, module_id, "web").encode()
        case "another module":
            return tpm.certificates(host.key, host.guests["good"].module.module_id, "good").encode()
        case "another host":
            return tpm.certificates(other.key, module_id, "web").encode()
        case "another issuer":
            return replace(made, p256=tpm.certificates(other.key, module_id, "web").p256).encode()
        case "none":
            return b""
        case "malformed":
            return replace(made, rsa=made.rsa[:-1]).encode()
    return made.encode() + bytes(MAX_TPM_CERTIFICATES + 1 - len(made.encode()))


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("another key", "KEY_MISMATCH: the P-256 endorsement certificate is of another key than the TPM's identity names"),
        ("another module", "WRONG_MODULE: the RSA endorsement certificate names another module"),
        ("another host", "WRONG_HOST: the certificate of the host's CA for TPMs names another host"),
        ("another issuer", "BAD_CHAIN: the P-256 endorsement certificate is not issued by the CA that came with it"),
        ("none", "MALFORMED: not an hsmvisor record"),
        ("malformed", "MALFORMED: the RSA endorsement certificate cannot be read: "),
        ("too large", "TOO_LARGE: a TPM's certificates have at most 16384 bytes, these have 16385"),
    ],
)
def test_an_attestation_with_wrong_certificates_counts_for_nothing(play: Play, what: str, why: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, _ = await one_guest(fleet)
        host.add("good")
        other = await fleet.host("h2")
        await fleet.settle()
        host.certify = lambda made: _wrong_certificates(what, host, other, made)
        request = await fleet.ask(**WEB, resources=ONE)
        await fleet.settle()
        assert held(guest) == 0 and guest.module.materials == {}
        line = await fleet.line(request)
        assert line.stage == "unmeasured" and f"its host's attestation is not taken: {why}" in line.why
        measured = await only_measurement(fleet)
        assert (measured.found, measured.attestation, measured.certificates) == ("", b"", b"")
        host.certify = TpmCertificates.encode
        await fleet.pass_(30)
        assert held(guest) == 1

    play(scenario, policy=DEMANDING)


def test_an_answer_that_was_right_once_is_not_right_again(play: Play) -> None:
    """A host that keeps what its guest said when it had booted rightly."""

    async def scenario(fleet: Fleet) -> None:
        host, guest, tpm = await one_guest(fleet)
        kept: list[bytes] = []
        host.lie = lambda data, asked: kept.append(data) or kept[0]  # type: ignore[func-returns-value]
        request = await fleet.ask(**WEB, resources=ONE)
        await fleet.settle()
        assert held(guest) == 1
        tpm.boot(EVIL)
        await fleet.pass_(2000, 60)
        assert held(guest) == 1 and len(kept) > 1
        assert "REPLAY" in (await fleet.line(request)).why

    play(scenario, policy=DEMANDING)


# ---- nobody answers ---


@pytest.mark.parametrize("what", ["no TPM", "off", "old"])
def test_who_cannot_say_what_the_boot_was_gets_nothing_and_is_told_why(play: Play, what: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, tpm = await one_guest(fleet)
        if what == "no TPM":
            del host.tpms["web"]
        tpm.off, host.old = what == "off", what == "old"
        request = await fleet.ask(**WEB, resources=ONE)
        await fleet.settle()
        line = await fleet.line(request)
        assert held(guest) == 0 and line.stage == "unmeasured"
        assert (
            line.why
            == {
                "no TPM": "module web is no TPM",
                "off": "the guest is off: its TPM was not started",
                "old": "the release of its host (light) is too old to attest a guest's boot: upgrade host h1",
            }[what]
        )
        assert await whys(fleet) == [line.why]
        host.tpms["web"], tpm.off, host.old = tpm, False, False
        await fleet.pass_(30)
        assert held(guest) == 1 and len(await whys(fleet)) == 1

    play(scenario, policy=DEMANDING)


def test_a_host_that_says_nothing_is_asked_anew_and_what_it_says_too_late_counts_for_nothing(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, _ = await one_guest(fleet)
        request = await fleet.ask(**WEB, resources=ONE)
        swallowed: list[str] = []

        async def silent() -> None:
            """It takes its commands, and answers none."""
            await fleet.engine.turn()
            row = await fleet.row_of(host)
            async with fleet.database.reading() as connection:
                now = fleet.clock()
                found = await commands.queued(connection, row.id, 10, now, now)
            swallowed.extend(command.id for command in found)
            await fleet.exchange(host, carry_out=False)

        await silent()
        assert len(swallowed) == 1 and (await fleet.line(request)).why == "its guest's boot is being measured"
        for _ in range(8):
            fleet.clock.pass_(limits.ATTESTED_WITHIN / 6)
            await silent()
            await fleet.engine.sweep()
        line = await fleet.line(request)
        silent_for = f"its host has not said within {limits.ATTESTED_WITHIN} s what the guest's boot is"
        assert (line.stage, line.why) == ("unmeasured", silent_for)
        assert len(await whys(fleet)) == 1 and len(set(swallowed)) == 2, "with another nonce"
        late = host.attest(swallowed[0], "web", AttestationAsked(os.urandom(32), (0, 4, 7)).encode())
        host.results.append(late)
        fleet.clock.pass_(limits.ATTESTED_WITHIN)
        await fleet.pass_(60)
        assert held(guest) == 1
        async with fleet.database.reading() as connection:
            first = await measurements.one(connection, swallowed[0])
        assert first is not None and not first.told_at

    play(scenario, policy=DEMANDING)


def test_an_answer_that_is_told_twice_counts_once(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, tpm = await one_guest(fleet)
        await fleet.ask(**WEB, resources=ONE)
        await fleet.engine.turn()
        await fleet.exchange(host, carry_out=True)
        (first,) = host.results
        tpm.boot(EVIL)
        again = host.attest(first.id, "web", host.asked[0].encode())  # it was given twice, and is answered twice
        host.results.append(again)
        await fleet.settle()
        assert held(guest) == 1
        async with fleet.database.reading() as connection:
            found = await measurements.one(connection, first.id)
        assert found is not None and found.attestation == first.attestation

    play(scenario, policy=DEMANDING)


def test_a_host_that_is_away_is_not_asked_until_it_is_back(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, _ = await one_guest(fleet)
        fleet.clock.pass_(limits.AWAY + 1)
        request = await fleet.ask(**WEB, resources=ONE)
        await fleet.settle(away=("h1",))
        assert (await fleet.line(request)).why == "its host is away" and host.asked == []
        await fleet.settle()
        assert held(guest) == 1

    play(scenario, policy=DEMANDING)


def test_a_host_that_flaps_while_the_boot_is_wrong_is_told_of_once(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        _, guest, tpm = await one_guest(fleet, EVIL)
        request = await fleet.ask(**SHARED, resources=ONE)
        await fleet.settle()
        for _ in range(3):
            await fleet.pass_(limits.AWAY + 30, 30, away=("h1",))
            await fleet.ask(**SHARED | {"drain_seconds": 60}, resources=ONE)  # it is looked at
            await fleet.settle(away=("h1",))
            assert (await delivery(fleet, request)).why == "its host is away"
            await fleet.pass_(60, 20)
        assert len(await whys(fleet)) == 1
        tpm.boot(GOOD)
        await fleet.pass_(LONGEST_REST, 60)
        assert held(guest) >= 1

    play(scenario, policy=DEMANDING)


def test_what_was_to_be_delivered_is_not_given_any_more_when_the_attestation_is_too_old(play: Play) -> None:
    """The host is cut off for a few minutes, in which its guest starts anew: nobody takes it for away so soon."""

    async def scenario(fleet: Fleet) -> None:
        host, guest, tpm = await one_guest(fleet)
        request = await fleet.ask(**SHARED, resources=ONE, escrow=True)
        while not [c for c in await queued(fleet, host) if c.action == "activate"]:
            await fleet.engine.turn()
            if any(c.action == "attest" for c in await queued(fleet, host)):
                await fleet.exchange(host)
                await fleet.exchange(host, carry_out=False)  # it tells what the boot was
        tpm.boot(EVIL)
        fleet.clock.pass_(limits.ATTESTATION_GOOD)
        await fleet.settle()
        assert held(guest) == 0 and not guest.module.materials
        await fleet.pass_(limits.CARRIED_OUT_WITHIN + 120, 30)
        assert held(guest) == 0 and (await fleet.line(request)).stage == "unmeasured"
        tpm.boot(GOOD)
        await fleet.pass_(LONGEST_REST, 60)
        assert held(guest) >= 1

    play(scenario, policy=DEMANDING)


async def queued(fleet: Fleet, host: LightHost) -> list[commands.CommandRow]:
    async with fleet.database.reading() as connection:
        return await commands.queued(connection, host.id.hex(), 100, fleet.clock(), fleet.clock())


def test_a_host_that_begins_anew_is_asked_anew_for_what_it_did_not_carry_out_in_time(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, _ = await one_guest(fleet)
        await fleet.ask(**SHARED, resources=ONE, escrow=True)
        while not [c for c in await queued(fleet, host) if c.action == "activate"]:
            await fleet.engine.turn()
            if any(c.action == "attest" for c in await queued(fleet, host)):
                await fleet.exchange(host)
                await fleet.exchange(host, carry_out=False)
        await fleet.exchange(host, carry_out=False)  # it is given them, and dies
        fleet.clock.pass_(limits.ATTESTATION_GOOD)
        host.restart()
        asked = len(host.asked)
        await fleet.settle()
        assert held(guest) == 1 and len(host.asked) == asked + 1

    play(scenario, policy=DEMANDING)


# ---- again, and when something else is wanted ---


def test_it_is_tried_again_with_the_usual_pauses(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, _, _ = await one_guest(fleet, EVIL)
        await fleet.ask(**WEB, resources=ONE)
        at = [fleet.clock()]
        while len(at) < 10:
            await fleet.settle()
            if len(host.asked) > len(at):
                at.append(fleet.clock())
            fleet.clock.pass_(2.5)
            for one in fleet.hosts.values():  # it lives
                await fleet.exchange(one)
        pauses = [later - sooner for sooner, later in itertools.pairwise(at)]
        assert pauses == sorted(pauses) and pauses[0] <= 2 * REST and pauses[-1] <= LONGEST_REST + 5
        assert all(pause >= REST * 2**n for n, pause in enumerate(pauses[:7]))
        assert len(await whys(fleet)) == 1

    play(scenario, policy=DEMANDING)


def test_who_asks_for_a_new_key_has_it_tried_at_once(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        _, guest, tpm = await one_guest(fleet, EVIL)
        request = await fleet.ask(**WEB, resources=ONE)
        await fleet.pass_(400, 20)
        tpm.boot(GOOD)
        await rotate(fleet, request)
        assert held(guest) >= 1

    play(scenario, policy=DEMANDING)


@pytest.mark.parametrize("changed", ["measurements", "policies"])
def test_what_is_wanted_from_now_on_counts_at_once(play: Play, changed: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        _, guest, _ = await one_guest(fleet, EVIL)
        request = await fleet.ask(**WEB, resources=ONE)
        await fleet.pass_(600, 30)
        assert held(guest) == 0
        if changed == "measurements":
            fleet.measured = {"golden": golden(boots=(GOOD, EVIL))}
        else:
            fleet.policies = Policies(POLICY, 2)
        async with fleet.database.transaction() as connection:
            await look_again(connection, fleet.clock())
        fleet.hub.lines()
        await fleet.settle()
        assert held(guest) == 1 and (await delivery(fleet, request)).failures == 0

    play(scenario, policy=DEMANDING)


def test_a_set_that_nobody_configured_is_a_denial_with_its_rule(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, _ = await one_guest(fleet)
        fleet.measured = {}
        request = await fleet.ask(**WEB, resources=ONE)
        await fleet.settle()
        line = await fleet.line(request)
        assert held(guest) == 0 and host.asked == []
        assert (line.stage, line.why) == ("denied", "forbidden by measured-boot: here boots what is approved")

    play(scenario, policy=DEMANDING)


def test_a_resource_that_is_gone_leaves_nothing_of_its_boot(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, _, _ = await one_guest(fleet, EVIL)
        await fleet.ask(**WEB, resources=ONE)
        await fleet.settle()
        async with fleet.database.reading() as connection:
            assert await measurements.recent(connection, ["h1/web"], 0)
        del host.guests["web"]
        await fleet.settle()
        async with fleet.database.reading() as connection:
            assert not await measurements.recent(connection, ["h1/web"], 0)
            assert await inventory.resource(connection, "h1/web") is None

    play(scenario, policy=DEMANDING)


def test_a_module_that_was_made_anew_is_measured_anew(play: Play) -> None:
    async def scenario(fleet: Fleet) -> None:
        host, guest, _ = await one_guest(fleet)
        await fleet.ask(**WEB, resources=ONE)
        await fleet.settle()
        assert held(guest) == 1
        again = host.add("web", env="prod")
        host.tpms["web"] = SoftTpm().boot(EVIL)
        await fleet.settle()
        assert held(again) == 0 and "PCR 4" in (await whys(fleet))[0]

    play(scenario, policy=DEMANDING)
