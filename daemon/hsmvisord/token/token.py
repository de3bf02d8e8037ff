"""The token of one module: slot 0 over the keystore, and the applications that use it.

One lock guards the table of applications and sessions; it is never held during cryptography or while a reply is written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from hsmvisord import ck, limits
from hsmvisord.budget import Budget
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import CryptoProvider, KeyKind
from hsmvisord.crypto.mechanisms import check_mechanism
from hsmvisord.keystore import pin
from hsmvisord.keystore.keystore import Keystore
from hsmvisord.keystore.persistence import Usage
from hsmvisord.keystore.state import State
from hsmvisord.lanes.lanes import Gate
from hsmvisord.token import answers
from hsmvisord.token.application import Application, Saved
from hsmvisord.token.catalogue import Index
from hsmvisord.token.info import GUEST_SLOT, MANAGED_SLOT
from hsmvisord.token.journal import Journals
from hsmvisord.token.policy import EVERYTHING, Policing, Policy
from hsmvisord.token.seeds import Seeds
from hsmvisord.token.statistics import Cell, CellKey, Counters, total
from hsmvisord.wire.calls import Mechanism

TICKET_SIZE = 16


@dataclass(frozen=True)
class Settings:
    """The operator's settings of a module."""

    log_signatures: bool = False
    max_sessions: int = limits.MAX_SESSIONS
    max_connections: int = limits.MAX_CONNECTIONS
    policy: Policy = EVERYTHING
    guest_token: bool = False  #: slot 1 is there
    cryptoprocessor: str = ""  #: the HSM where the module's keys live; empty: in software


