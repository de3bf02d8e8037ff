"""libhsmvisor-pkcs11.so built with sanitizers, under threads, forks and a module that is replaced again and again."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import pytest
from support.cryptoki import REPOSITORY
from support.scripted_module import ScriptedModule
from support.usb_bus import UsbBus, build, claimed

SHIM = REPOSITORY / "pkcs11_shim"
SECONDS = 4


def build_stress(sanitizer: str, directory: Path) -> Path:
    program = directory / "stress"
    command = [
        "gcc", "-std=c11", "-D_GNU_SOURCE", "-g", "-O1", f"-fsanitize={sanitizer}", f"-I{SHIM}/include",
        REPOSITORY / "tests/support/stress.c", "-o", program, "-ldl", "-pthread",
    ]  # fmt: skip
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert made.returncode == 0, made.stdout
    return program


@pytest.mark.slow
@pytest.mark.parametrize("usb", [False, True], ids=["unix", "usb"])
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_threads_forks_and_restarts(sanitizer: str, usb: bool, tmp_path: Path) -> None:
    built, program = build(tmp_path, sanitizer), build_stress(sanitizer, tmp_path)
    module = ScriptedModule(tmp_path / "guest.sock")
    bus = UsbBus(built)
    node = bus.plug("VSM-1", module.path)
    ended = threading.Event()

    def restart_often() -> None:
        while not ended.wait(0.3):
            module.restart()

    restarter = threading.Thread(target=restart_often)
    restarter.start()
    environment = bus.environment("usb:serial=VSM-1" if usb else module.address) | {
        "TSAN_OPTIONS": "die_after_fork=0 halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
    }
    environment.pop("LD_PRELOAD", None)
    quiet = ["quiet"] if usb else []  # forks by programs without sanitizers: test_shim_usb.py
    began = time.monotonic()
    ran = subprocess.run(
        [program, built.library, str(SECONDS), "4", *quiet],
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
    assert claimed(node) == set()
