"""The host's state file, damaged: opened and read whole, as the host service does at its start.

An input is steps of 6 bytes: a place in the file and what stands there then, or where the file ends.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from fuzz.harness import Input
from hsmvisor.host.database import Database
from hsmvisor.host.state import State
from hsmvisor.serving.errors import Broken, ServiceError
from hsmvisor.serving.events import EventRow
from hsmvisor.serving.requests import Request
from hsmvisor_rpc.internal.messages import StoreState

INVARIANT = (
    "a damaged file is refused with Broken that is not about its directory, or, where damage is met later, with a ServiceError; "
    "never with another error; what was refused at the start is left as it was, to the byte"
)
MAX_LENGTH = 120


@cache
def directory() -> Path:
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    made = Path(tempfile.mkdtemp(prefix="hsmf.", dir=base))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@cache
def good() -> bytes:
    """A file with something in every table."""
    path = directory() / "good.db"
    database = Database(path)
    state = State(database)
    request = Request("id-1", "CreateModule", b"c" * 32)

    async def fill() -> None:
        await state.begin_create(b"m" * 16, "web-1", 1, 1, b"r" * 32, "{}")
        await state.finish_create(b"m" * 16, request, b"result")
        await state.store(b"m" * 16, StoreState(1, "", b"", ("meta", "key/1"), (b"x" * 300, b"y" * 900), ()), None)
        await state.add_enrolment(b"e" * 16, b"h" * 32, 2**40, Request("id-2", "CreateEnrolment", b"d" * 32), b"")
        await state.take_nonce("key", b"n" * 16, 2**40)
        await state.add_events([EventRow(number, number, "kind", "web-1", "{}") for number in range(9)])

    asyncio.run(fill())
    database.close()
    return path.read_bytes()


@cache
def loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def run(data: bytes) -> None:
    given, content = Input(data), bytearray(good())
    while given.more:
        at, words = int.from_bytes(given.take(3), "big") % len(content), given.take(4)
        if words == b"\xff\xff\xff\xff":
            del content[max(1, at) :]
        else:
            content[at : at + len(words)] = words[: len(content) - at]
    path = directory() / "state.db"
    for leftover in directory().glob("state.db*"):
        leftover.unlink()
    path.write_bytes(content)
    try:
        database = Database(path)
    except Broken as error:
        assert error.hint
        assert error.reason != "STATE_DIRECTORY", f"not the directory's fault: {error}"
        assert path.read_bytes() == content, "what was refused was changed"
        return
    try:
        loop().run_until_complete(read_all(State(database)))
    except ServiceError:
        pass
    finally:
        database.close()


async def read_all(state: State) -> None:
    for row in await state.modules():
        await state.sealed(row.module_id)
    await state.attachments()
    await state.answer(Request("id-0", "CreateModule", b"c" * 32))
    await state.events()
    await state.open_enrolments(1)
    await state.prune(1)
    await state.store(b"m" * 16, StoreState(2, "", b"", ("meta",), (b"z",), ("key/1",)), None)


def seeds() -> dict[str, bytes]:
    size = len(good())
    places = {"header": 0, "version": 60, "application": 68, "schema": 100, "page": 4096, "middle": size // 2, "end": size - 8}
    made = {f"{name}-{number}": place.to_bytes(3, "big") + words for name, place in places.items()
            for number, words in enumerate((b"\0\0\0\0", b"\x7f\0\1\2", b"\xff\xff\xff\xff"))}  # fmt: skip
    return made | {"whole": b""}
