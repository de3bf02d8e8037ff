"""A host service of a test's own: a real process with its directories under one temporary one, and stubs to call it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hsmvisor.client import connect
from hsmvisor_rpc.sealed.commands import raw_public
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc

ROOT = Path(__file__).resolve().parents[2]
SOURCES = os.pathsep.join(str(ROOT / d) for d in ("daemon", "control_domain", "proto", "tests"))


def new_id() -> str:
    return str(uuid.uuid4())


def wait_for(holds: Callable[[], Any], within: float = 10, what: str = "it") -> Any:
    """Returns what `holds` returns once that is true; fails after `within` seconds."""
    end = time.monotonic() + within
    while not (value := holds()):
        assert time.monotonic() < end, f"{what} did not happen within {within} s"
        time.sleep(0.01)
    return value


def gone(pid: int) -> bool:
    """Says whether a process has ended (one that nobody reaped has)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def reason(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """Returns code and the ErrorInfo's reason."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no google.rpc.Status: {error}"
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "hsmvisor"
    return error.code(), info.reason


def refused(call: Callable[..., object], *arguments: Any, **more: Any) -> tuple[grpc.StatusCode, str]:
    """Returns code and reason of a call that must be refused."""
    try:
        call(*arguments, **more)
    except grpc.RpcError as error:
        return reason(error)
    raise AssertionError("it was not refused")


class HostProcess:
    """`settings` is more TOML; `module` is run as __main__ (a test's own variant of the service)."""

    def __init__(self, settings: str = "", module: str = "hsmvisor.host.main", environment: dict[str, str] | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="hsmh."))
        self.state, self.run = self.directory / "state", self.directory / "run"
        self.socket = self.run / "control.sock"
        self.config = self.directory / "host.toml"
        self.configure(settings)
        self.module, self.environment = module, environment or {}
        self.patience = 1.0  #: how much slower than usual it may be
        self.log = self.directory / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self._channels: list[grpc.Channel] = []
        self.root = Ed25519PrivateKey.generate()
        self.root_public = raw_public(self.root.public_key())

    def configure(self, settings: str) -> None:
        head = f'state_directory = "{self.state}"\nruntime_directory = "{self.run}"\n'
        self.config.write_text(head + settings)

    def launch(self, arguments: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        first = ["nice", "-n", "-5"] if os.geteuid() == 0 else []  # as the unit does
        command = [*first, sys.executable, "-m", self.module, "--config", str(self.config), *arguments]
        environment = {**os.environ, "PYTHONPATH": SOURCES, **self.environment}
        with open(self.log, "ab") as log:
            return subprocess.Popen(command, env=environment, stderr=log, stdout=log, stdin=subprocess.DEVNULL)

    def start(self) -> Self:
        """Returns when the control API answers."""
        self.process = self.launch()
        wait_for(lambda: self.process.poll() is not None or self._answers(), 20 * self.patience, "the start of the host")
        assert self.process.poll() is None, self.log.read_text()
        self.channel = self.connect()
        self.modules = rpc.ModuleServiceStub(self.channel)
        self.material = rpc.MaterialServiceStub(self.channel)
        self.host = rpc.HostServiceStub(self.channel)
        self.events = rpc.EventServiceStub(self.channel)
        self.audit = rpc.AuditServiceStub(self.channel)
        return self

    def _answers(self) -> bool:
        if not self.socket.exists():
            return False
        with connect(f"unix:{self.socket}") as channel:
            try:
                rpc.ModuleServiceStub(channel).ListModules(pb.ListModulesRequest(page_size=1), timeout=2)
            except grpc.RpcError:
                return False
        return True

    def connect(self) -> grpc.Channel:
        channel = connect(f"unix:{self.socket}")
        self._channels.append(channel)
        return channel

    def create(self, name: str, request_id: str = "", **settings: Any) -> pb.Module:
        request = pb.CreateModuleRequest(request_id=request_id or new_id(), name=name, root=self.root_public)
        request.settings.MergeFrom(pb.ModuleSettings(**settings))
        return self.modules.CreateModule(request, timeout=20 * self.patience)

    def get(self, name: str) -> pb.Module:
        return self.modules.GetModule(pb.GetModuleRequest(name=name), timeout=10 * self.patience)

    def serving(self, name: str, not_pid: int = 0) -> pb.Module:
        """Returns the module once it serves (by another worker than `not_pid`)."""

        def look() -> pb.Module | None:
            module = self.get(name)
            return module if module.state == "serving" and module.pid not in (0, not_pid) else None

        return wait_for(look, 10 * self.patience, f"serving of {name}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends the service; its workers go on."""
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(20)

    def restart(self) -> Self:
        self.stop()
        return self.start()

    def audit_lines(self) -> list[str]:
        return (self.state / "audit.log").read_text().splitlines()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.clean()

    def clean(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
        assert self.launch(["--stop-workers"]).wait(20) == 0, self.log.read_text()
        shutil.rmtree(self.directory)
