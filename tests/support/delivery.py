"""Signed commands for one module of a HostProcess, made step by step: what a management plane sends."""

from __future__ import annotations

import time
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_der_public_key
from hsmvisor_rpc.sealed import commands, envelope
from hsmvisor_rpc.sealed.commands import Action, Command
from hsmvisor_rpc.sealed.identity import ModuleIdentity, verify_identity
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from support.certificates import Authority, chain_der
from support.host_process import HostProcess

AUTHORITY = Authority()


class Delivery:
    """Plays the management plane of one module."""

    def __init__(self, host: HostProcess, name: str, material: str = "web") -> None:
        self.host, self.name, self.material, self.signer = host, name, material, commands.Signer(host.root)

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
                host_id, module_id, envelope.recipient_fingerprint(recipient), self.material, generation, now + 600
            )
            sealed = envelope.seal(envelope.KeyMaterial(pkcs8), recipient, context)
            public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            body = commands.Stage(public, (), sealed, "pin", "tls", b"", 0, "extend", "keep", False).encode()
        elif action == Action.GENERATE:
            names = ("dns:www.example.net",)
            body = commands.Generate("P-256", names, "pin", "tls", b"", 0, "extend", "keep", False).encode()
        elif action == Action.CERTIFY:
            public: Any = load_der_public_key(self.public_keys()[generation])
            body = commands.Certify(chain_der((AUTHORITY.issue_for(public), AUTHORITY.intermediate))).encode()
        elif action == Action.RETIRE:
            body = commands.Retire(3600, "extend").encode()
        command = Command(action, host_id, module_id, sequence + 1, now, now + 600, self.material, generation, body)
        return self.signer.sign(command)

    def execute(self, data: bytes, request_id: str) -> pb.ExecuteResponse:
        request = pb.ExecuteRequest(request_id=request_id, module=self.name, signed_command=data)
        return self.host.material.Execute(request, timeout=10)

    def _generations(self) -> list[pb.Generation]:
        listed = self.host.material.ListMaterials(pb.ListMaterialsRequest(module=self.name), timeout=10).materials
        return [g for row in listed if row.name == self.material for g in row.generations]

    def states(self) -> dict[int, str]:
        """A staged generation of a key that the module made is `requested` until it has its certificate."""
        return {g.number: "requested" if g.csr and not g.certificates else g.state for g in self._generations()}

    def public_keys(self) -> dict[int, bytes]:
        return {g.number: g.public_key for g in self._generations()}
