"""Operations that are like others, or two at once: dual-function calls (PKCS#11 3.1, 5.17), signatures that hold their data
(5.13.6, 5.15.5), and verification with the signature first (3.2, 5.15.7)."""

from __future__ import annotations

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import PublicKey
from hsmvisord.face.caller import Args, Caller, Handler
from hsmvisord.face.cryptography import usable
from hsmvisord.token.application import Application
from hsmvisord.token.operations import (
    DecryptOperation,
    DigestOperation,
    EncryptOperation,
    Operation,
    SignOperation,
    SignRecoverOperation,
    VerifyOperation,
    VerifyRecoverOperation,
    VerifySignatureOperation,
)
from hsmvisord.token.session import Session
from hsmvisord.wire.calls import Call, Mechanism, Needed

# ---- dual functions -----------------------------------------------------------------------------------------------------
#
# They are one call here, and not two of the library's: it would have to undo the first where the second has no room for its output,
# and of a decryption it would send back what it has just received.  Here the room is known before either of the two has changed.


Other = type[DigestOperation | SignOperation | VerifyOperation]


def _dual(cipher: type[EncryptOperation | DecryptOperation], other: Other) -> Handler:
    """`other` takes what goes into an encryption, or what comes out of a decryption."""

    def handler(caller: Caller, args: Args) -> Args:
        session_handle, data, room = args
        session = caller.application.session(session_handle)
        with session.lock:
            pair = session.open(cipher), session.open(other)
            try:
                return (_updated(caller, session, cipher, other, data or b"", room),)
            except BaseException:
                _end(session, pair)
                raise

    return handler


def _updated(
    caller: Caller,
    session: Session,
    cipher: type[EncryptOperation | DecryptOperation],
    other: Other,
    data: bytes,
    room: int | None,
) -> bytes | Needed:
    now = caller.token.wall()
    with session.running(cipher, caller.counters, now) as outer:
        needed = outer.needed(len(data))
        if room is None or needed > room:
            return Needed(needed)
        out = outer.update(data, room)
        assert isinstance(out, bytes)
    with session.running(other, caller.counters, now) as inner:
        inner.update(data if cipher is EncryptOperation else out)
    for operation in (outer, inner):
        if operation.journal is not None:
            operation.journal.whole = False  # each is carried out again alone, and would not see what they share
    return out


def _end(session: Session, pair: tuple[Operation, ...]) -> None:
    """An error ends both, for they have not seen the same data."""
    for operation in pair:
        session.cancel(operation.name)


# ---- signatures that hold their data ------------------------------------------------------------------------------------


def sign_recover_init(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, key = args
    application = caller.application
    session = application.session(session_handle)
    with session.lock:
        if mechanism is None:
            session.cancel(SignRecoverOperation.name)
        else:
            _sign_recover_init(application, session, mechanism, key)
    return ()


def _sign_recover_init(application: Application, session: Session, mechanism: Mechanism, key: int) -> None:
    session.check_free(SignRecoverOperation.name)
    use = application.use(session, key)
    if not use.may_recover:
        raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
    application.token.begin(mechanism, use.allowed, use.private.kind, ck.CKF_SIGN_RECOVER)
    operation = SignRecoverOperation(mechanism.type, use, use.private.signer(mechanism))
    application.begin(session, operation, key, use.asks_again)


def sign_recover(caller: Caller, args: Args) -> Args:
    session_handle, data, room = args
    token = caller.token
    session = caller.application.session(session_handle)
    with session.lock, session.running(SignRecoverOperation, caller.counters, token.wall()) as operation:
        signature = operation.sign(data or b"", room)
    if operation.done and token.on_signature:
        token.on_signature(caller.application, "sign", operation.mechanism, operation.generation)
    return (signature,)


def verify_recover_init(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, key = args
    application = caller.application
    session = application.session(session_handle)
    with session.lock:
        if mechanism is None:
            session.cancel(VerifyRecoverOperation.name)
            return ()
        session.check_free(VerifyRecoverOperation.name)
        public: PublicKey = usable(application, session, key, mechanism, ck.CKF_VERIFY_RECOVER)  # type: ignore[assignment]  # of RSA
        application.begin(session, VerifyRecoverOperation(mechanism.type, None, public.recoverer(mechanism)), key, False)
    return ()


def verify_recover(caller: Caller, args: Args) -> Args:
    session_handle, signature, room = args
    session = caller.application.session(session_handle)
    with session.lock, session.running(VerifyRecoverOperation, caller.counters, caller.token.wall()) as operation:
        return (operation.run(signature or b"", room),)


# ---- the signature first ------------------------------------------------------------------------------------------------


def verify_signature_init(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, key, signature = args
    application = caller.application
    session = application.session(session_handle)
    with session.lock:
        if mechanism is None:
            session.cancel(VerifySignatureOperation.name)
            return ()
        session.check_free(VerifySignatureOperation.name)
        public = usable(application, session, key, mechanism, ck.CKF_VERIFY)
        operation = VerifySignatureOperation(mechanism.type, public.verifier(mechanism), signature or b"")
        application.begin(session, operation, key, False)
    return ()


def verify_signature(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock, session.running(VerifySignatureOperation, caller.counters, caller.token.wall()) as operation:
        operation.check(args[1] or b"")
    return ()


def verify_signature_update(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock, session.running(VerifySignatureOperation, caller.counters, caller.token.wall()) as operation:
        operation.update(args[1] or b"")
    return ()


def verify_signature_final(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock, session.running(VerifySignatureOperation, caller.counters, caller.token.wall()) as operation:
        operation.end()
    return ()


TABLE: dict[Call, Handler] = {
    Call.DIGEST_ENCRYPT_UPDATE: _dual(EncryptOperation, DigestOperation),
    Call.DECRYPT_DIGEST_UPDATE: _dual(DecryptOperation, DigestOperation),
    Call.SIGN_ENCRYPT_UPDATE: _dual(EncryptOperation, SignOperation),
    Call.DECRYPT_VERIFY_UPDATE: _dual(DecryptOperation, VerifyOperation),
    Call.SIGN_RECOVER_INIT: sign_recover_init,
    Call.SIGN_RECOVER: sign_recover,
    Call.VERIFY_RECOVER_INIT: verify_recover_init,
    Call.VERIFY_RECOVER: verify_recover,
    Call.VERIFY_SIGNATURE_INIT: verify_signature_init,
    Call.VERIFY_SIGNATURE: verify_signature,
    Call.VERIFY_SIGNATURE_UPDATE: verify_signature_update,
    Call.VERIFY_SIGNATURE_FINAL: verify_signature_final,
}
