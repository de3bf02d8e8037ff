"""The service killed at every step of a material's life: never half-done, never done twice; the caller who repeats is answered."""

from __future__ import annotations

import os
import signal
import time

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hsmvisor_rpc.sealed import commands, envelope
from hsmvisor_rpc.sealed.commands import Action, Command
from hsmvisor_rpc.sealed.identity import ModuleIdentity, verify_identity
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.host_process import HostProcess, reason

STEPS = [
    ("hsmvisor.host.worker:WorkerProcess.ask", "before"),
    ("hsmvisor.host.state:State.store", "before"),
    ("hsmvisor.host.state:State.store", "after"),
    ("hsmvisor.host.worker:WorkerProcess.ask", "after"),
    ("hsmvisor.host.state:State.record", "before"),
    ("hsmvisor.host.state:State.record", "after"),
    ("hsmvisor.host.audit:Audit._write", "before"),
    ("hsmvisor.host.audit:Audit._write", "after"),
]


class Delivery:
    """Plays the management plane of one module."""

    def __init__(self, host: HostProcess, name: str) -> None:
        self.host, self.name, self.signer = host, name, commands.Signer(host.root)

    def _identity(self) -> tuple[ModuleIdentity, int]:
        key = self.host.host.GetHost(pb.GetHostRequest()).host_key
        answer = self.host.modules.GetIdentity(pb.GetIdentityRequest(name=self.name), timeout=10)
        return verify_identity(answer.signed_identity, key), answer.sequence

    def command(self, action: str, generation: int) -> bytes:
        """Returns a signed command with the next sequence number."""
        identity, sequence = self._identity()
        host_id, module_id, recipient = identity.host_id, identity.module_id, identity.recipient
        now, body = int(time.time()), b""
        if action == Action.STAGE:
            key = ec.generate_private_key(ec.SECP256R1())
            pkcs8 = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
            context = envelope.EnvelopeContext(
                host_id, module_id, envelope.recipient_fingerprint(recipient), "web", generation, now + 600
            )
            sealed = envelope.seal(envelope.KeyMaterial(pkcs8), recipient, context)
            public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            body = commands.Stage(public, (), sealed, "pin", "tls", b"", 0, "extend", "keep", False).encode()
        elif action == Action.RETIRE:
            body = commands.Retire(3600, "extend").encode()
        return self.signer.sign(Command(action, host_id, module_id, sequence + 1, now, now + 600, "web", generation, body))

    def execute(self, data: bytes, request_id: str) -> pb.ExecuteResponse:
        request = pb.ExecuteRequest(request_id=request_id, module=self.name, signed_command=data)
        return self.host.material.Execute(request, timeout=10)

    def states(self) -> dict[int, str]:
        listed = self.host.material.ListMaterials(pb.ListMaterialsRequest(module=self.name), timeout=10).materials
        return {g.number: g.state for row in listed for g in row.generations}


#: action, generation, what leads up to it, the states before and after it
LIFE: dict[str, tuple[int, list[tuple[str, int]], dict[int, str], dict[int, str]]] = {
    Action.STAGE: (1, [], {}, {1: "staged"}),
    Action.ACTIVATE: (1, [(Action.STAGE, 1)], {1: "staged"}, {1: "current"}),
    Action.RETIRE: (1, [(Action.STAGE, 1), (Action.ACTIVATE, 1)], {1: "current"}, {1: "retiring"}),
    Action.DESTROY: (1, [(Action.STAGE, 1)], {1: "staged"}, {1: "destroyed"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("step", "moment"), STEPS)
@pytest.mark.parametrize("action", LIFE)
def test_a_step_killed_anywhere_is_whole_and_repeatable(action: str, step: str, moment: str) -> None:
    generation, path, before, after = LIFE[action]
    with HostProcess(module="support.crashing_host") as host:
        host.create("web-1")
        delivery = Delivery(host, "web-1")
        for i, (earlier, number) in enumerate(path):
            delivery.execute(delivery.command(earlier, number), f"path-{i}")
        assert delivery.states() == before
        command = delivery.command(action, generation)
        # a service that dies at that step; the worker lives on and is adopted
        host.stop()
        host.environment = {"HSMVISOR_CRASH": f"{step}:{moment}", "HSMVISOR_CRASH_ARMED_BY": str(host.directory / "armed")}
        host.start()
        host.serving("web-1")
        (host.directory / "armed").touch()
        with pytest.raises(grpc.RpcError):
            delivery.execute(command, "the-one")
        assert host.process is not None and host.process.wait(10) == -signal.SIGKILL
        host.environment = {}
        host.start()
        assert host.serving("web-1").restarts == 0
        assert delivery.states() in (before, after)
        answer = delivery.execute(command, "the-one")  # the caller repeats it
        assert (answer.action, answer.generation) == (action, generation)
        assert delivery.states() == after
        assert delivery.execute(command, "the-one") == answer
        with pytest.raises(grpc.RpcError) as caught:
            delivery.execute(command, "another")
        assert reason(caught.value)[1] == "REPLAY"
        # and the worker's own restart finds the same state
        pid = host.get("web-1").pid
        os.kill(pid, signal.SIGKILL)
        host.serving("web-1", not_pid=pid)
        assert delivery.states() == after
