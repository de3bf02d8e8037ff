"""Which requests wait for the host to store something, or take long: a reactor gives them to another thread before it answers.

What a session alone is to have is answered at once where that takes no milliseconds: secret keys, pairs on curves and lattices,
data and certificates.  Primes are looked for, and what is brought in is checked, by another thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hsmvisord import ck, limits
from hsmvisord.token.application import Application
from hsmvisord.token.info import GUEST_SLOT
from hsmvisord.wire.calls import Call, Request

Args = tuple[Any, ...]


def _always(args: Args) -> bool:
    return True


def _of_token(template: Any) -> bool:
    """Whether an object of this template may be the token's: so it is unless the template does not speak of it, or says no."""
    return any(kind == ck.CKA_TOKEN and value is not False for kind, value in template)


_QUICKLY_CREATED = tuple((ck.CKA_CLASS, cls) for cls in (ck.CKO_DATA, ck.CKO_CERTIFICATE, ck.CKO_SECRET_KEY))
_QUICKLY_GENERATED = frozenset(
    (
        ck.CKM_AES_KEY_GEN,
        ck.CKM_CHACHA20_KEY_GEN,
        ck.CKM_GENERIC_SECRET_KEY_GEN,
        ck.CKM_EC_KEY_PAIR_GEN,
        ck.CKM_EC_EDWARDS_KEY_PAIR_GEN,
        ck.CKM_EC_MONTGOMERY_KEY_PAIR_GEN,
        ck.CKM_ML_DSA_KEY_PAIR_GEN,
        ck.CKM_ML_KEM_KEY_PAIR_GEN,
    )
)


def _created(args: Args) -> bool:
    template = args[1]
    return _of_token(template) or not any(pair in template for pair in _QUICKLY_CREATED)


def _generated(args: Args) -> bool:
    _session, mechanism, *templates = args
    return mechanism is None or mechanism.type not in _QUICKLY_GENERATED or any(map(_of_token, templates))


def _handled(args: Args) -> bool:
    """Of a token object."""
    return bool(args[1] < limits.FIRST_SESSION_OBJECT)


#: Of any slot, and of slot 1.
_ASKING = frozenset({Call.LOGIN, Call.LOGIN_USER, Call.INIT_TOKEN, Call.INIT_TOKEN2})
_STORING: dict[Call, Callable[[Args], bool]] = {
    Call.INIT_PIN: _always,
    Call.SET_PIN: _always,
    Call.COPY_OBJECT: _always,
    Call.UNWRAP_KEY: _always,
    Call.UNWRAP_KEY_AUTHENTICATED: _always,
    Call.ENCAPSULATE_KEY: _always,
    Call.DECAPSULATE_KEY: _always,
    Call.CREATE_OBJECT: _created,
    Call.GENERATE_KEY: _generated,
    Call.GENERATE_KEY_PAIR: _generated,
    Call.DERIVE_KEY: _always,
    Call.DERIVE_KEY2: _always,
    Call.SET_ATTRIBUTE_VALUE: _always,  # of two changes by one application one waits for the other
    Call.DESTROY_OBJECT: _handled,
}
MAY_WAIT = _ASKING | _STORING.keys()


def waits(application: Application | None, request: Request) -> bool:
    """Says so of a request of `MAY_WAIT`."""
    if request.call in _ASKING:
        return True
    session = application.sessions.get(request.args[0]) if application is not None else None
    return session is not None and session.slot == GUEST_SLOT and _STORING[request.call](request.args)
