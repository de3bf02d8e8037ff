"""What a host writes down and counts of a guest's applications: each connection's begin and end, signatures, metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import Authority, new_key
from support.guest import OURS, Guest, library
from support.host import Host, Module, wait_for
from support.shell import Shell


def lines(module: Module, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in module.host.process.audit_lines() if f'"module":"{module.name}"' in line]
    return [line for line in found if line["kind"] == kind]


def metrics(host: Host) -> dict[str, float]:
    text = host.process.host.GetMetrics(pb.GetMetricsRequest(), timeout=10).text
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in rows}


def test_every_begin_and_end_of_a_connection_with_who_and_why(module: Module, guest: Guest) -> None:
    key = new_key("p256")
    module.push("k", key)
    with Shell(guest) as shell:
        assert shell.signs_with(shell.private("k"), key)
        opened = wait_for(lambda: lines(module, "module.connection-opened"))
        pid = shell.process.pid
        assert opened[0]["detail"]["peer"] == f"unix uid={os.geteuid()} pid={pid}"
        assert opened[0]["detail"]["dialect"] == ("native" if guest.library.ours else "p11-kit")
        assert not guest.library.ours or opened[0]["detail"]["pid"] == pid
        assert metrics(module.host)[f'hsmvisor_module_connections{{module="{module.name}"}}'] >= 1
        assert metrics(module.host)[f'hsmvisor_module_sessions{{module="{module.name}"}}'] == 1
    closed = wait_for(lambda: (found := lines(module, "module.connection-closed")) and len(found) == len(opened) and found)
    assert {line["detail"]["connection"] for line in closed} == {line["detail"]["connection"] for line in opened}
    assert {line["detail"]["why"] for line in closed} == {"closed by the client"}


def test_an_application_that_is_killed_ends_its_connection(module: Module, tmp_path: Path) -> None:
    module.push("k", new_key("p256"))
    with Shell(Guest(library("ours"), module.address, tmp_path)) as shell:
        shell.private("k")
        os.kill(shell.process.pid, signal.SIGKILL)
        shell.process.wait(10)
        wait_for(lambda: lines(module, "module.connection-closed"))


@pytest.mark.parametrize("how", ["the worker is killed", "the module is destroyed"])
def test_connections_end_with_their_worker(new_module: Callable[..., Module], tmp_path: Path, how: str) -> None:
    module = new_module()
    module.push("k", new_key("p256"))
    with Shell(Guest(library("ours"), module.address, tmp_path)) as shell:
        shell.private("k")
        wait_for(lambda: lines(module, "module.connection-opened"))
        if how == "the worker is killed":
            os.kill(module.pid, signal.SIGKILL)
        else:
            module.destroy()
        closed = wait_for(lambda: lines(module, "module.connection-closed"))
        assert closed[0]["detail"]["pid"] == shell.process.pid
        assert closed[0]["detail"]["why"] in ("its worker ended", "the module was ended")
    if how == "the worker is killed":
        module.destroy()


def test_signatures_one_by_one_when_the_module_asks_for_it(new_module: Callable[..., Module], tmp_path: Path) -> None:
    module = new_module(log_signatures=True)
    key = new_key("p256")
    module.push("k", key)
    with Shell(Guest(library("ours"), module.address, tmp_path)) as shell:
        handle = shell.private("k")
        for _ in range(5):
            shell.signs_with(handle, key)
    signed = wait_for(lambda: len(found := lines(module, "module.signature")) == 5 and found)
    for line in signed:
        assert (line["detail"]["material"], line["detail"]["generation"], line["detail"]["mechanism"]) == ("k", 1, "CKM_ECDSA")
    module.destroy()


def test_metrics_by_module_and_mechanism(module: Module, tmp_path: Path) -> None:
    key = new_key("p256")
    module.push("k", key, Authority().chain(key))
    with Shell(Guest(library("ours"), module.address, tmp_path)) as shell:
        handle = shell.private("k")
        for _ in range(3):
            shell.signs_with(handle, key)
        found = metrics(module.host)
    labels = f'mechanism="CKM_ECDSA",module="{module.name}",operation="sign"'
    assert found[f"hsmvisor_operation_seconds_count{{{labels}}}"] == 3
    assert found[f"hsmvisor_operation_errors_total{{{labels}}}"] == 0
    assert 0 < found[f"hsmvisor_operation_seconds_sum{{{labels}}}"] < 3
    buckets = [v for name, v in found.items() if name.startswith("hsmvisor_operation_seconds_bucket") and module.name in name]
    assert len(buckets) > 5 and max(buckets) == 3
    generation = f'generation="1",material="k",module="{module.name}",state="current"'
    assert 0 <= found[f"hsmvisor_generation_age_seconds{{{generation}}}"] < 60
    assert found[f"hsmvisor_certificate_not_after_seconds{{{generation}}}"] > time.time()


def test_the_guests_helper_does_not_fill_the_log(module: Module, tmp_path: Path) -> None:
    """It waits long on one connection, and ends at once when it is told to."""
    key = new_key("p256")
    module.push("k", key, Authority().chain(key))
    command = [OURS.parent / "hsmvisor-guest", "sync", "--label", "k", "--out", tmp_path / "k.pem", "--module", OURS]
    environment = os.environ | {"HSMVISOR_PKCS11_ADDRESS": module.address}
    with subprocess.Popen(command, env=environment) as helper:
        wait_for((tmp_path / "k.pem").exists)
        time.sleep(3.5)
        assert len(lines(module, "module.connection-opened")) <= 3
        helper.terminate()
        assert helper.wait(3) == 0
