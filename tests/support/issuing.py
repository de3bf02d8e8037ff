"""An issuer with what a test asks of it: modules to seal to, and a manager of its own process where its memory is searched."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_der_private_key
from hsmvisor.manager.issuer import client
from hsmvisor.manager.issuer.calls import Ready, SealTo
from hsmvisor.manager.issuer.client import Issuer, Made
from hsmvisor.manager.issuer.settings import FileEscrow, Settings, TokenEscrow
from hsmvisor.serving.measures import Measure
from hsmvisor_rpc.sealed.envelope import EnvelopeContext, RecipientKey, recipient_fingerprint
from support.certificates import PrivateKey
from support.processes import descendants
from support.softhsm import TOKEN, Token

EXPIRES = 2_000_000_000
PROGRAM = Path(__file__).parent.parent / "integration" / "programs" / "manager_of_issuer.py"


@dataclass(frozen=True)
class Target:
    """A module that is sealed to, with the key that only it has."""

    number: int
    key: RecipientKey = field(default_factory=RecipientKey)
    material: str = "web"
    generation: int = 1

    @property
    def seal_to(self) -> SealTo:
        host, module = self.number.to_bytes(32, "big"), self.number.to_bytes(16, "big")
        return SealTo(host, module, self.key.public, self.material, self.generation, EXPIRES)

    def opened(self, envelope: bytes) -> PrivateKey:
        """Raises Refusal."""
        to = self.seal_to
        fingerprint = recipient_fingerprint(to.recipient)
        context = EnvelopeContext(to.host_id, to.module_id, fingerprint, to.material, to.generation, to.expires_at)
        key: Any = load_der_private_key(self.key.open(envelope, context).pkcs8, None)
        return key


def targets(count: int) -> list[Target]:
    return [Target(number) for number in range(count)]


def seal_to(modules: Sequence[Target]) -> list[SealTo]:
    return [one.seal_to for one in modules]


def many(count: int) -> list[SealTo]:
    """For one module's key: what is sealed is not opened."""
    recipient = RecipientKey().public
    return [SealTo(n.to_bytes(32, "big"), n.to_bytes(16, "big"), recipient, "web", 1, EXPIRES) for n in range(count)]


def file_settings(directory: Path) -> Settings:
    return Settings(directory / "issuer.key", FileEscrow(directory / "escrow.key"))


def token_settings(directory: Path, at: Token, **others: Any) -> Settings:
    """`others` in the place of the right ones."""
    told: dict[str, Any] = {"library": Path(at.library), "token": TOKEN, "pin_file": at.pin_file}
    told |= {"environment": at.environment, "writes": (at.directory / "tokens",)} | others
    return Settings(directory / "issuer.key", TokenEscrow(**told))


def pid_of(issuer: Issuer) -> int:
    """0: none runs."""
    return issuer._link.process.pid if issuer._link is not None else 0


def ready_of(issuer: Issuer) -> Ready:
    """What it told of itself when it was started, or later of its token."""
    assert issuer._ready is not None
    return issuer._ready


def measures_of(issuer: Issuer) -> tuple[Measure, ...]:
    """What it gave up, and what it could not."""
    return client._measures(ready_of(issuer))


def issuer_of(pid: int) -> int:
    """The issuer below a manager; 0: none."""
    below = {one: title for one, title in descendants(pid).items() if title == "hsmvisor-manager: issuer"}
    return next((one for one in below if not any(one in descendants(other) for other in below if other != one)), 0)


def children_of(issuer: int) -> list[int]:
    return list(descendants(issuer))


class Manager:
    """A manager's process with an issuer below it: what it is asked, it asks its issuer."""

    def __init__(self, directory: Path, *command: str) -> None:
        self.process = subprocess.Popen(
            [*command, sys.executable, str(PROGRAM), str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.recipient = bytes.fromhex(self._read()["recipient"])

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def issuer(self) -> int:
        return issuer_of(self.pid)

    def begin(self, operation: str, modules: Sequence[Target], **told: Any) -> None:
        """Asks, and does not wait."""
        assert self.process.stdin is not None
        encoded = [one.seal_to.encode().hex() for one in modules]
        self.process.stdin.write(json.dumps({"operation": operation, "targets": encoded} | told) + "\n")
        self.process.stdin.flush()

    def result(self) -> Made:
        answer = self._read()
        assert "error" not in answer, answer
        of_lists = {name: tuple(map(bytes.fromhex, answer[name])) for name in ("envelopes", "certificates")}
        return Made(**of_lists, **{name: bytes.fromhex(answer[name]) for name in ("public_key", "csr", "wrapped")})

    def ask(self, operation: str, modules: Sequence[Target], **told: Any) -> Made:
        self.begin(operation, modules, **told)
        return self.result()

    def held(self) -> bytes:
        """A key (PKCS #8) that this manager holds on purpose."""
        self.begin("hold", ())
        return bytes.fromhex(self._read()["held"])

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Issuer]:
    issuer = Issuer(settings)
    await issuer.start()
    try:
        yield issuer
    finally:
        await issuer.close()


def tell(directory: Path, story: Callable[[Issuer], Awaitable[None]]) -> None:
    async def run() -> None:
        async with running(file_settings(directory)) as issuer:
            await story(issuer)

    asyncio.run(run())
