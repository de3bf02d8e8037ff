"""Limits of what a guest makes its module keep: each at the limit and one past it; and that it is given back."""

from __future__ import annotations

import gc
import json
import socket
from typing import Any

import pytest
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import FrameReader
from hsmvisord import ck, limits
from hsmvisord.budget import Budget
from hsmvisord.ck import CkError
from hsmvisord.confined.link import Link
from hsmvisord.crypto import streams
from hsmvisord.face.caller import Caller
from hsmvisord.keystore.keystore import Cause
from hsmvisord.token.operations import SHORT, FindOperation
from hsmvisord.token.secrets import secret_attributes
from hsmvisord.token.statistics import Counters, total
from hsmvisord.transport.connection import Connection, Ended
from hsmvisord.transport.parking import Parking
from hsmvisord.wire.calls import Attribute, BadMessage, Call, Mechanism, Request
from hsmvisord.wire.frames import FrameBuffer, frame
from hsmvisord.wire.native import NativeCodec
from hsmvisord.wire.p11kit import P11KitCodec
from hsmvisord.worker.visits import PAUSE, Visits
from support.keystores import Bench
from support.native_client import NativeEncoding
from support.p11kit_client import RELEASES, P11KitEncoding

SESSION = ck.CKF_SERIAL_SESSION


@pytest.fixture
def bench() -> Bench:
    return Bench()


def refused(rv: int, act: Any, *arguments: Any) -> None:
    with pytest.raises(CkError) as caught:
        act(*arguments)
    assert caught.value.rv == rv, caught.value


def test_a_budget() -> None:
    budget = Budget(3)
    assert budget.take(2) and not budget.take(2) and budget.take(1) and not budget.take(1)
    budget.give(3)
    assert budget.take(3)


# ---- session objects ----------------------------------------------------------------------------------------------------


def test_session_objects_of_an_application_and_of_a_module(bench: Bench) -> None:
    token = bench.token()
    made = []
    for n in range(limits.MAX_SESSION_OBJECTS_ALL // limits.MAX_SESSION_OBJECTS):
        application = token.new_application(str(n))
        session = application.session(application.open_session(0, SESSION))
        for _ in range(limits.MAX_SESSION_OBJECTS):
            handle = application.add_object(session, {})
        refused(ck.CKR_DEVICE_MEMORY, application.add_object, session, {})
        made.append((application, session, handle))
    last = token.new_application("last")
    session = last.session(last.open_session(0, SESSION))
    refused(ck.CKR_DEVICE_MEMORY, last.add_object, session, {})
    (one, its_session, handle), (two, *_), (three, *_) = made[:3]
    one.remove_object(handle)
    last.add_object(session, {})
    refused(ck.CKR_DEVICE_MEMORY, last.add_object, session, {})
    one.close_session(its_session.handle)
    token.leave(two)
    three.close_all_sessions()
    for _ in range(limits.MAX_SESSION_OBJECTS - 1):
        last.add_object(session, {})
    assert token.session_objects.take(2 * limits.MAX_SESSION_OBJECTS), "all were given back"
    assert not token.session_objects.take(1)


def test_values_of_a_new_object() -> None:
    assert secret_attributes({ck.CKA_LABEL: b"l" * limits.MAX_VALUE}, b"secret", 1)[ck.CKA_LABEL]
    refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, secret_attributes, {ck.CKA_LABEL: b"l" * (limits.MAX_VALUE + 1)}, b"secret", 1)


# ---- operations ---------------------------------------------------------------------------------------------------------


def test_open_searches_share_their_room_and_short_ones_are_free() -> None:
    budget = Budget(2 * SHORT + 2)
    one, two = (FindOperation(list(range(SHORT + 1)), budget) for _ in range(2))
    FindOperation(list(range(SHORT)), budget)
    refused(ck.CKR_HOST_MEMORY, FindOperation, list(range(SHORT + 1)), budget)
    del one
    assert FindOperation(list(range(SHORT + 1)), budget).take(3) == two.take(3)


