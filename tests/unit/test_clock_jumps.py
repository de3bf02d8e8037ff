"""Clocks that are set forward and back: keys sign on, nothing is destroyed early, orders stay orders, refusals name the clock."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from hsmvisor.host.database import Database
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.state import State
from hsmvisor.serving.audit import Audit
from hsmvisor.serving.audit_verify import verify
from hsmvisor.serving.errors import Unauthenticated
from hsmvisor.serving.events import Events
from hsmvisor.serving.signatures import KnownKey, Signatures
from hsmvisor_rpc.sealed.commands import Retire
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from hsmvisor_rpc.v1 import request_signing
from hsmvisord import ck
from hsmvisord.keystore import pin
from hsmvisord.keystore.changes import BARE_DRAIN
from hsmvisord.keystore.keystore import HOLD, LEAP, Cause
from hsmvisord.token.statistics import Counters
from hsmvisord.wire.calls import Mechanism
from support.keystores import Bench

YEARS = 10 * 365 * 86400.0
JUMPS = pytest.mark.parametrize("jump", [YEARS, -YEARS, 3600.0, -3600.0])


class Watched(Bench):
    """A keystore that sees a clock which nobody sets; `later` moves both."""

    steady = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.keystore.watch_clock(lambda: self.steady)

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.steady += seconds
        self.keystore.tick()

    def leap(self, seconds: float) -> None:
        self.now += seconds
        self.later(1)


def draining() -> Watched:
    bench = Watched()
    bench.push(1)
    bench.push(2)
    assert bench.state_of(1) == "retiring"
    return bench


def test_a_drain_ends_in_its_time() -> None:
    bench = draining()
    for _ in range(24):
        bench.later(BARE_DRAIN / 24 - 1)
    assert bench.state_of(1) == "retiring"
    bench.later(60)
    assert bench.state_of(1) == "destroyed"
    assert "clock-leapt" not in [h.kind for h in bench.happened]


@pytest.mark.parametrize("after_drain", ["extend", "refuse"])
def test_a_leap_forward_ends_no_drain_until_the_clock_can_be_set_right(after_drain: str) -> None:
    bench = draining()
    bench.execute("retire", "tls", 1, Retire(BARE_DRAIN, after_drain))
    bench.leap(YEARS)
    bench.later(HOLD - 2)
    assert bench.state_of(1) == "retiring"
    assert [h.report["seconds"] for h in bench.happened if h.kind == "clock-leapt"] == [int(YEARS)]
    bench.leap(-YEARS)  # set right: the drain goes on as if nothing had been
    bench.later(HOLD)
    assert bench.state_of(1) == "retiring"
    bench.later(BARE_DRAIN)
    assert bench.state_of(1) == "destroyed"


def test_a_leap_that_was_right_ends_the_drain_later_unless_the_key_is_in_use() -> None:
    for used, state in ((False, "destroyed"), (True, "retiring")):
        bench = draining()
        bench.leap(YEARS)
        if used:
            bench.usage = {("tls", 1): (1, int(bench.now))}
        bench.later(HOLD)
        assert bench.state_of(1) == state


def test_a_leap_back_ends_no_drain_and_a_small_one_is_none() -> None:
    bench = draining()
    bench.leap(-YEARS)
    bench.leap(LEAP - 2)
    assert bench.state_of(1) == "retiring"
    assert bench.happened == [] or "clock-leapt" not in [h.kind for h in bench.happened]


@JUMPS
def test_keys_sign_whatever_the_clock_says(jump: float) -> None:
    bench = Watched()
    bench.push(1, chained=True)
    token = bench.token()
    application = token.new_application("test", 0)
    session = application.session(application.open_session(0, ck.CKF_SERIAL_SESSION))
    (handle,) = application.find(session, ((ck.CKA_CLASS, ck.CKO_PRIVATE_KEY),)).take(10)

    def sign() -> bytes:
        application.sign_init(session, Mechanism(ck.CKM_ECDSA), handle)
        signature = application.sign(session, b"d" * 32, 1000, Counters())
        assert isinstance(signature, bytes)
        return signature

    sign()
    bench.leap(jump)
    assert len(sign()) == 64
    bench.restart()
    assert bench.state_of(1) == "current"


def test_a_command_of_another_time_is_refused_and_changes_nothing() -> None:
    bench = Bench()
    bench.stage(1)
    early = bench.signer.sign(bench.command("activate"))
    for jump, why in ((YEARS, Reason.EXPIRED), (-YEARS, Reason.NOT_YET_VALID)):
        bench.now += jump
        with pytest.raises(Refusal) as caught:
            bench.send(early)
        assert caught.value.reason in (why, Reason.EXPIRED, Reason.NOT_YET_VALID)
        assert bench.state_of(1) == "staged"
        bench.now -= jump
    bench.send(early)
    assert bench.state_of(1) == "current"


def test_a_clock_that_was_set_back_locks_no_pin_for_ever() -> None:
    bench = Bench()
    bench.keystore.set_pin(b"123456", Cause())
    for _ in range(pin.FREE_ATTEMPTS):
        assert bench.keystore.try_pin(b"wrong!") is False
    assert bench.keystore.try_pin(b"123456") is None
    bench.now -= YEARS
    assert bench.keystore.try_pin(b"123456") is True


@JUMPS
def test_the_audit_log_keeps_its_order(tmp_path: Path, jump: float) -> None:
    host, now = HostIdentity(os.urandom(32)), [2_000_000_000.0]

    async def write() -> None:
        audit = Audit(
            tmp_path / "audit.log",
            host.sign,
            service="host",
            rotate_bytes=1000,
            checkpoint_lines=3,
            checkpoint_seconds=1000.0,
            now=lambda: now[0],
        )
        audit.start()
        for _ in range(10):
            await audit.record("test", who="me")
            now[0] += jump / 10
        await audit.close()

    asyncio.run(write())
    verdict = verify(tmp_path / "audit.log", host.public)
    assert verdict.sound and verdict.lines >= 10, verdict.findings


def test_events_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [2_000_000_000.0]
    monkeypatch.setattr("hsmvisor.serving.events.time.time", lambda: now[0])

    async def emit(count: int) -> list[int]:
        database = Database(tmp_path / "state.db")
        events = Events(State(database), "host", "begin from now")
        await events.start()
        for _ in range(count):
            events.emit("test")
            now[0] -= 3600
        ids = [row.id for row in events._ring]
        await events.close()
        database.close()
        return ids

    before = asyncio.run(emit(5))
    after = asyncio.run(emit(5))
    assert after[:5] == before and after == sorted(set(after))


@JUMPS
def test_a_signed_request_of_another_time_names_the_clocks(tmp_path: Path, jump: float) -> None:
    now = 2_000_000_000

    async def call() -> None:
        database = Database(tmp_path / "state.db")
        key = KnownKey("tester", frozenset(), lambda signature, covered: True)
        signatures = Signatures({"tester": key}, 60, State(database), "host", lambda: now + jump)
        metadata: dict[str, str | bytes] = {
            request_signing.KEY: "tester",
            request_signing.TIME: str(now),
            request_signing.NONCE: os.urandom(request_signing.NONCE_SIZE).hex(),
            request_signing.SIGNATURE: "00",
        }
        with pytest.raises(Unauthenticated) as caught:
            await signatures.verify("Method", b"", metadata)
        assert caught.value.reason == "REQUEST_TIME" and "clocks" in caught.value.hint
        database.close()

    asyncio.run(call())
