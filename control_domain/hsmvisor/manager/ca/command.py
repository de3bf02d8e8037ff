"""An authority that is a program: for those that have tools of their own.

It is run for each order, as `PROGRAM issue` or `PROGRAM revoke`, with one JSON object on standard input, and answers with one on
standard output:

    issue   {"order", "csr" (PEM), "profile", "names": ["dns:..."], "lifetime", "replaces" (PEM or "")}
            -> {"chain": [PEM, ...]}, the leaf first; exit status 0
    revoke  {"certificate" (PEM), "reason"}   -> {}; exit status 0

Exit status 75 (EX_TEMPFAIL): not now; {"seconds": N} says when to ask again.  Any other: refused; the last line on standard error
is told.  The program gives the same chain when it is asked again with the same order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Sequence
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.manager.ca import chains, requests
from hsmvisor.manager.ca.interface import Issued, Keep, Later, Order, Reason, Refused, Window

MAX_ANSWER = 1 << 20  #: bytes of standard output
MAX_COMPLAINT = 300  #: characters of standard error that are told
TEMPORARY = 75  #: EX_TEMPFAIL of sysexits.h


class CommandCa:
    kind = "command"

    def __init__(self, command: Sequence[str], seconds: float = 300, environment: dict[str, str] | None = None) -> None:
        """`seconds`: how long the program may take.  It sees PATH, LANG and `environment`, nothing else."""
        self._command, self._seconds = list(command), seconds
        self._environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"} | (environment or {})

    async def issue(self, order: Order, keep: Keep) -> Issued:
        requests.check(order.csr, order.names)
        csr = x509.load_der_x509_csr(order.csr).public_bytes(Encoding.PEM).decode()
        told = {
            "order": order.id,
            "csr": csr,
            "profile": order.profile,
            "names": list(map(str, order.names)),
            "lifetime": order.lifetime,
            "replaces": _pem(order.replaces) if order.replaces else "",
        }
        answer = await self._run("issue", told)
        chain = answer.get("chain")
        if not isinstance(chain, list) or not all(isinstance(item, str) for item in chain):
            raise Later('the program\'s answer has no "chain", a list of certificates in PEM')
        return Issued(chains.checked(chains.of_pem("\n".join(chain)), order))

    async def revoke(self, certificate: bytes, reason: Reason) -> None:
        await self._run("revoke", {"certificate": _pem(certificate), "reason": str(reason)})

    async def window(self, certificate: bytes) -> Window | None:
        return None

    async def close(self) -> None:
        return

    async def _run(self, verb: str, told: dict[str, Any]) -> dict[str, Any]:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                verb,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            raise Later(f"{self._command[0]}: {error.strerror}") from None
        try:
            async with asyncio.timeout(self._seconds):
                out, complaint = await _talk(process, json.dumps(told).encode())
                status = await process.wait()
        except TimeoutError:
            raise Later(f"{self._command[0]} took longer than {self._seconds:.0f} seconds") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.stdin is not None:
                process.stdin.close()
            await process.wait()
        return _answer(status, out, complaint, self._command[0])


async def _talk(process: asyncio.subprocess.Process, told: bytes) -> tuple[bytes, bytes]:
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    reading = asyncio.gather(_bounded(process.stdout), _bounded(process.stderr))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it does not want to know
        process.stdin.write(told)
        await process.stdin.drain()
        process.stdin.close()
    out, complaint = await reading
    return out, complaint


async def _bounded(stream: asyncio.StreamReader) -> bytes:
    """What is more than the limit is read and dropped: the program does not block on it."""
    kept = bytearray()
    while part := await stream.read(65536):
        kept += part[: MAX_ANSWER + 1 - len(kept)]
    return bytes(kept)


def _answer(status: int, out: bytes, complaint: bytes, program: str) -> dict[str, Any]:
    last = next((line for line in reversed(complaint.decode("utf-8", "replace").splitlines()) if line.strip()), "")
    said = "".join(c for c in last if c.isprintable())[:MAX_COMPLAINT] or "it did not say why"
    if status not in (0, TEMPORARY):
        raise Refused(f"{program} ended with {status}: {said}")
    try:
        answer = json.loads(out) if len(out) <= MAX_ANSWER else None
    except ValueError:
        answer = None
    if status == TEMPORARY:
        seconds = answer.get("seconds", 0) if isinstance(answer, dict) else 0
        raise Later(f"{program}: {said}", float(seconds) if isinstance(seconds, int | float) and seconds >= 0 else 0)
    if not isinstance(answer, dict):
        raise Later(f"{program} answered with no JSON object of at most {MAX_ANSWER} bytes")
    return answer


def _pem(der: bytes) -> str:
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM).decode()
