"""The keystore of one module: carries out signed commands, commits each change before it counts, and ends drains.

`execute`, `tick` and the PIN's methods are called by several threads and run one at a time; readers take `state`, an immutable
value, without a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hsmvisor_rpc.sealed import commands, envelope, limits
from hsmvisor_rpc.sealed.canonical import MalformedRecord
from hsmvisor_rpc.sealed.commands import Action, Command, Generate
from hsmvisor_rpc.sealed.envelope import EnvelopeContext, KeyMaterial, RecipientKey
from hsmvisor_rpc.sealed.refusal import Reason, Refusal

from hsmvisord import ck
from hsmvisord import limits as daemon_limits
from hsmvisord.budget import Pace
from hsmvisord.ck import CkError
from hsmvisord.crypto.hardware.channel import Away
from hsmvisord.crypto.interface import CryptoProvider, PrivateKey
from hsmvisord.crypto.rsa import MIN_BITS
from hsmvisord.keystore import changes, guests, making, persistence, pin
from hsmvisord.keystore.chain import parse_chain
from hsmvisord.keystore.making import NewKey
from hsmvisord.keystore.pages import GuestObject
from hsmvisord.keystore.persistence import SealedChange, Usage
from hsmvisord.keystore.state import EXTEND, GenerationState, Pin, State, Step
from hsmvisord.keystore.vault import Manifest, Vault

LEAP = 60.0  #: seconds by which the clock may run ahead between two looks at drains
HOLD = 3600.0  #: seconds after a leap in which no drain ends: to set the clock right, and to see which keys are in use

_FROZEN = "the module's worker is being replaced"
DELIVERED = (ck.CKK_RSA, ck.CKK_EC, ck.CKK_EC_EDWARDS, ck.CKK_EC_MONTGOMERY, ck.CKK_ML_DSA)
NOT_DELIVERED = ("EC secp256k1", "EC P-192", "X448")

#: Stores one sealed change durably, with the id of the request that caused it and the reply to that request (both empty for
#: a change of the module's own); raises StorageError and then nothing has changed.
Persist = Callable[[SealedChange, str, bytes], None]


class StorageError(Exception):
    """The change could not be stored; nothing has changed."""


@dataclass(frozen=True)
class Cause:
    """The request behind a change, and a function that makes its reply from the state that comes of it."""

    request_id: str = ""
    reply: Callable[[State], bytes] = lambda state: b""


@dataclass(frozen=True)
class Happening:
    """Something that the operator hears of: an Event's kind and report."""

    kind: str
    report: Mapping[str, str | int]


def is_compromised(command: Command) -> bool:
    """Says whether a command destroys a key because it is compromised.  Raises MalformedRecord."""
    return command.action == Action.DESTROY and bool(command.body) and commands.Destroy.decode(command.body).compromised


def _no_tpm(leaves: bool, ident: bytes, key: bytes) -> None:
    raise ValueError("the module is no TPM")


