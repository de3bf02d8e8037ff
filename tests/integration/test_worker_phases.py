"""The table of phases, walked: every message of the internal protocol in every phase and form; what is not in its row ends the
worker, what is in it is served."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import subprocess
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
from hsmvisor.host import limits
from hsmvisor.host.worker import WorkerProcess
from hsmvisor_rpc.internal import messages as m
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.internal.phases import MAX_DESCRIPTORS, WORKER_MAY, Phase, descriptors_of
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record
from support.host_process import gone

#: By hand, beside the table: what a worker may say, in which form, in which phases.  None: adopted, its phase not yet known.
MAY: dict[tuple[type[Record], Kind], set[Phase | None]] = {
    (m.StoreState, Kind.REQUEST): {None, Phase.BOOTING, Phase.SERVING, Phase.CLOSING},
    (m.Event, Kind.NOTIFICATION): {None, Phase.BOOTING, Phase.SERVING, Phase.LEAVING, Phase.CLOSING},
    (m.DeviceState, Kind.NOTIFICATION): {None, Phase.BOOTING, Phase.SERVING, Phase.CLOSING},
    (m.DeviceGone, Kind.NOTIFICATION): {None, Phase.BOOTING, Phase.SERVING, Phase.LEAVING, Phase.CLOSING},
    (m.UsbCame, Kind.NOTIFICATION): {None, Phase.SERVING, Phase.LEAVING, Phase.CLOSING},
    (m.UsbGone, Kind.NOTIFICATION): {None, Phase.SERVING, Phase.LEAVING, Phase.CLOSING},
    (m.UsbShown, Kind.NOTIFICATION): {None, Phase.SERVING, Phase.LEAVING, Phase.CLOSING},
}
PHASES: list[Phase | None] = [None, *Phase]
ALL = [c for c in vars(m).values() if isinstance(c, type) and issubclass(c, Record) and c is not Record]
SAMPLES: dict[type, object] = {int: 1, str: "measures", bytes: b"x", bool: True}


def sample(kind: type[Record]) -> Record:
    hints = typing.get_type_hints(kind)
    return kind(*(SAMPLES.get(hints[f.name], ()) for f in dataclasses.fields(kind)))  # type: ignore[arg-type]


class Worker:
    """What the supervisor takes for a worker: a process to end, and our end of its control connection."""

    def __init__(self, directory: Path, phase: Phase | None) -> None:
        self.told: list[Record] = []
        self.withheld = 0  #: descriptors that do not come although their message says so
        self.process = subprocess.Popen(["sleep", "100"])
        path = directory / "control.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            # the kernel says who speaks, and that is this process
            self.seen = WorkerProcess("walked", os.getpid(), os.pidfd_open(self.process.pid), phase)
            self.seen.connect(path, self._store, self.told.append, self._of_device, self._of_device)
            self.sock, _ = listener.accept()
        path.unlink()
        self.sock.setblocking(False)

    async def _store(self, change: m.StoreState) -> None:
        self.told.append(change)

    def _of_device(self, record: Record, descriptors: list[int]) -> None:
        self.told.append(record)
        for descriptor in descriptors:
            os.close(descriptor)

    async def says(self, kind: Kind, record: Record) -> str:
        """Returns `taken`, or why it was ended."""
        loop, reader = asyncio.get_running_loop(), FrameReader()
        data = encode_frame(Frame(0 if kind is Kind.NOTIFICATION else 1, kind, record.encode()))
        socket.send_fds(self.sock, [data], [self.sock.fileno()] * (descriptors_of(record) - self.withheld))
        for _ in range(500):
            if self.told:
                if kind is Kind.REQUEST:
                    (reply,) = reader.feed(await loop.sock_recv(self.sock, 4096))
                    assert (reply.kind, reply.payload) == (Kind.REPLY, m.Done().encode())
                return "taken"
            if self.seen.violation:
                await self.seen.ended()
                assert gone(self.process.pid)
                return self.seen.violation
            await asyncio.sleep(0.001)
        return "neither"

    def end(self) -> None:
        self.seen.leave()
        self.sock.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("phase", PHASES, ids=str)
def test_every_message_in_every_form(phase: Phase | None, tmp_path: Path) -> None:
    async def walk() -> None:
        for kind in Kind:
            for record in ALL:
                worker = Worker(tmp_path, phase)
                try:
                    outcome = await worker.says(kind, sample(record))
                finally:
                    worker.end()
                allowed = phase in MAY.get((record, kind), set())
                assert (outcome == "taken") == allowed, (record.TYPE, kind.name, outcome)
                assert allowed or outcome != "neither", (record.TYPE, kind.name)

    asyncio.run(walk())


def test_the_table_is_what_stands_here() -> None:
    assert len(ALL) > 25
    for phase in Phase:
        assert WORKER_MAY[phase] == {record for (record, _), phases in MAY.items() if phase in phases}


@pytest.mark.parametrize("count", [0, MAX_DESCRIPTORS, MAX_DESCRIPTORS + 1])
def test_a_device_comes_with_its_descriptors(count: int, tmp_path: Path) -> None:
    async def say(withheld: int) -> str:
        worker = Worker(tmp_path, Phase.SERVING)
        worker.withheld = withheld
        try:
            return await worker.says(Kind.NOTIFICATION, m.DeviceState(1, b"", count))
        finally:
            worker.end()

    if count > MAX_DESCRIPTORS:
        with pytest.raises(MalformedRecord):
            asyncio.run(say(0))
        return
    assert asyncio.run(say(0)) == "taken"
    if count:
        assert asyncio.run(say(1)) == f"{count - 1} descriptors where {count} should be"


@pytest.mark.parametrize(
    ("make", "most", "what"),
    [
        (lambda data: m.DeviceState(1, data, 0), limits.MAX_DEVICE_STATE, "a device's state"),
        (lambda data: m.UsbShown(1, data), limits.MAX_USB_SHOWN, "a card's memory"),
    ],
    ids=["device", "card"],
)
@pytest.mark.parametrize("over", [0, 1])
def test_what_it_tells_of_a_device_is_small(
    make: Callable[[bytes], Record], most: int, what: str, over: int, tmp_path: Path
) -> None:
    async def say() -> str:
        worker = Worker(tmp_path, Phase.SERVING)
        try:
            return await worker.says(Kind.NOTIFICATION, make(b"x" * (most + over)))
        finally:
            worker.end()

    assert asyncio.run(say()) == (f"{what} of {most + 1} bytes" if over else "taken")


@pytest.mark.parametrize("kind", ["root-shell", ""])
def test_an_event_of_no_known_kind_ends_it(kind: str, tmp_path: Path) -> None:
    async def say() -> None:
        worker = Worker(tmp_path, Phase.SERVING)
        try:
            assert await worker.says(Kind.NOTIFICATION, m.Event(kind, 0, "{}")) == "event as a notification"
        finally:
            worker.end()

    asyncio.run(say())
