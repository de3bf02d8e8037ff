"""libhsmvisor-pkcs11.so when its module goes away and comes back: what it replays, what it restores, what it says."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from ctypes import byref, c_ulong
from pathlib import Path
from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.wire.calls import Call
from support.cryptoki import Cryptoki
from support.scripted_module import KEY, Close, Request, ScriptedModule, signature

OK = ck.CKR_OK
NEW, JOIN, FORK, RESUME = range(4)


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ScriptedModule]:
    module = ScriptedModule(tmp_path / "guest.sock")
    yield module
    module.end()


@pytest.fixture
def p11(module: ScriptedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cryptoki]:
    config = tmp_path / "pkcs11.conf"
    config.write_text(f"address = {module.address}\nreconnect_ms = 1500  # short, for the tests\ndeadline_ms = 1000\n")
    monkeypatch.setenv("HSMVISOR_PKCS11_CONFIG", str(config))
    monkeypatch.delenv("HSMVISOR_PKCS11_ADDRESS", raising=False)
    library = Cryptoki()
    library.initialize()
    yield library
    library.finalize()


def once(answer: Any) -> Any:
    """An answer for the first request; the next get the usual one."""
    done = []

    def first(module: ScriptedModule, application: Any, request: Request) -> Any:
        if done:
            return getattr(ScriptedModule, request.name.lower())(module, application, request)
        done.append(request)
        return answer(module, application, request)

    return first


def close_after(done: bool) -> Any:
    """The connection is lost, before or after the module did what it was asked."""

    def answer(module: ScriptedModule, application: Any, request: Request) -> Any:
        if done:
            getattr(ScriptedModule, request.name.lower())(module, application, request)
        raise Close

    return once(answer)


def test_sessions_and_handles_outlive_a_restart_of_the_module(module: ScriptedModule, p11: Cryptoki) -> None:
    sessions = [p11.open_session(flags=flags) for flags in (4, 6, 4)]
    p11.good("C_CloseSession", sessions[0])
    ticket = next(iter(module.applications))
    module.requests.clear()
    module.restart()
    for session in sessions[1:]:
        assert p11.sign_init(session, KEY) == OK
        assert p11.sign(session, b"x") == (OK, signature(b"x"))
    assert module.names()[:3] == ["HELLO", "RESTORE_SESSIONS", "SIGN_INIT"]
    hello, restored = module.requests[:2]
    assert hello.args[1:4] == (RESUME, ticket, 7)
    assert restored.args[0] == [sessions[1], 0, 6, sessions[2], 0, 4]
    assert p11.call("C_CloseSession", sessions[0]) == ck.CKR_SESSION_HANDLE_INVALID


def test_a_lost_connection_of_a_living_application_is_joined_again(module: ScriptedModule, p11: Cryptoki) -> None:
    session = p11.open_session()
    next(iter(module.applications.values())).connections += 1  # as if another connection were alive
    module.requests.clear()
    module.cut()
    assert p11.sign_init(session, KEY) == OK
    assert module.names() == ["HELLO", "SIGN_INIT"]
    assert module.requests[0].args[1] == RESUME


def test_the_view_of_the_last_search_is_resumed(module: ScriptedModule, p11: Cryptoki) -> None:
    session = p11.open_session()
    module.watermark = 12
    p11.find(session)
    module.restart()
    p11.find(session)
    assert [r.args[3] for r in module.requests if r.call is Call.HELLO] == [0, 12]


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("living", [False, True], ids=["new application", "same application"])
def test_one_shot_signatures_are_replayed(module: ScriptedModule, p11: Cryptoki, done: bool, living: bool) -> None:
    session = p11.open_session()
    assert (p11.sign_init(session, KEY), p11.sign(session, b"x")[0]) == (OK, OK)
    if living:
        next(iter(module.applications.values())).connections += 1
    module.answers[Call.SIGN_ONCE] = close_after(done)
    assert p11.sign_init(session, KEY) == OK
    assert p11.sign(session, b"y") == (OK, signature(b"y"))
    assert module.names().count("SIGN_ONCE") == 2


@pytest.mark.parametrize("done", [False, True])
def test_an_init_is_replayed_once_what_it_began_is_cancelled(module: ScriptedModule, p11: Cryptoki, done: bool) -> None:
    session = p11.open_session()
    next(iter(module.applications.values())).connections += 1
    module.answers[Call.SIGN_INIT] = close_after(done)
    assert p11.sign_init(session, KEY) == OK
    assert p11.sign(session, b"y") == (OK, signature(b"y"))
    assert module.names()[-4:] == ["HELLO", "SESSION_CANCEL", "SIGN_INIT", "SIGN"]


@pytest.mark.parametrize("done", [False, True])
def test_an_interrupted_operation_says_so_once(module: ScriptedModule, p11: Cryptoki, done: bool) -> None:
    session = p11.open_session()
    module.answers[Call.SIGN_UPDATE] = close_after(done)
    assert p11.sign_init(session, KEY) == OK
    assert p11.call("C_SignUpdate", session, b"ab", 2) == ck.CKR_DEVICE_ERROR
    assert p11.call("C_SignUpdate", session, b"ab", 2) == ck.CKR_OPERATION_NOT_INITIALIZED
    assert p11.sign_init(session, KEY) == OK
    assert p11.sign(session, b"y") == (OK, signature(b"y"))


@pytest.mark.parametrize("living", [False, True], ids=["new application", "same application"])
def test_what_may_have_been_done_is_not_repeated(module: ScriptedModule, p11: Cryptoki, living: bool) -> None:
    session = p11.open_session()
    if living:
        next(iter(module.applications.values())).connections += 1
    module.answers[Call.LOGIN] = close_after(True)
    module.answers[Call.SIGN] = close_after(False)
    assert p11.call("C_Login", session, ck.CKU_USER, b"1234", 4) == ck.CKR_DEVICE_ERROR
    assert p11.sign_init(session, KEY) == OK
    assert p11.sign(session, b"y")[0] == ck.CKR_DEVICE_ERROR
    assert p11.sign_init(session, KEY) == OK  # the operation that may be open still is cancelled first
    assert p11.sign(session, b"y") == (OK, signature(b"y"))
    assert module.names().count("LOGIN") == 1


def test_a_request_that_never_left_is_no_risk(module: ScriptedModule, p11: Cryptoki) -> None:
    """A module that is replaced while nothing is under way fails no call, whatever its kind."""
    session = p11.open_session()
    module.restart()
    time.sleep(0.05)
    p11.good("C_Login", session, ck.CKU_USER, b"1234", 4)
    assert p11.sign_init(session, KEY) == OK
    module.restart()
    time.sleep(0.05)
    assert p11.sign(session, b"x")[0] == ck.CKR_DEVICE_ERROR
    assert p11.sign(session, b"x")[0] == ck.CKR_OPERATION_NOT_INITIALIZED


def test_a_search_that_is_here_whole_outlives_its_module(module: ScriptedModule, p11: Cryptoki) -> None:
    session = p11.open_session()
    p11.good("C_FindObjectsInit", session, None, 0)
    module.restart()
    assert p11.sign_init(session, KEY) == OK  # reconnects
    handles, count = (c_ulong * 8)(), c_ulong()
    p11.good("C_FindObjects", session, handles, 8, byref(count))
    assert count.value == 2
    p11.good("C_FindObjectsFinal", session)


def test_a_request_that_kills_its_module_is_not_sent_for_ever(module: ScriptedModule, p11: Cryptoki) -> None:
    session = p11.open_session()

    def die(*_: Any) -> Any:
        raise Close

    module.answers[Call.FIND_ONCE] = die
    assert p11.call("C_FindObjectsInit", session, None, 0) == ck.CKR_DEVICE_ERROR
    assert 2 <= module.names().count("FIND_ONCE") <= 5


def test_a_module_that_is_away_for_a_moment(module: ScriptedModule, p11: Cryptoki) -> None:
    session = p11.open_session()
    module.applications.clear()
    module.stop()
    threading.Timer(0.4, module.start).start()
    began = time.monotonic()
    assert p11.sign_init(session, KEY) == OK
    assert 0.3 < time.monotonic() - began < 1.4


def test_a_module_that_stays_away_and_comes_back_later(module: ScriptedModule, p11: Cryptoki) -> None:
    session = p11.open_session()
    module.applications.clear()
    module.stop()
    began = time.monotonic()
    assert p11.sign_init(session, KEY) == ck.CKR_DEVICE_ERROR
    assert 1.4 < time.monotonic() - began < 2.5
    module.start()
    assert p11.sign_init(session, KEY) == OK


def test_a_module_that_does_not_answer(module: ScriptedModule, p11: Cryptoki) -> None:
    session = p11.open_session()

    def hang(*_: Any) -> Any:
        time.sleep(1.5)
        raise Close

    module.answers[Call.SIGN_INIT] = once(hang)
    began = time.monotonic()
    assert p11.sign_init(session, KEY) == ck.CKR_DEVICE_ERROR
    assert 0.9 < time.monotonic() - began < 1.4
    assert p11.find(session)


def test_many_threads_lose_and_find_their_module_together(module: ScriptedModule, p11: Cryptoki) -> None:
    sessions = [p11.open_session() for _ in range(6)]
    wrong: list[Any] = []
    end = time.monotonic() + 1.5

    def work(session: int) -> None:
        number = 0
        while time.monotonic() < end:
            number += 1
            data = b"%d %d" % (session, number)
            rv = p11.sign_init(session, KEY)
            result = p11.sign(session, data) if rv == OK else (rv, None)
            # the two-step form of the first signature may be cut between its steps
            if result != (OK, signature(data)) and not (result[0] == ck.CKR_DEVICE_ERROR and number == 1):
                wrong.append((session, number, rv, result))

    threads = [threading.Thread(target=work, args=(s,)) for s in sessions]
    for thread in threads:
        thread.start()
    for _ in range(8):
        time.sleep(0.15)
        module.restart()
    for thread in threads:
        thread.join(20)
    assert not wrong
    assert sum(r.call is Call.RESTORE_SESSIONS for r in module.requests) <= 2 * 8


def test_sessions_that_the_module_refuses_are_closed(module: ScriptedModule, p11: Cryptoki) -> None:
    sessions = [p11.open_session(), p11.open_session()]

    def refuse_first(module: ScriptedModule, application: Any, request: Request) -> Any:
        ScriptedModule.restore_sessions(module, application, request)
        return ((ck.CKR_SESSION_COUNT, OK),)

    module.answers[Call.RESTORE_SESSIONS] = refuse_first
    module.restart()
    p11.find(sessions[1])
    assert p11.sign_init(sessions[0], KEY) == ck.CKR_SESSION_HANDLE_INVALID
    assert p11.sign_init(sessions[1], KEY) == OK


# ---- a module that was never there -----------------------------------------------------------------------------------------


def test_an_absent_module_is_a_library_without_slots(tmp_path: Path) -> None:
    p11 = Cryptoki()
    path = tmp_path / "later.sock"
    p11.initialize(f"unix:path={path}")
    began = time.monotonic()
    assert p11.slots() == []
    assert time.monotonic() - began < 0.5
    module = ScriptedModule(path)
    assert p11.slots() == [0]
    assert p11.finalize() == OK
    module.end()


# ---- waiting ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", [False, True], ids=["connected", "module away"])
def test_finalize_ends_a_thread_that_waits(module: ScriptedModule, p11: Cryptoki, away: bool) -> None:
    slot, results = c_ulong(), []
    thread = threading.Thread(target=lambda: results.append(p11.call("C_WaitForSlotEvent", 0, byref(slot), None)))
    thread.start()
    time.sleep(0.3)
    assert p11.sign_init(p11.open_session(), KEY) == OK  # others go on meanwhile
    if away:
        module.stop()
        time.sleep(0.2)
    began = time.monotonic()
    assert p11.finalize() == OK
    thread.join(5)
    assert time.monotonic() - began < 0.5
    assert results == [ck.CKR_CRYPTOKI_NOT_INITIALIZED]


def test_polling_for_slot_events(module: ScriptedModule, p11: Cryptoki) -> None:
    slot = c_ulong()
    assert p11.call("C_WaitForSlotEvent", 1, byref(slot), None) == ck.CKR_NO_EVENT
    assert p11.call("C_WaitForSlotEvent", 1, None, None) == ck.CKR_ARGUMENTS_BAD


def test_rotation_wait(module: ScriptedModule, p11: Cryptoki) -> None:
    assert p11.rotation_wait(0, 0) == (OK, 7)
    assert p11.rotation_wait(7, 100)[0] == ck.CKR_FUNCTION_CANCELED
    assert module.requests[-1].deadline == 100
    threading.Timer(0.2, module.rotate).start()
    assert p11.rotation_wait(7, 5000) == (OK, 8)


# ---- nothing is left behind ------------------------------------------------------------------------------------------------


def test_no_descriptors_or_threads_are_left(module: ScriptedModule, p11: Cryptoki) -> None:
    p11.finalize()
    time.sleep(0.1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        p11.initialize()
        session = p11.open_session()
        threads = [threading.Thread(target=lambda: p11.find(p11.open_session())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        module.restart()
        assert p11.sign_init(session, KEY) == OK
        assert len(os.listdir("/proc/self/task")) < 40
        assert p11.finalize() == OK
    deadline = time.monotonic() + 3
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.05)  # the module's own ends of the connections
    assert len(os.listdir("/proc/self/fd")) <= before
