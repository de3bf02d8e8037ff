"""The state file: what is stored when, and what is said when it cannot be read or written."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hsmvisor.host import migrations
from hsmvisor.host.database import Database
from hsmvisor.host.state import CREATING, PRESENT, AttachmentRow, ModuleRow, PurgeRow, State
from hsmvisor.serving.errors import Broken, Conflict, Exhausted, StorageUnavailable, WrongState
from hsmvisor.serving.events import EventRow
from hsmvisor.serving.requests import Request
from hsmvisor_rpc.internal.messages import StoreState

M = b"m" * 16


def change(
    version: int, request_id: str = "", result: bytes = b"", put: dict[str, bytes] | None = None, delete: tuple[str, ...] = ()
) -> StoreState:
    put = put or {}
    return StoreState(version, request_id, result, tuple(put), tuple(put.values()), delete)


def asked(request_id: str = "r", content: bytes = b"c") -> Request:
    return Request(request_id, "Method", content)


def with_state(path: Path, work: Callable[[State], Awaitable[None]]) -> None:
    database = Database(path)
    try:
        asyncio.run(work(State(database)))  # type: ignore[arg-type]
    finally:
        database.close()


async def made(state: State, module_id: bytes = M, name: str = "web", number: int = 0) -> None:
    await state.begin_create(module_id, name, number, 1, b"r" * 32, "{}")


def test_pragmas_hold(tmp_path: Path) -> None:
    database = Database(tmp_path / "state.db")
    values = {
        p: database._connection.execute(f"PRAGMA {p}").fetchone()[0] for p in ("journal_mode", "synchronous", "secure_delete")
    }
    assert values == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1}
    assert oct((tmp_path / "state.db").stat().st_mode & 0o777) == "0o600"
    database.close()


def test_a_module_goes_from_intent_to_present_to_gone(tmp_path: Path) -> None:
    async def work(state: State) -> None:
        await made(state)
        assert [(r.name, r.intent, r.version) for r in await state.modules()] == [("web", CREATING, 0)]
        await state.store(M, change(1, put={"a": b"1"}), None)
        await state.finish_create(M, asked(), b"answer")
        assert [(r.intent, r.version) for r in await state.modules()] == [(PRESENT, 1)]
        assert await state.answer(asked()) == b"answer"
        await state.begin_destroy(M)
        with pytest.raises(WrongState):
            await state.store(M, change(2), None)
        await state.remove(M, asked("d"), b"")
        assert await state.modules() == []
        assert await state.sealed(M) == (0, [])

    with_state(tmp_path / "state.db", work)


def test_what_was_removed_is_overwritten_in_every_file(tmp_path: Path) -> None:
    secret = os.urandom(3000)

    def found() -> bool:
        files = [path.read_bytes() for path in tmp_path.iterdir()]
        return any(secret[i : i + 32] in data for data in files for i in range(0, 2900, 32))

    async def work(state: State) -> None:
        await made(state)
        await state.store(M, change(1, put={"a": secret}), None)
        assert found()
        await state.remove(M, None)
        assert not found()

    with_state(tmp_path / "state.db", work)


def test_a_change_is_stored_whole_with_its_answer(tmp_path: Path) -> None:
    async def work(state: State) -> None:
        await made(state)
        await state.store(M, change(1, put={"a": b"1", "b": b"2"}), None)
        await state.store(M, change(2, "x", b"done", put={"b": b"3"}, delete=("a",)), asked())
        assert await state.sealed(M) == (2, [("b", b"3")])
        assert await state.answer(asked()) == b"done"

    with_state(tmp_path / "state.db", work)


def test_versions_follow_each_other(tmp_path: Path) -> None:
    async def work(state: State) -> None:
        await made(state)
        first = change(1, put={"a": b"1"})
        await state.store(M, first, None)
        await state.store(M, first, None)  # it was stored before: done again
        for wrong in (change(1, put={"a": b"other"}), change(0), change(3)):
            with pytest.raises(WrongState):
                await state.store(M, wrong, None)
        with pytest.raises(WrongState):
            await state.store(b"x" * 16, first, None)
        assert await state.sealed(M) == (1, [("a", b"1")])

    with_state(tmp_path / "state.db", work)


def test_how_much_a_module_may_have_is_counted_through_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsmvisor.host.limits.MAX_MODULE_STATE", 100)

    async def work(state: State) -> None:
        await made(state)
        await state.store(M, change(1, put={"a": bytes(60), "b": bytes(40)}), None)  # at the limit
        for more in ({"a": bytes(61)}, {"c": b"1"}):
            with pytest.raises(Exhausted):
                await state.store(M, change(2, put=more), None)
        await state.store(M, change(2, put={"a": bytes(10)}, delete=("b", "b", "nothing")), None)
        with pytest.raises(Exhausted):
            await state.store(M, change(3, put={"b": bytes(91)}), None)
        await state.store(M, change(3, put={"b": bytes(90)}, delete=("b",)), None)
        with pytest.raises(Exhausted):
            await state.store(M, change(4, put={"c": b"1"}), None)
        again = State(state._database)  # a service that was started again counts the same
        with pytest.raises(Exhausted):
            await again.store(M, change(4, put={"c": b"1"}), None)
        await again.store(M, change(4, delete=("a",)), None)
        await again.store(M, change(5, put={"c": bytes(10)}), None)

    with_state(tmp_path / "state.db", work)


def test_records_that_cannot_be_are_refused_and_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsmvisor.host.limits.MAX_MODULE_STATE", 100)

    async def work(state: State) -> None:
        await made(state)
        await state.store(M, change(1, put={"a": bytes(90)}), None)
        with pytest.raises(Exhausted):
            await state.store(M, change(2, "x", b"", put={"b": bytes(20)}), asked())
        for wrong in (
            StoreState(2, "", b"", ("a",), (), ()),
            StoreState(2, "", b"", ("a", "a"), (b"", b""), ()),
            change(2, put={"": b""}),
        ):
            with pytest.raises(WrongState):
                await state.store(M, wrong, None)
        assert await state.sealed(M) == (1, [("a", bytes(90))])
        assert await state.answer(asked()) is None

    with_state(tmp_path / "state.db", work)


def test_a_request_id_belongs_to_its_content(tmp_path: Path) -> None:
    async def work(state: State) -> None:
        await state.record(asked(), b"answer")
        with pytest.raises(Conflict):
            await state.answer(asked(content=b"other"))
        await made(state)
        with pytest.raises(Conflict):
            await state.store(M, change(1, "x"), asked(content=b"other"))
        assert (await state.sealed(M))[0] == 0

    with_state(tmp_path / "state.db", work)


def test_everything_survives_closing(tmp_path: Path) -> None:
    async def first(state: State) -> None:
        await made(state)
        await state.store(M, change(1, put={"a": b"1"}), None)
        await state.add_events([EventRow(5, 1, "k", "web", "{}")])
        assert await state.take_nonce("key", b"n", 10)

    async def second(state: State) -> None:
        assert await state.sealed(M) == (1, [("a", b"1")])
        assert [e.id for e in await state.events()] == [5]
        assert not await state.take_nonce("key", b"n", 10)
        await state.prune(11)
        assert await state.take_nonce("key", b"n", 10)

    with_state(tmp_path / "state.db", first)
    with_state(tmp_path / "state.db", second)


def test_events_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsmvisor.serving.limits.EVENT_RING", 3)

    async def work(state: State) -> None:
        await state.add_events([EventRow(i, 1, "k", "", "{}") for i in range(1, 10)])
        assert [e.id for e in await state.events()] == [7, 8, 9]

    with_state(tmp_path / "state.db", work)


# ---- files that are not as they should be ---------------------------------------------------------------------------


def refused(path: Path, reason: str) -> None:
    """Opening says why, and not one byte of the file changes."""
    before = path.read_bytes()
    with pytest.raises(Broken) as caught:
        Database(path)
    assert caught.value.reason == reason
    assert str(path) in caught.value.detail
    assert path.read_bytes() == before


def filled(path: Path) -> None:
    async def work(state: State) -> None:
        for i in range(20):
            await made(state, bytes([i]) * 16, f"m{i}", i)
            await state.store(bytes([i]) * 16, change(1, put={"a": os.urandom(5000)}), None)

    with_state(path, work)


def test_an_empty_file_is_a_truncated_one(tmp_path: Path) -> None:
    (tmp_path / "state.db").touch()
    refused(tmp_path / "state.db", "STATE_CORRUPT")


@pytest.mark.parametrize("keep", [50, 4096, 30_000, 100_000])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "state.db"
    filled(path)
    assert path.stat().st_size > keep
    os.truncate(path, keep)
    refused(path, "STATE_CORRUPT")


def test_a_corrupted_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    filled(path)
    data = bytearray(path.read_bytes())
    for i in range(4096, 3 * 4096):
        data[i] ^= 0x5A
    path.write_bytes(data)
    refused(path, "STATE_CORRUPT")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"not a database" * 1000)
    refused(path, "STATE_CORRUPT")
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (x)")
    refused(path, "STATE_FOREIGN")


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    filled(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.execute("PRAGMA user_version = 99")
    connection.commit()
    connection.close()
    with pytest.raises(Broken) as caught:
        Database(path)
    assert caught.value.reason == "STATE_NEWER"
    assert "99" in caught.value.detail


def test_an_older_schema_is_migrated_in_one_step_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.db"
    filled(path)
    steps = migrations.STEPS
    monkeypatch.setattr(migrations, "STEPS", (*steps, ("ALTER TABLE modules ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue'",)))
    database = Database(path)
    assert database.migrated_from == len(steps)
    assert database._connection.execute("SELECT DISTINCT colour FROM modules").fetchall() == [("blue",)]
    database.close()
    broken = ("CREATE TABLE half (x) STRICT_TYPO", "never reached")
    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, ("CREATE TABLE first (x)", *broken)))
    with pytest.raises(Broken):
        Database(path)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'first'").fetchone()[0] == 0
    assert connection.execute("PRAGMA user_version").fetchone()[0] == len(steps) + 1
    connection.close()


def test_an_attachment_is_kept_with_its_module(tmp_path: Path) -> None:
    def row(module_id: bytes, qmp: str) -> AttachmentRow:
        return AttachmentRow(module_id, qmp, "", "rp0", "hsmvisor-web", "hsmvisor-web", 7)

    async def work(state: State) -> None:
        await made(state)
        await state.attach(row(M, "/one"), asked("1"), b"")
        await state.attach(row(M, "/two"), asked("2"), b"")
        assert await state.attachments() == [row(M, "/two")]
        new = ModuleRow(b"n" * 16, "web", 0, 1, b"s" * 32, "{}", PRESENT, 0)
        await state.replace(M, new, asked("3"), b"")
        assert await state.attachments() == [row(new.module_id, "/two")]
        await state.detach(new.module_id, asked("4"), b"")
        assert await state.attachments() == []
        await state.attach(row(new.module_id, "/three"), asked("5"), b"")
        assert [await state.answer(asked(ident)) for ident in "12345"] == [b""] * 5
        await state.remove(new.module_id, None)
        assert await state.attachments() == []

    with_state(tmp_path / "state.db", work)


def test_a_state_without_attachments_gets_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.db"
    with monkeypatch.context() as earlier:
        earlier.setattr(migrations, "STEPS", migrations.STEPS[:2])
        filled(path)
    database = Database(path)
    assert database.migrated_from == 2
    state = State(database)
    module, *_ = asyncio.run(state.modules())
    assert asyncio.run(state.attachments()) == []
    asyncio.run(state.attach(AttachmentRow(module.module_id, "/q", "", "rp0", "d", "c", 1), asked("attach"), b""))
    assert len(asyncio.run(state.attachments())) == 1
    database.close()


def test_attachments_of_the_release_before_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.db"
    with monkeypatch.context() as earlier:
        earlier.setattr(migrations, "STEPS", migrations.STEPS[:3])
        filled(path)
        database = Database(path)
        sql = "INSERT INTO attachments SELECT module_id, '/q', '', 'rp0', 'd', 'c', 1 FROM modules LIMIT 1"
        asyncio.run(database.run(lambda c: c.execute(sql)))
        database.close()
    database = Database(path)
    state = State(database)
    (kept,) = asyncio.run(state.attachments())
    assert kept == AttachmentRow(kept.module_id, "/q", "", "rp0", "d", "c", 1, "")
    hybrid = AttachmentRow(kept.module_id, "", "", "", "", "", 2, "/srv/vm/v.sock")
    asyncio.run(state.attach(hybrid, asked("attach"), b""))
    assert asyncio.run(state.attachments()) == [hybrid]
    database.close()


def test_what_is_left_in_an_hsm_is_noted_with_the_step_that_forgets_the_module(tmp_path: Path) -> None:
    purge = PurgeRow(M, "web", "rack")

    async def work(state: State) -> None:
        await made(state)
        assert await state.purges() == []
        new = ModuleRow(b"n" * 16, "web", 0, 1, b"s" * 32, "{}", PRESENT, 0)
        await state.replace(M, new, asked("1"), b"", purge)
        await state.remove(new.module_id, asked("2"), purge=PurgeRow(new.module_id, "web", "rack"))
        assert await state.purges() == [purge, PurgeRow(new.module_id, "web", "rack")]
        await state.remove(new.module_id, None, purge=PurgeRow(new.module_id, "web", "rack"))  # once is enough
        await state.purged(M)
        assert await state.purges() == [PurgeRow(new.module_id, "web", "rack")]

    with_state(tmp_path / "state.db", work)


def test_a_state_without_purges_gets_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.db"
    with monkeypatch.context() as earlier:
        earlier.setattr(migrations, "STEPS", migrations.STEPS[:4])
        filled(path)
    database = Database(path)
    assert database.migrated_from == 4
    assert asyncio.run(State(database).purges()) == []
    database.close()


def test_a_creation_that_was_cut_off_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "state.db.new").write_bytes(b"half")
    Database(tmp_path / "state.db").close()
    assert not (tmp_path / "state.db.new").exists()


def test_a_full_disk_changes_nothing_and_is_said(tmp_path: Path) -> None:
    async def work(state: State) -> None:
        await made(state)
        await state.store(M, change(1, put={"a": b"1"}), None)
        connection = state._database._connection
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to say: full
        with pytest.raises(StorageUnavailable) as caught:
            await state.store(M, change(2, put={"b": bytes(1_000_000)}), None)
        assert "full" in caught.value.detail
        assert await state.sealed(M) == (1, [("a", b"1")])
        connection.execute("PRAGMA max_page_count = 1000000")
        await state.store(M, change(2, put={"b": bytes(1_000_000)}), None)

    with_state(tmp_path / "state.db", work)
