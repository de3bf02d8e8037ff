"""What a guest's boot has to be: compared and told, as a condition of policies, and asked of a host."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hsmvisor.host.uplink import attesting
from hsmvisor.host.uplink.carrying import Carrying
from hsmvisor.host.uplink.told import Given, Result
from hsmvisor.manager.history.events import History
from hsmvisor.manager.policy import cases
from hsmvisor.manager.policy.engine import Policies
from hsmvisor.manager.policy.measured import MOST_VALUES, Measured, either, nearest, parse
from hsmvisor.manager.policy.questions import Act, Decision
from hsmvisor.manager.store.rows import RequestRow, ResourceRow
from hsmvisor.manager.wanted.judging import Judge
from hsmvisor.manager.wanted.spec import BadSpec, Spec
from hsmvisor.serving.errors import Invalid, NotFound, Unavailable, WrongState
from hsmvisor.serving.requests import Origin
from hsmvisor_rpc.sealed.canonical import MalformedRecord
from hsmvisor_rpc.sealed.endorsement import TpmCertificates
from hsmvisor_rpc.sealed.fleet import AttestationAsked

A, B, C, D = (bytes([n]) * 32 for n in range(4))


# ---- values ---


def test_each_pcr_that_stands_there_has_one_of_its_values() -> None:
    known = parse({"golden": {"pcrs": {"7": [B.hex(), C.hex().upper(), B.hex()], "4": D.hex()}}})["golden"]
    assert known == Measured("golden", {7: (B, C), 4: (D,)})
    assert known.fits({4: D, 7: C, 9: A}) and known.fits({4: D, 7: B})
    assert known.told({4: D, 7: B}) == ""
    assert known.differing({7: D}) == [4, 7]
    assert known.told({7: D}) == f"PCR 4 is not told, wanted {D.hex()}; PCR 7 is {D.hex()}, wanted {B.hex()} or {C.hex()}"


def test_what_differs_is_told_of_the_nearest_and_is_not_endless() -> None:
    far = Measured("far", dict.fromkeys(range(24), (A,)))
    near = Measured("near", {0: (A,), 7: tuple(bytes([n]) * 32 for n in range(2, 2 + MOST_VALUES))})
    found = dict.fromkeys(range(24), B)
    assert nearest([far, near], found).startswith("near: PCR 0 is ") and " or 62 others" in nearest([far, near], found)
    assert far.told(found).endswith(f"; and PCR {', '.join(map(str, range(2, 24)))}")
    assert len(far.told(found)) < 500 and len(near.told(found)) < 700
    assert nearest([], found) == ""
    assert either(["b", "a"]) == "a or b" and either(["b", "a"], together=True) == "a and b"


@pytest.mark.parametrize(
    ("names", "said"), [(("a",) * 2, "each name stands once"), (("a b",), "NAME"), (("a",) * 17, "at most 16")]
)
def test_a_request_names_what_may_be_configured(names: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadSpec, match=said):
        Spec("tls", names=("dns:a.test",), resources=("h/a",), measured=names).check()


def test_what_demands_nothing_is_written_as_it_was_before_there_was_this() -> None:
    bare = Spec("tls", names=("dns:a.test",), resources=("h/a",))
    assert "measured" not in bare.text() and Spec.of_text(bare.text()) == bare
    demanding = replace(bare, measured=("golden",))
    assert Spec.of_text(demanding.text()) == demanding


# ---- policies ---

PERMIT = '@id("own") permit (principal, action, resource) when { resource.owner == principal };'
DISTRIBUTE = 'forbid (principal, action == Action::"distribute", resource)'


def decided(
    policy: str,
    act: Act = Act.DISTRIBUTE,
    measured: frozenset[str] | None = None,
    names: str = "golden silver",
    demands: tuple[str, ...] = (),
) -> Decision:
    known = {name: Measured(name, {7: (A,)}) for name in names.split()}
    history: History = None  # type: ignore[assignment]
    judge = Judge(lambda: Policies(policy, 3), history, lambda: 0.0, lambda: known)
    asked = Spec("tls", names=("dns:a.test",), resources=("h/web",), measured=demands)
    resource = ResourceRow("h/web", "ab", "web", "VM", "alice", "{}", 1, 0, 0, "web", "cd", b"", b"", 1, 0)
    request = RequestRow("r", "alice", "", "tls", asked.text(), "active", 0, 0, 0)
    first = judge.decide(act, request, asked, resource, None, True, measured)
    assert judge.decide(act, request, asked, resource, None, True, measured) == first, "as it is remembered"
    return first


def forbidding(unless: str) -> str:
    return f'{PERMIT} @id("boot") @reason("approved") {DISTRIBUTE} unless {{ {unless} }};'


def test_what_depends_on_the_boot_is_allowed_and_says_so() -> None:
    demanding = forbidding('context.measured.contains("golden")')
    found = decided(demanding)
    assert (found.allowed, found.measured, found.together) == (True, ("golden",), False)
    assert found.why == "permitted by own, where the guest's boot is measured as golden"
    for measured, allowed in ((frozenset(), False), (frozenset({"silver"}), False), (frozenset({"golden", "silver"}), True)):
        known = decided(demanding, measured=measured)
        assert (known.allowed, known.measured) == (allowed, ())
    assert decided(demanding, measured=frozenset()).why == "forbidden by boot: approved"
    assert decided(demanding, Act.RENEW).measured == ()
    either_will_do = decided(forbidding('context.measured.containsAny(["golden", "silver"])'))
    assert either_will_do.measured == ("golden", "silver") and not either_will_do.together
    both = decided(forbidding('context.measured.containsAll(["golden", "silver"])'))
    assert both.measured == ("golden", "silver") and both.condition == "where the guest's boot is measured as golden and silver"


def test_what_no_boot_would_allow_is_denied_with_the_rule_that_is_left() -> None:
    demanding = forbidding('context.measured.contains("golden")')
    other = f'{demanding} @id("never") @reason("no") {DISTRIBUTE};'
    assert decided(other).why == "forbidden by never: no"
    assert decided(forbidding('context.measured.contains("bronze")')).why == "forbidden by boot: approved"
    assert decided(demanding, names="").why == "forbidden by boot: approved"


@pytest.mark.parametrize("act", [Act.REQUEST, Act.DISTRIBUTE, Act.RENEW, Act.IMPORT])
def test_a_request_demands_it_of_each_delivery(act: Act) -> None:
    assert decided(PERMIT, act).measured == (), "where it demands nothing, nothing matters"
    asked = _of_request(act, None)
    assert asked.allowed and asked.measured == ("golden",)
    assert _of_request(act, frozenset({"golden"})).allowed
    denied = _of_request(act, frozenset({"silver"}))
    assert denied.why == "forbidden by measured: its request is for guests whose boot is measured as golden"


@pytest.mark.parametrize("act", [Act.ROTATE, Act.REVOKE, Act.CANCEL])
def test_what_is_there_may_be_given_back_whatever_the_boot_is(act: Act) -> None:
    assert _of_request(act, frozenset()).allowed and _of_request(act, None).measured == ()


def _of_request(act: Act, measured: frozenset[str] | None) -> Decision:
    return decided(PERMIT, act, measured, demands=("golden",))


def test_a_file_of_cases_says_what_the_boot_was() -> None:
    text = """
    [[case]]
    act = "distribute"
    owner = { name = "alice" }
    resource = { name = "web", owner = "alice" }
    material = { name = "tls", names = ["a.test"], measured = ["golden"] }
    expect = "allow"
    """
    policies = Policies(forbidding('context.measured.contains("golden")'))
    assert [result.failure for result in cases.run(policies, cases.parse(text))] == [""]
    other = text.replace('["golden"]', '["silver"]')
    assert [result.failure for result in cases.run(policies, cases.parse(other))] == ["expected allow: forbidden by boot: approved"]
    with pytest.raises(cases.BadCases, match="case 1: measured is a list of texts, not 'golden'"):
        cases.parse(text.replace('["golden"]', '"golden"'))


# ---- what a host is asked ---


@pytest.mark.parametrize(
    "asked",
    [
        AttestationAsked(bytes(31), (7,)),
        AttestationAsked(bytes(33), (7,)),
        AttestationAsked(bytes(32), ()),
        AttestationAsked(bytes(32), (7, 4)),
        AttestationAsked(bytes(32), (7, 7)),
        AttestationAsked(bytes(32), (24,)),
        AttestationAsked(bytes(32), (2**63,)),
    ],
)
def test_a_question_that_is_none(asked: AttestationAsked) -> None:
    with pytest.raises(MalformedRecord):
        AttestationAsked.parse(asked.encode())


def test_a_question() -> None:
    asked = AttestationAsked(bytes(range(32)), tuple(range(24)))
    assert AttestationAsked.parse(asked.encode()) == asked


class Tpm:
    """In the place of a module's."""

    life = SimpleNamespace(certificates=(b"rsa", b"p256", b"platform"))
    ca_certificate = b"ca"

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, tuple[int, ...]]] = []
        self.fault: Exception | None = None
        self.go = asyncio.Event()
        self.go.set()

    async def attest(self, nonce: bytes, pcrs: tuple[int, ...]) -> bytes:
        self.asked.append((nonce, pcrs))
        await self.go.wait()
        if self.fault is not None:
            raise self.fault
        return b"attested " + nonce


