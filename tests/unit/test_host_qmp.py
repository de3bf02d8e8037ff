"""The QMP client against a scripted QEMU: what it understands, what it bears, and what it says when it cannot go on."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hsmvisor.host import limits, qmp
from hsmvisor.host.qmp import QemuGone, QemuSilent, Qmp, QmpError
from hsmvisor.serving.errors import Invalid, ServiceError
from hsmvisor.serving.limits import MAX_UNIX_PATH

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": []}}
Serve = Callable[["Script"], Awaitable[None]]


class Script:
    """The other end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def says(self, *messages: Any) -> None:
        for message in messages:
            self.writer.write(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")
        await self.writer.drain()

    async def hears(self) -> dict[str, Any]:
        message = json.loads(await self.reader.readline())
        assert isinstance(message, dict)
        return message

    async def greets(self) -> None:
        await self.says(GREETING)
        asked = await self.hears()
        assert asked["execute"] == "qmp_capabilities"
        await self.says({"return": {}, "id": asked["id"]})


def meet(path: Path, serve: Serve, work: Callable[[Qmp], Awaitable[Any]]) -> Any:
    """Returns what `work` returns with a client of a QEMU that `serve` plays."""

    async def both() -> Any:
        async def played(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(Script(reader, writer))
            except (ConnectionError, asyncio.IncompleteReadError, json.JSONDecodeError):
                pass
            finally:
                writer.close()

        async with await asyncio.start_unix_server(played, path), qmp.connect(str(path)) as client:
            return await work(client)

    return asyncio.run(both())


async def nothing(client: Qmp) -> None: ...


async def asks(client: Qmp) -> Any:
    return await client.execute("query-status")


def refusal(path: Path, serve: Serve, work: Callable[[Qmp], Awaitable[Any]] = asks) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        meet(path, serve, work)
    return caught.value


def test_answers_find_their_questions_between_events(tmp_path: Path) -> None:
    async def serve(script: Script) -> None:
        await script.greets()
        asked = await script.hears()
        await script.says({"event": "RESUME", "data": {}}, {"return": "late", "id": 1}, {"return": 5, "id": asked["id"]})

    async def work(client: Qmp) -> Any:
        assert client.version == "7.2.22"
        return await client.execute("query-status"), await client.event(lambda name, data: True, 1)

    assert meet(tmp_path / "s", serve, work) == (5, "RESUME")


def test_a_refusal_has_its_class_and_its_words(tmp_path: Path) -> None:
    async def serve(script: Script) -> None:
        await script.greets()
        asked = await script.hears()
        await script.says({"error": {"class": "DeviceNotFound", "desc": "Device\n'x' not found"}, "id": asked["id"]})

    error = refusal(tmp_path / "s", serve)
    assert isinstance(error, QmpError)
    assert (error.kind, error.said) == ("DeviceNotFound", "Device?'x' not found")
    assert "query-status" in error.detail


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"QEMU 7.2.22 monitor - type 'help' for more information\n",
        b"{}\n",
        b"[1]\n",
        b'{"QMP": 1}\n',
        b"[" * 10_000 + b"\n",
        b"\xff\xfe\n",
        b"no end of line",
    ],
)
def test_what_is_not_qemu_is_told_nothing(tmp_path: Path, said: bytes) -> None:
    heard = []

    async def serve(script: Script) -> None:
        await script.says(said)
        script.writer.write_eof()
        heard.append(await script.reader.read())

    error = refusal(tmp_path / "s", serve, nothing)
    assert (error.reason, heard) == ("NOT_QMP", [b""])
    assert "-qmp" in error.hint


