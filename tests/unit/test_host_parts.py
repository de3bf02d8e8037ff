"""Smaller parts of the host: pages, reports of untrusted workers, events, throttle, links."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hsmvisor.host import convert, reports
from hsmvisor.host.database import Database
from hsmvisor.host.link import Link, LinkClosed, Violation
from hsmvisor.host.refusals import refused
from hsmvisor.host.state import State
from hsmvisor.serving import errors, pages
from hsmvisor.serving.errors import Exhausted, Invalid, Lost, ServiceError
from hsmvisor.serving.events import EventRow, Events
from hsmvisor.serving.relay import Credentials, parse_peer
from hsmvisor.serving.throttle import Throttle
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame, Kind, encode_frame
from hsmvisor_rpc.internal.phases import MAX_DESCRIPTORS
from hsmvisor_rpc.sealed.refusal import Reason
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# ---- pages ----------------------------------------------------------------------------------------------------------


@given(st.sets(st.text("abc-.", min_size=1, max_size=5)), st.integers(0, 7))
def test_pages_hold_everything_once(names: set[str], size: int) -> None:
    seen: list[str] = []
    token = ""
    while True:
        chosen, token = pages.page(names, str, size, token)
        seen += chosen
        if not token:
            break
    assert seen == sorted(names)


def test_an_item_that_goes_between_pages_does_no_harm() -> None:
    _, token = pages.page(["a", "b", "c", "d"], str, 2, "")
    assert pages.page(["a", "c", "d"], str, 2, token)[0] == ["c", "d"]


@pytest.mark.parametrize("token", ["%", "a", "/w==", "ä"])
def test_a_foreign_token_is_refused(token: str) -> None:
    with pytest.raises(Invalid):
        pages.page(["a"], str, 1, token)


# ---- what workers tell ----------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)
anything = st.recursive(
    scalars, lambda c: st.lists(c, max_size=4) | st.dictionaries(st.text(max_size=8), c, max_size=4), max_leaves=20
)
keys = st.sampled_from(
    [
        "sequence",
        "materials",
        "generations",
        "name",
        "number",
        "operations",
        "bounds",
        "counts",
        "measures",
        "detail",
        "resident_bytes",
    ]
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(keys, anything, max_size=8))
def test_any_report_is_read_without_an_error_and_fits_the_api(value: dict[str, Any]) -> None:
    for wrapped in (value, {"materials": [value]}, {"materials": [{"generations": [value]}]}, {"operations": [value]}):
        text = json.dumps(wrapped)
        status = reports.status(text)
        for row in status.materials:
            convert.material("m", row).SerializeToString()
        convert.statistics(reports.statistics(text)).SerializeToString()
        json.dumps(reports.plain(text))


@given(st.text(max_size=50))
def test_text_that_is_no_report_is_an_empty_one(text: str) -> None:
    reports.status(text)
    reports.plain(text)


def test_a_report_is_cleaned() -> None:
    value = reports.plain(json.dumps({"program": "a\nb\x1b[0m", "pid": 3, "deep": {"x": 1}, "large": 10**30, "long": "x" * 1000}))
    assert value == {"program": "a?b?[0m", "pid": 3, "large": 0, "long": "x" * 256}


def test_a_status_is_read() -> None:
    text = json.dumps(
        {
            "sequence": 7,
            "pin_set": True,
            "materials": [
                {
                    "name": "web",
                    "alias_id": "0aff",
                    "generations": [{"number": 2, "state": "current", "public_key": "AQI=", "not_after": 5.5}],
                }
            ],
        }
    )
    status = reports.status(text)
    assert (status.sequence, status.pin_set, status.materials[0].alias_id) == (7, True, b"\x0a\xff")
    generation = convert.material("m", status.materials[0]).generations[0]
    assert (generation.number, generation.public_key, generation.not_after.nanos) == (2, b"\x01\x02", 500_000_000)
    assert not generation.HasField("retired_at")


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_every_refusal_of_a_worker_has_its_code() -> None:
    for reason in (*Reason, m.REASON_PHASE, m.REASON_STORAGE, m.REASON_INTERNAL, m.REASON_UNSEALED, m.REASON_HSM):
        error = refused(m.Error(reason, "detail"))
        assert error.reason == reason
        assert errors.code(error).name in {
            "PERMISSION_DENIED",
            "FAILED_PRECONDITION",
            "INVALID_ARGUMENT",
            "UNAVAILABLE",
            "INTERNAL",
        }


def test_a_reason_that_a_worker_may_not_give_is_not_passed_on() -> None:
    assert refused(m.Error("<script>", "x")).reason == "WORKER"


def test_every_error_has_its_code() -> None:
    def walk(cls: type[ServiceError]) -> None:
        for sub in cls.__subclasses__():
            if sub is not errors.Refused and sub.__module__ == errors.__name__:
                errors.code(sub("R", "d"))
            walk(sub)

    walk(ServiceError)


# ---- events ---------------------------------------------------------------------------------------------------------


def with_events(tmp_path: Any, size: int, work: Callable[[Events], Awaitable[None]]) -> None:
    database = Database(tmp_path / "state.db")

    async def run() -> None:
        events = Events(State(database), "host", "begin from now", size)
        await events.start()
        await work(events)
        await events.close()

    asyncio.run(run())
    database.close()


async def take(stream: AsyncIterator[EventRow], count: int) -> list[EventRow]:
    return [await asyncio.wait_for(anext(stream), 2) for _ in range(count)]


def test_a_follower_resumes_where_it_was(tmp_path: Any) -> None:
    async def work(events: Events) -> None:
        for i in range(5):
            events.emit("k", f"m{i % 2}", {"i": i})
        first = next(iter(events._ring)).id
        rows = await take(events.follow(first, ""), 4)
        assert [json.loads(r.detail)["i"] for r in rows] == [1, 2, 3, 4]
        assert [json.loads(r.detail)["i"] for r in await take(events.follow(first, "m1"), 2)] == [1, 3]
        assert [r.id for r in rows] == sorted({r.id for r in rows})

    with_events(tmp_path, 100, work)


def test_a_slow_follower_is_cut_off_with_an_error(tmp_path: Any) -> None:
    async def work(events: Events) -> None:
        stream = events.follow(0, "")
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        events.emit("k")
        await reading
        for _ in range(20):
            events.emit("k")
        with pytest.raises(Exhausted, match="SLOW_CONSUMER"):
            await take(stream, 20)

    with_events(tmp_path, 5, work)


def test_events_that_are_not_kept_are_not_passed_over(tmp_path: Any) -> None:
    async def work(events: Events) -> None:
        for _ in range(20):
            events.emit("k")
        with pytest.raises(Lost, match="EVENTS_LOST"):
            await take(events.follow(1, ""), 1)

    with_events(tmp_path, 5, work)


def test_ids_go_on_after_a_restart(tmp_path: Any) -> None:
    ids: list[int] = []

    async def work(events: Events) -> None:
        events.emit("k")
        ids.extend(row.id for row in events._ring)

    with_events(tmp_path, 5, work)
    with_events(tmp_path, 5, work)
    assert len(ids) == 3 and ids[0] == ids[1] < ids[2]


def test_a_throttle_lets_a_burst_pass_and_counts_the_rest() -> None:
    throttle = Throttle(5, 0.001)
    assert [throttle.admit() for _ in range(8)] == [True] * 5 + [False] * 3
    assert (throttle.take_suppressed(), throttle.take_suppressed()) == (3, 0)


# ---- peers and links ------------------------------------------------------------------------------------------------


def test_only_names_that_a_relay_gives_are_credentials() -> None:
    assert parse_peer("unix-abstract:hsm-0-5-77-0123456789abcdef") == ("hsm", Credentials(0, 5, 77))
    for name in ("unix:", "unix:/x", "unix-abstract:hsm-0-5-77", "unix-abstract:xhsm-0-5-77-0123456789abcdef", "ipv4:127.0.0.1:1"):
        assert parse_peer(name) is None


def with_link(work: Callable[[Link, socket.socket, list[Any]], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        ends: list[Any] = []
        link = Link(ours, ends.append, **options)
        await work(link, theirs, ends)
        link.close()
        theirs.close()

    asyncio.run(run())


def reply(ident: int, record: Any, kind: Kind = Kind.REPLY) -> bytes:
    return encode_frame(Frame(ident, kind, record.encode()))


def test_a_request_has_its_reply_and_its_descriptor() -> None:
    async def work(link: Link, theirs: socket.socket, ends: list[Any]) -> None:
        asked = asyncio.ensure_future(link.ask(m.QueryStatus(), m.Spawned, within=2, take=1))
        await asyncio.sleep(0)
        theirs.recv(100)
        socket.send_fds(theirs, [reply(1, m.Spawned(7))[:5]], [theirs.fileno()])
        theirs.send(reply(1, m.Spawned(7))[5:])
        spawned, descriptors = await asked
        assert (spawned.pid, len(descriptors), link.sender_pid) == (7, 1, os.getpid())
        os.close(descriptors[0])

    with_link(work)


def test_a_reply_in_the_moment_of_giving_up_leaves_no_descriptor() -> None:
    async def work(link: Link, theirs: socket.socket, ends: list[Any]) -> None:
        before = len(os.listdir("/proc/self/fd"))
        asked = asyncio.ensure_future(link.ask(m.QueryStatus(), m.Spawned, within=2, take=1))
        await asyncio.sleep(0)
        theirs.recv(100)
        socket.send_fds(theirs, [reply(1, m.Spawned(7))], [theirs.fileno()])
        link._readable()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert len(os.listdir("/proc/self/fd")) == before

    with_link(work)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff" + bytes(10),
        b"\x00\x00\x00\x05" + bytes(4) + b"\x09",
        reply(9, m.Done()),
        reply(0, m.Event("x", 0, ""), Kind.NOTIFICATION),
        reply(1, m.QueryStatus(), Kind.REQUEST),
    ],
)
def test_what_cannot_be_closes_the_link(data: bytes) -> None:
    async def work(link: Link, theirs: socket.socket, ends: list[Any]) -> None:
        asked = asyncio.ensure_future(link.ask(m.QueryStatus(), m.Done, within=2))
        await asyncio.sleep(0)
        theirs.send(data)
        with pytest.raises(LinkClosed):
            await asked
        assert isinstance(ends[0], Violation)

    with_link(work)


def test_descriptors_that_nobody_expects_close_the_link() -> None:
    async def work(link: Link, theirs: socket.socket, ends: list[Any]) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for count in (MAX_DESCRIPTORS, 1):
            assert not ends
            socket.send_fds(theirs, [b"\0"], [theirs.fileno()] * count)
            await asyncio.sleep(0.01)
        assert isinstance(ends[0], Violation)
        assert len(os.listdir("/proc/self/fd")) <= before

    with_link(work)


def test_a_late_reply_is_thrown_away() -> None:
    async def work(link: Link, theirs: socket.socket, ends: list[Any]) -> None:
        with pytest.raises(TimeoutError):
            await link.ask(m.QueryStatus(), m.Done, within=0.01)
        theirs.send(reply(1, m.Done()))
        asked = asyncio.ensure_future(link.ask(m.QueryStatus(), m.Done, within=2))
        await asyncio.sleep(0.01)
        theirs.send(reply(2, m.Done()))
        await asked
        assert not ends

    with_link(work)


def test_another_process_cannot_speak_in_its_place() -> None:
    async def work(link: Link, theirs: socket.socket, ends: list[Any]) -> None:
        link.expected_pid = os.getpid()
        script = "import os; os.write(1, bytes.fromhex('" + reply(1, m.Done()).hex() + "'))"
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=theirs)
        await process.wait()
        with pytest.raises(LinkClosed):
            await link.ask(m.QueryStatus(), m.Done, within=2)
        assert "spoke in the place" in str(ends[0])

    with_link(work)


def test_many_large_frames_pass_both_ways_in_order() -> None:
    async def work(link: Link, theirs: socket.socket, ends: list[Any]) -> None:
        blob = os.urandom(300_000)
        asked = [asyncio.ensure_future(link.ask(m.LoadState(("a",), (blob,)), m.Done, within=5)) for _ in range(10)]
        await asyncio.sleep(0)
        theirs.setblocking(False)
        loop, size = asyncio.get_running_loop(), 0
        expected = len(encode_frame(Frame(1, Kind.REQUEST, m.LoadState(("a",), (blob,)).encode()))) * 10
        while size < expected:
            size += len(await loop.sock_recv(theirs, 65536))
        for ident in range(1, 11):
            await loop.sock_sendall(theirs, reply(ident, m.Done()))
        await asyncio.gather(*asked)

    with_link(work)
