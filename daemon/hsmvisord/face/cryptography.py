"""Cryptographic functions (PKCS#11 3.1, 5.8-5.18) on the operations of a session."""

from __future__ import annotations

from time import perf_counter

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto.interface import PublicKey, SecretKey
from hsmvisord.face import guest
from hsmvisord.face.caller import Args, Caller, Handler, shaped
from hsmvisord.token.application import Application
from hsmvisord.token.operations import DecryptOperation, DigestOperation, EncryptOperation, VerifyOperation
from hsmvisord.token.secrets import secret_attributes
from hsmvisord.token.session import Session
from hsmvisord.wire.calls import Call, Mechanism

# ---- sign ---------------------------------------------------------------------------------------------------------------


def sign_init(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, key = args
    application = caller.application
    session = application.session(session_handle)
    with session.lock:
        if mechanism is None:
            session.cancel("sign")
        else:
            application.sign_init(session, mechanism, key)
            session.shut()
    return ()


def sign(caller: Caller, args: Args) -> Args:
    session_handle, data, room = args
    application = caller.application
    session = application.session(session_handle)
    with session.lock:
        return (application.sign(session, data or b"", room, caller.counters),)


def sign_once(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, key, data, room = args
    application = caller.application
    session = application.session(session_handle)
    with session.lock:
        application.sign_init(session, mechanism, key)
        try:
            return (application.sign(session, data or b"", room, caller.counters),)
        finally:
            if "sign" in session.operations:  # a question for the length keeps it open
                session.shut()


def sign_update(caller: Caller, args: Args) -> Args:
    application = caller.application
    session = application.session(args[0])
    with session.lock, application.signing(session, caller.counters) as operation:
        operation.update(args[1] or b"")
    return ()


def sign_final(caller: Caller, args: Args) -> Args:
    application = caller.application
    session = application.session(args[0])
    with session.lock, application.signing(session, caller.counters) as operation:
        return (operation.final(args[1]),)


# ---- verify and encrypt: the public key's side --------------------------------------------------------------------------


def _public_key(application: Application, handle: int) -> PublicKey:
    found = application.token.index.by_handle.get(handle)
    if found is None:
        raise CkError(ck.CKR_KEY_HANDLE_INVALID)
    if found.public is None:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, "a public key is needed")
    return found.public


#: What is asked of a public key, as CKF_ of a mechanism -> as CKA_ of the key.
_PERMITTED = {
    ck.CKF_VERIFY: ck.CKA_VERIFY,
    ck.CKF_MESSAGE_VERIFY: ck.CKA_VERIFY,
    ck.CKF_VERIFY_RECOVER: ck.CKA_VERIFY_RECOVER,
    ck.CKF_ENCRYPT: ck.CKA_ENCRYPT,
    ck.CKF_MESSAGE_ENCRYPT: ck.CKA_ENCRYPT,
}


def usable(
    application: Application, session: Session, handle: int, mechanism: Mechanism, function: int, counted: bool = True
) -> PublicKey | SecretKey:
    """Returns the key that verifies or encrypts; `counted`: an operation begins now."""
    ask = application.token.begin if counted else application.token.check
    if session.slot:
        key, allowed = application.guest.other(handle, _PERMITTED[function])
        ask(mechanism, allowed, key.kind, function)
        return key
    public = _public_key(application, handle)
    attributes = application.token.index.by_handle[handle].attributes
    if not attributes[_PERMITTED[function]]:
        raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
    ask(mechanism, attributes[ck.CKA_ALLOWED_MECHANISMS], public.kind, function)
    return public


def _verify_init(application: Application, session: Session, mechanism: Mechanism, key: int) -> None:
    session.check_free("verify")
    public = usable(application, session, key, mechanism, ck.CKF_VERIFY)
    application.begin(session, VerifyOperation(mechanism.type, public.verifier(mechanism)), key, False)


def verify_init(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, key = args
    session = caller.application.session(session_handle)
    with session.lock:
        if mechanism is None:
            session.cancel("verify")
        else:
            _verify_init(caller.application, session, mechanism, key)
    return ()


def _verify(caller: Caller, session: Session, data: bytes | None, signature: bytes | None) -> Args:
    with session.running(VerifyOperation, caller.counters, caller.token.wall()) as operation:
        operation.verify(data or b"", signature or b"")
    return ()


def verify(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock:
        return _verify(caller, session, args[1], args[2])


def verify_once(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, key, data, signature = args
    session = caller.application.session(session_handle)
    with session.lock:
        _verify_init(caller.application, session, mechanism, key)
        return _verify(caller, session, data, signature)


def verify_update(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock, session.running(VerifyOperation, caller.counters, caller.token.wall()) as operation:
        operation.update(args[1] or b"")
    return ()


def verify_final(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock, session.running(VerifyOperation, caller.counters, caller.token.wall()) as operation:
        operation.final(args[1] or b"")
    return ()


def encrypt_init(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, key = args
    session = caller.application.session(session_handle)
    with session.lock:
        if mechanism is None:
            session.cancel("encrypt")
            return ()
        _encrypt_init(caller.application, session, mechanism, key)
    return ()


def _encrypt_init(application: Application, session: Session, mechanism: Mechanism, key: int) -> None:
    session.check_free("encrypt")
    public = usable(application, session, key, mechanism, ck.CKF_ENCRYPT)
    application.begin(session, EncryptOperation(mechanism.type, None, public.encrypter(mechanism)), key, False)


def update(kind: type[EncryptOperation | DecryptOperation]) -> Handler:
    """C_EncryptUpdate, C_DecryptUpdate."""

    def handler(caller: Caller, args: Args) -> Args:
        session = caller.application.session(args[0])
        with session.lock, session.running(kind, caller.counters, caller.token.wall()) as operation:
            return (operation.update(args[1] or b"", args[2]),)

    return handler


def final(kind: type[EncryptOperation | DecryptOperation]) -> Handler:
    """C_EncryptFinal, C_DecryptFinal."""

    def handler(caller: Caller, args: Args) -> Args:
        session = caller.application.session(args[0])
        with session.lock, session.running(kind, caller.counters, caller.token.wall()) as operation:
            return (operation.final(args[1]),)

    return handler


def _encrypt(caller: Caller, session: Session, data: bytes | None, room: int | None) -> Args:
    with session.running(EncryptOperation, caller.counters, caller.token.wall()) as operation:
        return (operation.run(data or b"", room),)


def encrypt(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock:
        return _encrypt(caller, session, args[1], args[2])


def encrypt_once(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, key, data, room = args
    session = caller.application.session(session_handle)
    with session.lock:
        _encrypt_init(caller.application, session, mechanism, key)
        return _encrypt(caller, session, data, room)


# ---- decrypt ------------------------------------------------------------------------------------------------------------


def _decrypt_init(application: Application, session: Session, mechanism: Mechanism, key: int) -> None:
    session.check_free("decrypt")
    use = application.use(session, key)
    if not use.may_decrypt:
        raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
    application.token.begin(mechanism, use.allowed, use.private.kind, ck.CKF_DECRYPT)
    operation = DecryptOperation(mechanism.type, use.generation, use.private.decrypter(mechanism))
    application.begin(session, operation, key, use.asks_again)


def decrypt_init(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, key = args
    session = caller.application.session(session_handle)
    with session.lock:
        if mechanism is None:
            session.cancel("decrypt")
        else:
            _decrypt_init(caller.application, session, mechanism, key)
    return ()


def _decrypt(caller: Caller, session: Session, data: bytes | None, room: int | None) -> Args:
    with session.running(DecryptOperation, caller.counters, caller.token.wall()) as operation:
        return (operation.run(data or b"", room),)


def decrypt(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock:
        return _decrypt(caller, session, args[1], args[2])


def decrypt_once(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, key, data, room = args
    session = caller.application.session(session_handle)
    with session.lock:
        _decrypt_init(caller.application, session, mechanism, key)
        return _decrypt(caller, session, data, room)


# ---- digest, derive, random ---------------------------------------------------------------------------------------------


def _digest_init(caller: Caller, session: Session, mechanism: Mechanism) -> None:
    session.check_free("digest")
    size, begin = caller.token.provider.digest(mechanism)
    session.begin(DigestOperation(mechanism.type, size, begin))


def digest_init(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock:
        if args[1] is None:
            session.cancel("digest")
        else:
            _digest_init(caller, session, args[1])
    return ()


def _digest(caller: Caller, session: Session, data: bytes | None, room: int | None) -> Args:
    with session.running(DigestOperation, caller.counters, caller.token.wall()) as operation:
        return (operation.digest(data or b"", room),)


def digest(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock:
        return _digest(caller, session, args[1], args[2])


def digest_once(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock:
        _digest_init(caller, session, args[1])
        return _digest(caller, session, args[2], args[3])


def digest_update(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock, session.running(DigestOperation, caller.counters, caller.token.wall()) as operation:
        operation.update(args[1] or b"")
    return ()


def digest_final(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock, session.running(DigestOperation, caller.counters, caller.token.wall()) as operation:
        return (operation.final(args[1]),)


def digest_key(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock, session.running(DigestOperation, caller.counters, caller.token.wall()) as operation:
        if session.slot:
            operation.update(guest.digestible(caller.application, args[1]))
            return ()
        known = caller.application.object(args[1]) is not None
        raise CkError(ck.CKR_KEY_INDIGESTIBLE if known else ck.CKR_KEY_HANDLE_INVALID)


def _derive(caller: Caller, args: Args) -> int:
    session_handle, mechanism, key, template = args
    application = caller.application
    session = application.session(session_handle)
    if mechanism is None:
        raise CkError(ck.CKR_ARGUMENTS_BAD)
    if len(template) > limits.MAX_TEMPLATE:
        raise CkError(ck.CKR_TEMPLATE_INCONSISTENT, f"a template has at most {limits.MAX_TEMPLATE} attributes")
    if session.slot:
        return guest.derive_key(caller, session, mechanism, key, template)
    use = application.key(key)
    if not use.may_derive:
        raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
    application.token.begin(mechanism, use.allowed, use.private.kind, ck.CKF_DERIVE)
    began = perf_counter()
    wanted = dict(template)
    length = wanted.get(ck.CKA_VALUE_LEN)
    secret = use.private.derive(mechanism, length if isinstance(length, int) else 0)
    handle = application.add_object(session, secret_attributes(wanted, secret, mechanism.type))
    caller.counters.cell("derive", mechanism.type, use.generation).observe(perf_counter() - began, caller.token.wall())
    return handle


def derive_key(caller: Caller, args: Args) -> Args:
    return (_derive(caller, args),)


def derive_key2(caller: Caller, args: Args) -> Args:
    """p11-kit's newer form: rv, the mechanism's parameter update, handle."""
    return shaped(lambda: (_derive(caller, args),), lambda made: (ck.CKR_OK, args[1], *made))


def generate_random(caller: Caller, args: Args) -> Args:
    session_handle, room = args
    caller.application.session(session_handle)
    if room is None:
        raise CkError(ck.CKR_ARGUMENTS_BAD)
    if room > limits.MAX_RANDOM:
        raise CkError(ck.CKR_ARGUMENTS_BAD, f"at most {limits.MAX_RANDOM} bytes at a time")
    return (caller.token.seeds.mixed(caller.token.provider.random, room),)


TABLE: dict[Call, Handler] = {
    Call.SIGN_INIT: sign_init,
    Call.SIGN: sign,
    Call.SIGN_ONCE: sign_once,
    Call.SIGN_UPDATE: sign_update,
    Call.SIGN_FINAL: sign_final,
    Call.VERIFY_INIT: verify_init,
    Call.VERIFY: verify,
    Call.VERIFY_ONCE: verify_once,
    Call.VERIFY_UPDATE: verify_update,
    Call.VERIFY_FINAL: verify_final,
    Call.ENCRYPT_INIT: encrypt_init,
    Call.ENCRYPT: encrypt,
    Call.ENCRYPT_ONCE: encrypt_once,
    Call.ENCRYPT_UPDATE: update(EncryptOperation),
    Call.ENCRYPT_FINAL: final(EncryptOperation),
    Call.DECRYPT_INIT: decrypt_init,
    Call.DECRYPT: decrypt,
    Call.DECRYPT_ONCE: decrypt_once,
    Call.DECRYPT_UPDATE: update(DecryptOperation),
    Call.DECRYPT_FINAL: final(DecryptOperation),
    Call.DIGEST_INIT: digest_init,
    Call.DIGEST: digest,
    Call.DIGEST_ONCE: digest_once,
    Call.DIGEST_UPDATE: digest_update,
    Call.DIGEST_FINAL: digest_final,
    Call.DIGEST_KEY: digest_key,
    Call.DERIVE_KEY: derive_key,
    Call.DERIVE_KEY2: derive_key2,
    Call.GENERATE_RANDOM: generate_random,
}
