"""Notices by webhook and mail, with real servers and both databases: signed, retried, shared by managers, sent after a kill."""

from __future__ import annotations

import asyncio
import contextlib
import email
import itertools
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from email.policy import default
from pathlib import Path
from typing import Any

import pytest
from hsmvisor.manager.history.events import Happened, History, Kind
from hsmvisor.manager.notify import limits, notices
from hsmvisor.manager.notify.channels import Channel
from hsmvisor.manager.notify.notifier import Notifier
from hsmvisor.manager.store import tables
from hsmvisor.manager.store.database import Database
from sqlalchemy import select, update
from support.channels import channels
from support.databases import new_url, opened
from support.postgres import Postgres
from support.receivers import SECRET, HookServer, MailServer, Received, SlowServer


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """One of this module's own: a test stops it."""
    with contextlib.closing(Postgres()) as server:
        yield server


@pytest.fixture
def hooks(tmp_path: Path) -> Iterator[HookServer]:
    with contextlib.closing(HookServer(tmp_path)) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(limits, "POLL", 0.2)


def private(path: Path, text: str) -> str:
    path.touch(0o600)
    path.write_text(text)
    return str(path)


def hook_section(tmp_path: Path, hooks: HookServer, name: str = "ops", **changes: Any) -> dict[str, Any]:
    secret = private(tmp_path / f"{name}.secret", SECRET + "\n")
    return {"name": name, "url": hooks.url, "secret_file": secret, "ca_file": str(hooks.ca_file)} | changes


def mail_section(server: MailServer, **changes: Any) -> dict[str, Any]:
    told = {"name": "mail", "host": "127.0.0.1", "port": server.port, "ca_file": str(server.ca_file)}
    return told | {"sender": "hsmvisor@example.net", "to": ["ops@example.net", "sec@example.net"]} | changes


class Plane:
    def __init__(self, database: Database, channels: list[Channel], **options: Any) -> None:
        self.database, self.channels = database, channels
        self.history = History(database, channels, **({"clock": options["clock"]} if "clock" in options else {}))
        self.notifier = Notifier(database, self.history, channels, **options)
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._running = asyncio.ensure_future(self.notifier.run())

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running
        self._running = None

    async def add(self, kind: Kind = Kind.ROTATED, owner: str = "alice", material: str = "web", **detail: Any) -> int:
        async with self.database.transaction() as connection:
            return await self.history.add(connection, Happened(kind, owner, material=material, detail=detail))

    async def rows(self) -> list[Any]:
        async with self.database.transaction() as connection:
            return list((await connection.execute(select(tables.notices).order_by(tables.notices.c.event_id))).all())

    async def kinds(self) -> list[str]:
        return [event.kind for event in (await self.history.page())[0]]