class Modules:
    """And of the host's modules."""

    def __init__(self) -> None:
        self.tpm = Tpm()

    def get(self, name: str) -> Any:
        if name != "web":
            raise NotFound("MODULE", f"there is no module {name}")
        return SimpleNamespace(faces=SimpleNamespace(tpm=self.tpm))


class Commands:
    async def execute(self, origin: Origin, id: str, name: str, command: bytes) -> Any:
        await asyncio.Event().wait()


QUESTION = AttestationAsked(bytes(32), (4, 7))


def answer(modules: Modules, module: str = "web", asked: bytes = QUESTION.encode()) -> Result:
    return asyncio.run(attesting.attest(modules, Given("a", module, b"", asked)))  # type: ignore[arg-type]


def test_a_host_attests_what_it_is_asked() -> None:
    modules = Modules()
    certificates = TpmCertificates(b"rsa", b"p256", b"platform", b"ca").encode()
    assert answer(modules) == Result("a", done=True, attestation=b"attested " + bytes(32), tpm_certificates=certificates)
    assert modules.tpm.asked == [(bytes(32), (4, 7))]


@pytest.mark.parametrize(
    ("fault", "reason", "detail"),
    [
        (WrongState("TPM", "module web is no TPM", "set it"), "TPM", "module web is no TPM; set it"),
        (Unavailable("TPM", "its process is being started"), "TPM", "its process is being started"),
        (RuntimeError("secret"), "INTERNAL", "an error inside the host service: RuntimeError"),
        (TimeoutError(), "TPM", "the TPM of module web has not answered within 20 s"),
    ],
)
def test_why_a_host_does_not_attest(fault: Exception, reason: str, detail: str) -> None:
    modules = Modules()
    modules.tpm.fault = fault
    assert answer(modules) == Result("a", reason=reason, detail=detail)


