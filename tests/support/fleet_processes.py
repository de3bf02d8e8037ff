"""A fleet of real processes: managers on one database, hosts that have joined, their guests with clients."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from hsmvisor.client import connect
from hsmvisor_rpc.v1 import hsmvisor_pb2 as host_pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as host_rpc
from hsmvisor_rpc.v1 import manager_pb2 as pb
from hsmvisor_rpc.v1 import manager_pb2_grpc as rpc
from support.guest import free_port
from support.host_process import SOURCES, HostProcess, new_id, wait_for


class Manager:
    """`fleet`: the directory of another manager's keys, for a second one; `url`: of the database.

    `module` is run as __main__ (a test's own variant of the service).
    """

    def __init__(self, settings: str = "", url: str = "", fleet: Path | None = None, module: str = "hsmvisor.manager.main") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="hsmm."))
        self.state, self.run = self.directory / "state", self.directory / "run"
        self.socket, self.log = self.run / "control.sock", self.directory / "log"
        self.port, self.join_port = free_port(), free_port()
        if fleet is not None:
            self.state.mkdir(mode=0o700)
            shutil.copytree(fleet, self.state / "fleet")
        self.config = self.directory / "manager.toml"
        self.config.write_text(
            f'name = "{self.directory.name}"\nstate_directory = "{self.state}"\nruntime_directory = "{self.run}"\n'
            f'[database]\nurl = "{url}"\n'
            f'[tls]\naddress = "127.0.0.1:{self.port}"\npublic = ["127.0.0.1:{self.port}"]\n'
            f'[join]\naddress = "127.0.0.1:{self.join_port}"\npublic = ["127.0.0.1:{self.join_port}"]\n' + settings
        )
        self.module = module
        self.process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    def start(self) -> Self:
        """Returns when the control API answers."""
        command = [sys.executable, "-m", self.module, "--config", str(self.config)]
        environment = os.environ | {"PYTHONPATH": SOURCES}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        wait_for(lambda: self.process.poll() is not None or self._answers(), 40, "the start of the manager")  # type: ignore[union-attr]
        assert self.process.poll() is None, self.log.read_text()
        self._channel = connect(f"unix:{self.socket}")
        return self

    def _answers(self) -> bool:
        if not self.socket.exists():
            return False
        with connect(f"unix:{self.socket}") as channel:
            try:
                rpc.FleetServiceStub(channel).WhoAmI(pb.WhoAmIRequest(), timeout=3)
            except grpc.RpcError:
                return False
        return True

    @property
    def channel(self) -> grpc.Channel:
        assert self._channel is not None
        return self._channel

    @property
    def fleet(self) -> rpc.FleetServiceStub:
        return rpc.FleetServiceStub(self.channel)

    @property
    def requests(self) -> rpc.RequestServiceStub:
        return rpc.RequestServiceStub(self.channel)

    @property
    def policy(self) -> rpc.PolicyServiceStub:
        return rpc.PolicyServiceStub(self.channel)

    @property
    def history(self) -> rpc.HistoryServiceStub:
        return rpc.HistoryServiceStub(self.channel)

    def token(self, host: str = "", owners: tuple[str, ...] = ()) -> str:
        request = pb.CreateJoinTokenRequest(request_id=new_id(), host=host, owners=owners)
        return self.fleet.CreateJoinToken(request, timeout=20).token

    def apply(self, owner: str = "alice", **spec: Any) -> pb.MaterialRequest:
        request = pb.ApplyRequest(request_id=new_id(), owner=owner, spec=pb.RequestSpec(**spec))
        return self.requests.Apply(request, timeout=20)

    def request(self, id: str) -> pb.MaterialRequest:
        return self.requests.Get(pb.GetRequest(id=id), timeout=20)

    def events(self, kind: str = "") -> list[pb.FleetEvent]:
        """Oldest first."""
        answer = self.history.ListEvents(pb.ListFleetEventsRequest(kind=kind, page_size=1000), timeout=20)
        return list(answer.events)[::-1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.clean()

    def clean(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


class Member(HostProcess):
    """A host that joins managers."""

    def __init__(self, *managers: Manager, settings: str = "") -> None:
        ports = [port for manager in managers for port in (manager.port, manager.join_port)]
        super().__init__(f"[manager]\nports = {ports}\n[guests]\nsocket_mode = 0o666\n" + settings)
        self.patience = 2.0

    @property
    def guests(self) -> host_rpc.GuestServiceStub:
        return host_rpc.GuestServiceStub(self.channel)

    def join(self, name: str, token: str) -> None:
        request = host_pb.JoinManagerRequest(request_id=new_id(), token=token, name=name)
        self.host.JoinManager(request, timeout=30)
        wait_for(lambda: self.host.GetHost(host_pb.GetHostRequest(), timeout=10).manager.connected, 20, "the connection")

    def register(self, name: str, owner: str = "alice", **attributes: str) -> str:
        """Returns the address of the guest's module."""
        request = host_pb.RegisterGuestRequest(request_id=new_id(), name=name, kind="VM", owner=owner, attributes=attributes)
        self.guests.RegisterGuest(request, timeout=30)
        return self.get(name).address