def test_a_socket_that_is_taken_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU accepts a second client and greets it when the first one has gone."""
    monkeypatch.setattr(qmp, "_GREETING_WITHIN", 0.1)

    async def serve(script: Script) -> None:
        await script.reader.read()

    error = refusal(tmp_path / "s", serve, nothing)
    assert error.reason == "QMP_BUSY"
    assert "second -qmp" in error.hint


def test_a_command_that_is_not_answered_ends_in_time(tmp_path: Path) -> None:
    async def serve(script: Script) -> None:
        await script.greets()
        await script.reader.read()

    async def work(client: Qmp) -> None:
        await client.execute("device_add", 0.1)

    error = refusal(tmp_path / "s", serve, work)
    assert isinstance(error, QemuSilent)
    assert "device_add" in error.detail


@pytest.mark.parametrize("before", [b"", b'{"return": '])
def test_an_end_in_the_middle(tmp_path: Path, before: bytes) -> None:
    async def serve(script: Script) -> None:
        await script.greets()
        await script.hears()
        await script.says(before)

    error = refusal(tmp_path / "s", serve)
    assert isinstance(error, QemuGone) if not before else error.reason == "NOT_QMP"


def test_an_answer_without_an_id_belongs_to_the_command(tmp_path: Path) -> None:
    """QEMU cannot give one to what it could not read."""

    async def serve(script: Script) -> None:
        await script.greets()
        await script.hears()
        await script.says({"error": {"class": "GenericError", "desc": "JSON parse error"}})

    assert "JSON parse error" in refusal(tmp_path / "s", serve).detail


@pytest.mark.parametrize("error", [7, None, {}, {"class": 1}])
def test_an_error_of_another_form_is_one_too(tmp_path: Path, error: Any) -> None:
    async def serve(script: Script) -> None:
        await script.greets()
        asked = await script.hears()
        await script.says({"error": error, "id": asked["id"]})

    assert "no reason given" in refusal(tmp_path / "s", serve).detail


def line_of(size: int, ident: int) -> bytes:
    head = b'{"return": "'
    tail = b'", "id": %d}\n' % ident
    return head + b"x" * (size - len(head) - len(tail)) + tail


def test_a_line_at_its_limit_and_one_past_it(tmp_path: Path) -> None:
    def serves(size: int) -> Serve:
        async def serve(script: Script) -> None:
            await script.greets()
            await script.says(line_of(size, (await script.hears())["id"]))

        return serve

    assert len(meet(tmp_path / "s", serves(limits.MAX_QMP_LINE), asks)) > limits.MAX_QMP_LINE - 100
    assert str(limits.MAX_QMP_LINE) in refusal(tmp_path / "t", serves(limits.MAX_QMP_LINE + 1)).detail


def test_events_that_are_kept_are_bounded(tmp_path: Path) -> None:
    async def serve(script: Script) -> None:
        await script.greets()
        asked = await script.hears()
        await script.says(*({"event": f"E{i}"} for i in range(limits.QMP_EVENTS + 1)), {"return": {}, "id": asked["id"]})

    async def work(client: Qmp) -> str:
        await client.execute("query-status")
        assert len(client._events) == limits.QMP_EVENTS
        return await client.event(lambda name, data: True, 1)

    assert meet(tmp_path / "s", serve, work) == "E1"


def test_an_event_that_does_not_come_is_waited_for_in_vain_and_in_time(tmp_path: Path) -> None:
    async def serve(script: Script) -> None:
        await script.greets()
        await script.says({"event": "STOP"}, {"event": 7}, {"event": "STOP", "data": 7})
        await script.reader.read()

    async def work(client: Qmp) -> None:
        with pytest.raises(TimeoutError):
            await client.event(lambda name, data: name == "RESUME", 0.1)

    meet(tmp_path / "s", serve, work)


def test_nobody_there(tmp_path: Path) -> None:
    async def go(path: Path) -> None:
        async with qmp.connect(str(path)):
            pass

    with pytest.raises(QemuGone) as caught:
        asyncio.run(go(tmp_path / "absent"))
    assert "-qmp" in caught.value.hint
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    with pytest.raises(QemuGone) as caught:
        asyncio.run(go(tmp_path / "dead"))
    assert "has ended" in caught.value.detail
    (tmp_path / "file").write_text("")
    with pytest.raises(QemuGone):
        asyncio.run(go(tmp_path / "file"))


def test_the_path_is_bounded_and_absolute() -> None:
    longest = "/" + "p" * (MAX_UNIX_PATH - 1)
    assert limits.qmp_path(longest) == longest
    for path in ("", "relative", longest + "p", "/with\nnewline", "/\0", "/" + "é" * (MAX_UNIX_PATH // 2 + 1)):
        with pytest.raises(Invalid):
            limits.qmp_path(path)


def test_names_of_buses_and_sizes_of_memory() -> None:
    longest = "b" * limits.MAX_BUS
    assert [limits.bus(bus) for bus in ("", "rp0", "pci.0", longest)] == ["", "rp0", "pci.0", longest]
    for bus in (longest + "b", "0rp", "rp 0", "rp0,x=y", "rp\n"):
        with pytest.raises(Invalid):
            limits.bus(bus)
    assert [limits.memory(size) for size in ("512M", "4G")] == ["512M", "4G"]
    for size in ("", "4", "0M", "4T", "4G,share=off", "-1G"):
        with pytest.raises(Invalid):
            limits.memory(size)
    assert len(limits.command_line("x" * limits.MAX_COMMAND_LINE)) == limits.MAX_COMMAND_LINE
    with pytest.raises(Invalid):
        limits.command_line("x" * (limits.MAX_COMMAND_LINE + 1))