def test_what_is_asked_wrongly_reaches_no_tpm() -> None:
    modules = Modules()
    for module, asked, reason in (
        ("other", QUESTION.encode(), "MODULE"),
        ("no\nname", QUESTION.encode(), "NAME"),
        ("web", b"nothing", "QUESTION"),
        ("web", AttestationAsked(b"short", (7,)).encode(), "QUESTION"),
    ):
        found = answer(modules, module, asked)
        assert (found.done, found.again) == (False, False) and found.reason == reason
    assert modules.tpm.asked == []


def test_a_tpm_that_says_nothing_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attesting, "_WITHIN", 0.05)
    modules = Modules()
    modules.tpm.go.clear()
    assert answer(modules).detail == "the TPM of module web has not answered within 0 s"


def test_a_question_waits_for_no_command_and_may_be_answered_twice() -> None:
    async def work() -> None:
        modules, news = Modules(), asyncio.Event()
        made = Carrying(Commands(), modules, lambda: Origin("manager"), news)  # type: ignore[arg-type]
        assert made.take([Given("c", "web", b"signed"), Given("a", "web", b"", QUESTION.encode())]) == 2
        await asyncio.wait_for(news.wait(), 10)
        (result,) = made.results()
        assert (result.id, result.done) == ("a", True)
        assert made.take([Given("a", "web", b"", QUESTION.encode())]) == 0, "it is not told yet"
        made.confirm(made.results())
        news.clear()
        assert made.take([Given("a", "web", b"", QUESTION.encode())]) == 1
        await asyncio.wait_for(news.wait(), 10)
        assert len(modules.tpm.asked) == 2 and made.count == 1, "the command is at work"
        await made.stop()

    asyncio.run(work())


def test_a_host_of_the_release_before_says_what_the_manager_knows_it_by() -> None:
    """It sees a command of no bytes."""
    from hsmvisor.host.commands import Commands as Real

    class Once:
        async def once(self, origin: Any, kind: str, asked: Any, fields: Any, work: Any) -> bytes:
            done: bytes = await work()
            return done

    real = Real(Modules(), Once(), None, None)  # type: ignore[arg-type]
    with pytest.raises(Invalid) as caught:
        asyncio.run(real.execute(Origin("manager"), "a", "web", b""))
    assert caught.value.reason == "MALFORMED"
