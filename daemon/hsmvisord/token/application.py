"""One PKCS#11 application (one C_Initialize): its login state, sessions, session objects and its view of the token."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.token.catalogue import Template, View, matches
from hsmvisord.token.guest import GuestItem, GuestUser
from hsmvisord.token.info import GUEST_SLOT, MANAGED_SLOT
from hsmvisord.token.objects import KeyUse, TokenObject
from hsmvisord.token.operations import FindOperation, Operation, Output, SignOperation
from hsmvisord.token.secrets import SecretObject, sound
from hsmvisord.token.session import Session
from hsmvisord.token.statistics import Counters
from hsmvisord.wire.calls import Mechanism

if TYPE_CHECKING:
    from hsmvisord.token.token import Token

AnyObject = TokenObject | SecretObject


@dataclass(frozen=True)
class Saved:
    """An application without its operations."""

    ticket: bytes
    program: str
    watermark: int
    logged_in: bool
    seen_slot_events: int
    next_session: int
    next_object: int
    sessions: list[tuple[int, int, int]]  #: handle, slot, flags
    objects: list[tuple[int, SecretObject]]  #: session, object
    guest_role: int | None  #: who is logged in to slot 1
    guest_objects: list[tuple[int, GuestItem]]  #: session, object of slot 1


_SESSION_FLAGS = ck.CKF_SERIAL_SESSION | ck.CKF_RW_SESSION


class Application:
    """Calls of one application may come from several connections, so from several threads, at once."""

    def __init__(self, token: Token, ticket: bytes, program: str, watermark: int, inherited: bool = False) -> None:
        """`inherited`: the view is that of the parent before a fork, and the first session does not move it on."""
        self.token, self.ticket, self.program, self.watermark = token, ticket, program, watermark
        self._inherited = inherited
        self.connections = 1  #: guarded by the token's lock
        self.logged_in = False
        self.seen_slot_events = token.slot_events
        self._lock = threading.Lock()
        self.sessions: dict[int, Session] = {}  #: by handle
        self._next_session = 1
        self._objects: dict[int, SecretObject] = {}
        self._open = [0, 0]  #: sessions of each slot
        self.guest = GuestUser(token, self)
        self._ended = False
        # Not those of an application before a reconnect: a handle that it left behind must not name another secret.
        self._next_object = limits.FIRST_SESSION_OBJECT + int.from_bytes(os.urandom(limits.RANDOM_START))
        self._last_search = token.monotonic()

    # ---- view ---------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        self.watermark = self.token.watermark

    def view(self) -> View:
        return self.token.index.view(self.watermark)

    # ---- sessions -----------------------------------------------------------------------------------------------

    def check_slot(self, slot: int) -> None:
        if slot not in self.token.slots:
            raise CkError(ck.CKR_SLOT_ID_INVALID, f"there is no slot {slot}")

    def check_present(self, slot: int) -> None:
        self.check_slot(slot)
        if slot == MANAGED_SLOT and not self.token.present:
            raise CkError(ck.CKR_TOKEN_NOT_PRESENT, "the operator has detached the token")

    def open_session(self, slot: int, flags: int) -> int:
        self.check_present(slot)
        if not flags & ck.CKF_SERIAL_SESSION:
            raise CkError(ck.CKR_SESSION_PARALLEL_NOT_SUPPORTED)
        if flags & ck.CKF_ASYNC_SESSION:
            raise CkError(ck.CKR_SESSION_ASYNC_NOT_SUPPORTED)
        if slot == GUEST_SLOT:
            self.guest.check_session(flags)
        # OpenSSH and pkcs11-tool --test open nothing but read-write sessions, so these are let in; what would write is refused.
        return self._add_session(slot, flags & _SESSION_FLAGS, None)

    def _add_session(self, slot: int, flags: int, handle: int | None) -> int:
        self.token.take_session()
        with self._lock:
            if self._ended:
                self.token.give_sessions(1)
                raise CkError(ck.CKR_CRYPTOKI_NOT_INITIALIZED, "another connection of the application has finalized it")
            if slot == MANAGED_SLOT and not self._open[slot] and not self._inherited:
                self._advance()
            self._inherited = False
            if handle is None:
                handle = self._next_session
                self._next_session += 1
            if handle <= limits.LAST_HANDLE:
                self.sessions[handle] = Session(handle, slot, flags)
                self._open[slot] += 1
                return handle
        self.token.give_sessions(1)
        raise CkError(ck.CKR_SESSION_COUNT, "this application has used up its session handles")

    def restore_sessions(self, triples: list[tuple[int, int, int]]) -> list[int]:
        """Opens sessions with the handles they had before a reconnect; returns a CK_RV for each.  The view does not move."""
        with self._lock:
            if self.sessions:
                raise CkError(ck.CKR_SESSION_EXISTS, "sessions are restored into an application without sessions")
        mark, results = self.watermark, []
        for handle, slot, flags in triples:
            try:
                self.check_present(slot)
                if not 0 < handle <= limits.LAST_HANDLE or handle in self.sessions:
                    raise CkError(ck.CKR_SESSION_HANDLE_INVALID)
                self._add_session(slot, flags & _SESSION_FLAGS | ck.CKF_SERIAL_SESSION, handle)
                results.append(ck.CKR_OK)
            except CkError as error:
                results.append(error.rv)
        self._next_session = max(self.sessions, default=0) + 1
        self.watermark = mark
        return results

    def session(self, handle: int) -> Session:
        try:
            return self.sessions[handle]
        except KeyError:
            raise CkError(ck.CKR_SESSION_HANDLE_INVALID) from None

    def close_session(self, handle: int) -> None:
        with self._lock:
            session = self.sessions.pop(handle, None)
            if session is None:
                raise CkError(ck.CKR_SESSION_HANDLE_INVALID)
            session.shut()
            self._open[session.slot] -= 1
            last = not self._open[session.slot]
            if last and session.slot == MANAGED_SLOT:
                self.logged_in = False  # PKCS#11 3.1, 5.6.2: the last session closed logs out
            gone = [self._objects.pop(item) for item in session.objects if item in self._objects]
        self.token.session_objects.give(len(gone))
        if session.slot == GUEST_SLOT:
            self.guest.session_closed(session, last)
        self.token.give_sessions(1)

    def close_all_sessions(self, slot: int | None = None) -> None:
        """Those of one slot, or all."""
        for session in list(self.sessions.values()):
            if slot is None or session.slot == slot:
                with contextlib.suppress(CkError):  # another thread was first
                    self.close_session(session.handle)

    def end(self) -> None:
        with self._lock:
            self._ended = True
        self.close_all_sessions()

    def token_removed(self) -> None:
        self.close_all_sessions(MANAGED_SLOT)

    def session_count(self, slot: int) -> int:
        return self._open[slot]

    def rw_session_count(self, slot: int) -> int:
        return sum(1 for s in list(self.sessions.values()) if s.slot == slot and s.flags & ck.CKF_RW_SESSION)

    def session_state(self, session: Session) -> int:
        if session.slot == GUEST_SLOT:
            return self.guest.session_state(session)
        if session.flags & ck.CKF_RW_SESSION:
            return ck.CKS_RW_USER_FUNCTIONS if self.logged_in else ck.CKS_RW_PUBLIC_SESSION
        return ck.CKS_RO_USER_FUNCTIONS if self.logged_in else ck.CKS_RO_PUBLIC_SESSION

    # ---- a successor of the worker ------------------------------------------------------------------------------

    def saved(self) -> Saved:
        return Saved(
            self.ticket,
            self.program,
            self.watermark,
            self.logged_in,
            self.seen_slot_events,
            self._next_session,
            self._next_object,
            [(s.handle, s.slot, s.flags) for s in self.sessions.values()],
            [(s.handle, self._objects[h]) for s in self.sessions.values() for h in s.objects if h in self._objects],
            self.guest.role,
            [(s.handle, self.guest.items[h]) for s in self.sessions.values() for h in s.objects if h in self.guest.items],
        )

    def restore(self, saved: Saved) -> None:
        """Becomes what `saved` was, but for its operations.  Raises CkError when that is more than an application may be."""
        items: list[tuple[int, SecretObject | GuestItem]] = [*saved.objects, *saved.guest_objects]
        if len(items) > limits.MAX_SESSION_OBJECTS:
            raise CkError(ck.CKR_DEVICE_MEMORY, f"{len(items)} session objects")
        _check_handles([handle for handle, _, _ in saved.sessions], 1, saved.next_session)
        _check_handles([item.handle for _, item in items], limits.FIRST_SESSION_OBJECT, saved.next_object)
        if saved.guest_role not in (None, ck.CKU_SO, ck.CKU_USER):
            raise CkError(ck.CKR_USER_TYPE_INVALID)
        if not all(sound(item.attributes) for _, item in saved.objects):
            raise CkError(ck.CKR_ATTRIBUTE_VALUE_INVALID, "a session object that this release would not have made")
        for handle, slot, flags in saved.sessions:
            if slot not in (MANAGED_SLOT, GUEST_SLOT):
                raise CkError(ck.CKR_SLOT_ID_INVALID)
            self.token.take_session()
            self.sessions[handle] = Session(handle, slot, flags)
            self._open[slot] += 1
        for session, item in items:
            if not self.token.session_objects.take(1):
                raise CkError(ck.CKR_DEVICE_MEMORY, "more session objects than a module has")
            if isinstance(item, GuestItem):
                self.guest.items[item.handle] = item
            else:
                self._objects[item.handle] = item
            self.sessions[session].objects.add(item.handle)
        self.guest.role = saved.guest_role
        self._next_session, self._next_object = saved.next_session, saved.next_object
        self.logged_in, self.seen_slot_events = saved.logged_in, saved.seen_slot_events

    def operations(self) -> Iterator[Operation]:
        for session in list(self.sessions.values()):
            yield from list(session.operations.values())

    # ---- login --------------------------------------------------------------------------------------------------

    def login(self, handle: int, user: int, attempt: bytes | None) -> None:
        session = self.session(handle)
        if session.slot == GUEST_SLOT:
            self.guest.login(session, user, attempt or b"")
            return
        if user == ck.CKU_CONTEXT_SPECIFIC:
            raise CkError(ck.CKR_OPERATION_NOT_INITIALIZED, "no key here asks for a login at each use")
        if user == ck.CKU_SO:
            raise CkError(ck.CKR_SESSION_READ_ONLY_EXISTS, "slot 0 has no security officer: its operator is outside of the guest")
        if user != ck.CKU_USER:
            raise CkError(ck.CKR_USER_TYPE_INVALID)
        if self.logged_in:
            raise CkError(ck.CKR_USER_ALREADY_LOGGED_IN)
        if self.token.pin_set:
            self.token.try_pin(attempt or b"")
        self.logged_in = True

    def logout(self, handle: int) -> None:
        if self.session(handle).slot == GUEST_SLOT:
            self.guest.logout()
            return
        if not self.logged_in:
            raise CkError(ck.CKR_USER_NOT_LOGGED_IN)
        self.end_login()

    def end_login(self) -> None:
        """C_Logout, or the operator has set another PIN: private session objects go (PKCS#11 3.1, 5.6.8)."""
        self.logged_in = False
        for session in list(self.sessions.values()):
            session.shut()
        if not self.may_use_private:
            with self._lock:
                self._objects = {h: o for h, o in self._objects.items() if not o.private}

    @property
    def may_use_private(self) -> bool:
        return self.logged_in or not self.token.pin_set

    # ---- objects ------------------------------------------------------------------------------------------------

    def object(self, handle: int) -> AnyObject | None:
        """Returns the object, or None when there is none that this application may see."""
        found: AnyObject | None = self.token.index.by_handle.get(handle) or self._objects.get(handle)
        if found is not None and found.private and not self.may_use_private:
            return None
        return found

    def add_object(self, session: Session, attributes: dict[int, Any]) -> int:
        handle = self.take_object_handle(session)
        self._objects[handle] = SecretObject(handle, attributes)
        return handle

    def take_object_handle(self, session: Session) -> int:
        """Returns the handle of a new session object; it counts from now on.  Raises CkError."""
        with self._lock:
            if len(self._objects) + len(self.guest.items) >= limits.MAX_SESSION_OBJECTS:
                raise CkError(ck.CKR_DEVICE_MEMORY, f"an application has at most {limits.MAX_SESSION_OBJECTS} session objects")
            handle = self._next_object
            if handle > limits.LAST_HANDLE:
                raise CkError(ck.CKR_DEVICE_MEMORY, "this application has used up its session object handles")
            if self.sessions.get(session.handle) is not session:
                raise CkError(ck.CKR_SESSION_HANDLE_INVALID)
            if not self.token.session_objects.take(1):
                raise CkError(ck.CKR_DEVICE_MEMORY, f"a module has at most {limits.MAX_SESSION_OBJECTS_ALL} session objects")
            self._next_object += 1
            session.objects.add(handle)
        return handle

    def remove_object(self, handle: int) -> None:
        with self._lock:
            if handle in self._objects:
                del self._objects[handle]
                self.token.session_objects.give(1)
                for session in self.sessions.values():
                    session.objects.discard(handle)
                return
        if self.object(handle) is None:
            raise CkError(ck.CKR_OBJECT_HANDLE_INVALID)
        raise CkError(ck.CKR_ACTION_PROHIBITED, "delivered objects are the operator's")

    def find(self, session: Session, template: Template) -> FindOperation:
        """Begins a search; the view moves first when the last search is long ago."""
        session.check_free("find")
        if session.slot == GUEST_SLOT:
            return FindOperation(self.guest.find(template)[: limits.MAX_FOUND], self.token.found)
        if len(template) > limits.MAX_TEMPLATE:
            raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, f"a search has at most {limits.MAX_TEMPLATE} attributes")
        template = tuple(dict.fromkeys(template))  # said twice with one value counts once
        wanted = dict(template)
        now = self.token.monotonic()
        if now - self._last_search > limits.VIEW_PAUSE:
            self._advance()
        self._last_search = now
        handles = [o.handle for o in self.view().find(self._without_private(template)) if self._shown(o, template)]
        if len(wanted) == len(template):  # no object has two values of one attribute
            handles += [o.handle for o in list(self._objects.values()) if self._found(o, wanted)]
        return FindOperation(handles[: limits.MAX_FOUND], self.token.found)

    def _found(self, item: SecretObject, wanted: dict[int, Any]) -> bool:
        """A value that may not be read may not be guessed either."""
        if (item.private and not self.may_use_private) or any(map(item.hides, wanted)):
            return False
        return matches(item.attributes, wanted)

    def _without_private(self, template: Template) -> Template:
        return tuple(a for a in template if a[0] != ck.CKA_PRIVATE)

    def _shown(self, item: TokenObject, template: Template) -> bool:
        if item.private and not self.may_use_private:
            return False
        return all(value == self.is_private(item) for kind, value in template if kind == ck.CKA_PRIVATE)

    def is_private(self, item: AnyObject) -> bool:
        """CKA_PRIVATE: without a PIN nobody logs in, so nothing that was delivered is private."""
        return item.private and (self.token.pin_set or isinstance(item, SecretObject))

    # ---- keys and signing ---------------------------------------------------------------------------------------

    def key(self, handle: int) -> KeyUse:
        """Returns the delivered private key behind a handle; raises the error that the operation's Init answers."""
        found = self.token.index.by_handle.get(handle)
        if found is None or (found.use is not None and not self.may_use_private):
            secret = self.object(handle) if found is None else None
            raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT if secret else ck.CKR_KEY_HANDLE_INVALID)
        if found.use is None:
            raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT if found.public else ck.CKR_KEY_HANDLE_INVALID)
        use = found.use
        if use.refuse_after < float("inf") and self.token.wall() >= use.refuse_after:
            raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED, "the key's certificate has expired and its material refuses then")
        return use

    def use(self, session: Session, handle: int) -> KeyUse:
        """Returns the private or secret key behind a handle of the session's slot."""
        return self.guest.use(handle) if session.slot else self.key(handle)

    def begin(self, session: Session, operation: Operation, handle: int, asks_again: bool) -> None:
        """Opens an operation with a key of the session's slot."""
        if session.slot:
            operation.key_handle = handle
            if asks_again:
                operation.lock()
        session.operations[operation.name] = operation

    def sign_init(self, session: Session, mechanism: Mechanism, handle: int) -> None:
        if "sign" in session.operations:
            raise CkError(ck.CKR_OPERATION_ACTIVE, "a sign operation is open")
        use = self.use(session, handle)
        if not use.may_sign:
            raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
        self.token.begin(mechanism, use.allowed, use.private.kind, ck.CKF_SIGN)
        self.begin(session, SignOperation(mechanism.type, use, use.private.signer(mechanism)), handle, use.asks_again)

    def sign(self, session: Session, data: bytes, room: int | None, counters: Counters) -> Output:
        """The hot path: what Session.running does, in line."""
        operation = session.operations.get("sign")
        if operation is None:
            raise CkError(ck.CKR_OPERATION_NOT_INITIALIZED, "no sign operation is open")
        assert isinstance(operation, SignOperation)
        began = perf_counter()
        try:
            output = operation.sign(data, room)
        except BaseException:
            del session.operations["sign"]
            counters.cell("sign", operation.mechanism, operation.generation).errors += 1
            raise
        if operation.done:
            del session.operations["sign"]
            counters.cell("sign", operation.mechanism, operation.generation).observe(perf_counter() - began, self.token.wall())
            if self.token.on_signature:
                self.token.on_signature(self, "sign", operation.mechanism, operation.generation)
        return output

    @contextmanager
    def signing(self, session: Session, counters: Counters) -> Iterator[SignOperation]:
        """Gives the open sign operation for one step of a multi-part signature."""
        with session.running(SignOperation, counters, self.token.wall()) as operation:
            yield operation
        if operation.done and self.token.on_signature:
            self.token.on_signature(self, "sign", operation.mechanism, operation.generation)


def _check_handles(handles: list[int], first: int, following: int) -> None:
    """Raises CkError unless each is there once, from `first` on and before the one that is given next."""
    if len(set(handles)) != len(handles) or not all(first <= h < following for h in handles) or following > limits.LAST_HANDLE + 1:
        raise CkError(ck.CKR_OBJECT_HANDLE_INVALID, "handles that were never given")
