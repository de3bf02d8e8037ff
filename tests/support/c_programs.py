"""Our C programs that guests run, compiled on the machine of the tests: a guest of scripts/guest-image is the same Debian."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.guest import REPOSITORY


def _compiled(source: str, directory: Path, *more: str) -> Path:
    program = directory / Path(source).stem
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", str(program), str(REPOSITORY / source), *more]
    subprocess.run(command, check=True)
    return program


def build_stream_echo(directory: Path) -> Path:
    """Sends, echoes, compares and times what goes over a stream."""
    return _compiled("tests/support/stream_echo.c", directory)


def build_p11bench(directory: Path) -> Path:
    """Signs on and on with any PKCS#11 library."""
    return _compiled("scripts/benchlib/p11bench.c", directory, *_cryptoki(), "-ldl")


def build_tokenbench(directory: Path) -> Path:
    """Times single calls of any PKCS#11 library."""
    calls = REPOSITORY / "scripts/benchlib/tokencalls.c"
    return _compiled("scripts/benchlib/tokenbench.c", directory, str(calls), *_cryptoki(), "-ldl")


def _cryptoki() -> list[str]:
    return subprocess.run(["pkg-config", "--cflags", "p11-kit-1"], check=True, capture_output=True, text=True).stdout.split()
