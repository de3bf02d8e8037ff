"""libhsmvisor-pkcs11.so built with sanitizers, under threads, forks and a module that is replaced again and again."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from support.cryptoki import REPOSITORY
from support.scripted_module import ScriptedModule

SHIM = REPOSITORY / "pkcs11_shim"
SECONDS = 4


def build(sanitizer: str, directory: Path) -> tuple[Path, Path]:
    library, program = directory / "libhsmvisor-pkcs11.so", directory / "stress"
    make = ["make", "-s", "-C", SHIM, f"BUILD={directory}", f"SANITIZE={sanitizer}", library]
    compile_program = [
        "gcc", "-std=c11", "-D_GNU_SOURCE", "-g", "-O1", f"-fsanitize={sanitizer}", f"-I{SHIM}/include",
        REPOSITORY / "tests/support/stress.c", "-o", program, "-ldl", "-pthread",
    ]  # fmt: skip
    for command in (make, compile_program):
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        assert made.returncode == 0, made.stdout
    return library, program


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_threads_forks_and_restarts(sanitizer: str, tmp_path: Path) -> None:
    library, program = build(sanitizer, tmp_path)
    module = ScriptedModule(tmp_path / "guest.sock")
    ended = threading.Event()

    def restart_often() -> None:
        while not ended.wait(0.3):
            module.restart()

    restarter = threading.Thread(target=restart_often)
    restarter.start()
    environment = os.environ | {
        "HSMVISOR_PKCS11_ADDRESS": module.address,
        "TSAN_OPTIONS": "die_after_fork=0 halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
    }
    environment.pop("LD_PRELOAD", None)
    began = time.monotonic()
    ran = subprocess.run(
        [program, library, str(SECONDS), "4"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    ended.set()
    restarter.join()
    module.end()
    assert ran.returncode == 0, f"after {time.monotonic() - began:.1f} s: {ran.stdout[-6000:]}"
