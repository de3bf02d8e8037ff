"""Generations of a material: the table of states, drains, roll-back, renewal of the certificate alone, and what views see."""

from __future__ import annotations

import pytest
from hsmvisor_rpc.sealed.commands import Retire
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from hsmvisord.keystore.changes import BARE_DRAIN, IN_USE, skip_handles
from hsmvisord.keystore.state import TRANSITIONS, GenerationState, Pin, State, Step
from support.certificates import new_key
from support.keystores import NOW, Bench

COMMANDS = {
    Step.ACTIVATE: lambda b: b.execute("activate"),
    Step.ROLL_BACK: lambda b: b.execute("roll-back"),
    Step.RETIRE: lambda b: b.execute("retire", "tls", 1, Retire(0, "extend")),
    Step.DESTROY: lambda b: b.execute("destroy"),
    Step.CERTIFY: lambda b: b.execute("certify", "tls", 1, b.to_certify()),
}


def bench_in(state: GenerationState) -> Bench:
    bench = Bench()
    bench.stage(1)
    if state is not GenerationState.STAGED:
        bench.execute("activate")
    if state in (GenerationState.RETIRING, GenerationState.DESTROYED):
        bench.push(2)
    if state is GenerationState.DESTROYED:
        bench.execute("destroy")
    assert bench.state_of(1) == state
    return bench


@pytest.mark.parametrize("step", list(COMMANDS))
@pytest.mark.parametrize("state", list(GenerationState))
def test_the_table_of_states(state: GenerationState, step: Step) -> None:
    bench = bench_in(state)
    expected = TRANSITIONS.get((state, step))
    if expected is None:
        with pytest.raises(Refusal) as caught:
            COMMANDS[step](bench)
        assert caught.value.reason is Reason.WRONG_STATE
    else:
        COMMANDS[step](bench)
        assert bench.state_of(1) == expected


def test_activation_retires_the_one_before_in_one_step() -> None:
    bench = Bench()
    bench.push(1)
    bench.stage(2)
    versions = bench.version
    bench.execute("activate", "tls", 2)
    assert (bench.state_of(1), bench.state_of(2)) == ("retiring", "current")
    assert bench.version == versions + 1


def test_a_drain_ends_with_the_certificate() -> None:
    bench = Bench()
    bench.push(1, chained=True, after_drain="refuse")
    bench.push(2, chained=True)
    first = bench.keystore.state.materials["tls"].generation(1)
    assert first is not None
    leaf = bench.authority.issue(new_key("p256"))
    assert abs(first.drain_ends_at - leaf.not_valid_after_utc.timestamp()) < 60
    bench.now = first.drain_ends_at - 1
    bench.keystore.tick()
    assert bench.state_of(1) == "retiring"
    bench.now = first.drain_ends_at
    bench.keystore.tick()
    assert bench.state_of(1) == "destroyed"


def test_a_bare_key_drains_for_a_day_and_longer_while_it_is_used() -> None:
    bench = Bench()
    bench.push(1)
    bench.push(2)
    bench.now = NOW + BARE_DRAIN
    bench.usage = {("tls", 1): (3, int(bench.now) - 10)}
    bench.keystore.tick()
    bench.keystore.tick()
    assert bench.state_of(1) == "retiring"
    assert [h.kind for h in bench.happened].count("drain-extended") == 1
    bench.now += IN_USE
    bench.keystore.tick()
    assert bench.state_of(1) == "destroyed"


def test_refuse_ends_a_drain_that_is_in_use() -> None:
    bench = Bench()
    bench.push(1)
    bench.push(2)
    bench.execute("retire", "tls", 1, Retire(60, "refuse"))
    bench.usage = {("tls", 1): (3, NOW + 59)}
    bench.now = NOW + 60
    bench.keystore.tick()
    assert bench.state_of(1) == "destroyed"


def test_a_destroyed_generation_leaves_nothing_in_storage() -> None:
    bench = Bench()
    bench.push(1, chained=True)
    bench.push(2, chained=True)
    before = set(bench.stored)
    bench.execute("destroy")
    gone = before - set(bench.stored)
    assert {name.split("/")[0] for name in gone} == {"key", "certificate"}
    assert len([name for name in bench.stored if name.startswith("key/")]) == 1


