"""The host's internal sockets, on which a worker that its guest has taken over may say anything to the host service.

The first byte chooses: the frames alone, or the host's end of a link that waits for replies while the rest of the input comes.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Coroutine
from functools import cache
from typing import Any

from fuzz.harness import Input
from hsmvisor.host.link import Link, LinkClosed, PeerError, Violation
from hsmvisor_rpc.internal import handover, messages
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.internal.phases import LAUNCHER_MAY_BE_ASKED, PROVIDER_MAY_BE_ASKED, SUPERVISOR_MAY, WORKER_MAY, by_type
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record, record_type

INVARIANT = (
    "frames come out the same whether the bytes came whole or one by one, or MalformedRecord ends the stream; a record has one "
    "encoding; a link ends with a Violation or goes on, its callers hear of it, nothing is raised and no descriptor is left behind"
)
MAX_LENGTH = 2000

RECORDS = {
    value.TYPE: value
    for module in (messages, handover)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Record) and value is not Record
}
ALLOWED = LAUNCHER_MAY_BE_ASKED | PROVIDER_MAY_BE_ASKED | frozenset().union(*SUPERVISOR_MAY.values(), *WORKER_MAY.values())


APPLICATION = handover.SavedApplication(b"t", "p", 1, False, 0, 2, 3, 1, (1, 0, 4), (b"o",), (), 2, (b"g",))


def run(data: bytes) -> None:
    given = Input(data)
    head, rest = given.byte(), given.rest()
    if head & 1:
        loop().run_until_complete(linked(rest, 1 + head % 64))
    else:
        frames(rest)


def frames(data: bytes) -> None:
    whole = read(data, len(data) or 1)
    for piece in (1, 5):
        assert read(data, piece) == whole
    for frame in whole[0]:
        assert encode_frame(frame) in data
        try:
            kind = RECORDS.get(record_type(frame.payload))
            if kind is not None:
                assert kind.decode(frame.payload).encode() == frame.payload
        except MalformedRecord:
            pass
    assert by_type(ALLOWED).keys() <= RECORDS.keys()


def read(data: bytes, piece: int) -> tuple[list[Frame], bool]:
    reader, found = FrameReader(), []
    for start in range(0, len(data), piece):
        try:
            found += reader.feed(data[start : start + piece])
        except MalformedRecord:
            return found, False
    return found, True


@cache
def loop() -> asyncio.AbstractEventLoop:
    made = asyncio.new_event_loop()
    made.set_exception_handler(lambda loop, context: faults.append(context))
    return made


faults: list[dict[str, Any]] = []


async def linked(data: bytes, piece: int) -> None:
    here, there = socket.socketpair()
    ours, theirs = os.pipe2(os.O_NONBLOCK)
    ended: list[Violation | None] = []
    stored: list[Frame] = []

    async def reply(frame: Frame) -> Record:
        stored.append(frame)
        return m.Done()

    def request(frame: Frame) -> Coroutine[Any, Any, Record]:
        if record_type(frame.payload) != m.StoreState.TYPE:
            raise Violation("not in this phase")
        return reply(frame)

    link = Link(here, ended.append, request, lambda frame: stored.append(frame))
    asked = [asyncio.ensure_future(link.ask(m.QueryStatus(), m.Report, within=60)) for _ in range(2)]
    await asyncio.sleep(0)
    there.setblocking(False)
    there.recv(1 << 16)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs]))]  # a descriptor that nobody expects
    for start in range(0, len(data), max(piece, len(data) // 8)):
        try:
            there.sendmsg([data[start : start + max(piece, len(data) // 8)]], [] if start else rights)
        except OSError:
            break
        await asyncio.sleep(0)
    there.close()
    os.close(theirs)
    for _ in range(20):
        await asyncio.sleep(0)
        if link.closed:
            break
    assert link.closed
    assert len(ended) == 1
    for answer in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(answer, LinkClosed | PeerError | tuple), repr(answer)
    assert not faults, faults
    assert here.fileno() == -1
    assert os.read(ours, 1) == b"", "a descriptor that came was left open"  # BlockingIOError, as long as somebody holds it
    os.close(ours)


def seeds() -> dict[str, bytes]:
    records: dict[str, tuple[Kind, int, Record]] = {
        "report": (Kind.REPLY, 1, m.Report("{}")),
        "error": (Kind.ERROR, 2, m.Error("STORAGE", "full")),
        "store": (Kind.REQUEST, 1, m.StoreState(2, "", b"", ("meta",), (b"blob",), ("key/1",))),
        "event": (Kind.NOTIFICATION, 0, m.Event("pin-wrong", 1, "{}")),
        "attached": (Kind.REPLY, 1, m.Attached(1, "serving", b"m" * 16, "web-1", 1, b"", b"", "{}")),
        "executed": (Kind.REPLY, 1, m.Executed("stage", "tls", 1, 1, "root", "{}", False)),
        "application": (
            Kind.REPLY,
            9,
            APPLICATION,
        ),
    }
    made = {}
    for name, (kind, ident, record) in records.items():
        frame = encode_frame(Frame(ident, kind, record.encode()))
        made |= {f"{name}-{head}": bytes((head,)) + frame for head in (0, 1, 5)}
    both = encode_frame(Frame(1, Kind.REPLY, m.Report("{}").encode())) + encode_frame(Frame(2, Kind.REPLY, m.Report("{}").encode()))
    return made | {"both": b"\1" + both, "twice": b"\x3f" + both + both}
