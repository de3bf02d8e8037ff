"""A management plane of a test's own, that can also say everything wrong."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from hsmvisor_rpc.sealed import envelope
from hsmvisor_rpc.sealed.commands import Action, Command, Signer, Stage
from hsmvisor_rpc.sealed.identity import ModuleIdentity, verify_identity
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import Authority, PrivateKey, chain_der, new_key, pkcs8, spki
from support.host_process import HostProcess, new_id


@dataclass
class Plane:
    """A management plane that can say everything wrong; `changes` go into the command."""

    host: HostProcess
    name: str
    key: bytes

    def __post_init__(self) -> None:
        self.authority, self.signer = Authority(), Signer(self.host.root)

    def identity(self) -> tuple[ModuleIdentity, int]:
        answer = self.host.modules.GetIdentity(pb.GetIdentityRequest(name=self.name), timeout=10)
        return verify_identity(answer.signed_identity, self.key), answer.sequence

    def body(
        self,
        key: PrivateKey,
        chain: tuple[x509.Certificate, ...] = (),
        generation: int = 1,
        sealed: PrivateKey | None = None,
        material: str = "tls",
        **changes: Any,
    ) -> Stage:
        """`sealed`: another key than the one that is named."""
        known, _ = self.identity()
        self.expires = int(time.time()) + 300
        recipient = envelope.recipient_fingerprint(known.recipient)
        context = envelope.EnvelopeContext(known.host_id, known.module_id, recipient, material, generation, self.expires)
        blob = envelope.seal(envelope.KeyMaterial(pkcs8(sealed or key)), known.recipient, context)
        values: dict[str, Any] = {
            "mode": "pin",
            "profile": "tls",
            "alias_id": b"",
            "drain_seconds": 0,
            "after_drain": "extend",
            "on_expiry": "keep",
        }
        values |= {"public_key": spki(key), "certificates": chain_der(chain), "envelope": blob, "self_signed": False} | changes
        return Stage(**values)

    def command(self, body: Stage | None = None, action: str = Action.STAGE, generation: int = 1, **changes: Any) -> bytes:
        known, sequence = self.identity()
        now, expires = int(time.time()), self.expires if body else int(time.time()) + 300
        content = body.encode() if body else b""
        values: dict[str, Any] = {
            "action": action,
            "host_id": known.host_id,
            "module_id": known.module_id,
            "sequence": sequence + 1,
            "issued_at": now,
        }
        values |= {"expires_at": expires, "material": "tls", "generation": generation, "body": content}
        return self.signer.sign(Command(**(values | changes)))

    def send(self, data: bytes) -> pb.ExecuteResponse:
        request = pb.ExecuteRequest(request_id=new_id(), module=self.name, signed_command=data)
        return self.host.material.Execute(request, timeout=20)

    def deliver(self, generation: int = 1) -> None:
        self.send(self.command(self.body(new_key("p256"), generation=generation), generation=generation))