def test_certificate_only_renewal_keeps_key_and_handles() -> None:
    bench = Bench()
    key = bench.push(1, chained=True)
    keys = dict(bench.keystore.state.keys)
    bench.execute("stage", "tls", 2, bench.body(key, bench.authority.chain(key), generation=2, renew=True))
    bench.execute("activate", "tls", 2)
    assert bench.keystore.state.keys == keys
    second = bench.keystore.state.materials["tls"].generation(2)
    assert second is not None and second.certificate_only
    bench.execute("destroy", "tls", 1)
    assert bench.keystore.state.keys == keys, "the key lives on with the generation that shares it"


def test_certificate_without_its_key_is_refused() -> None:
    bench = Bench()
    bench.push(1)
    other = new_key("p256")
    with pytest.raises(Refusal) as caught:
        bench.execute("stage", "tls", 2, bench.body(other, bench.authority.chain(other), generation=2, renew=True))
    assert caught.value.reason is Reason.UNKNOWN_GENERATION


def test_intermediates_are_kept_once() -> None:
    bench = Bench()
    bench.push(1, chained=True)
    bench.push(1, chained=True, material="other")
    authorities = [c for c in bench.keystore.state.certificates.values() if c.authority]
    assert len(authorities) == 1


def test_views_by_watermark() -> None:
    bench = Bench()
    marks = [bench.keystore.state.watermark]
    for number in (1, 2, 3):
        bench.push(number)
        marks.append(bench.keystore.state.watermark)
    material = bench.keystore.state.materials["tls"]
    assert [(g.number if (g := material.seen_at(mark)) else None) for mark in marks] == [None, 1, 2, 3]
    bench.execute("roll-back", "tls", 2)
    material = bench.keystore.state.materials["tls"]
    seen = material.seen_at(bench.keystore.state.watermark)
    assert seen is not None and seen.number == 2
    bench.execute("destroy", "tls", 1)
    material = bench.keystore.state.materials["tls"]
    seen = material.seen_at(marks[1])
    assert seen is not None and seen.number == 2, "a view of a destroyed generation sees the current one"


def test_a_retired_material_leaves_the_views() -> None:
    bench = Bench()
    bench.push(1)
    mark = bench.keystore.state.watermark
    bench.execute("retire", "tls", 1, Retire(0, "extend"))
    material = bench.keystore.state.materials["tls"]
    assert material.seen_at(bench.keystore.state.watermark) is None
    seen = material.seen_at(mark)
    assert seen is not None and seen.number == 1


def test_handles_are_never_used_again() -> None:
    bench = Bench()
    seen: set[int] = set()
    for number in range(1, 30):
        before = set(bench.keystore.state.keys)
        bench.push(number, chained=True)
        if number > 1:
            bench.execute("destroy", "tls", number - 1)
        new = set(bench.keystore.state.keys) - before
        assert not new & seen
        seen |= new
        if number % 10 == 0:
            bench.restart()


def test_a_handle_of_another_module_or_of_a_lost_time_is_given_to_no_other_key() -> None:
    """An application keeps its handles when its module is made anew, or set back to an older copy: none may name another key."""
    bench = Bench()
    bench.push(1, material="before")
    kept, version = dict(bench.stored), bench.version
    bench.push(1, material="lost")
    lost = {key.handle for key in bench.keystore.state.keys.values() if key.material == "lost"}
    before = {key.handle for key in bench.keystore.state.keys.values()} - lost
    bench.stored, bench.version, bench.now = kept, version, bench.now + 3600
    bench.restart()
    assert set(bench.keystore.state.keys) == before
    bench.push(1, material="other")
    assert not set(bench.keystore.state.keys) & lost
    first, second = (State(0, bytes([n]) * 16, b"", b"", NOW, 0, 1, 1, True, Pin(), {}, {}, {}) for n in (1, 2))
    assert abs(skip_handles(first, NOW).next_handle - skip_handles(second, NOW).next_handle) > 100_000
    assert skip_handles(first, 2**40).next_handle < 2**30
