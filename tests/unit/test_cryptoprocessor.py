"""A worker and its helper: connected again after each end of one of them, and said to be so when it is true."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hsmvisor.host import config, pauses
from hsmvisor.host.cryptoprocessor import Cryptoprocessor
from hsmvisor.host.hsm_helper import HsmFault
from hsmvisor.host.hsms import Hsm, Hsms
from hsmvisor.host.link import PeerError
from hsmvisor_rpc.internal import messages as m

ROW = config.Hsm("rack", "/lib/none.so", "prod", "/none/pin")


class FakeHelper:
    """A process that is not there."""

    def __init__(self) -> None:
        self.usable, self.ended, self.pid, self.began, self.last, self.wrong_pin = True, False, 7, -1000.0, "", False
        self.on_end: Callable[[], None] = lambda: None

    async def serve(self, sock: object, within: float) -> None: ...

    async def end(self) -> None: ...

    def die(self, last: str = "") -> None:
        self.usable, self.ended, self.last, self.wrong_pin = False, True, last, last.startswith("the PIN")
        self.on_end()


class FakeWorker:
    """Refuses the sockets whose numbers are in `refused`."""

    def __init__(self, *refused: int) -> None:
        self.asked, self._refused = 0, refused

    async def use_hsm(self, sock: object, within: float) -> None:
        self.asked += 1
        if self.asked in self._refused:
            raise PeerError(m.Error(m.REASON_HSM, "nobody there"))


class Bench:
    def __init__(self, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.helpers: list[FakeHelper] = []
        self.told: list[str] = []
        self.hsms = Hsms([ROW])
        self.hsms.start()
        monkeypatch.setattr(Hsm, "start", lambda hsm, module_id, within: self._start(hsm))
        serving: Any = worker
        self.subject = Cryptoprocessor(self.hsms, "rack", "web", bytes(16), 1, lambda: serving, self.told.append)

    async def _start(self, hsm: Hsm) -> Any:
        hsm._demand_open()
        self.helpers.append(FakeHelper())
        return self.helpers[-1]

    @staticmethod
    async def until(holds: Callable[[], bool]) -> None:
        for _ in range(1000):
            if holds():
                return
            await asyncio.sleep(0.005)
        raise AssertionError("it did not happen")


def test_a_connection_that_fails_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "QUICK", (0.01, 0.01, 0.01))

    async def run() -> None:
        worker = FakeWorker(2, 3)
        b = Bench(worker, monkeypatch)
        b.subject.look()
        await b.until(lambda: worker.asked == 1)
        b.helpers[0].die()
        await b.until(lambda: worker.asked == 4)
        await asyncio.sleep(0.05)
        assert (worker.asked, len(b.helpers)) == (4, 2)
        assert set(b.told) == {""}, "a few failures are tried again without a word"
        await b.subject.halt()

    asyncio.run(run())


def test_what_fails_for_long_is_told_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "QUICK", (0.01, 0.01, 0.01))

    async def run() -> None:
        worker = FakeWorker(1, 2, 3, 4)
        b = Bench(worker, monkeypatch)
        b.subject.look()
        await b.until(lambda: any(b.told))
        assert worker.asked == 4 and "nobody there" in b.told[-1]
        b.subject.reopen()
        await b.until(lambda: b.told[-1] == "")
        assert worker.asked == 5
        await b.subject.halt()

    asyncio.run(run())


def test_a_helper_that_dies_of_a_wrong_pin_is_not_followed_by_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        worker = FakeWorker()
        b = Bench(worker, monkeypatch)
        b.subject.look()
        await b.until(lambda: worker.asked == 1)
        b.helpers[0].die("the PIN is not taken: PinIncorrect")
        await b.until(lambda: any(b.told))
        assert len(b.helpers) == 1 and b.subject.barred
        assert "the PIN is not taken" in b.told[-1] and "/none/pin" in b.told[-1]
        with pytest.raises(HsmFault):
            await b.subject.fresh()
        b.subject.reopen()
        await b.until(lambda: b.told[-1] == "")
        assert (len(b.helpers), worker.asked) == (2, 2)
        await b.subject.halt()

    asyncio.run(run())


def test_software_needs_nothing() -> None:
    async def run() -> None:
        worker = FakeWorker()
        subject = Cryptoprocessor(Hsms([]), "", "web", bytes(16), 1, lambda: None, pytest.fail)
        subject.look()
        await subject.ready()
        await subject.give(worker)  # type: ignore[arg-type]
        assert await subject.fresh() is None
        assert (worker.asked, subject.pid, subject.barred, subject.measures) == (0, 0, False, ())
        await subject.halt()
        await subject.end()

    asyncio.run(run())
