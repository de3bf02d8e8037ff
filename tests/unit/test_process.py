"""A service as a process: signals, and what is said of what keeps it from running."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from hsmvisor.serving.errors import BadConfig, Broken, ServiceError, Unavailable
from hsmvisor.serving.process import failing, serve


class Service:
    """Is told to read again twice, and to end the second time; the first time its audit log cannot be written."""

    status = "well"

    def __init__(self) -> None:
        self.log: list[str] = []

    async def start(self) -> None:
        self.log.append("start")
        os.kill(os.getpid(), signal.SIGHUP)

    async def reload(self, config: str) -> None:
        self.log.append(f"reload {config}")
        if len(self.log) == 2:
            os.kill(os.getpid(), signal.SIGHUP)
            raise Unavailable("AUDIT", "the audit log cannot be written")
        os.kill(os.getpid(), signal.SIGTERM)

    async def stop(self) -> None:
        self.log.append("stop")


def test_a_service_reads_again_and_ends_when_it_is_told_to() -> None:
    """What it could not take over once does not keep it from the next time."""
    service = Service()

    async def story() -> None:
        async with asyncio.timeout(10):
            await serve(lambda: service, lambda: "all")

    asyncio.run(story())
    assert service.log == ["start", "reload all", "reload all", "stop"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BadConfig("the file", "has no sense"), 78, "name: the file: has no sense\n"),
        (Broken("LOCKED", "another one runs", "stop it first"), 1, "name: another one runs\n  stop it first\n"),
        (Unavailable("AUDIT", "no log"), 1, "name: no log\n"),
        (OSError(2, "No such file", "/x"), 1, "name: /x: No such file\n"),
    ],
)
def test_what_a_service_cannot_go_on_with_is_said(
    error: ServiceError | OSError, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, failing("name"):
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err == said
