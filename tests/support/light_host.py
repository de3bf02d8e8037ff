"""Hosts and modules without processes: they obey signed commands as real ones do, keep keys in memory, and speak the real API.

For tests of the manager's engine with an injected clock, and for the bench's fleet: thousands of them fit into one process.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key
from hsmvisor.manager.ca import names
from hsmvisor.manager.engine.results import Result
from hsmvisor.manager.inventory.reports import Report, Told
from hsmvisor_rpc.sealed import commands, envelope
from hsmvisor_rpc.sealed.commands import Action, Certify, Command, Generate, Stage, fingerprint, raw_public
from hsmvisor_rpc.sealed.endorsement import TpmCertificates
from hsmvisor_rpc.sealed.envelope import EnvelopeContext, RecipientKey
from hsmvisor_rpc.sealed.fleet import AttestationAsked
from hsmvisor_rpc.sealed.identity import ModuleIdentity
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from support.soft_tpm import SoftTpm

_SPKI = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

#: ML-KEM keys take a while: a bench of thousands of modules lets them share one.
NewRecipient = Callable[[], RecipientKey]


@dataclass
class Generation:
    number: int
    state: str
    public_key: bytes
    certificates: tuple[bytes, ...] = ()
    operations: int = 0


@dataclass
class LightModule:
    name: str
    host_id: bytes
    root: bytes  #: raw
    clock: Callable[[], float]
    new_recipient: NewRecipient = RecipientKey
    curve: ec.EllipticCurve = field(default_factory=ec.SECP256R1)
    module_id: bytes = field(default_factory=lambda: os.urandom(16))
    sequence: int = 0
    materials: dict[str, dict[int, Generation]] = field(default_factory=dict)
    keys: dict[bytes, Any] = field(default_factory=dict)  #: private keys by SubjectPublicKeyInfo
    activations: int = 0

    def __post_init__(self) -> None:
        self.recipient, self.created_at = self.new_recipient(), int(self.clock())

    def execute(self, signed: bytes) -> tuple[Command, bytes]:
        """Returns the command, and the certificate request that came out of it.  Raises Refusal."""
        command, _ = commands.verify_command(signed, self.root, int(self.clock()))
        commands.check_address(command, self.host_id, self.module_id)
        if command.sequence <= self.sequence:
            raise Refusal(Reason.STALE_SEQUENCE, f"{command.sequence} is not above {self.sequence}")
        csr = self._apply(command)
        self.sequence = command.sequence
        return command, csr

    def _apply(self, command: Command) -> bytes:
        there = self.materials.setdefault(command.material, {})
        number = command.generation
        match command.action:
            case Action.GENERATE:
                return self._generate(there, number, Generate.decode(command.body))
            case Action.CERTIFY:
                generation = self._in(there, number, "staged")
                chain = Certify.decode(command.body).certificates
                self._check(chain, generation.public_key)
                generation.certificates = chain
            case Action.STAGE:
                self._stage(there, command, Stage.decode(command.body))
            case Action.ACTIVATE | Action.ROLL_BACK:
                generation = self._in(there, number, "staged" if command.action == Action.ACTIVATE else "retiring")
                for other in there.values():
                    if other.state == "current":
                        other.state = "retiring"
                generation.state = "current"
                self.activations += 1
            case Action.RETIRE:
                self._in(there, number, "current").state = "retiring"
            case Action.DESTROY:
                generation = self._in(there, number, "staged", "retiring")
                generation.state = "destroyed"
        return b""

    def _in(self, there: Mapping[int, Generation], number: int, *states: str) -> Generation:
        generation = there.get(number)
        if generation is None:
            raise Refusal(Reason.UNKNOWN_GENERATION, f"there is no generation {number}")
        if generation.state not in states:
            raise Refusal(Reason.WRONG_STATE, f"generation {number} is {generation.state}")
        return generation

    def _check_newer(self, there: Mapping[int, Generation], number: int) -> None:
        if number <= max(there, default=0):
            raise Refusal(Reason.STALE_GENERATION, f"generation {number} is not newer than {max(there)}")

    def _check(self, chain: tuple[bytes, ...], public_key: bytes) -> None:
        leaf = x509.load_der_x509_certificate(chain[0])
        if leaf.public_key().public_bytes(*_SPKI) != public_key:
            raise Refusal(Reason.KEY_MISMATCH, "the certificate is not of this key")

    def _generate(self, there: dict[int, Generation], number: int, body: Generate) -> bytes:
        self._check_newer(there, number)
        key = ec.generate_private_key(self.curve)
        public = key.public_key().public_bytes(*_SPKI)
        self.keys[public] = key
        there[number] = Generation(number, "staged", public)
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        if body.names:
            found = [names.general(names.parse(name)) for name in body.names]
            builder = builder.add_extension(x509.SubjectAlternativeName(found), False)
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)

    def _stage(self, there: dict[int, Generation], command: Command, body: Stage) -> None:
        self._check_newer(there, command.generation)
        if body.envelope:
            context = EnvelopeContext(
                command.host_id,
                command.module_id,
                envelope.recipient_fingerprint(self.recipient.public),
                command.material,
                command.generation,
                command.expires_at,
            )
            key = load_der_private_key(self.recipient.open(body.envelope, context).pkcs8, None)
            if key.public_key().public_bytes(*_SPKI) != body.public_key:
                raise Refusal(Reason.KEY_MISMATCH, "another key")
            self.keys[body.public_key] = key
        elif body.public_key not in self.keys:
            raise Refusal(Reason.UNKNOWN_GENERATION, "a certificate alone renews a key that is there; this key is not")
        if body.certificates:
            self._check(body.certificates, body.public_key)
        there[command.generation] = Generation(command.generation, "staged", body.public_key, body.certificates)

    def current(self, material: str) -> Generation | None:
        return next((g for g in self.materials.get(material, {}).values() if g.state == "current"), None)

    def told(self, material: str) -> dict[int, Told]:
        return {n: Told(g.state, g.operations) for n, g in self.materials.get(material, {}).items()}


@dataclass
class LightGuest:
    name: str
    owner: str
    attributes: dict[str, str]
    module: LightModule
    kind: str = "VM"


class LightHost:
    """`root`: raw, what its modules obey."""

    def __init__(self, name: str, root: bytes, clock: Callable[[], float], new_recipient: NewRecipient = RecipientKey) -> None:
        self.name, self.root, self.clock, self.new_recipient = name, root, clock, new_recipient
        self.key = Ed25519PrivateKey.generate()
        self.public = raw_public(self.key.public_key())
        self.id = fingerprint(self.public)
        self.guests: dict[str, LightGuest] = {}
        self.session, self.number = uuid.uuid4().hex, 0
        self.results: list[Result] = []
        self.told: dict[str, Report] = {}  #: what the manager has heard
        self.done: dict[str, Result] = {}  #: by command: once
        self.silent: set[str] = set()  #: guests whose modules do not serve at the moment
        self.forged: dict[str, bytes] = {}  #: identities that are not true
        self.refused: dict[str, Any] = {}  #: guests that the manager did not take
        self.refuse: Callable[[str, Command], Refusal | None] = lambda module, command: None  #: a test's own
        self.tpms: dict[str, SoftTpm] = {}  #: of modules that are one
        self.asked: list[AttestationAsked] = []  #: of guests' boots
        self.old = False  #: of the release that could not attest
        self.lie: Callable[[bytes, AttestationAsked], bytes] = lambda attestation, asked: attestation  #: a test's own
        self.certify: Callable[[TpmCertificates], bytes] = TpmCertificates.encode  #: the same, of its TPMs' certificates

    def add(self, name: str, owner: str = "alice", root: bytes = b"", kind: str = "VM", **attributes: str) -> LightGuest:
        module = LightModule(name, self.id, root or self.root, self.clock, self.new_recipient)
        guest = self.guests[name] = LightGuest(name, owner, attributes, module, kind)
        return guest

    def restart(self) -> None:
        """As after a restart of the host's service: what it did not tell is told by being given the commands again."""
        self.session, self.number, self.told, self.results = uuid.uuid4().hex, 0, {}, []

    def report(self, guest: LightGuest) -> Report:
        module = guest.module
        if guest.name in self.silent:
            return Report(guest.name, guest.kind, guest.owner, dict(guest.attributes), module.name)
        identity = ModuleIdentity(
            self.id, module.module_id, module.name, module.recipient.public, fingerprint(module.root), module.created_at
        )
        return Report(
            name=guest.name,
            kind=guest.kind,
            owner=guest.owner,
            attributes=dict(guest.attributes),
            module=module.name,
            signed_identity=self.forged.get(guest.name) or commands.sign(identity, self.key).encode(),
            sequence=module.sequence,
            materials={material: module.told(material) for material in module.materials},
        )

    def carry_out(self, id: str, module: str, signed: bytes) -> Result:
        """Once for each id."""
        if id not in self.done:
            self.done[id] = self._carry_out(id, module, signed)
        return self.done[id]

    def attest(self, id: str, module: str, untrusted_asked: bytes) -> Result:
        """Each time anew."""
        if self.old:  # as hsmvisor.host.commands says of a command of no bytes, which is all that it sees
            return Result(id, False, "MALFORMED", "signed_command has 1-1048576 bytes")
        asked = AttestationAsked.parse(untrusted_asked)
        self.asked.append(asked)
        guest = next((g for g in self.guests.values() if g.module.name == module), None)
        if guest is None:
            return Result(id, False, "MODULE", f"there is no module {module}")
        if module not in self.tpms:
            return Result(id, False, "TPM", f"module {module} is no TPM")
        tpm = self.tpms[module]
        if tpm.off:
            return Result(id, False, "TPM", "the guest is off: its TPM was not started")
        attestation = tpm.attestation(self.key, guest.module.module_id, module, asked.nonce, asked.pcrs)
        certificates = tpm.certificates(self.key, guest.module.module_id, module)
        return Result(id, True, attestation=self.lie(attestation, asked), tpm_certificates=self.certify(certificates))

    def _carry_out(self, id: str, name: str, signed: bytes) -> Result:
        guest = next((g for g in self.guests.values() if g.module.name == name), None)
        if guest is None:
            return Result(id, False, "MODULE", f"there is no module {name}")
        module = guest.module
        try:
            command = Command.decode(commands.SignedCommand.decode(signed).payload)
            if (refusal := self.refuse(name, command)) is not None:
                raise refusal
            command, csr = module.execute(signed)
        except Refusal as error:
            payload = Command.decode(commands.SignedCommand.decode(signed).payload)
            states = {n: g.state for n, g in module.materials.get(payload.material, {}).items()}
            return Result(id, False, str(error.reason), error.detail, sequence=module.sequence, states=states)
        there = module.materials[command.material]
        public = there[command.generation].public_key if command.generation in there else b""
        states = {n: g.state for n, g in there.items()}
        return Result(id, True, public_key=public, csr=csr, sequence=module.sequence, states=states)


def shared_recipient() -> NewRecipient:
    """All modules of a bench have one: their number is what counts there."""
    made = RecipientKey()
    return lambda: made