async def until(holds: Callable[[], Any], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while True:
            told = holds()
            if await told if isinstance(told, Awaitable) else told:
                return
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def plane(url: str, config: dict[str, Any], **options: Any) -> AsyncIterator[Plane]:
    async with opened(url) as database:
        made = Plane(database, channels(config), **options)
        made.start()
        try:
            async with asyncio.timeout(90):
                yield made
        finally:
            await made.stop()
            await made.history.close()


async def empty(plane: Plane) -> bool:
    return not await plane.rows()


# ---- webhooks -----------------------------------------------------------------------------------------------------------


def test_a_webhook_is_signed_and_sent_once(url: str, hooks: HookServer, tmp_path: Path) -> None:
    async def story() -> None:
        config = {"webhooks": [hook_section(tmp_path, hooks, kinds=["rotated", "denied"], owners=["alice"])]}
        async with plane(url, config) as made:
            mine = await made.add(why="its time had come")
            await made.add(Kind.ISSUED)
            await made.add(owner="bob")
            await until(lambda: hooks.received)
            await until(lambda: empty(made))
            (got,) = hooks.received
            assert got.is_signed() and not got.is_signed("whsec_" + "A" * 32)
            assert got.path == "/hook?for=us" and got.headers["content-type"] == "application/json"
            assert got.headers["host"] == hooks.url.split("/")[2]
            assert got.told["type"] == "hsmvisor.rotated" and got.told["data"]["detail"] == {"why": "its time had come"}
            assert got.told["data"]["id"] == mine

    asyncio.run(story())


def test_a_new_secret_beside_the_old_one_counts_at_once(url: str, hooks: HookServer, tmp_path: Path) -> None:
    async def story() -> None:
        section = hook_section(tmp_path, hooks)
        async with plane(url, {"webhooks": [section]}) as made:
            other = "whsec_" + "Q" * 40
            private(tmp_path / "ops.secret", f"{other}\n{SECRET}\n")
            await made.add()
            await until(lambda: hooks.received)
            assert hooks.received[0].is_signed(other) and hooks.received[0].is_signed()

    asyncio.run(story())


def test_it_is_tried_again_after_503_with_the_same_id(url: str, hooks: HookServer, tmp_path: Path) -> None:
    hooks.answer = lambda request: (503, {}) if len(hooks.received) < 4 else (200, {})

    async def story() -> None:
        async with plane(url, {"webhooks": [hook_section(tmp_path, hooks)]}, chance=lambda: 0.0) as made:
            await made.add()
            await until(lambda: len(hooks.received) == 4)
            await until(lambda: empty(made))
            assert len({got.id for got in hooks.received}) == 1 and all(got.is_signed() for got in hooks.received)
            times = [got.at for got in hooks.received]
            pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
            assert pauses[0] >= 0.1 and pauses[1] >= 0.2 and pauses[2] >= 0.4

    asyncio.run(story())


def test_retry_after_is_heard(url: str, hooks: HookServer, tmp_path: Path) -> None:
    hooks.answer = lambda request: (429, {"Retry-After": "3000"})

    async def story() -> None:
        async with plane(url, {"webhooks": [hook_section(tmp_path, hooks)]}) as made:
            await made.add()

            async def failed() -> Any:
                return (await made.rows())[0].attempts

            await until(failed)
            (row,) = await made.rows()
            assert 2900 < row.next_at - time.time() <= 3000 and row.failure == "the receiver answered with HTTP 429"

    asyncio.run(story())


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (302, {"Location": "https://127.0.0.1:1/elsewhere"}, "redirects (HTTP 302), which is not followed"),
        (404, {}, "HTTP 404"),
        (500, {"X": "y" * 70000}, "no HTTP (LineTooLong)"),
        (500, {f"X{i}": "y" for i in range(101)}, "no HTTP (HTTPException)"),
    ],
)
def test_other_answers_are_failures(hooks: HookServer, tmp_path: Path, status: int, headers: dict[str, str], said: str) -> None:
    hooks.answer = lambda request: (status, headers)

    async def story() -> None:
        async with plane(f"sqlite:///{tmp_path}/fleet.db", {"webhooks": [hook_section(tmp_path, hooks)]}) as made:
            await made.add()

            async def failure() -> str:
                return str((await made.rows())[0].failure)

            await until(failure)
            assert said in await failure()
            assert all(got.path == "/hook?for=us" for got in hooks.received)

    asyncio.run(story())


def test_after_410_the_channel_is_off_until_the_next_start(url: str, hooks: HookServer, tmp_path: Path) -> None:
    hooks.answer = lambda request: (410, {})

    async def story() -> None:
        config = {"webhooks": [hook_section(tmp_path, hooks, kinds=["rotated", "channel_off"])]}
        async with plane(url, config) as made:
            first = await made.add()

            async def told() -> bool:
                return "channel_off" in await made.kinds()

            await until(told)
            count = len(hooks.received)
            second = await made.add()
            await asyncio.sleep(0.6)
            assert len(hooks.received) == count
            assert [row.channel for row in await made.rows()] == ["ops", "ops"]
            event = (await made.history.page(kind="channel_off"))[0][0]
            assert event.detail == {"channel": "ops", "why": "the receiver wants no more (HTTP 410)"}
        hooks.answer = lambda request: (200, {})
        async with plane(url, config) as made:
            await until(lambda: empty(made))
            assert sorted(hooks.ids[count:]) == [first, second]

    asyncio.run(story())


