"""Slot 1: the guest's own objects, as one application sees them; login, and who may do what (PKCS#11 3.1, 5.5-5.7, 5.18).

Token objects are the keystore's and the same for all applications; session objects are the application's.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import AnyKey, PrivateKey, PublicKey, SecretKey
from hsmvisord.crypto.mechanisms import of_key_type
from hsmvisord.keystore import pin
from hsmvisord.keystore.pages import INDEXED
from hsmvisord.token import answers, keepers, rules
from hsmvisord.token.catalogue import Template, matches
from hsmvisord.token.info import padded
from hsmvisord.token.making import Made, part
from hsmvisord.token.objects import KeyUse

if TYPE_CHECKING:
    from hsmvisord.token.application import Application
    from hsmvisord.token.session import Session
    from hsmvisord.token.token import Token

_USES = (ck.CKO_PRIVATE_KEY, ck.CKO_SECRET_KEY)
_OTHERS = (ck.CKO_PUBLIC_KEY, ck.CKO_SECRET_KEY)


@dataclass(frozen=True)
class GuestItem:
    """An object of slot 1, of the token or of a session.  `attributes` hold no secret part."""

    handle: int
    attributes: Mapping[int, Any]
    key: AnyKey | None

    @property
    def private(self) -> bool:
        return bool(self.attributes[ck.CKA_PRIVATE])

    @property
    def allowed(self) -> frozenset[int]:
        """The mechanisms that the key may be used with."""
        named = self.attributes[ck.CKA_ALLOWED_MECHANISMS]
        of_type = of_key_type(self.attributes[ck.CKA_KEY_TYPE])
        return of_type & frozenset(named) if named else of_type

    def may(self, attribute: int) -> bool:
        return bool(self.attributes.get(attribute))

    def value(self, kind: int) -> Any:
        """Returns an attribute's value; raises KeyError where there is none, CKR_ATTRIBUTE_SENSITIVE for one that is hidden."""
        if kind in self.attributes and kind != keepers.EVER:
            return self.attributes[kind]
        if rules.hides(self.attributes, kind):
            raise CkError(ck.CKR_ATTRIBUTE_SENSITIVE)
        rule = rules.rules_of(self.attributes).get(kind)
        found = part(self.attributes, self.key, kind) if rule is not None and rule.secret else None
        if found is None:
            raise KeyError(kind)
        return found


