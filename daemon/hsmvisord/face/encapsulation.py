"""Keys that travel with what authenticates or makes them (PKCS#11 3.2, 5.18.8-5.18.11): C_EncapsulateKey, C_DecapsulateKey,
C_WrapKeyAuthenticated, C_UnwrapKeyAuthenticated.  All of them are slot 1's."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import PrivateKey, PublicKey
from hsmvisord.face import guest
from hsmvisord.face.caller import Args, Caller, Handler, shaped
from hsmvisord.token import making, rules
from hsmvisord.token.catalogue import Template
from hsmvisord.token.info import GUEST_SLOT
from hsmvisord.token.making import Made
from hsmvisord.token.messages import MessageParameter, message_parameter
from hsmvisord.token.nonces import Nonces
from hsmvisord.token.rules import By
from hsmvisord.token.session import Session
from hsmvisord.wire.calls import Call, Mechanism, Needed


def _own(caller: Caller, handle: int) -> Session:
    session = caller.application.session(handle)
    if session.slot != GUEST_SLOT:
        raise CkError(ck.CKR_MECHANISM_INVALID, "slot 0 makes and wraps no keys")
    return session


def _count(caller: Caller, operation: str, mechanism: Mechanism, began: float) -> None:
    caller.counters.cell(operation, mechanism.type, None).observe(perf_counter() - began, caller.token.wall())


# ---- encapsulation ------------------------------------------------------------------------------------------------------


def _shared(caller: Caller, secret: Callable[[], bytes], template: Template, mechanism: Mechanism) -> Callable[[], list[Made]]:
    """Returns what makes the key of a shared secret.  Nobody knows who else has it: never CKA_ALWAYS_SENSITIVE, and
    CKA_EXTRACTABLE unless the template says otherwise (5.18.10)."""
    values = rules.as_dict(template)
    values.setdefault(ck.CKA_EXTRACTABLE, True)
    officer, provider = caller.application.guest.officer, caller.token.provider
    return lambda: [making.from_secret(secret(), values.items(), officer, mechanism.type, By.DERIVE, {}, provider)]


def encapsulate_key(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, handle, template, room = args
    session = _own(caller, session_handle)
    key, allowed = caller.application.guest.other(handle, ck.CKA_ENCAPSULATE)
    public: PublicKey = key  # type: ignore[assignment]  # only they have CKA_ENCAPSULATE
    caller.token.check(mechanism, allowed, public.kind, ck.CKF_ENCAPSULATE)
    began = perf_counter()
    ciphertext, secret = public.encapsulate(mechanism)
    if room is None or len(ciphertext) > room:
        return Needed(len(ciphertext)), 0
    caller.token.policing.admit(mechanism.type, public.kind)
    make = _shared(caller, lambda: secret, template, mechanism)
    _count(caller, "encapsulate", mechanism, began)
    return shaped(lambda: guest.added(caller, session, make), lambda made: (ciphertext, *made))


def decapsulate_key(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, handle, ciphertext, template = args
    session = _own(caller, session_handle)
    item = caller.application.guest.known(handle, ck.CKR_KEY_HANDLE_INVALID)
    use = caller.application.guest.use(handle)
    if not item.may(ck.CKA_DECAPSULATE):
        raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
    caller.token.begin(mechanism, use.allowed, use.private.kind, ck.CKF_DECAPSULATE)
    began = perf_counter()
    private: PrivateKey = use.private  # type: ignore[assignment]
    made = guest.added(
        caller, session, _shared(caller, lambda: private.decapsulate(mechanism, ciphertext or b""), template, mechanism)
    )
    _count(caller, "decapsulate", mechanism, began)
    return made


# ---- wrapping with associated data --------------------------------------------------------------------------------------


def wrap_key_authenticated(caller: Caller, args: Args) -> Args:
    """Answers the IV where the token makes it, else nothing; the tag; and the wrapped key, as long as the key."""
    session_handle, mechanism, wrapping, handle, associated, room = args
    _own(caller, session_handle)
    wanted = _parameter(mechanism)
    prepared = guest.wrapping_of(caller, mechanism.type, wrapping, handle)
    began = perf_counter()
    nonce = Nonces(caller.token.provider.random).next(wanted.source)
    bound, wrap = prepared(wanted.usual(nonce, associated or b""))
    if room is None:
        return b"", b"", Needed(bound - wanted.tag_size)
    sealed = guest.wrapped_by(wrap)
    size = len(sealed) - wanted.tag_size
    if size > room:
        return b"", b"", Needed(size)  # and nobody has seen what this IV was used for
    _count(caller, "wrap", mechanism, began)
    made = nonce if wanted.source.generator != ck.CKG_NO_GENERATE else b""
    return made, sealed[size:], sealed[:size]


def unwrap_key_authenticated(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, unwrapping, wrapped, template, associated = args
    session = _own(caller, session_handle)
    wanted = _parameter(mechanism)
    usual = wanted.usual(wanted.source.given, associated or b"")
    return guest.unwrapped(caller, session, usual, unwrapping, (wrapped or b"") + _tag(wanted), template)


def _parameter(mechanism: Mechanism) -> MessageParameter:
    if mechanism.type not in (ck.CKM_AES_GCM, ck.CKM_AES_CCM):
        raise CkError(ck.CKR_MECHANISM_INVALID, f"{ck.mechanism_name(mechanism.type)} does not wrap with associated data")
    return message_parameter(mechanism, mechanism.type)


def _tag(wanted: MessageParameter) -> bytes:
    if len(wanted.tag) != wanted.tag_size:
        raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "a tag of another length")
    return wanted.tag


TABLE: dict[Call, Handler] = {
    Call.ENCAPSULATE_KEY: encapsulate_key,
    Call.DECAPSULATE_KEY: decapsulate_key,
    Call.WRAP_KEY_AUTHENTICATED: wrap_key_authenticated,
    Call.UNWRAP_KEY_AUTHENTICATED: unwrap_key_authenticated,
}