@pytest.mark.parametrize(
    ("first", "drip"),
    [
        (b"", b""),
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"x-more: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nx: ", b"y"),
        (b"HTTP/1.1 100 C\r\n\r\n", b"HTTP/1.1 100 C\r\n\r\n"),
    ],
)
def test_a_receiver_that_never_ends_is_cut(tmp_path: Path, first: bytes, drip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FIRST_PAUSE", 100.0)
    slow = SlowServer(first, drip)

    async def story() -> None:
        secret = private(tmp_path / "secret", SECRET)
        section = {"name": "slow", "url": f"http://127.0.0.1:{slow.port}/", "secret_file": secret}
        async with plane(f"sqlite:///{tmp_path}/fleet.db", {"webhooks": [section]}, seconds=1.0) as made:
            began = time.monotonic()
            await made.add()

            async def failure() -> Any:
                return (await made.rows())[0].failure

            await until(failure)
            assert await failure() in ("it took longer than 1 seconds", "the receiver's answer is no HTTP (HTTPException)")
            assert time.monotonic() - began < 20
            await until(lambda: slow.ended == slow.connections == 1)

    with contextlib.closing(slow):
        asyncio.run(story())


def test_a_dead_channel_does_not_delay_another(url: str, hooks: HookServer, tmp_path: Path) -> None:
    async def story() -> None:
        with contextlib.closing(SlowServer()) as slow, contextlib.closing(MailServer(tmp_path)) as mails:
            dead = [hook_section(tmp_path, hooks, f"dead{i}", url=f"http://127.0.0.1:{slow.port}/") for i in range(5)]
            config = {"webhooks": [*dead, hook_section(tmp_path, hooks)], "mails": [mail_section(mails)]}
            async with plane(url, config) as made:
                for _ in range(30):
                    await made.add()
                await until(lambda: len(hooks.received) == 30, 15)
                await until(lambda: mails.mails, 15)
                await until(lambda: slow.connections == 5 * limits.AT_ONCE)
                await asyncio.sleep(0.5)
                assert slow.connections == 5 * limits.AT_ONCE, "bounded"
                began = time.monotonic()
                await made.stop()
                assert time.monotonic() - began < 20
                assert all(row.lease_until == 0 for row in await made.rows()), "all are given back"

    asyncio.run(story())


@pytest.mark.parametrize("trusts", [False, True])
def test_the_receivers_certificate_is_verified(hooks: HookServer, tmp_path: Path, trusts: bool) -> None:
    async def story() -> None:
        changes = {} if trusts else {"ca_file": ""}
        async with plane(f"sqlite:///{tmp_path}/fleet.db", {"webhooks": [hook_section(tmp_path, hooks, **changes)]}) as made:
            await made.add()

            async def failure() -> Any:
                return [row.failure for row in await made.rows() if row.failure]

            await until(lambda: hooks.received if trusts else failure())
            if not trusts:
                assert "the other side's certificate: unable to get local issuer certificate" in (await failure())[0]
                assert hooks.received == []

    asyncio.run(story())


def test_pauses_grow_up_to_a_limit_and_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    async def story() -> None:
        async with opened(f"sqlite:///{tmp_path}/fleet.db") as database:
            longest, shortest = (Notifier(database, History(database), [], chance=lambda c=c: c) for c in (0.0, 1.0))  # type: ignore[misc]
            assert [longest.pause(n) for n in (0, 1, 2, 10)] == [5, 10, 20, 5120]
            assert longest.pause(12) == longest.pause(10**6) == limits.LONGEST_PAUSE
            assert shortest.pause(3) == longest.pause(3) / 2
            attempts, at = 0, 0.0
            while at < limits.GIVE_UP:
                at, attempts = at + longest.pause(attempts), attempts + 1
            assert 10 <= attempts <= 30

    asyncio.run(story())


# ---- giving up ----------------------------------------------------------------------------------------------------------


def test_after_a_day_it_is_given_up_with_an_event(url: str, hooks: HookServer, tmp_path: Path) -> None:
    hooks.answer = lambda request: (500, {})
    skipped = 0.0

    def clock() -> float:
        return time.time() + skipped

    async def story() -> None:
        nonlocal skipped
        config = {"webhooks": [hook_section(tmp_path, hooks)]}
        async with plane(url, config, clock=clock) as made:
            for _ in range(3):
                await made.add()

            async def tried() -> bool:
                return all(row.attempts > 0 for row in await made.rows())

            await until(tried)
            skipped = limits.GIVE_UP
            await until(lambda: empty(made))
            lost = (await made.history.page(kind="notice_lost"))[0]
            assert sum(event.detail["count"] for event in lost) == 3
            assert lost[0].detail["channel"] == "ops" and lost[0].detail["why"] == "the receiver answered with HTTP 500"
            assert set(await made.kinds()) == {"rotated", "notice_lost"}

    asyncio.run(story())


def test_two_dead_channels_do_not_tell_of_one_another_for_ever(url: str, hooks: HookServer, tmp_path: Path) -> None:
    hooks.answer = lambda request: (500, {})
    skipped = 0.0

    def clock() -> float:
        return time.time() + skipped

    async def story() -> None:
        nonlocal skipped
        config = {"webhooks": [hook_section(tmp_path, hooks, name) for name in ("one", "two")]}
        async with plane(url, config, clock=clock) as made:
            await made.add()
            for _ in range(4):

                async def tried() -> bool:
                    return all(row.attempts > 0 for row in await made.rows())

                await until(tried)
                skipped += limits.GIVE_UP
                await asyncio.sleep(1)
            await until(lambda: empty(made))
            assert (await made.kinds()).count("notice_lost") <= 2

    asyncio.run(story())


def test_an_old_notice_is_tried_before_it_is_given_up_and_one_of_no_channel_is_swept(
    url: str, hooks: HookServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SWEEP_EVERY", 0.1)

    async def story() -> None:
        config = {"webhooks": [hook_section(tmp_path, hooks)]}
        async with opened(url) as database:
            history = History(database, channels({"webhooks": [*config["webhooks"], hook_section(tmp_path, hooks, "former")]}))
            ids = []
            for age in (limits.FORGET - 100, limits.FORGET + 100):
                async with database.transaction() as connection:
                    ids.append(await history.add(connection, Happened(Kind.DENIED)))
                    old = update(tables.events).where(tables.events.c.id == ids[-1]).values(at=time.time() - age)
                    await connection.execute(old)
                    gone = tables.notices.delete().where(tables.notices.c.event_id == ids[-1], tables.notices.c.channel == "ops")
                    if age > limits.FORGET:
                        await connection.execute(gone)
        async with plane(url, config) as made:
            await until(lambda: ids[0] in hooks.ids)

            async def told() -> Any:
                return (await made.history.page(kind="notice_lost"))[0]

            await until(told)
            assert (await told())[0].detail["channel"] == "former" and (await told())[0].detail["count"] == 1
            await until(lambda: len(hooks.received) == 2)

            async def is_left() -> bool:
                return [(row.event_id, row.channel) for row in await made.rows()] == [(ids[0], "former")]

            await until(is_left)

    asyncio.run(story())


# ---- several managers, and kills ------------------------------------------------------------------------------------------


def test_two_managers_share_and_each_notice_is_sent_once(url: str, hooks: HookServer, tmp_path: Path) -> None:
    sent, ours = 0, threading.Event()

    def answer(request: Received) -> tuple[int, dict[str, str]]:
        if len(hooks.received) > 5:  # or the other has sent all before we have begun
            assert ours.wait(60)
        time.sleep(0.03)
        return 200, {}

    hooks.answer = answer

    async def story() -> None:
        config = {"webhooks": [hook_section(tmp_path, hooks)]}
        settings = {"url": url, "notify": config, "lease": 60, "die": False}
        async with plane(url, config) as made:
            await made.stop()
            ids = [await made.add() for _ in range(150)]
            real = made.notifier._senders["ops"].send

            async def counted(events: Any) -> None:
                nonlocal sent
                sent += 1
                ours.set()
                await real(events)

            made.notifier._senders["ops"].send = counted  # type: ignore[method-assign]
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "support.notifying", json.dumps(settings), cwd="tests"
            )
            try:
                await until(lambda: hooks.received)
                made.start()
                await until(lambda: empty(made), 40)
            finally:
                process.send_signal(signal.SIGKILL)
                await process.wait()
            assert sorted(hooks.ids) == ids
            assert 0 < sent < 150

    asyncio.run(story())


def test_a_kill_between_sending_and_its_mark(url: str, hooks: HookServer, tmp_path: Path) -> None:
    """It is sent again, with the same id, when the lease of the dead is over."""

    async def story() -> None:
        config = {"webhooks": [hook_section(tmp_path, hooks)]}
        settings = {"url": url, "notify": config, "lease": 3, "die": True}
        async with plane(url, config) as made:
            await made.stop()
            mine = await made.add()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "support.notifying", json.dumps(settings), cwd="tests"
            )
            assert await process.wait() == -signal.SIGKILL
            assert hooks.ids == [mine] and len(await made.rows()) == 1
            made.start()
            await until(lambda: empty(made))
            assert hooks.ids == [mine, mine]
            first, second = hooks.received
            assert first.id == second.id and first.body == second.body and second.is_signed()

    asyncio.run(story())