class Keystore:
    """One module's state with everything that changes it."""

    def __init__(
        self,
        state: State,
        recipient: RecipientKey,
        manifest: Manifest,
        vault: Vault,
        provider: CryptoProvider,
        clock: Callable[[], float],
        persist: Persist,
        usage: Callable[[], Usage] = dict,
    ) -> None:
        """`clock` gives seconds since 1970; `usage` what each generation was used since the worker began."""
        self.state = changes.skip_handles(state, int(clock()))
        self._recipient, self._manifest, self._vault = recipient, manifest, vault
        self._provider, self._clock, self._persist, self.usage = provider, clock, persist, usage
        self._lock = threading.RLock()
        self._began = int(clock())
        self.frozen = False  #: a successor has taken the state over, or is about to
        #: A guest that knows its PIN could have the host store without end, by a wrong one before each right one.
        self._tries = Pace(daemon_limits.PIN_BURST, daemon_limits.PIN_RATE, clock)
        self._stores = Pace(daemon_limits.STORE_BURST, daemon_limits.STORE_RATE, clock)
        self._steady: Callable[[], float] | None = None
        self._looked, self._held_until = (0.0, 0.0), 0.0
        self._alerted: dict[tuple[str, int], int] = {}
        self.changed: Callable[[State], None] = lambda state: None  #: called after each change, with the lock held
        self.happened: Callable[[Happening], None] = lambda happening: None
        self.move_tpm: Callable[[bool, bytes, bytes], None] = _no_tpm  #: leaves, which move, its key; raises ValueError

    @classmethod
    def create(
        cls,
        module_id: bytes,
        host_id: bytes,
        root: bytes,
        created_at: int,
        vault: Vault,
        provider: CryptoProvider,
        clock: Callable[[], float],
        persist: Persist,
        usage: Callable[[], Usage] = dict,
    ) -> Keystore:
        """Begins an empty module with a recipient key of its own, and stores it."""
        recipient = RecipientKey()
        state = State(0, module_id, host_id, root, created_at, 0, 1, 1, True, Pin(), {}, {}, {})
        store = cls(state, recipient, Manifest(), vault, provider, clock, persist, usage)
        store._commit(store.state, Cause())
        return store

    @property
    def recipient_public(self) -> bytes:
        return self._recipient.public

    # ---- commands -----------------------------------------------------------------------------------------------

    def execute(self, signed: bytes, cause_of: Callable[[Command, str], Cause]) -> tuple[Command, str]:
        """Carries out one signed command; returns it with its signer's name.  Raises Refusal, StorageError, or Away where keys are
        in hardware; then nothing has changed."""
        with self._lock:
            command, signer, now = self._admitted(signed)
            if command.action != Action.GENERATE:
                return self._carry_out(command, signer, now, cause_of)
            body = self._to_generate(command)
        new = making.make(body, self._provider)  # seconds, in which guests' PINs are tried and their objects stored
        with self._lock:
            command, signer, now = self._admitted(signed)
            return self._carry_out(command, signer, now, cause_of, new)

    def _admitted(self, signed: bytes) -> tuple[Command, str, int]:
        """Returns a command that may be carried out now, its signer's name, and the time.  Raises Refusal."""
        now = int(self._clock())
        command, signer = commands.verify_command(signed, self.state.root, now)
        commands.check_address(command, self.state.host_id, self.state.module_id)
        if command.sequence == self.state.sequence:
            raise Refusal(Reason.REPLAY, f"sequence number {command.sequence} was used already")
        if command.sequence < self.state.sequence:
            raise Refusal(Reason.STALE_SEQUENCE, f"sequence number {command.sequence} is below {self.state.sequence}, the last one")
        return command, signer, now

    def _carry_out(
        self, command: Command, signer: str, now: int, cause_of: Callable[[Command, str], Cause], new: NewKey | None = None
    ) -> tuple[Command, str]:
        """`new`: the key that the command had made."""
        try:
            state = self._apply(command, now, new)
        except MalformedRecord as error:
            raise Refusal(Reason.MALFORMED, str(error)) from None
        before = self.state
        self._commit(replace(state, sequence=command.sequence), cause_of(command, signer))
        self._tell(before)
        return command, signer

    def _to_generate(self, command: Command) -> Generate:
        """Raises Refusal, and StorageError where a key would be made in vain."""
        if self.frozen:
            raise StorageError(_FROZEN)
        try:
            body = Generate.decode(command.body)
        except MalformedRecord as error:
            raise Refusal(Reason.MALFORMED, str(error)) from None
        changes.check_new(self.state, command.material, command.generation, body)
        making.check(body, self._provider)
        return body

    def _apply(self, command: Command, now: int, new: NewKey | None) -> State:
        name, number = command.material, command.generation
        match command.action:
            case Action.STAGE:
                return self._stage(command, commands.Stage.decode(command.body), now)
            case Action.GENERATE if new is not None:
                body = self._to_generate(command)  # again: drains may have ended meanwhile
                return changes.generate(self.state, name, number, body, new.private, new.request, now)
            case Action.CERTIFY:
                certificates = commands.Certify.decode(command.body).certificates
                generation = changes.uncertified(self.state, name, number)
                if not certificates:
                    raise Refusal(Reason.MALFORMED, "there is no certificate")
                return changes.certify(self.state, name, number, parse_chain(certificates, generation.public_key, now))
            case Action.ACTIVATE | Action.ROLL_BACK:
                return changes.activate(self.state, name, number, Step(command.action), now)
            case Action.RETIRE:
                return changes.retire(self.state, name, number, commands.Retire.decode(command.body), now)
            case Action.DESTROY:
                is_compromised(command)
                return changes.destroy(self.state, name, number, Step.DESTROY)
            case Action.MOVE_TPM:
                self._move_tpm(command, commands.MoveTpm.decode(command.body))
                return self.state
            case Action.CHANGE_ROOT:
                root = commands.ChangeRoot.decode(command.body).new_root
                if len(root) != 32:
                    raise Refusal(Reason.MALFORMED, "a root is a raw Ed25519 public key of 32 bytes")
                return replace(self.state, root=root)
        raise Refusal(Reason.MALFORMED, f"unknown action {command.action!r}")

    def _stage(self, command: Command, body: commands.Stage, now: int) -> State:
        changes.check_stage(self.state, command.material, command.generation, body)
        chain = parse_chain(body.certificates, body.public_key, now)
        private = None
        if body.envelope:
            private = self._open(command, body)
        return changes.stage(self.state, command.material, command.generation, body, private, chain, now)

    def _move_tpm(self, command: Command, body: commands.MoveTpm) -> None:
        if len(body.ident) != commands.MOVE_IDENT or command.material or command.generation:
            raise Refusal(Reason.MALFORMED, f"a move has {commands.MOVE_IDENT} bytes that name it, no material and no generation")
        key = self._unsealed(command, body.envelope).pkcs8 if body.envelope else b""
        if len(key) not in (0, commands.MOVE_KEY):
            raise Refusal(Reason.MALFORMED, f"a move has a key of {commands.MOVE_KEY} bytes")
        try:
            self.move_tpm(body.leaves, body.ident, key)
        except ValueError as error:
            raise Refusal(Reason.WRONG_STATE, str(error)) from None

    def _unsealed(self, command: Command, sealed: bytes) -> KeyMaterial:
        context = EnvelopeContext(
            host_id=self.state.host_id,
            module_id=self.state.module_id,
            recipient=envelope.recipient_fingerprint(self._recipient.public),
            material=command.material,
            generation=command.generation,
            expires_at=command.expires_at,
        )
        return self._recipient.open(sealed, context)

    def _open(self, command: Command, body: commands.Stage) -> PrivateKey:
        material = self._unsealed(command, body.envelope)
        if len(material.pkcs8) > limits.MAX_PKCS8:
            raise Refusal(Reason.TOO_LARGE, f"a private key has at most {limits.MAX_PKCS8} bytes")
        try:
            private = self._provider.load_private_key(material.pkcs8)
        except Away:  # nothing is wrong with the key
            raise
        except CkError as error:
            raise Refusal(Reason.UNSUPPORTED_KEY, f"the delivered key cannot be used: {error}") from None
        if private.kind.key_type not in DELIVERED or private.kind.name in NOT_DELIVERED:
            raise Refusal(Reason.UNSUPPORTED_KEY, f"{private.kind.name} keys are not delivered: none of the profiles is for them")
        if private.kind.key_type == ck.CKK_RSA and private.kind.bits < MIN_BITS:
            raise Refusal(Reason.UNSUPPORTED_KEY, f"an RSA key that is delivered has at least {MIN_BITS} bits")
        if private.public.spki != body.public_key:
            raise Refusal(Reason.KEY_MISMATCH, "the delivered private key is not that of the command's public key and certificate")
        return private

    # ---- time ---------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Ends drains that are over; raises StorageError."""
        with self._lock:
            now = int(self._clock())
            if not self._is_time_believed(now):
                return
            usage = self.usage()
            for material in self.state.materials.values():
                for g in material.generations:
                    if g.state is not GenerationState.RETIRING or g.drain_ends_at > now:
                        continue
                    last = max(g.last_used_at, usage.get((material.name, g.number), (0, 0))[1], self._began if g.operations else 0)
                    if g.after_drain == EXTEND and now - last < changes.IN_USE:
                        self._alert(material.name, g.number, now)
                        continue
                    before = self.state
                    self._commit(changes.destroy(self.state, material.name, g.number, Step.END_DRAIN), Cause())
                    self._tell(before)

    def watch_clock(self, steady: Callable[[], float]) -> None:
        """`steady` gives seconds of a clock that nobody sets: by it a leap of the other one is seen."""
        self._steady = steady
        self._looked = self._clock(), steady()

    def _is_time_believed(self, now: float) -> bool:
        """A destroyed key does not come back, and a clock that leapt forward may be wrong: drains wait."""
        if self._steady is None:
            return True
        (then, before), steady = self._looked, self._steady()
        self._looked = now, steady
        if (ahead := (now - then) - (steady - before)) > LEAP:
            self._held_until = steady + HOLD
            self.happened(Happening("clock-leapt", {"seconds": int(ahead), "drains_wait_seconds": int(HOLD)}))
        return steady >= self._held_until

    def _alert(self, name: str, number: int, now: int) -> None:
        if now - self._alerted.get((name, number), 0) >= changes.IN_USE:
            self._alerted[name, number] = now
            self.happened(Happening("drain-extended", {"material": name, "generation": number}))

    # ---- slot 0 -------------------------------------------------------------------------------------------------

    def set_pin(self, value: bytes, cause: Cause) -> None:
        """An empty value takes the PIN away; raises ValueError for a length out of bounds."""
        if value and not pin.MIN_PIN <= len(value) <= pin.MAX_PIN:
            raise ValueError(f"a PIN has {pin.MIN_PIN} to {pin.MAX_PIN} bytes")
        made = pin.make(value) if value else Pin()
        with self._lock:
            self._commit(replace(self.state, pin=made), cause)

    def try_pin(self, attempt: bytes) -> bool | None:
        """Returns whether it is the PIN, or None while the token is locked.  A wrong one is stored before this returns."""
        with self._lock:
            return self._try(self.state.pin, attempt, lambda tried: replace(self.state, pin=tried))

    def _try(self, current: Pin, attempt: bytes, with_pin: Callable[[Pin], State]) -> bool | None:
        """`with_pin`: from what a try leaves of the PIN to the state that has it."""
        now = int(self._clock())
        until = pin.locked_until(current)
        # A clock that was set back must not lock for longer than the longest delay.
        if now < until and until - now <= pin.MAX_DELAY:
            return None
        if not self._tries.may():
            return None
        if pin.matches(current, attempt):
            if current.failures:
                self._tries.take()
                self._commit(with_pin(pin.succeeded(current)), Cause())
            return True
        self._tries.take()
        failed = pin.failed(current, now)
        self._commit(with_pin(failed), Cause())
        locked = pin.locked_until(failed) > now
        self.happened(Happening("pin-locked" if locked else "pin-wrong", {"failures": failed.failures}))
        return False

    def set_token_present(self, present: bool) -> None:
        with self._lock:
            if present != self.state.token_present:
                self._commit(replace(self.state, token_present=present), Cause())

    # ---- slot 1 -------------------------------------------------------------------------------------------------

    def add_objects(self, made: Sequence[guests.Made]) -> list[GuestObject]:
        """Stores new token objects, all or none; returns them with their handles.  Raises CkError, StorageError."""
        with self._lock:
            state, objects = guests.added(self.state, made)
            self._store(state)
            return objects

    def change_object(self, handle: int, attributes: Mapping[int, Any], before: Mapping[int, Any] | None = None) -> bool:
        """`before`: what the new attributes were made of.  Returns False, and changes nothing, where somebody else has changed them
        since.  Raises CkError, StorageError."""
        with self._lock:
            item = self.state.objects.get(handle)
            if before is not None and item is not None and item.attributes != before:
                return False
            self._store(guests.changed(self.state, handle, attributes))
            return True

    def remove_object(self, handle: int) -> None:
        """Raises CkError, StorageError."""
        with self._lock:
            self._store(guests.removed(self.state, handle))

    def initialize_guest(self, label: bytes, so_pin: bytes) -> bool | None:
        """C_InitToken: the first time the PIN becomes the security officer's, later it must be it.  As `try_pin` otherwise."""
        with self._lock:
            if self.state.guest:
                right = self.try_guest_pin(so_pin, officer=True)
                if not right:
                    return right
            so = pin.make(so_pin) if not self.state.guest else self.state.guest.so
            self._store(guests.initialized(self.state, label, so))
            return True

    def try_guest_pin(self, attempt: bytes, officer: bool) -> bool | None:
        """As `try_pin`, for a role of slot 1."""
        with self._lock:
            guest = self.state.guest
            if officer:
                return self._try(guest.so, attempt, lambda tried: replace(self.state, guest=replace(guest, so=tried)))
            return self._try(guest.user, attempt, lambda tried: replace(self.state, guest=replace(guest, user=tried)))

    def set_guest_pin(self, value: bytes, officer: bool) -> None:
        """Raises CkError, StorageError."""
        made = pin.make(value)
        with self._lock:
            guest = self.state.guest
            self._store(replace(self.state, guest=replace(guest, so=made) if officer else replace(guest, user=made)))

    def _store(self, state: State) -> None:
        """A change that a guest asks for: not without end."""
        if not self._stores.may():
            raise CkError(ck.CKR_FUNCTION_REJECTED, f"more than {daemon_limits.STORE_RATE:.0f} changes of the token a second")
        self._stores.take()
        self._commit(state, Cause())

    # ---- a successor of the worker ------------------------------------------------------------------------------

    def freeze(self) -> int:
        """No change from now on; returns the stored version, with what each key was used until now.  Raises StorageError."""
        with self._lock:
            if self.usage():
                materials = {name: replace(material) for name, material in self.state.materials.items()}
                self._commit(replace(self.state, materials=materials), Cause())
            self.frozen = True
            return self.state.version

    def thaw(self) -> None:
        with self._lock:
            self.frozen = False

    # ---- commit -------------------------------------------------------------------------------------------------

    def _commit(self, state: State, cause: Cause) -> None:
        if self.frozen:
            raise StorageError(_FROZEN)
        new = replace(state, version=self.state.version + 1)
        old = self.state if self.state.version else None
        change, manifest = persistence.seal_change(old, new, self._recipient, self._manifest, self._vault, self.usage())
        self._persist(change, cause.request_id, cause.reply(new))
        self.state, self._manifest = new, manifest
        self.changed(new)

    def _tell(self, before: State) -> None:
        kinds = {
            GenerationState.CURRENT: "generation-activated",
            GenerationState.RETIRING: "generation-retired",
            GenerationState.DESTROYED: "generation-destroyed",
        }
        for name, material in self.state.materials.items():
            old = before.materials.get(name)
            for g in material.generations:
                was = old.generation(g.number) if old else None
                if g.state in kinds and (was is None or was.state is not g.state):
                    self.happened(Happening(kinds[g.state], {"material": name, "generation": g.number}))
