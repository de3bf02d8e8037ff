"""Message-based signing, verification, encryption and decryption (PKCS#11 3.1, 5.9, 5.11, 5.14, 5.16)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import PublicKey, SecretKey
from hsmvisord.face import cryptography
from hsmvisord.face.caller import Args, Caller, Handler
from hsmvisord.token.application import Application
from hsmvisord.token.messages import (
    MessageDecryptOperation,
    MessageEncryptOperation,
    MessageOperation,
    MessageSignOperation,
    MessageVerifyOperation,
)
from hsmvisord.token.objects import KeyUse
from hsmvisord.token.session import Session
from hsmvisord.wire.calls import Call, Mechanism

#: Begins a process: from (application, session, mechanism, key).
Begin = Callable[[Application, Session, Mechanism, int], None]


def _init(kind: type[MessageOperation], begin: Begin) -> Handler:
    """C_Message...Init."""

    def handler(caller: Caller, args: Args) -> Args:
        session_handle, mechanism, key = args
        session = caller.application.session(session_handle)
        with session.lock:
            if mechanism is None:
                session.cancel(kind.name)
            else:
                session.check_free(kind.name)
                begin(caller.application, session, mechanism, key)
        return ()

    return handler


def _final(kind: type[MessageOperation]) -> Handler:
    """C_Message...Final: within a message it is not the time for it, and nothing happens."""

    def handler(caller: Caller, args: Args) -> Args:
        session = caller.application.session(args[0])
        with session.lock:
            session.open(kind).check_resting()
            session.cancel(kind.name)
        return ()

    return handler


# What the begin of an operation asks, a message asks too: whether the key is still there and may, and how many there were of late.


def _own_use(application: Application, session: Session, mechanism: Mechanism, key: int, signing: bool, counted: bool) -> KeyUse:
    """Returns the key that signs or decrypts."""
    use = application.use(session, key)
    if not (use.may_sign if signing else use.may_decrypt):
        raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
    ask = application.token.begin if counted else application.token.check
    ask(mechanism, use.allowed, use.private.kind, ck.CKF_MESSAGE_SIGN if signing else ck.CKF_MESSAGE_DECRYPT)
    return use


def _begin_sign(application: Application, session: Session, mechanism: Mechanism, key: int) -> None:
    ask = partial(_own_use, application, session, mechanism, key, True)
    use = ask(False)
    operation = MessageSignOperation(mechanism.type, use.generation, use.private.signer(mechanism), lambda: _discard(ask(True)))
    application.begin(session, operation, key, use.asks_again)


def _begin_decrypt(application: Application, session: Session, mechanism: Mechanism, key: int) -> None:
    ask = partial(_own_use, application, session, mechanism, key, False)
    use = ask(False)
    operation = MessageDecryptOperation(
        mechanism, _secret(use.private), lambda: _discard(ask(True)), application.token.provider.random
    )
    application.begin(session, operation, key, use.asks_again)


def _begin_verify(application: Application, session: Session, mechanism: Mechanism, key: int) -> None:
    ask = partial(cryptography.usable, application, session, key, mechanism, ck.CKF_MESSAGE_VERIFY)
    public = ask(False)
    operation = MessageVerifyOperation(mechanism.type, None, public.verifier(mechanism), lambda: _discard(ask(True)))
    application.begin(session, operation, key, False)


def _begin_encrypt(application: Application, session: Session, mechanism: Mechanism, key: int) -> None:
    ask = partial(cryptography.usable, application, session, key, mechanism, ck.CKF_MESSAGE_ENCRYPT)
    secret = _secret(ask(False))
    operation = MessageEncryptOperation(mechanism, secret, lambda: _discard(ask(True)), application.token.provider.random)
    application.begin(session, operation, key, False)


def _discard(key: KeyUse | PublicKey | SecretKey) -> None:
    """The process has its key."""


def _secret(key: object) -> SecretKey:
    """The mechanisms of message-based encryption are of secret keys alone."""
    return key  # type: ignore[return-value]


# ---- messages -----------------------------------------------------------------------------------------------------------


@contextmanager
def _signing(caller: Caller, session: Session) -> Iterator[MessageSignOperation]:
    token = caller.token
    with session.message(MessageSignOperation, caller.counters, token.wall()) as operation:
        yield operation
    if operation.finished and token.on_signature:
        token.on_signature(caller.application, "sign", operation.mechanism, operation.generation)


def _no_parameter(parameter: bytes | None) -> None:
    if parameter:
        raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "messages of this mechanism have no parameter of their own")


def sign_message(caller: Caller, args: Args) -> Args:
    session_handle, parameter, data, room = args
    session = caller.application.session(session_handle)
    with session.lock, _signing(caller, session) as operation:
        _no_parameter(parameter)
        return (operation.sign(data or b"", room),)


def sign_message_begin(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock, _signing(caller, session) as operation:
        _no_parameter(args[1])
        operation.begin()
    return ()


def sign_message_next(caller: Caller, args: Args) -> Args:
    session_handle, parameter, data, room = args
    session = caller.application.session(session_handle)
    with session.lock, _signing(caller, session) as operation:
        _no_parameter(parameter)
        return (operation.next(data or b"", room),)


def verify_message(caller: Caller, args: Args) -> Args:
    session_handle, parameter, data, signature = args
    session = caller.application.session(session_handle)
    with session.lock, session.message(MessageVerifyOperation, caller.counters, caller.token.wall()) as operation:
        _no_parameter(parameter)
        operation.verify(data or b"", signature or b"")
    return ()


def verify_message_begin(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock, session.message(MessageVerifyOperation, caller.counters, caller.token.wall()) as operation:
        _no_parameter(args[1])
        operation.begin()
    return ()


def verify_message_next(caller: Caller, args: Args) -> Args:
    """A NULL signature: more follows (5.16.4)."""
    session_handle, parameter, data, signature = args
    session = caller.application.session(session_handle)
    with session.lock, session.message(MessageVerifyOperation, caller.counters, caller.token.wall()) as operation:
        _no_parameter(parameter)
        operation.next(data or b"", signature)
    return ()


def encrypt_message(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, associated, data, room = args
    session = caller.application.session(session_handle)
    with session.lock, session.message(MessageEncryptOperation, caller.counters, caller.token.wall()) as operation:
        return operation.encrypt(mechanism, associated or b"", data or b"", room)


def encrypt_message_begin(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, associated = args
    session = caller.application.session(session_handle)
    with session.lock, session.message(MessageEncryptOperation, caller.counters, caller.token.wall()) as operation:
        return (operation.begin(mechanism, associated or b""),)


def encrypt_message_next(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, data, room, flags = args
    session = caller.application.session(session_handle)
    with session.lock, session.message(MessageEncryptOperation, caller.counters, caller.token.wall()) as operation:
        return operation.next(mechanism, data or b"", room, _last(flags))


def decrypt_message(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, associated, data, room = args
    session = caller.application.session(session_handle)
    with session.lock, session.message(MessageDecryptOperation, caller.counters, caller.token.wall()) as operation:
        return (operation.decrypt(mechanism, associated or b"", data or b"", room),)


def decrypt_message_begin(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, associated = args
    session = caller.application.session(session_handle)
    with session.lock, session.message(MessageDecryptOperation, caller.counters, caller.token.wall()) as operation:
        operation.begin(mechanism, associated or b"")
    return ()


def decrypt_message_next(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, data, room, flags = args
    session = caller.application.session(session_handle)
    with session.lock, session.message(MessageDecryptOperation, caller.counters, caller.token.wall()) as operation:
        return (operation.next(mechanism, data or b"", room, _last(flags)),)


def _last(flags: int) -> bool:
    if flags & ~ck.CKF_END_OF_MESSAGE:
        raise CkError(ck.CKR_ARGUMENTS_BAD, "flags of a message's part: CKF_END_OF_MESSAGE alone")
    return bool(flags)


TABLE: dict[Call, Handler] = {
    Call.MESSAGE_SIGN_INIT: _init(MessageSignOperation, _begin_sign),
    Call.SIGN_MESSAGE: sign_message,
    Call.SIGN_MESSAGE_BEGIN: sign_message_begin,
    Call.SIGN_MESSAGE_NEXT: sign_message_next,
    Call.MESSAGE_SIGN_FINAL: _final(MessageSignOperation),
    Call.MESSAGE_VERIFY_INIT: _init(MessageVerifyOperation, _begin_verify),
    Call.VERIFY_MESSAGE: verify_message,
    Call.VERIFY_MESSAGE_BEGIN: verify_message_begin,
    Call.VERIFY_MESSAGE_NEXT: verify_message_next,
    Call.MESSAGE_VERIFY_FINAL: _final(MessageVerifyOperation),
    Call.MESSAGE_ENCRYPT_INIT: _init(MessageEncryptOperation, _begin_encrypt),
    Call.ENCRYPT_MESSAGE: encrypt_message,
    Call.ENCRYPT_MESSAGE_BEGIN: encrypt_message_begin,
    Call.ENCRYPT_MESSAGE_NEXT: encrypt_message_next,
    Call.MESSAGE_ENCRYPT_FINAL: _final(MessageEncryptOperation),
    Call.MESSAGE_DECRYPT_INIT: _init(MessageDecryptOperation, _begin_decrypt),
    Call.DECRYPT_MESSAGE: decrypt_message,
    Call.DECRYPT_MESSAGE_BEGIN: decrypt_message_begin,
    Call.DECRYPT_MESSAGE_NEXT: decrypt_message_next,
    Call.MESSAGE_DECRYPT_FINAL: _final(MessageDecryptOperation),
}