def test_a_lease_that_is_over_is_not_ours_any_more(url: str, hooks: HookServer, tmp_path: Path) -> None:
    async def story() -> None:
        async with plane(url, {"webhooks": [hook_section(tmp_path, hooks)]}) as made:
            await made.stop()
            await made.add()
            async with made.database.transaction() as connection:
                first = await notices.take(connection, "ops", time.time() + 1, 5e9, digests=False)
                assert first is not None
                assert await notices.take(connection, "ops", 5e9 - 1, 6e9, digests=False) is None
                second = await notices.take(connection, "ops", 5e9, 6e9, digests=False)
                assert second is not None and second.ids == first.ids
                await notices.again(connection, first, 7e9, "late")
                await notices.give_back(connection, first)
                assert await notices.lose(connection, first, 0) == []
            (row,) = await made.rows()
            assert (row.lease_until, row.attempts, row.failure) == (6e9, 0, "")
            async with made.database.transaction() as connection:
                await notices.delivered(connection, first)
            assert await made.rows() == []

    asyncio.run(story())


def test_the_database_goes_away_between_sending_and_its_mark(
    postgres: Postgres, request: pytest.FixtureRequest, hooks: HookServer, tmp_path: Path
) -> None:
    url = new_url("postgresql", request)

    def answer(received: Received) -> tuple[int, dict[str, str]]:
        if len(hooks.received) == 1:
            postgres.stop()
            is_stopped.set()
        return 200, {}

    is_stopped = threading.Event()

    hooks.answer = answer

    async def story() -> None:
        async with plane(url, {"webhooks": [hook_section(tmp_path, hooks)]}) as made:
            await made.add()
            assert await asyncio.to_thread(is_stopped.wait, 30)
            await asyncio.sleep(1)
            await asyncio.to_thread(postgres.start)
            await until(lambda: empty(made))
            assert len(hooks.received) == 1

    asyncio.run(story())


