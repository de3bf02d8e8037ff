"""The words of a ring: what each access compiles to, and what the binding refuses."""

from __future__ import annotations

import mmap
import re
import subprocess
from pathlib import Path

import pytest
from hsmvisord.rings import rings
from hsmvisord.rings.rings import Words
from support.cryptoki import REPOSITORY

SOURCE = REPOSITORY / "daemon/hsmvisord/rings/rings.c"
#: The instruction that has the ordering, by function.
AARCH64 = {"rings_load": r"\bldarh\b", "rings_store": r"\bstlrh\b", "rings_fence": r"\bdmb\s+ish\b", "rings_put": r"\bstr\b"}
X86_64 = {"rings_load": r"\bmovzwl\b", "rings_store": r"\bmov\s+%si,", "rings_fence": r"\b(mfence|lock)\b", "rings_put": r"\bmov\s"}


@pytest.mark.parametrize(("prefix", "expected"), [("aarch64-linux-gnu-", AARCH64), ("", X86_64)], ids=["aarch64", "here"])
def test_orderings_are_in_the_code(prefix: str, expected: dict[str, str], tmp_path: Path) -> None:
    made = tmp_path / "rings.o"
    flags = ["-std=gnu11", "-O2", "-ffreestanding", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([f"{prefix}gcc", *flags, "-c", "-o", made, SOURCE], check=True, timeout=60)
    listing = subprocess.run([f"{prefix}objdump", "-d", made], check=True, capture_output=True, text=True, timeout=60).stdout
    for name, instruction in expected.items():
        body = re.search(rf"<{name}>:\n((?:.+\n)+)", listing)
        assert body, listing
        assert re.search(instruction, body[1]), body[1]


def test_words_are_little_endian_halves_of_the_memory() -> None:
    memory = mmap.mmap(-1, 4096)
    words = Words(memoryview(memory)[8:24], 4)
    words.store(1, 0xABCD)
    words.put(2, 0x01020304)
    rings.fence()
    assert memory[8:24] == bytes.fromhex("0000cdab 00000000 04030201 00000000")
    assert [words.load(index) for index in range(8)] == [0, 0xABCD, 0, 0, 0x0304, 0x0102, 0, 0]
    for bad in (-1, 8):
        with pytest.raises(IndexError):
            words.load(bad)
        with pytest.raises(IndexError):
            words.store(bad, 0)
    for bad in (-1, 4):
        with pytest.raises(IndexError):
            words.put(bad, 0)
    with pytest.raises(BufferError):
        memory.close()
    words.release()
    with pytest.raises(IndexError):
        words.load(0)
    memory.close()


def test_what_is_not_aligned_is_refused() -> None:
    memory = mmap.mmap(-1, 4096)
    for start, alignment in ((1, 2), (2, 4), (3, 2)):
        with pytest.raises(ValueError, match="aligned"):
            Words(memoryview(memory)[start : start + 8], alignment)
    memory.close()