def test_messages_in_parts_share_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_parts", Budget(limits.MAX_MULTIPART_ALL))
    kept = [streams.Kept() for _ in range(limits.MAX_MULTIPART_ALL // limits.MAX_MULTIPART)]
    for one in kept:
        one.update(bytes(limits.MAX_MULTIPART))
        refused(ck.CKR_DATA_LEN_RANGE, one.update, b"x")
    more = streams.Kept()
    more.update(b"")
    refused(ck.CKR_DEVICE_MEMORY, more.update, b"x")
    kept.pop()
    del one
    gc.collect()  # the exceptions that pytest caught hold it
    more.update(bytes(limits.MAX_MULTIPART))
    assert more.whole() == bytes(limits.MAX_MULTIPART)


def test_parameters_of_a_mechanism() -> None:
    native, stock = NativeEncoding(), P11KitEncoding(RELEASES["0.26.4"])

    def begin(mechanism: Mechanism) -> None:
        NativeCodec().decode(1, b"", native.request(Call.SIGN_INIT, 1, mechanism, 2))

    begin(Mechanism(0x4021, bytes(limits.MAX_PARAMETER)))
    begin(Mechanism(0x4021, (bytes(limits.MAX_PARAMETER - 6),)))
    P11KitCodec(2).decode(1, b"", stock.request(Call.DERIVE_KEY, 1, _ecdh(0), 2, ()))
    for act in (
        lambda: begin(Mechanism(0x4021, bytes(limits.MAX_PARAMETER + 1))),
        lambda: begin(Mechanism(0x4021, (bytes(limits.MAX_PARAMETER - 5),))),
        lambda: P11KitCodec(2).decode(1, b"", stock.request(Call.DERIVE_KEY, 1, _ecdh(1), 2, ())),
    ):
        with pytest.raises(BadMessage) as caught:
            act()
        assert caught.value.rv == ck.CKR_MECHANISM_PARAM_INVALID


def _ecdh(past: int) -> Mechanism:
    """A parameter of u64 and two `bytes` that is `past` bytes too long."""
    return Mechanism(ck.CKM_ECDH1_DERIVE, (1, b"", bytes(limits.MAX_PARAMETER - 16 + past)))


# ---- what is kept of searches, frames, replies, connections -------------------------------------------------------------


def test_long_searches_are_not_remembered_nested_ones_neither(bench: Bench) -> None:
    bench.push(1)
    token = bench.token()
    view = token.index.view(token.watermark)
    long = b"x" * (limits.MAX_CACHED_TEMPLATE + 1)
    for template in (
        ((ck.CKA_LABEL, long),),
        ((ck.CKA_WRAP_TEMPLATE, (Attribute(ck.CKA_UNWRAP_TEMPLATE, (Attribute(ck.CKA_LABEL, long),)),)),),
    ):
        view.find(template)
        assert not view._answers
    view.find(((ck.CKA_LABEL, long[: limits.MAX_CACHED_TEMPLATE - 100]),))
    for n in range(3 * limits.MAX_CACHED_SEARCHES):
        view.find(((ck.CKA_LABEL, b"%d" % n),))
        assert len(view._answers) <= limits.MAX_CACHED_SEARCHES


def test_a_frame_that_was_given_is_not_held() -> None:
    buffer = FrameBuffer()
    buffer.feed(frame(1, b"m" * 100_000))
    assert buffer.next_frame() is not None
    assert buffer._data == b"" and buffer.wanted == 0
    buffer.feed(frame(2, b"m" * 100_000)[:5000])
    assert buffer.next_frame() is None and buffer.wanted == 100_012


def test_a_reply_is_not_longer_than_a_message_may_be() -> None:
    """One large certificate, asked for often in one call."""
    codec = NativeCodec()
    value = bytes(4096 - 13)
    most = limits.MAX_MESSAGE // 4096

    def reply(count: int) -> bytes:
        wanted = tuple([(ck.CKA_VALUE, 65536)] * count)
        request = Request(1, Call.GET_ATTRIBUTE_VALUE, (1, 2, wanted), 0)
        return codec.reply(request, [(ck.CKA_VALUE, value)] * count)

    assert len(reply(most)) >= limits.MAX_MESSAGE
    with pytest.raises(BadMessage) as caught:
        reply(most + 1)
    assert caught.value.rv == ck.CKR_HOST_MEMORY


def test_waiting_calls_of_a_connection_and_of_a_module(bench: Bench) -> None:
    token = bench.token()
    parking = Parking(lambda: 0.0)
    request = Request(1, Call.ROTATION_WAIT, (0,), 0)

    def caller() -> Caller:
        return Caller(token, NativeCodec(), "test")

    def park(who: Caller, most: int) -> None:
        for _ in range(most):
            parking.park(who, request, lambda: None, lambda reply: None, b"")

    callers = [caller() for _ in range(limits.MAX_PARKED_ALL // limits.MAX_PARKED)]
    for one in callers:
        park(one, limits.MAX_PARKED)
        refused(ck.CKR_HOST_MEMORY, park, one, 1)
    refused(ck.CKR_HOST_MEMORY, park, caller(), 1)
    parking.remove(callers.pop())
    park(last := caller(), limits.MAX_PARKED)
    assert len(parking.saved(last)) == limits.MAX_PARKED == last.parked
    parking.remove(last)
    assert last.parked == 0


def test_an_application_that_one_connection_finalized_opens_nothing_for_another(bench: Bench) -> None:
    """Its sessions would be nobody's, and never be given back."""
    token = bench.token()
    application = token.new_application("two connections")
    assert token.join(application.ticket) is application
    application.open_session(0, SESSION)
    token.finalize(application)
    refused(ck.CKR_CRYPTOKI_NOT_INITIALIZED, application.open_session, 0, SESSION)
    token.leave(application)
    assert token.sessions == 0 and token.applications() == []


def test_counters_of_connections_that_ended(bench: Bench) -> None:
    token = bench.token()
    for n in range(3):
        counters = Counters()
        token.add_counters(counters)
        counters.cell("sign", ck.CKM_ECDSA, ("tls", 1)).observe(0.001, 10.0 + n)
        before = token.statistics()
        token.remove_counters(counters)
        after = token.statistics()
        assert after == before == total([token._closed])
        assert after["sign", ck.CKM_ECDSA, ("tls", 1)].count == n + 1


# ---- what a guest makes its host do -------------------------------------------------------------------------------------


def test_a_wrong_pin_before_each_right_one_changes_the_stored_state_only_so_often(bench: Bench) -> None:
    bench.keystore.set_pin(b"123456", Cause())
    for _ in range(limits.PIN_BURST // 2):
        assert bench.keystore.try_pin(b"wrong!") is False
        assert bench.keystore.try_pin(b"123456") is True
    version = bench.version
    assert bench.keystore.try_pin(b"wrong!") is None
    assert bench.keystore.try_pin(b"123456") is None, "or guesses would be free"
    assert bench.version == version
    bench.now += 2 / limits.PIN_RATE
    assert bench.keystore.try_pin(b"wrong!") is False
    assert bench.keystore.try_pin(b"123456") is True
    assert bench.keystore.try_pin(b"123456") is None
    bench.now += 1 / limits.PIN_RATE
    for _ in range(100):
        assert bench.keystore.try_pin(b"123456") is True, "a right one alone costs nothing"


class Visitor:
    """A connection as far as its telling goes; its application began."""

    told = True

    def __init__(self, bench: Bench) -> None:
        self.caller, self.why = Caller(bench.token(), NativeCodec(), "unix uid=1 pid=2"), "closed by the client"


def test_connections_beyond_the_rate_are_counted_and_told_together(bench: Bench) -> None:
    now = 1000.0
    told: list[tuple[str, dict[str, Any]]] = []
    visits = Visits(lambda kind, **report: told.append((kind, report)), lambda: now)
    visitors: list[Any] = [Visitor(bench) for _ in range(limits.EVENT_BURST + 2)]
    for visitor in visitors:
        visits.began(visitor)
    visits.count()
    for visitor in visitors:
        visits.ended(visitor)
    kinds = [kind for kind, _ in told]
    assert kinds.count("connection-opened") == kinds.count("connection-closed") == limits.EVENT_BURST
    assert [report for kind, report in told if kind == "connections-suppressed"] == [{"began": 2, "ended": 0, "refused": 0}]
    now += PAUSE
    visits.count()
    visits.count()
    assert told[-1] == ("connections-suppressed", {"began": 2, "ended": 2, "refused": 0})
    told.clear()
    visits.began(visitors[0])
    assert [kind for kind, _ in told] == ["connection-opened"], "the rate goes on"


def visitor_of_none(bench: Bench, sent: bytes = b"", over: bool = False) -> Connection:
    """A connection that ended before its application began; `sent` is all that came."""
    ours, theirs = socket.socketpair()
    parking = Parking(lambda: 0.0)
    connection = Connection(ours, "unix uid=1 pid=2", bench.token(), parking, over, lambda connection: None)
    theirs.sendall(sent)
    theirs.shutdown(socket.SHUT_WR)
    try:
        while True:
            connection.receive()
            connection.work()
    except Ended as end:
        if not over:
            connection.why = str(end)
    connection.end()
    theirs.close()
    return connection


@pytest.mark.parametrize(
    ("sent", "over", "report"),
    [
        (b"", False, {"why": "closed by the client"}),
        (b"\x80", False, {"greeting": 0x80, "why": "broken greeting: version 0 of the native dialect does not exist"}),
        (b"\0", False, {"greeting": 0, "dialect": "p11-kit", "program": "", "pid": 0, "why": "closed by the client"}),
        (b"\xff", False, {"greeting": 255, "dialect": "native", "program": "", "pid": 0, "why": "closed by the client"}),
        (b"", True, {"why": f"over the limit of {limits.MAX_CONNECTIONS} connections"}),
        (b"\x80", True, {"greeting": 0x80, "why": f"over the limit of {limits.MAX_CONNECTIONS} connections"}),
    ],
)
def test_who_went_without_an_application_and_why(bench: Bench, sent: bytes, over: bool, report: dict[str, Any]) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    visits = Visits(lambda kind, **report: told.append((kind, report)), lambda: 1000.0)
    visits.ended(visitor_of_none(bench, sent, over))
    ((kind, said),) = told
    said.pop("connection", None)
    assert (kind, said) == ("connection-refused", {"peer": "unix uid=1 pid=2", **report})


def test_ends_without_an_application_share_the_rate_of_the_others(bench: Bench) -> None:
    now = 1000.0
    told: list[tuple[str, dict[str, Any]]] = []
    visits = Visits(lambda kind, **report: told.append((kind, report)), lambda: now)
    begun: Any = Visitor(bench)
    visits.began(begun)
    probe = visitor_of_none(bench)
    for _ in range(limits.EVENT_BURST - 1):
        visits.ended(probe)
    visits.count()
    assert [kind for kind, _ in told] == ["connection-opened"] + ["connection-refused"] * (limits.EVENT_BURST - 1)
    told.clear()
    visits.ended(probe)
    visits.ended(begun)
    visits.count()
    assert [kind for kind, _ in told] == ["connection-closed", "connections-suppressed"], "what began and was told ends so"
    assert told[-1][1] == {"began": 0, "ended": 0, "refused": 1}
    now += PAUSE
    told.clear()
    for _ in range(int(PAUSE * limits.EVENT_RATE) + 1):
        visits.ended(probe)
    visits.count()
    assert [kind for kind, _ in told].count("connection-refused") == PAUSE * limits.EVENT_RATE
    assert told[-1] == ("connections-suppressed", {"began": 0, "ended": 0, "refused": 2})


def test_events_that_wait_for_a_supervisor_and_those_that_could_not() -> None:
    ours, theirs = socket.socketpair()
    link = Link(ours, 0)
    for n in range(limits.EVENT_BACKLOG + 3):
        link.tell(m.Event("pin-wrong", n, "{}"))
    link._sock, link._attached = ours, 1
    theirs.settimeout(0.5)
    reader, events = FrameReader(), []
    link._events = link._events[:100]  # as many as the socket takes
    link.flush()
    while len(events) < 101:
        events += [m.Event.decode(f.payload) for f in reader.feed(theirs.recv(65536))]
    assert events[0].kind == "events-suppressed" and json.loads(events[0].report) == {"count": 3}
    assert events[1].at_ms == 3 and events[0].kind in m.EVENT_KINDS
    ours.close()
    theirs.close()