def test_a_stop_in_the_midst_of_work_leaves_the_database_usable(url: str, hooks: HookServer, tmp_path: Path) -> None:
    async def story() -> None:
        async with plane(url, {"webhooks": [hook_section(tmp_path, hooks)]}) as made:
            ids = []
            for i in range(25):
                ids += [await made.add() for _ in range(3)]
                await asyncio.sleep(0.002 * i)
                await made.stop()
                made.start()
            await until(lambda: empty(made))
            assert set(hooks.ids) == set(ids)

    asyncio.run(story())


# ---- mail ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", ["starttls", "tls", "none"])
def test_a_mail_with_a_login(tmp_path: Path, tls: str) -> None:
    async def story() -> None:
        with contextlib.closing(MailServer(tmp_path, tls, "hsm", "hunter2 ")) as server:
            section = mail_section(server, tls=tls, user="hsm", password_file=private(tmp_path / "pass", "hunter2 \n"))
            async with plane(f"sqlite:///{tmp_path}/fleet.db", {"mails": [section]}) as made:
                await made.add(Kind.DENIED, material="wéb\r\nBcc: evil@example.net", why="no rule")
                await until(lambda: server.mails)
                await until(lambda: empty(made))
                (envelope,) = server.mails
                assert envelope.mail_from == "hsmvisor@example.net" and envelope.rcpt_tos == ["ops@example.net", "sec@example.net"]
                assert isinstance(envelope.content, bytes)
                told = email.message_from_bytes(envelope.content, policy=default)
                assert told["subject"] == "hsmvisor: refused by policy: wéb  Bcc: evil@example.net" and told["bcc"] is None
                assert "why:        no rule" in told.get_content()  # type: ignore[attr-defined]
                assert server.logins == [True]

    asyncio.run(story())


