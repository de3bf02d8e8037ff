"""The backup's file, and the last steps of a restore cut off at each of them."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import sqlite3
import time
from pathlib import Path

import pytest
from hsmvisor.host import backup_file, restored
from hsmvisor.host.backup_file import CHUNK, MEMBERS, BadBackup, Manifest, WrongKey
from hsmvisor.host.config import Config
from hsmvisor.host.database import Database
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.restored import READY, Note
from hsmvisor.host.roles import Role
from hsmvisor.host.state import State, forbid_signed_until
from hsmvisor.serving.errors import Unauthenticated
from hsmvisor.serving.signatures import KnownKey, Signatures
from hsmvisor_rpc.v1 import request_signing

KEY = b"k" * 32
HOST = HostIdentity(b"h" * 32)


def made(host_key: bytes = b"h" * 32, state: bytes = b"s" * 5000) -> bytes:
    def describe(backup_id: bytes, salt: bytes, sizes: tuple[int, ...], digests: tuple[bytes, ...]) -> Manifest:
        return Manifest(
            backup_id, HOST.public, 1, "0.1.0", 1, "file 00", salt, 7, "0" * 64, ("web-1",), MEMBERS, sizes, digests
        )  # fmt: skip

    out = io.BytesIO()
    backup_file.write(out, (io.BytesIO(host_key), io.BytesIO(state)), KEY, HOST.sign, describe)
    return out.getvalue()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_what_was_packed_comes_out(tmp_path: Path, size: int) -> None:
    state = os.urandom(size)
    file = io.BytesIO(made(state=state))
    manifest = backup_file.verify(file)
    assert (manifest.modules, manifest.audit_sequence) == (("web-1",), 7)
    backup_file.unpack(file, manifest, KEY, tmp_path)
    assert (tmp_path / "state.db").read_bytes() == state and (tmp_path / "host.key").read_bytes() == b"h" * 32


def test_each_byte_counts() -> None:
    whole = made(state=b"s" * 100)
    for at in range(len(whole)):
        altered = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        with pytest.raises(BadBackup):
            backup_file.verify(io.BytesIO(altered))
        with pytest.raises(BadBackup):
            backup_file.verify(io.BytesIO(whole[:at]))
    with pytest.raises(BadBackup):
        backup_file.verify(io.BytesIO(whole + b"x"))


def test_another_key_opens_nothing_and_two_files_share_no_key(tmp_path: Path) -> None:
    one, other = made(), made()
    file = io.BytesIO(one)
    with pytest.raises(WrongKey):
        backup_file.unpack(file, backup_file.verify(file), b"x" * 32, tmp_path)
    at, length = len(b"hsmvisor-backup 1\n"), 32 + 16
    assert one[at : at + length] != other[at : at + length]
    mixed = io.BytesIO(other[:at] + one[at : at + length] + other[at + length :])
    (tmp_path / "host.key").unlink()
    with pytest.raises(WrongKey):
        backup_file.unpack(mixed, backup_file.read_manifest(io.BytesIO(other)), KEY, tmp_path)


class Cut(Exception):
    pass


def unpacked(directory: Path) -> Config:
    """A state with all that may be there, and a restore that has happened but of which nothing is moved yet."""
    config = Config(state_directory=str(directory))
    for name in ("state.db", "state.db-wal", "state.db-shm", "host.key", "audit.log", "audit.log.000000000001", "audit.log.head"):
        (directory / name).write_text(f"old {name}")
    ready = directory / READY
    ready.mkdir()
    for name in MEMBERS:
        (ready / name).write_text(f"new {name}")
    Note("id", "host", 1, 1, 2, "uid:0", "", "replaced", True, 7, "0" * 64).write(ready / restored.NOTE)
    return config


def test_a_restore_cut_off_at_any_move_is_finished_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, cuts = restored.move, 0
    for number in range(100):
        directory = tmp_path / str(number)
        directory.mkdir()
        config, left = unpacked(directory), number

        def move(source: Path, target: Path) -> None:
            nonlocal left
            if not left:
                raise Cut
            left -= 1
            real(source, target)

        monkeypatch.setattr(restored, "move", move)
        try:
            restored.finish(config)
        except Cut:
            cuts += 1
        monkeypatch.setattr(restored, "move", real)
        note = restored.finish(config)
        assert note is not None and note.backup == "id"
        assert {p.name for p in directory.iterdir()} == {"state.db", "host.key", "restored.json", "replaced"}
        assert all((directory / name).read_text() == f"new {name}" for name in MEMBERS)
        aside = {p.name: p.read_text() for p in (directory / "replaced").iterdir()}
        assert len(aside) == 7 and all(text == f"old {name}" for name, text in aside.items())
        restored.forget(config)
        assert restored.finish(config) is None
        if left:
            break
    assert cuts == 10  # 7 old files, 2 new ones, the note


def test_a_restored_host_takes_no_request_that_it_may_have_seen(tmp_path: Path) -> None:
    """The nonces of the lost time are lost: what was signed up to then, by a clock as far off as is borne, is refused."""
    Database(tmp_path / "state.db").close()
    restored_at, skew = int(time.time()), 60
    with sqlite3.connect(tmp_path / "state.db") as connection:
        forbid_signed_until(connection, restored_at + skew, skew)
    connection.close()
    database = Database(tmp_path / "state.db")
    nonces = iter(range(100))

    async def asked(signed_at: int, now: int) -> None:
        state = State(database)
        await state.prune(now)
        known = {"ops": KnownKey("ops", frozenset({Role.OPERATOR}), lambda signature, covered: True)}
        metadata = {
            request_signing.KEY: "ops",
            request_signing.TIME: str(signed_at),
            request_signing.NONCE: next(nonces).to_bytes(request_signing.NONCE_SIZE, "big").hex(),
            request_signing.SIGNATURE: "00",
        }
        await Signatures(known, skew, state, "host", lambda: now).verify("/m", b"", metadata)

    try:
        for signed_at, now in (
            (restored_at - 30, restored_at),
            (restored_at + 60, restored_at + 1),
            (restored_at + 60, restored_at + 120),
        ):
            with pytest.raises(Unauthenticated, match="restored from a backup"):
                asyncio.run(asked(signed_at, now))
        asyncio.run(asked(restored_at + 61, restored_at + 61))
        asyncio.run(asked(restored_at + 1000, restored_at + 1000))
    finally:
        database.close()


def test_the_manifest_names_its_host() -> None:
    assert backup_file.verify(io.BytesIO(made())).host_id == hashlib.sha256(HOST.public).digest()
