"""Files that their owner alone may read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hsmvisor.files import OthersRead, read_private, write_private


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_private(path, b"0123456789")
    assert read_private(path) == b"0123456789" and read_private(path, 4) == b"0123"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_that_is_others_too_is_not_read(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    write_private(path, b"x")
    path.chmod(mode)
    with pytest.raises(OthersRead, match=f"others may read {path} .mode {mode:o}"):
        read_private(path)


@pytest.mark.timeout(10)
def test_what_is_no_file_is_neither_read_nor_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "directory").mkdir(mode=0o700)
    for path in tmp_path.iterdir():
        with pytest.raises(OSError, match=r"regular file|directory"):
            read_private(path)


def test_the_mode_is_that_of_the_file_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that takes its place after it was opened changes nothing."""
    path, other = tmp_path / "secret", tmp_path / "other"
    write_private(path, b"mine")
    path.chmod(0o644)
    write_private(other, b"another")
    opened = os.open

    def open_and_swap(*arguments: int, **options: int) -> int:
        descriptor = opened(*arguments, **options)  # type: ignore[arg-type]
        other.rename(path)
        return descriptor

    monkeypatch.setattr(os, "open", open_and_swap)
    with pytest.raises(OthersRead):
        read_private(path)