def test_many_events_of_a_kind_become_one_mail(url: str, tmp_path: Path) -> None:
    async def story() -> None:
        with contextlib.closing(MailServer(tmp_path)) as server:
            async with plane(url, {"mails": [mail_section(server)]}) as made:
                await made.stop()
                for _ in range(limits.DIGEST_OVER):
                    await made.add(Kind.ISSUED)
                denied = [await made.add(Kind.DENIED, material=f"m{i}") for i in range(limits.DIGEST_OVER + 1)]
                expired = [await made.add(Kind.EXPIRED) for _ in range(limits.DIGEST_MOST + 30)]
                made.start()
                await until(lambda: empty(made), 60)
                told = [email.message_from_bytes(e.content, policy=default) for e in server.mails]  # type: ignore[arg-type]
                subjects = [str(one["subject"]) for one in told]
                assert subjects.count("hsmvisor: a certificate was issued: web") == limits.DIGEST_OVER
                assert subjects.count(f"hsmvisor: refused by policy ({limits.DIGEST_OVER + 1} events)") == 1
                assert subjects.count(f"hsmvisor: a certificate has expired ({limits.DIGEST_MOST} events)") == 1
                assert subjects.count("hsmvisor: a certificate has expired (30 events)") == 1
                assert len(subjects) == limits.DIGEST_OVER + 3
                digest = told[subjects.index(f"hsmvisor: refused by policy ({len(denied)} events)")].get_content()  # type: ignore[attr-defined]
                assert all(f"  {number}  m{i} of alice" in digest for i, number in enumerate(denied))
                assert len(expired) == 230

    asyncio.run(story())


def test_a_mail_is_tried_again_with_the_same_id(url: str, tmp_path: Path) -> None:
    async def story() -> None:
        with contextlib.closing(MailServer(tmp_path)) as server:
            server.refuse = "451 come back later"
            async with plane(url, {"mails": [mail_section(server)]}) as made:
                await made.add()

                async def failure() -> Any:
                    return (await made.rows())[0].failure

                await until(failure)
                assert await failure() == "the server answered with 451: come back later"
                server.refuse = ""
                await until(lambda: server.mails)
                await until(lambda: empty(made))
            tries = [email.message_from_bytes(one.content, policy=default) for one in (*server.refused, *server.mails)]  # type: ignore[arg-type]
            assert len(tries) >= 2 and tries[0]["message-id"] and len({one["message-id"] for one in tries}) == 1

    asyncio.run(story())


