"""What a host writes down of connections that end before an application began: who and why, and no more than it can bear."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord import limits
from hsmvisord.wire.calls import Call
from support.certificates import new_key
from support.guest import Guest
from support.host import Host, Module, wait_for
from support.host_process import new_id
from support.hostile import connect, raw, socket_of
from support.native_client import NativeClient
from support.p11kit_client import P11KitClient
from support.shell import Shell
from support.wire_client import Refused, WireClient

ME = f"unix uid={os.geteuid()} pid={os.getpid()}"
NEVER_BEGAN = "connection-refused"


def told(module: Module, kind: str) -> list[dict[str, Any]]:
    """Returns the details of the audit log's lines of this kind."""
    found = [json.loads(line) for line in module.host.process.audit_lines() if f'"module":"{module.name}"' in line]
    return [line["detail"] for line in found if line["kind"] == f"module.{kind}"]


def the_only_one(module: Module, within: float = 10) -> dict[str, Any]:
    wait_for(lambda: told(module, NEVER_BEGAN), within, "the line")
    (detail,) = told(module, NEVER_BEGAN)
    return {name: value for name, value in detail.items() if name != "connection"}


def refused_by_limit(module: Module) -> float:
    text = module.host.process.host.GetMetrics(pb.GetMetricsRequest(), timeout=10).text
    name = f'hsmvisor_module_connections_refused_total{{module="{module.name}"}} '
    return float(next(line.removeprefix(name) for line in text.splitlines() if line.startswith(name)))


@pytest.mark.parametrize(
    ("sent", "detail"),
    [
        (b"", {}),
        (b"\x81", {"greeting": 0x81, "dialect": "native", "program": "", "pid": 0}),
        (b"\0", {"greeting": 0, "dialect": "p11-kit", "program": "", "pid": 0}),
    ],
)
def test_one_that_its_client_closed(module: Module, sent: bytes, detail: dict[str, Any]) -> None:
    sock = raw(socket_of(module.address))
    sock.sendall(sent)
    if sent:
        assert sock.recv(1)
    sock.close()
    assert the_only_one(module) == {"peer": ME, "why": "closed by the client", **detail}
    assert told(module, "connection-opened") == told(module, "connection-closed") == []
    assert refused_by_limit(module) == 0


def test_one_with_a_broken_greeting(module: Module) -> None:
    with raw(socket_of(module.address)) as sock:
        sock.sendall(b"\x80")
        assert sock.recv(1) == b""
    why = "broken greeting: version 0 of the native dialect does not exist"
    assert the_only_one(module) == {"peer": ME, "greeting": 0x80, "why": why}


def test_those_of_which_nothing_whole_came(module: Module) -> None:
    path = socket_of(module.address)
    with raw(path) as silent, raw(path) as half:
        half.sendall(b"\x81\0\0")
        wait_for(lambda: len(told(module, NEVER_BEGAN)) == 2, limits.FRAME_SECONDS + 5)
        assert silent.recv(1) == b"", "closed by the module"
    lines = {detail["why"]: detail for detail in told(module, NEVER_BEGAN)}
    assert lines[f"nothing came for {limits.GREETING_SECONDS} s"]["peer"] == ME
    assert lines[f"nothing whole came or was read for {limits.FRAME_SECONDS} s"]["dialect"] == "native"


def test_one_over_the_limit(new_module: Callable[..., Module]) -> None:
    module = new_module(max_connections=2)
    path = socket_of(module.address)
    with contextlib.closing(connect(path)) as first, contextlib.closing(connect(path)):
        wait_for(lambda: len(told(module, "connection-opened")) == 2)
        assert not told(module, NEVER_BEGAN), "at the limit"
        with contextlib.closing(NativeClient(raw(path))) as over, pytest.raises(Refused):
            over.hello()
        detail = the_only_one(module)
        assert (detail["peer"], detail["dialect"], detail["why"]) == (ME, "native", "over the limit of 2 connections")
        assert first.open_session()
    assert refused_by_limit(module) == 1
    wait_for(lambda: len(told(module, "connection-closed")) == 2)
    assert len(told(module, NEVER_BEGAN)) == 1
    module.destroy()


