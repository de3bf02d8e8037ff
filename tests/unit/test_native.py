"""Our own C libraries are those of this Python, and whoever has not built them is told how."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from hsmvisord import native


def test_that_of_this_python_is_found_beside_its_module(tmp_path: Path) -> None:
    for suffix in (".cpython-39-x86_64-linux-gnu.so", sysconfig.get_config_var("EXT_SUFFIX")):
        (tmp_path / f"_mine{suffix}").touch()
    assert native.library(str(tmp_path / "mine.py"), "_mine") == tmp_path / f"_mine{sysconfig.get_config_var('EXT_SUFFIX')}"


def test_one_of_another_python_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "_mine.cpython-39-x86_64-linux-gnu.so").touch()
    with pytest.raises(ImportError, match="scripts/setup"):
        native.library(str(tmp_path / "mine.py"), "_mine")
