"""The contract of every source of storage keys, and what the file does beyond it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hsmvisord.keyprovider.sources import KEY_SIZE, SOURCES, FileSource, KeySource, SourceError

Open = Callable[[], KeySource]


@pytest.fixture(params=sorted(SOURCES))
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens one and the same source of each kind; a kind that needs more than a path prepares it here."""
    return lambda: SOURCES[request.param](tmp_path / "master.key")


def test_a_storage_key_is_always_the_same_and_its_own(opened: Open) -> None:
    source = opened()
    keys = [source.derive(info) for info in (b"module 1", b"module 2", b"")]
    assert len(set(keys)) == 3 and {len(key) for key in keys} == {KEY_SIZE}
    assert [opened().derive(info) for info in (b"module 1", b"module 2", b"")] == keys


def test_nothing_that_is_printed_holds_a_key(opened: Open) -> None:
    source = opened()
    assert source.derive(b"x").hex() not in repr(source) and len(repr(source)) < 40


def test_derivation_is_rfc_5869(tmp_path: Path) -> None:
    """By hand: HMAC-SHA256 twice.  State that is stored must open with every later version."""
    import hashlib
    import hmac

    key = bytes(range(32))
    path = tmp_path / "master.key"
    path.write_bytes(key)
    path.chmod(0o600)
    extracted = hmac.new(bytes(32), key, hashlib.sha256).digest()
    assert FileSource(path).derive(b"info") == hmac.new(extracted, b"info\1", hashlib.sha256).digest()


@pytest.mark.parametrize(("mode", "size", "says"), [(0o640, 32, "others may read"), (0o600, 31, "31 bytes")])
def test_a_file_that_cannot_be_trusted_is_not_used(tmp_path: Path, mode: int, size: int, says: str) -> None:
    path = tmp_path / "master.key"
    path.write_bytes(bytes(size))
    path.chmod(mode)
    with pytest.raises(SourceError, match=says):
        FileSource(path)


def test_a_file_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    FileSource(tmp_path / "master.key")
    assert (tmp_path / "master.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(SourceError, match="cannot be made"):
        FileSource(tmp_path / "none/master.key")