@pytest.mark.parametrize("some", [True, False])
def test_recipients_that_the_server_refuses(tmp_path: Path, some: bool) -> None:
    async def story() -> None:
        with contextlib.closing(MailServer(tmp_path)) as server:
            server.refused_recipients = {"ops@example.net"} | (set() if some else {"sec@example.net"})
            async with plane(f"sqlite:///{tmp_path}/fleet.db", {"mails": [mail_section(server)]}) as made:
                await made.add()
                if some:
                    await until(lambda: empty(made))
                    assert [envelope.rcpt_tos for envelope in server.mails] == [["sec@example.net"]]
                else:

                    async def failure() -> Any:
                        return (await made.rows())[0].failure

                    await until(failure)
                    assert await failure() == "the server refuses all recipients (550)"

    asyncio.run(story())


@pytest.mark.parametrize(
    ("first", "drip", "said"),
    [
        (b"", b"", "it took longer than 1 seconds"),
        (b"220-", b"x", "it took longer than 1 seconds"),
        (b"", b"220-x\r\n" * 4000, "the server ended the session (SMTPServerDisconnected)"),
        (b"220 hi\r\n250 hi\r\n", b"", "the server does not offer what is needed (STARTTLS, or a way to log in)"),
        (b"554 no\r\n", b"", "the server answered with 554: no"),
        (b"HTTP/1.1 400 Bad\r\n", b"", "the server answered with -1"),
    ],
)
def test_mail_servers_that_are_none(tmp_path: Path, first: bytes, drip: bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FIRST_PAUSE", 100.0)

    async def story() -> None:
        with contextlib.closing(SlowServer(first, drip)) as slow, contextlib.closing(MailServer(tmp_path)) as other:
            section = mail_section(other, port=slow.port)
            async with plane(f"sqlite:///{tmp_path}/fleet.db", {"mails": [section]}, seconds=1.0) as made:
                await made.add()

                async def failure() -> Any:
                    return (await made.rows())[0].failure

                await until(failure)
                assert said in await failure()

    asyncio.run(story())


# ---- secrets ------------------------------------------------------------------------------------------------------------


def test_no_secret_is_logged_stored_or_told(url: str, hooks: HookServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where servers refuse, and where one says the password back."""
    caplog.set_level(logging.DEBUG)
    hooks.answer = lambda request: (500, {"x-secret": SECRET})

    async def story() -> None:
        with (
            contextlib.closing(MailServer(tmp_path, "starttls", "hsm", "right")) as refusing,
            contextlib.closing(MailServer(tmp_path, "none", "hsm", "hunter2")) as telling,
        ):
            telling.refuse = "550 your password is hunter2"
            password = private(tmp_path / "pass", "hunter2\n")
            logins = {"user": "hsm", "password_file": password}
            config = {
                "webhooks": [hook_section(tmp_path, hooks, url=hooks.url.replace("us", "sesame"))],
                "mails": [
                    mail_section(refusing, ca_file=str(telling.ca_file), name="untrusted", **logins),
                    mail_section(telling, name="telling", tls="none", **logins),
                ],
            }
            async with plane(url, config) as made:
                await made.add(password="hunter2", why=f"with {SECRET}")

                async def tried() -> bool:
                    return all(row.failure for row in await made.rows())

                await until(tried)
                failures = {row.channel: row.failure for row in await made.rows()}
                assert failures["telling"] == "the server answered with 550"
                assert failures["ops"] == "the receiver answered with HTTP 500"
                events, _ = await made.history.page()
            logged = "\n".join(record.getMessage() for record in caplog.records if record.name != "mail.log")  # the test's server
            shown = logged + str(failures) + str(events) + str(hooks.received[0].body)
            assert "the receiver answered with HTTP 500" in logged
            for secret in (SECRET, SECRET[6:], "hunter2", "aHVudGVyMg", "sesame"):
                assert secret not in shown

    asyncio.run(story())