class Token:
    def __init__(
        self, module: str, keystore: Keystore, provider: CryptoProvider, wall: Callable[[], float], monotonic: Callable[[], float]
    ) -> None:
        self.module, self.keystore, self.provider = module, keystore, provider
        self.wall, self.monotonic = wall, monotonic
        self.policing = Policing(EVERYTHING, monotonic)
        self.seeds = Seeds()
        self._settings = Settings()
        self.epoch = int.from_bytes(os.urandom(4), "big")  #: changes when the module's process is another
        self.on_fault: Callable[[str, Exception], None] = lambda call, error: None
        self.index = Index(keystore.state)
        self.slot_events = 0  #: how often the token came or went
        self.on_change: Callable[[], None] = lambda: None  #: wakes those who wait for a rotation or a slot event
        self._on_signature: Callable[[Application, str, int, tuple[str, int] | None], None] | None = None
        self.gate = Gate()  #: open while the state and what is told of signatures stay as they are
        self.recall: Callable[[], None] = lambda: None  #: has all lanes come back; any thread
        self._lock = threading.Lock()
        self._applications: dict[bytes, Application] = {}
        self._sessions = 0
        self._counters: set[Counters] = set()
        self.journals = Journals()
        self.session_objects = Budget(limits.MAX_SESSION_OBJECTS_ALL)
        self.found = Budget(limits.MAX_FOUND_ALL)
        self._closed = Counters()  #: of connections that ended
        self._present = keystore.state.token_present
        keystore.changed = self._changed

    @property
    def settings(self) -> Settings:
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._settings = settings
        if not settings.guest_token:
            for application in self.applications():
                application.close_all_sessions(GUEST_SLOT)
        if settings.policy != self.policing.policy:  # else what was used of the rate stays used
            self.policing = Policing(settings.policy, self.monotonic, self.policing.told)
        self._shut()

    def offers(self, mechanism: int) -> bool:
        """Says whether a guest may find it in the list of mechanisms."""
        return self.policing.offers(mechanism) and self.provider.offers(mechanism)

    def begin(self, mechanism: Mechanism, allowed: Container[int], kind: KeyKind, function: int) -> None:
        """Raises unless the operation may begin now: by the key, by the module's policy, and by its rate."""
        self.check(mechanism, allowed, kind, function)
        self.policing.admit(mechanism.type, kind)

    def check(self, mechanism: Mechanism, allowed: Container[int], kind: KeyKind, function: int) -> None:
        """As `begin`, of an operation that is not begun."""
        self.policing.check_legacy(mechanism.type)
        check_mechanism(mechanism, allowed, kind, function)
        if not self.provider.offers(mechanism.type):
            raise CkError(ck.CKR_MECHANISM_INVALID, f"the module's cryptoprocessor has no {ck.mechanism_name(mechanism.type)}")
        self.policing.check(mechanism.type, kind)

    @property
    def on_signature(self) -> Callable[[Application, str, int, tuple[str, int] | None], None] | None:
        return self._on_signature

    @on_signature.setter
    def on_signature(self, told: Callable[[Application, str, int, tuple[str, int] | None], None] | None) -> None:
        self._on_signature = told
        self._shut()

    def _shut(self) -> None:
        """After a change: what lanes were told before it holds no more."""
        old, self.gate = self.gate, Gate()
        old.shut()
        self.recall()

    # ---- the keystore's state -----------------------------------------------------------------------------------

    @property
    def watermark(self) -> int:
        return self.index.state.watermark

    @property
    def slots(self) -> tuple[int, ...]:
        return (MANAGED_SLOT, GUEST_SLOT) if self._settings.guest_token else (MANAGED_SLOT,)

    @property
    def present(self) -> bool:
        return self._present

    @property
    def pin_set(self) -> bool:
        return bool(self.index.state.pin)

    @property
    def pin_locked(self) -> bool:
        return pin.locked_until(self.index.state.pin) > self.wall()

    def _changed(self, state: State) -> None:
        before = self.index.state
        same = state.materials == before.materials
        if same:
            self.index.state = state  # objects do not depend on the rest
        else:
            self.index = Index(state, self.index)
            self._revoke(state)
        if state.pin and state.pin.salt != before.pin.salt:
            for application in self.applications():
                application.end_login()  # a login from before does not prove the new PIN
        if state.objects is not before.objects:
            self._revoke_of_guest(state)
        self._shut()
        if state.token_present != self._present:
            self._present = state.token_present
            self.slot_events += 1
            if not self._present:
                for application in self.applications():
                    application.token_removed()
        self.on_change()

    def _revoke(self, state: State) -> None:
        """Operations that were begun with a key that is gone end as well."""
        live = {(m.name, g.number) for m in state.materials.values() for g in m.generations if g.live}
        for application in self.applications():
            for operation in application.operations():
                if operation.generation and operation.generation not in live:
                    operation.revoke()

    def _revoke_of_guest(self, state: State) -> None:
        for application in self.applications():
            for operation in application.operations():
                if 0 < operation.key_handle < limits.FIRST_SESSION_OBJECT and operation.key_handle not in state.objects:
                    operation.revoke()

    def try_pin(self, attempt: bytes) -> None:
        """Raises CKR_PIN_INCORRECT, CKR_PIN_LOCKED, or CKR_DEVICE_ERROR when the attempt could not be counted."""
        with answers.stored():
            right = self.keystore.try_pin(answers.bounded(attempt))
        answers.judge(right)

    # ---- applications and sessions ------------------------------------------------------------------------------

    def new_application(self, program: str, watermark: int = 0, inherited: bool = False) -> Application:
        """`watermark` 0: the newest view; `inherited`: it is a parent's, and outlives the first session."""
        mark = min(watermark, self.watermark) if watermark else self.watermark
        application = Application(self, os.urandom(TICKET_SIZE), program, mark, inherited)
        with self._lock:
            self._applications[application.ticket] = application
        return application

    def restore_application(self, saved: Saved) -> Application:
        """Raises CkError."""
        if saved.ticket in self._applications or len(saved.ticket) != TICKET_SIZE:
            raise CkError(ck.CKR_ARGUMENTS_BAD, "a ticket that was never given, or twice")
        application = Application(self, saved.ticket, saved.program, min(saved.watermark, self.watermark))
        application.connections = 0
        try:
            application.restore(saved)
        except BaseException:
            application.close_all_sessions()
            raise
        with self._lock:
            self._applications[saved.ticket] = application
        return application

    def application(self, ticket: bytes) -> Application | None:
        return self._applications.get(ticket)

    def applications(self) -> list[Application]:
        with self._lock:
            return list(self._applications.values())

    def join(self, ticket: bytes) -> Application | None:
        """Returns the application with one connection more, or None when it has ended."""
        with self._lock:
            application = self._applications.get(ticket)
            if application is not None:
                application.connections += 1
            return application

    def leave(self, application: Application) -> None:
        """One connection of the application has ended; with the last one it ends."""
        with self._lock:
            application.connections -= 1
            if application.connections > 0:
                return
            self._applications.pop(application.ticket, None)
        application.end()

    def finalize(self, application: Application) -> None:
        """It has ended for all its connections; those that are left can open nothing."""
        with self._lock:
            application.connections -= 1
            self._applications.pop(application.ticket, None)
        application.end()

    def take_session(self) -> None:
        with self._lock:
            if self._sessions >= self.settings.max_sessions:
                raise CkError(ck.CKR_SESSION_COUNT, f"the module has {self._sessions} sessions open, its limit")
            self._sessions += 1

    def give_sessions(self, count: int) -> None:
        with self._lock:
            self._sessions -= count

    @property
    def sessions(self) -> int:
        return self._sessions

    # ---- statistics ---------------------------------------------------------------------------------------------

    def add_counters(self, counters: Counters) -> None:
        with self._lock:
            self._counters.add(counters)

    def remove_counters(self, counters: Counters) -> None:
        with self._lock:
            self._counters.discard(counters)
            if counters.cells:
                self._closed = self._closed.with_added(counters)

    def statistics(self) -> dict[CellKey, Cell]:
        with self._lock:
            parts = [self._closed, *self._counters]
        return total(parts)

    def usage(self) -> Usage:
        """Returns what each generation was used since the worker began."""
        used: dict[tuple[str, int], tuple[int, int]] = {}
        for (_, _, generation), cell in self.statistics().items():
            if generation:
                operations, last = used.get(generation, (0, 0))
                used[generation] = (operations + cell.count, max(last, int(cell.last)))
        return used

    def holders(self) -> Iterator[tuple[str, int]]:
        """Gives the generation once for each open connection that used it."""
        with self._lock:
            parts = list(self._counters)
        for part in parts:
            yield from {generation for _, _, generation in list(part.cells) if generation}
