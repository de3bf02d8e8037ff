"""Checks that an operator configured: a program that looks whether a new generation really serves.

It is run with one JSON object on standard input: {"material", "owner", "generation", "names", "resources", "certificate" (PEM)}.
Exit status 0: all is well.  Anything else, or no end in time, is a failure; its last line is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hsmvisor.serving.text import clean

MAX_OUTPUT = 64 * 1024


@dataclass(frozen=True)
class HealthCheck:
    name: str
    command: Sequence[str]
    seconds: float = 60

    async def run(self, told: dict[str, Any]) -> str:
        """Returns why it is not well, empty where it is."""
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"}
        pipe, together = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
        try:
            process = await asyncio.create_subprocess_exec(
                *self.command, stdin=pipe, stdout=pipe, stderr=together, env=environment, start_new_session=True
            )
        except OSError as error:
            return f"health check {self.name} cannot be run: {error.strerror}"
        try:
            async with asyncio.timeout(self.seconds):
                out = await _talk(process, json.dumps(told).encode())
                status = await process.wait()
        except TimeoutError:
            return f"health check {self.name} took longer than {self.seconds:.0f} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if status == 0:
            return ""
        last = next((line for line in reversed(out.decode("utf-8", "replace").splitlines()) if line.strip()), "")
        return f"health check {self.name} ended with {status}: {clean(last) or 'it did not say why'}"


async def _talk(process: asyncio.subprocess.Process, told: bytes) -> bytes:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(told)
        await process.stdin.drain()
    process.stdin.close()
    kept = bytearray()
    while part := await process.stdout.read(4096):
        kept = (kept + part)[-MAX_OUTPUT:]
    return bytes(kept)
