"""Sends signed commands to modules: fetches a module's identity, checks it against its host's pinned key, seals, signs, sends."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import grpc
from hsmvisor.authority.csr import CertificateRequest, spelled
from hsmvisor.authority.records import Known, ModuleRecord, Records, content_of, delivery_of, key_of, made_of
from hsmvisor.authority.store import Authority, AuthorityError
from hsmvisor.bundle import Bundle
from hsmvisor.serving import errors
from hsmvisor_rpc.sealed import envelope
from hsmvisor_rpc.sealed.canonical import Record
from hsmvisor_rpc.sealed.commands import (
    Action,
    Certify,
    ChangeRoot,
    Command,
    Destroy,
    Generate,
    MoveTpm,
    Retire,
    Signer,
    Stage,
    fingerprint,
)
from hsmvisor_rpc.sealed.identity import ModuleIdentity, verify_identity
from hsmvisor_rpc.sealed.refusal import Reason
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisor_rpc.v1 import hsmvisor_pb2_grpc as rpc

LIFETIME = 600  #: seconds that a command is valid
ATTEMPTS = 5  #: when somebody else's command took the sequence number first


@dataclass(frozen=True)
class Staging:
    """How a generation is to be used; see hsmvisor_rpc.sealed.commands.Stage."""

    mode: str = "pin"
    profile: str = "tls"
    alias_id: bytes = b""
    drain_seconds: int = 0
    after_drain: str = "extend"
    on_expiry: str = "keep"
    self_signed: bool = False


class SetBack(AuthorityError):
    """The module has an older state than it had: what it was told in the meantime is lost."""


@dataclass(frozen=True)
class Target:
    """A module as its host certifies it, and the last sequence number that it carried out."""

    identity: ModuleIdentity
    sequence: int


class Pusher:
    """`host_key`: the host's pinned identity key; `address`: where it is met, by which what was delivered is recorded.

    Calls raise grpc.RpcError, sealed.Refusal and AuthorityError.
    """

    def __init__(
        self, channel: grpc.Channel, authority: Authority, host_key: bytes, timeout: float = 30, address: str = ""
    ) -> None:
        self._modules = rpc.ModuleServiceStub(channel)
        self._materials = rpc.MaterialServiceStub(channel)
        self._authority, self._host_key, self._timeout = authority, host_key, timeout
        self.records = Records(authority.directory, address or f"host:{fingerprint(host_key).hex()}")
        self._catching_up = False

    def target(self, module: str) -> Target:
        """Raises AuthorityError when the module obeys another root."""
        answer = self._modules.GetIdentity(pb.GetIdentityRequest(name=module), timeout=self._timeout)
        identity = verify_identity(answer.signed_identity, self._host_key)
        if identity.name != module:
            raise AuthorityError(f"the host answered with the identity of module {identity.name!r}")
        if identity.root != fingerprint(self._authority.root_public):
            raise AuthorityError(f"module {module!r} obeys another authority than that in {self._authority.directory}")
        return Target(identity, answer.sequence)

    def next_generation(self, module: str, material: str) -> int:
        """Returns the number after the newest generation, 1 for a new material; what was lost with a newer state counts too."""
        known = self.records.read(module).materials.get(material, Known())
        newest = max((g.number for m in self.materials(module) if m.name == material for g in m.generations), default=0)
        return max(newest, known.newest) + 1

    # ---- a module that was set back, or made anew ---------------------------------------------------------------

    def owed(self, module: str) -> str:
        """Says what the module lacks that this authority knows of, empty when it lacks nothing."""
        target, known = self._meet(module)
        if target.sequence < known:
            return _set_back(module, target.sequence, known)
        names = ", ".join(self.records.read(module).owed)
        return f"module {module} does not have what was delivered to it before: {names}" if names else ""

    @contextlib.contextmanager
    def catching_up(self, module: str) -> Iterator[ModuleRecord]:
        """Commands are sent to a module that was set back as well.  Yields what is known of it."""
        target, known = self._meet(module)
        with self.records.change(module) as record:
            if target.sequence < known:
                record.owed = sorted(name for name, of in record.materials.items() if of.current is not None)
        self._catching_up = True
        try:
            yield record
        finally:
            self._catching_up = False

    def _meet(self, module: str) -> tuple[Target, int]:
        """Returns the module and the last sequence number that it is known to have had, as that was before it was asked: another
        pusher may be at work."""
        before = self.records.read(module)
        target = self.target(module)
        if before.module_id == target.identity.module_id.hex():
            return target, before.sequence
        with self.records.change(module) as record:
            record.meet(target.identity.module_id)
        return target, 0

    def settled(self, module: str, owed: list[str]) -> None:
        """The module is up to date, but for `owed`; from now on its own word counts again."""
        target = self.target(module)
        with self.records.change(module) as record:
            record.sequence, record.owed = target.sequence, owed

    def delivered(self, module: str, material: str, bundle: Bundle, staging: Staging) -> tuple[int, str]:
        """Returns number and state of the current or a staged generation that is just this; (0, "") when there is none."""
        for known in self.materials(module):
            if known.name == material and _is_used_so(known, staging):
                fitting = [g for g in known.generations if g.state in ("current", "staged") and _is_just(g, bundle, staging)]
                if fitting:
                    newest = max(fitting, key=lambda g: (g.state == "current", g.number))
                    return newest.number, newest.state
        return 0, ""

    def materials(self, module: str) -> list[pb.Material]:
        found: list[pb.Material] = []
        token = ""
        while True:
            request = pb.ListMaterialsRequest(module=module, page_token=token)
            answer = self._materials.ListMaterials(request, timeout=self._timeout)
            found += answer.materials
            token = answer.next_page_token
            if not token:
                return found

    # ---- commands -----------------------------------------------------------------------------------------------

    def stage(
        self,
        module: str,
        material: str,
        bundle: Bundle,
        staging: Staging,
        generation: int,
        key_file: str = "",
        cert_file: str = "",
    ) -> pb.ExecuteResponse:
        """Delivers one generation; without a private key in `bundle` it renews the certificate of a key that is there.

        The names of the owner's files are recorded, for a redelivery.
        """

        def body(target: Target, expires_at: int) -> Stage:
            sealed = b"" if bundle.pkcs8 is None else _sealed(target, material, generation, expires_at, bundle.pkcs8)
            return Stage(
                public_key=bundle.public_key,
                certificates=bundle.certificates,
                envelope=sealed,
                mode=staging.mode,
                profile=staging.profile,
                alias_id=staging.alias_id,
                drain_seconds=staging.drain_seconds,
                after_drain=staging.after_drain,
                on_expiry=staging.on_expiry,
                self_signed=staging.self_signed,
            )

        delivery = delivery_of(bundle, generation, staging, key_file, cert_file)
        renewed = key_of(bundle.public_key) if bundle.pkcs8 is None else ""

        def done(record: ModuleRecord, answer: pb.ExecuteResponse) -> None:
            record.staged(material, delivery, renewed)

        return self._send(module, Action.STAGE, material, generation, body, done=done)

    def generate(
        self, module: str, material: str, key_type: str, names: Iterable[str], staging: Staging, generation: int
    ) -> pb.ExecuteResponse:
        """Has the module make a key, as a staged generation without a certificate.

        `key_type` is one of sealed.commands.KEY_TYPES.  The answer's `csr` is a certificate request (PKCS #10, DER) for `names`
        (dns:..., ip:..., uri:..., email:...), signed by that key; it was held against what was asked for.
        """
        asked = spelled(names)
        body = Generate(
            key_type=key_type,
            names=asked,
            mode=staging.mode,
            profile=staging.profile,
            alias_id=staging.alias_id,
            drain_seconds=staging.drain_seconds,
            after_drain=staging.after_drain,
            on_expiry=staging.on_expiry,
            self_signed=staging.self_signed,
        )

        def done(record: ModuleRecord, answer: pb.ExecuteResponse) -> None:
            record.staged(material, made_of(_public_key(answer, generation), generation, staging))

        answer = self._send(module, Action.GENERATE, material, generation, lambda *_: body, done=done)
        CertificateRequest.read(answer.csr).demand(_public_key(answer, generation), key_type, asked)
        return answer

    def generated(
        self, module: str, material: str, key_type: str, names: Iterable[str], staging: Staging
    ) -> tuple[int, CertificateRequest] | None:
        """Returns the staged generation, and its request, that just such a `generate` made and that has no certificate yet."""
        asked = spelled(names)
        for known in self.materials(module):
            if known.name == material and _is_used_so(known, staging):
                for g in reversed(known.generations):
                    bare = bool(g.certificates) == staging.self_signed
                    if g.state == "staged" and g.csr and bare and _is_kept_so(g, staging):
                        request = CertificateRequest.read(g.csr)
                        if (request.public_key, request.key_type, request.names) == (g.public_key, key_type, asked):
                            return g.number, request
        return None

    def certify(self, module: str, material: str, generation: int, bundle: Bundle, cert_file: str = "") -> pb.ExecuteResponse:
        """Puts certificates to a staged generation that has none; `bundle` holds them alone."""
        content = content_of(bundle.public_key, bundle.certificates)

        def done(record: ModuleRecord, answer: pb.ExecuteResponse) -> None:
            record.certified(material, generation, content, cert_file)

        return self._send(module, Action.CERTIFY, material, generation, lambda *_: Certify(bundle.certificates), done=done)

    def push(self, module: str, material: str, bundle: Bundle, staging: Staging | None = None) -> pb.ExecuteResponse:
        """Stages the next generation and activates it."""
        generation = self.next_generation(module, material)
        self.stage(module, material, bundle, staging or Staging(), generation)
        return self.activate(module, material, generation)

    def activate(self, module: str, material: str, generation: int) -> pb.ExecuteResponse:
        return self._activate(module, Action.ACTIVATE, material, generation)

    def roll_back(self, module: str, material: str, generation: int) -> pb.ExecuteResponse:
        return self._activate(module, Action.ROLL_BACK, material, generation)

    def _activate(self, module: str, action: Action, material: str, generation: int) -> pb.ExecuteResponse:
        return self._send(module, action, material, generation, done=lambda record, _: record.activated(material, generation))

    def retire(
        self, module: str, material: str, generation: int, drain_seconds: int = 0, after_drain: str = "extend"
    ) -> pb.ExecuteResponse:
        return self._send(
            module,
            Action.RETIRE,
            material,
            generation,
            lambda *_: Retire(drain_seconds, after_drain),
            done=lambda record, _: record.retired(material, generation),
        )

    def destroy(self, module: str, material: str, generation: int, compromised: bool = False) -> pb.ExecuteResponse:
        return self._send(
            module,
            Action.DESTROY,
            material,
            generation,
            lambda *_: Destroy(compromised),
            done=lambda record, _: record.destroyed(material, generation),
        )

    def move_tpm(self, module: str, leaves: bool, ident: bytes, key: bytes) -> pb.ExecuteResponse:
        """Permits that the state of the module's TPM goes to another host, or comes from one.

        `ident` (16 random bytes) and `key` (32) are the same at both ends; an empty key: it does not, after all.
        """

        def body(target: Target, expires_at: int) -> MoveTpm:
            return MoveTpm(leaves, ident, _sealed(target, "", 0, expires_at, key) if key else b"")

        return self._send(module, Action.MOVE_TPM, "", 0, body)

    def change_root(self, module: str, new_root: bytes) -> pb.ExecuteResponse:
        """Signed by the root itself."""
        return self._send(module, Action.CHANGE_ROOT, "", 0, lambda *_: ChangeRoot(new_root), self._authority.root())

    def _send(
        self,
        module: str,
        action: Action,
        material: str,
        generation: int,
        body: Callable[[Target, int], Record] | None = None,
        signer: Signer | None = None,
        done: Callable[[ModuleRecord, pb.ExecuteResponse], None] = lambda record, answer: None,
    ) -> pb.ExecuteResponse:
        """`done` records that it was carried out."""
        signer = signer or self._authority.signer()
        request_id = str(uuid.uuid4())
        for attempt in range(ATTEMPTS):
            target, known = self._meet(module)
            now = int(time.time())
            command = Command(
                action=action,
                host_id=target.identity.host_id,
                module_id=target.identity.module_id,
                sequence=self._next(module, target, known),
                issued_at=now,
                expires_at=now + LIFETIME,
                material=material,
                generation=generation,
                body=body(target, now + LIFETIME).encode() if body else b"",
            )
            request = pb.ExecuteRequest(request_id=f"{request_id}.{attempt}", module=module, signed_command=signer.sign(command))
            try:
                answer = self._materials.Execute(request, timeout=self._timeout)
                with self.records.change(module) as record:
                    record.acknowledged(answer.sequence)
                    done(record, answer)
                return answer
            except grpc.RpcError as error:
                if attempt + 1 == ATTEMPTS or errors.told(error)[0] not in (Reason.STALE_SEQUENCE, Reason.REPLAY):
                    raise
        raise AssertionError("unreachable")

    def _next(self, module: str, target: Target, known: int) -> int:
        """Returns a sequence number that was never used; raises SetBack when the module knows less than we do."""
        if target.sequence < known and not self._catching_up:
            raise SetBack(_set_back(module, target.sequence, known))
        return max(target.sequence, self.records.read(module).next_above) + 1


def _set_back(module: str, has: int, known: int) -> str:
    return (
        f"module {module} was set back: its last command is number {has}, this authority knows of number {known}. "
        f"An older state of its host was restored: hsmvisor material redeliver {module} brings it up to date"
    )


def _is_used_so(known: pb.Material, staging: Staging) -> bool:
    wanted = (staging.mode, staging.profile, staging.alias_id or known.alias_id)
    return (known.mode, known.profile, known.alias_id) == wanted


def _is_kept_so(known: pb.Generation, staging: Staging) -> bool:
    wanted = (staging.after_drain, staging.on_expiry, staging.drain_seconds)
    return (known.after_drain, known.on_expiry, known.drain_seconds) == wanted


def _is_just(known: pb.Generation, bundle: Bundle, staging: Staging) -> bool:
    certificates = tuple(known.certificates)
    if not bundle.certificates and staging.self_signed:  # the module made that certificate
        certificates = () if len(certificates) == 1 else (b"none",)
    return (known.public_key, certificates) == (bundle.public_key, bundle.certificates) and _is_kept_so(known, staging)


def _public_key(answer: pb.ExecuteResponse, generation: int) -> bytes:
    return next((g.public_key for g in answer.status.generations if g.number == generation), b"")


def _sealed(target: Target, material: str, generation: int, expires_at: int, secret: bytes) -> bytes:
    """Returns an envelope for the module alone."""
    identity = target.identity
    fingerprinted = envelope.recipient_fingerprint(identity.recipient)
    context = envelope.EnvelopeContext(identity.host_id, identity.module_id, fingerprinted, material, generation, expires_at)
    return envelope.seal(envelope.KeyMaterial(secret), identity.recipient, context)