class GuestUser:
    """Slot 1 for one application.  Calls may come from several threads; the application's lock guards what changes."""

    def __init__(self, token: Token, application: Application) -> None:
        self._token, self._application = token, application
        self.role: int | None = None  #: CKU_USER or CKU_SO while logged in
        self.items: dict[int, GuestItem] = {}  #: session objects, by handle
        self._changing = threading.Lock()

    # ---- who may --------------------------------------------------------------------------------------------------

    @property
    def officer(self) -> bool:
        return self.role == ck.CKU_SO

    def _sees(self, item: GuestItem) -> bool:
        return not item.private or self.role == ck.CKU_USER

    def _check_writable(self, session: Session, attributes: Mapping[int, Any]) -> None:
        """Raises unless the session may make, change or destroy an object with these attributes (5.7.1)."""
        if attributes[ck.CKA_TOKEN] and not session.flags & ck.CKF_RW_SESSION:
            raise CkError(ck.CKR_SESSION_READ_ONLY)
        if attributes[ck.CKA_PRIVATE] and self.role != ck.CKU_USER:
            raise CkError(ck.CKR_USER_NOT_LOGGED_IN, "a private object is the user's")

    # ---- objects --------------------------------------------------------------------------------------------------

    def item(self, handle: int) -> GuestItem | None:
        """Returns the object, or None when there is none that this application may see."""
        found = self.items.get(handle)
        if found is None:
            stored = self._token.keystore.state.objects.get(handle)
            found = GuestItem(handle, stored.attributes, stored.key) if stored is not None else None
        return found if found is not None and self._sees(found) else None

    def known(self, handle: int, rv: int = ck.CKR_OBJECT_HANDLE_INVALID) -> GuestItem:
        """Raises `rv`."""
        found = self.item(handle)
        if found is None:
            if rv == ck.CKR_KEY_HANDLE_INVALID and self.role is None and handle in self._token.keystore.state.objects:
                raise CkError(ck.CKR_USER_NOT_LOGGED_IN, "the key is the user's")  # after a lost connection, say
            raise CkError(rv)
        return found

    def find(self, template: Template) -> list[int]:
        wanted = dict(template)
        if len(wanted) != len(template) or keepers.EVER in wanted:
            return []  # no object has two values of one attribute
        found = self._find_stored(wanted)
        return found + [item.handle for item in list(self.items.values()) if self._matches(item, wanted)]

    def _find_stored(self, wanted: dict[int, Any]) -> list[int]:
        """Token objects, in the order of their handles."""
        objects = self._token.keystore.state.objects
        kind = next((kind for kind in INDEXED if kind in wanted), None)
        seen = (False, True) if self.role == ck.CKU_USER else (False,)
        value = None if kind is None else wanted[kind]
        found = [handle for private in seen for handle in objects.having(kind, value, private)]
        if len(wanted) > (kind is not None):
            found = [h for h in found if self._matches(GuestItem(h, objects[h].attributes, objects[h].key), wanted)]
        return sorted(found)

    def _matches(self, item: GuestItem, wanted: dict[int, Any]) -> bool:
        """A value that may not be read may not be guessed either."""
        if not self._sees(item):
            return False
        if matches(item.attributes, wanted):
            return True
        secret = {kind: value for kind, value in wanted.items() if kind not in item.attributes}
        if not secret or not matches(item.attributes, {k: v for k, v in wanted.items() if k not in secret}):
            return False
        try:
            return all(item.value(kind) == value for kind, value in secret.items())
        except (KeyError, CkError):
            return False

    def add(self, session: Session, made: Sequence[Made]) -> list[int]:
        """Returns the new objects' handles.  All are made or none; those of the token are stored when this returns."""
        for one in made:
            self._check_writable(session, one.attributes)
        token = [one for one in made if one.attributes[ck.CKA_TOKEN]]
        if token and len(token) != len(made):  # of a pair one half may be the session's: it is made first, for it is easily undone
            handles = {id(one): self._add_to_session(session, one) for one in made if one not in token}
            try:
                handles |= dict(zip(map(id, token), self._store(token), strict=True))
            except CkError:
                for handle in handles.values():
                    self._forget(session, handle)
                raise
            return [handles[id(one)] for one in made]
        return self._store(made) if token else [self._add_to_session(session, one) for one in made]

    def _store(self, made: Sequence[Made]) -> list[int]:
        with answers.stored():
            objects = self._token.keystore.add_objects([(one.attributes, one.key) for one in made])
        return [item.handle for item in objects]

    def _add_to_session(self, session: Session, made: Made) -> int:
        handle = self._application.take_object_handle(session)
        self.items[handle] = GuestItem(handle, made.attributes, made.key)
        return handle

    def _forget(self, session: Session, handle: int) -> None:
        if self.items.pop(handle, None) is not None:
            session.objects.discard(handle)
            self._token.session_objects.give(1)

    def change(self, session: Session, handle: int, template: Template) -> None:
        """C_SetAttributeValue."""
        with self._changing:  # of two changes one sees what the other did: what goes one way does not come back
            while True:
                item = self.known(handle)
                self._check_writable(session, item.attributes)
                after = rules.changed(item.attributes, template, self.officer)
                if handle in self.items:
                    self.items[handle] = GuestItem(handle, after, item.key)
                    return
                with answers.stored():
                    if self._token.keystore.change_object(handle, after, item.attributes):
                        return

    def destroy(self, session: Session, handle: int) -> None:
        item = self.known(handle)
        self._check_writable(session, item.attributes)
        if not item.attributes[ck.CKA_DESTROYABLE]:
            raise CkError(ck.CKR_ACTION_PROHIBITED, "the object is not destroyable")
        if handle in self.items:
            for owner in list(self._application.sessions.values()):
                if handle in owner.objects:
                    self._forget(owner, handle)
            return
        with answers.stored():
            self._token.keystore.remove_object(handle)

    def check_session(self, flags: int) -> None:
        """Raises unless a session may be opened now."""
        if not self._token.keystore.state.guest:
            raise CkError(ck.CKR_TOKEN_NOT_RECOGNIZED, "the token is not initialized (C_InitToken)")
        if self.officer and not flags & ck.CKF_RW_SESSION:
            raise CkError(ck.CKR_SESSION_READ_WRITE_SO_EXISTS)

    def session_state(self, session: Session) -> int:
        if session.flags & ck.CKF_RW_SESSION:
            states = {None: ck.CKS_RW_PUBLIC_SESSION, ck.CKU_USER: ck.CKS_RW_USER_FUNCTIONS, ck.CKU_SO: ck.CKS_RW_SO_FUNCTIONS}
            return states[self.role]
        return ck.CKS_RO_USER_FUNCTIONS if self.role == ck.CKU_USER else ck.CKS_RO_PUBLIC_SESSION

    def session_closed(self, session: Session, last: bool) -> None:
        for handle in list(session.objects):
            self._forget(session, handle)
        if last:
            self.role = None

    # ---- keys -----------------------------------------------------------------------------------------------------

    def use(self, handle: int) -> KeyUse:
        """Returns the private or secret key behind a handle, as operations use it."""
        item = self.known(handle, ck.CKR_KEY_HANDLE_INVALID)
        if item.attributes[ck.CKA_CLASS] not in _USES:
            is_key = item.attributes[ck.CKA_CLASS] == ck.CKO_PUBLIC_KEY
            raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT if is_key else ck.CKR_KEY_HANDLE_INVALID)
        return KeyUse(
            private=item.key,  # type: ignore[arg-type]
            allowed=item.allowed,
            may_sign=item.may(ck.CKA_SIGN),
            may_decrypt=item.may(ck.CKA_DECRYPT),
            may_derive=item.may(ck.CKA_DERIVE),
            refuse_after=float("inf"),
            generation=None,
            asks_again=item.may(ck.CKA_ALWAYS_AUTHENTICATE),
            may_recover=item.may(ck.CKA_SIGN_RECOVER),
        )

    def other(self, handle: int, attribute: int) -> tuple[PublicKey | SecretKey, frozenset[int]]:
        """Returns the key that verifies, encrypts or wraps (`attribute`), and its mechanisms."""
        item = self.known(handle, ck.CKR_KEY_HANDLE_INVALID)
        if item.attributes[ck.CKA_CLASS] not in _OTHERS:
            is_key = item.attributes[ck.CKA_CLASS] == ck.CKO_PRIVATE_KEY
            raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT if is_key else ck.CKR_KEY_HANDLE_INVALID)
        if not item.may(attribute):
            raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
        return item.key, item.allowed  # type: ignore[return-value]

    def check_private_half(self, item: GuestItem, wrapper: GuestItem) -> None:
        """Raises where a sensitive key would be wrapped for whoever uses this token: the private half of a public key is here."""
        if not item.may(ck.CKA_SENSITIVE) or wrapper.attributes[ck.CKA_CLASS] != ck.CKO_PUBLIC_KEY:
            return
        public: PublicKey = wrapper.key  # type: ignore[assignment]
        stored = [(item.attributes, item.key) for item in self._token.keystore.state.objects.values()]
        for attributes, key in stored + [(item.attributes, item.key) for item in list(self.items.values())]:
            if attributes[ck.CKA_CLASS] != ck.CKO_PRIVATE_KEY:
                continue
            private: PrivateKey = key  # type: ignore[assignment]
            if private.public.key_id == public.key_id:
                raise CkError(ck.CKR_KEY_NOT_WRAPPABLE, "the private half of the wrapping key is here, and may open it")

    # ---- login ----------------------------------------------------------------------------------------------------

    def login(self, session: Session, user: int, attempt: bytes) -> None:
        guest = self._token.keystore.state.guest
        if user == ck.CKU_CONTEXT_SPECIFIC:
            self._login_again(session, attempt)
            return
        if user not in (ck.CKU_SO, ck.CKU_USER):
            raise CkError(ck.CKR_USER_TYPE_INVALID)
        if self.role is not None:
            raise CkError(ck.CKR_USER_ALREADY_LOGGED_IN if self.role == user else ck.CKR_USER_ANOTHER_ALREADY_LOGGED_IN)
        if user == ck.CKU_USER and not guest.user:
            raise CkError(ck.CKR_USER_PIN_NOT_INITIALIZED, "the security officer sets the user's PIN first (C_InitPIN)")
        if user == ck.CKU_SO and self._has_read_only(session.slot):
            raise CkError(ck.CKR_SESSION_READ_ONLY_EXISTS)
        self._try(attempt, officer=user == ck.CKU_SO)
        self.role = user

    def _login_again(self, session: Session, attempt: bytes) -> None:
        """For one use of a key with CKA_ALWAYS_AUTHENTICATE, after its Init (5.6.8)."""
        waiting = [operation for operation in session.operations.values() if operation.locked]
        if not waiting:
            raise CkError(ck.CKR_OPERATION_NOT_INITIALIZED, "no operation waits for a login")
        if self.role != ck.CKU_USER:
            raise CkError(ck.CKR_USER_NOT_LOGGED_IN)
        self._try(attempt, officer=False)
        for operation in waiting:
            operation.unlock()

    def _try(self, attempt: bytes, officer: bool) -> None:
        with answers.stored():
            right = self._token.keystore.try_guest_pin(answers.bounded(attempt), officer)
        answers.judge(right)

    def _has_read_only(self, slot: int) -> bool:
        return any(s.slot == slot and not s.flags & ck.CKF_RW_SESSION for s in list(self._application.sessions.values()))

    def logout(self) -> None:
        if self.role is None:
            raise CkError(ck.CKR_USER_NOT_LOGGED_IN)
        self.end_login()

    def end_login(self) -> None:
        """Private session objects go, and so do operations with private keys (5.6.9)."""
        self.role = None
        for session in list(self._application.sessions.values()):
            for handle in list(session.objects):
                item = self.items.get(handle)
                if item is not None and item.private:
                    self._forget(session, handle)
            for operation in list(session.operations.values()):
                if operation.key_handle:
                    operation.revoke()

    # ---- PINs -----------------------------------------------------------------------------------------------------

    def init_token(self, so_pin: bytes, label: bytes) -> None:
        self._token.policing.permit("init-token")
        self._check_pin(so_pin)
        if any(s.slot for application in self._token.applications() for s in list(application.sessions.values())):
            raise CkError(ck.CKR_SESSION_EXISTS, "a session with the token is open")
        with answers.stored():
            right = self._token.keystore.initialize_guest(padded(label, 32), so_pin)
        answers.judge(right)

    def init_pin(self, value: bytes) -> None:
        self._token.policing.permit("init-pin")
        if not self.officer:
            raise CkError(ck.CKR_USER_NOT_LOGGED_IN, "the security officer sets the user's PIN")
        self._set_pin(value, officer=False)

    def set_pin(self, session: Session, old: bytes, new: bytes) -> None:
        """The security officer's when that is logged in, else the user's (5.6.4)."""
        self._token.policing.permit("set-pin")
        if not session.flags & ck.CKF_RW_SESSION:
            raise CkError(ck.CKR_SESSION_READ_ONLY)
        if not self.officer and not self._token.keystore.state.guest.user:
            raise CkError(ck.CKR_USER_PIN_NOT_INITIALIZED)
        self._check_pin(new)
        self._try(old, self.officer)
        self._set_pin(new, self.officer)

    def _set_pin(self, value: bytes, officer: bool) -> None:
        self._check_pin(value)
        with answers.stored():
            self._token.keystore.set_guest_pin(value, officer)

    def _check_pin(self, value: bytes) -> None:
        least = self._token.policing.policy.min_pin or pin.MIN_PIN
        if not least <= len(value) <= pin.MAX_PIN:
            raise CkError(ck.CKR_PIN_LEN_RANGE, f"a PIN has {least} to {pin.MAX_PIN} bytes")
