"""Keeping swap off by the control group, on a directory that stands for the kernel's: few machines let a test make a real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hsmvisor.host import swap

OWN = "0::/system.slice/hsmvisor-host.service\n"


class Kernel:
    """`limits`: memory.swap.max of each group, from the root down; None: that group has no memory controller."""

    def __init__(
        self, directory: Path, limits: list[str | None], members: list[int], own: str = OWN, kind: str = "cgroup2"
    ) -> None:
        self.mounts, self.own, root = directory / "mounts", directory / "cgroup", directory / "fs"
        self.mounts.write_text(f"tmpfs /tmp tmpfs rw 0 0\ncgroup {root} {kind} rw 0 0\n")
        self.own.write_text("4:memory:/elsewhere\n" + own)
        self.group = root / "system.slice/hsmvisor-host.service"
        self.group.mkdir(parents=True)
        for group, limit in zip((root, root / "system.slice", self.group), limits, strict=True):
            if limit is not None:
                (group / "memory.swap.max").write_text(limit + "\n")
        (self.group / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in members))

    def keep_out(self) -> str:
        return swap.keep_out(self.mounts, self.own)


@pytest.mark.parametrize("limits", [[None, "max", "0"], [None, "0", "max"]])
def test_it_is_off_already(tmp_path: Path, limits: list[str | None]) -> None:
    kernel = Kernel(tmp_path, limits, [os.getpid(), 7])
    assert kernel.keep_out().startswith("memory.swap.max is 0 in ")
    assert kernel.group.joinpath("memory.swap.max").read_text() == f"{limits[2]}\n"


def test_a_group_of_its_own_is_set(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, [None, "max", "max"], [os.getpid()])
    assert kernel.keep_out() == f"memory.swap.max made 0 in {kernel.group}"
    assert kernel.group.joinpath("memory.swap.max").read_text() == "0"


def test_a_group_with_others_in_it_is_left_alone(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, [None, "max", "max"], [os.getpid(), 1])
    with pytest.raises(swap.CannotKeepOut, match="MemorySwapMax=0"):
        kernel.keep_out()
    assert kernel.group.joinpath("memory.swap.max").read_text() == "max\n"


@pytest.mark.parametrize(
    ("own", "kind", "why"),
    [(OWN, "cgroup2", "no memory controller"), ("1:name=systemd:/\n", "cgroup2", "no cgroup v2"), (OWN, "cgroup", "no cgroup v2")],
)
def test_what_is_missing_is_said(tmp_path: Path, own: str, kind: str, why: str) -> None:
    with pytest.raises(swap.CannotKeepOut, match=why):
        Kernel(tmp_path, [None, None, None], [os.getpid()], own, kind).keep_out()


def test_swap_in_compressed_memory_is_no_disk(tmp_path: Path) -> None:
    table = tmp_path / "swaps"
    table.write_text("Filename Type Size Used Priority\n/dev/zram0 partition 1 0 5\n/dev/sda2 partition 1 0 -2\n")
    assert swap.areas(table) == ["/dev/sda2"]