def test_it_is_an_event_too(module: Module) -> None:
    stream = module.host.process.events.StreamEvents(pb.StreamEventsRequest(after_id=1, module=module.name), timeout=20)
    raw(socket_of(module.address)).close()
    event = next(event for event in stream if event.kind == NEVER_BEGAN)
    stream.cancel()
    assert json.loads(event.detail) == {"peer": ME, "why": "closed by the client"}


def test_an_honest_program_leaves_no_such_line(module: Module, guest: Guest) -> None:
    module.push("k", key := new_key("p256"))
    with Shell(guest) as shell:
        assert shell.signs_with(shell.private("k"), key)
        wait_for(lambda: told(module, "connection-opened"))
    wait_for(lambda: len(told(module, "connection-closed")) == len(told(module, "connection-opened")))
    assert not told(module, NEVER_BEGAN)


def test_probes_do_not_fill_the_log_and_each_is_counted(module: Module) -> None:
    path = socket_of(module.address)
    with contextlib.closing(connect(path)) as honest:
        for _ in range(limits.EVENT_BURST - 1):
            raw(path).close()
        wait_for(lambda: len(told(module, NEVER_BEGAN)) == limits.EVENT_BURST - 1, 10, "all, at the limit")
        assert not told(module, "connections-suppressed")
        probes = 2 * limits.EVENT_BURST
        for _ in range(probes):
            raw(path).close()
        assert honest.open_session()

    def counted() -> int:
        counts = told(module, "connections-suppressed")
        return len(told(module, NEVER_BEGAN)) + int(counts[-1]["refused"] if counts else 0)

    wait_for(lambda: counted() == limits.EVENT_BURST - 1 + probes, 20, "a count of the others")
    assert len(told(module, NEVER_BEGAN)) < limits.EVENT_BURST + 30 * limits.EVENT_RATE
    assert wait_for(lambda: told(module, "connection-closed")), "the honest one's end is told: its begin was"


def test_those_that_are_handed_over_are_told_once(shared_host: Host, new_module: Callable[..., Module]) -> None:
    module = new_module(max_connections=5)
    path = socket_of(module.address)
    stock = P11KitClient(raw(path))
    stock.initialize()
    ended: list[WireClient] = [connect(path), stock]
    for client in ended:
        client.call(Call.FINALIZE)
    serving, silent, greeted = connect(path), raw(path), raw(path)
    greeted.sendall(b"\x81")
    assert greeted.recv(1)
    with raw(path) as over:
        over.sendall(b"\x81")
        assert over.recv(1)
        request = pb.UpgradeModuleRequest(request_id=new_id(), name=module.name)
        done = shared_host.process.modules.UpgradeModule(request, timeout=30)
        assert done.connections == 6
        closed = wait_for(lambda: len(lines := told(module, "connection-closed")) == 2 and lines)
        assert {line["why"] for line in closed} == {"its application had ended when it was handed over"}
        assert not told(module, NEVER_BEGAN)
        silent.close()
        greeted.close()
    whys = wait_for(lambda: len(lines := told(module, NEVER_BEGAN)) == 3 and [line["why"] for line in lines])
    assert sorted(whys) == ["closed by the client", "closed by the client", "over the limit of 5 connections"]
    assert {line["peer"] for line in told(module, NEVER_BEGAN)} == {ME}
    assert serving.open_session()
    for client in (serving, *ended):
        client.close()
    wait_for(lambda: len(told(module, NEVER_BEGAN)) == 5)
    opened, closed = told(module, "connection-opened"), told(module, "connection-closed")
    assert sorted(line["connection"] for line in opened) == sorted(line["connection"] for line in closed)
    module.destroy()
