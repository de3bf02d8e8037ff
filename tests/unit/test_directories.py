"""Directories that a service has to itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hsmvisor.serving import directories
from hsmvisor.serving.errors import Broken


def test_a_directory_gets_its_mode_and_keeps_another_ones(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    directories.make(path, 0o755)
    assert path.stat().st_mode & 0o777 == 0o755
    directories.make(path)
    assert path.stat().st_mode & 0o777 == 0o755
    directories.make(path, 0o700)
    assert path.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(Broken, match=f"{tmp_path}/file: File exists"):
        directories.make(tmp_path / "file", 0o700)


def test_a_lock_is_one_services_and_says_whose(tmp_path: Path) -> None:
    path = tmp_path / "{odd}"
    held = directories.lock(path, "service", f"runs with {path}")
    with pytest.raises(Broken, match=f"another service .pid {os.getpid()}. runs with {tmp_path}/.odd."):
        directories.lock(path, "service", f"runs with {path}")
    os.close(held)
    os.close(directories.lock(path, "service", ""))
