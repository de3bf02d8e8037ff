"""A short run of the coverage-guided fuzzer over everything that a module can answer (pkcs11_shim/fuzz/fuzz_reply.c)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from fuzz.command import most_mb

SHIM = Path(__file__).parents[2] / "pkcs11_shim"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("clang"), reason="clang is not installed (scripts/setup --dev installs it)")
def test_no_answer_harms_the_application(tmp_path: Path) -> None:
    command = ["make", "-s", "-C", SHIM, f"BUILD={tmp_path}", "fuzz"]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert made.returncode == 0, made.stdout
    shutil.copytree(SHIM / "fuzz/corpus", tmp_path / "corpus")
    limits = ["-runs=20000", "-max_len=2000", "-max_total_time=20", "-timeout=5", f"-rss_limit_mb={most_mb()}", "-seed=1"]
    ran = subprocess.run(
        [tmp_path / "fuzz_reply", "corpus", *limits], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert ran.returncode == 0, ran.stdout.decode(errors="replace")[-4000:]
