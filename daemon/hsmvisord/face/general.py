"""General, slot, session and login functions (PKCS#11 3.1, 5.4-5.6)."""

from __future__ import annotations

from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto import mechanisms
from hsmvisord.face import guest
from hsmvisord.face.caller import Args, Caller, Handler, Parked
from hsmvisord.keystore import pin
from hsmvisord.token import info
from hsmvisord.token.info import GUEST_SLOT, MANAGED_SLOT
from hsmvisord.token.session import CANCEL_FLAGS
from hsmvisord.wire.calls import Call, Needed


def initialize(caller: Caller, args: Args) -> Args:
    if caller.application_or_none is not None:
        raise CkError(ck.CKR_CRYPTOKI_ALREADY_INITIALIZED)
    caller.application_or_none = caller.token.new_application(caller.program)
    return ()


def finalize(caller: Caller, args: Args) -> Args:
    application = caller.application
    caller.token.finalize(application)
    caller.application_or_none = None
    return ()


def get_info(caller: Caller, args: Args) -> Args:
    return info.library_info()


def fitted(values: tuple[int, ...], room: int | None) -> tuple[int, ...] | Needed:
    """A list of CK_ULONG for the caller's room."""
    return values if room is not None and len(values) <= room else Needed(len(values))


def get_slot_list(caller: Caller, args: Args) -> Args:
    token_present, room = args
    gone = token_present and not caller.token.present
    return (fitted(tuple(slot for slot in caller.token.slots if slot != MANAGED_SLOT or not gone), room),)


def get_slot_info(caller: Caller, args: Args) -> Args:
    caller.application.check_slot(args[0])
    if args[0] == GUEST_SLOT:
        return info.guest_slot_info(caller.token.module)
    return info.slot_info(caller.token.module, caller.token.present)


def get_token_info(caller: Caller, args: Args) -> Args:
    application, token = caller.application, caller.token
    (slot,) = args
    application.check_present(slot)
    state = token.keystore.state
    unknown = ck.CK_UNAVAILABLE_INFORMATION
    if slot == GUEST_SLOT:
        return guest.token_info(application)
    texts = (
        info.padded(token.module.encode(), 32),
        info.padded(info.MANUFACTURER, 32),
        info.padded(info.MODEL, 16),
        info.padded(state.module_id.hex()[:16].encode(), 16),
    )
    flags = info.token_flags(token.pin_set, state.pin.failures, token.pin_locked)
    limit = token.settings.max_sessions
    sessions = application.session_count(slot)
    least = pin.MIN_PIN if token.pin_set else 0
    counts = (limit, sessions, limit, application.rw_session_count(slot), pin.MAX_PIN, least, unknown, unknown, unknown, unknown)
    return (*texts, flags, *counts, info.VERSION, info.VERSION, b" " * 16)


def get_mechanism_list(caller: Caller, args: Args) -> Args:
    slot, room = args
    caller.application.check_present(slot)
    offered = tuple(filter(caller.token.offers, mechanisms.mechanism_list(slot)))
    return (fitted(offered, room),)


def get_mechanism_info(caller: Caller, args: Args) -> Args:
    slot, mechanism = args
    caller.application.check_present(slot)
    told = mechanisms.mechanism_info(mechanism, slot, caller.token.policing.policy.legacy)
    if not caller.token.offers(mechanism):
        raise CkError(ck.CKR_MECHANISM_INVALID, "the module's policy does not allow it, or its cryptoprocessor does not have it")
    return told if Call.MESSAGE_ENCRYPT_INIT in caller.codec.calls else _without_messages(*told)


def _without_messages(smallest: int, largest: int, flags: int) -> Args:
    """What a mechanism does in a dialect that has no message-based encryption."""
    if flags & (ck.CKF_MESSAGE_ENCRYPT | ck.CKF_MESSAGE_DECRYPT):
        flags &= ~(ck.CKF_MESSAGE_ENCRYPT | ck.CKF_MESSAGE_DECRYPT | ck.CKF_MULTI_MESSAGE)
    return smallest, largest, flags


def write_protected(caller: Caller, args: Args) -> Args:
    """C_InitToken, C_InitPIN, C_SetPIN: slot 0 is the operator's."""
    raise CkError(ck.CKR_TOKEN_WRITE_PROTECTED, "slot 0 is the operator's: it is changed from the host alone")


def init_token(caller: Caller, args: Args) -> Args:
    slot, so_pin, label = args
    caller.application.check_present(slot)
    if slot == GUEST_SLOT:
        return guest.unfrozen(caller, lambda: caller.application.guest.init_token(so_pin or b"", label))
    return write_protected(caller, args)


def init_pin(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    if session.slot == GUEST_SLOT:
        return guest.unfrozen(caller, lambda: caller.application.guest.init_pin(args[1] or b""))
    return session_write_protected(caller, args)


def set_pin(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    if session.slot == GUEST_SLOT:
        return guest.unfrozen(caller, lambda: caller.application.guest.set_pin(session, args[1] or b"", args[2] or b""))
    return session_write_protected(caller, args)


def session_write_protected(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    if not session.flags & ck.CKF_RW_SESSION:
        raise CkError(ck.CKR_SESSION_READ_ONLY)
    return write_protected(caller, args)


def open_session(caller: Caller, args: Args) -> Args:
    return (caller.application.open_session(args[0], args[1]),)


def close_session(caller: Caller, args: Args) -> Args:
    caller.application.close_session(args[0])
    return ()


def close_all_sessions(caller: Caller, args: Args) -> Args:
    caller.application.check_present(args[0])
    caller.application.close_all_sessions(args[0])
    return ()


def get_session_info(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    return session.slot, caller.application.session_state(session), session.flags, 0


def get_operation_state(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    cryptographic = session.operations.keys() - {"find"}
    raise CkError(ck.CKR_STATE_UNSAVEABLE if cryptographic else ck.CKR_OPERATION_NOT_INITIALIZED)


def set_operation_state(caller: Caller, args: Args) -> Args:
    caller.application.session(args[0])
    raise CkError(ck.CKR_SAVED_STATE_INVALID)


def _login(caller: Caller, handle: int, user: int, attempt: bytes | None) -> Args:
    """A PIN is not tried while the state is handed to a successor: the request waits and goes along."""
    return guest.unfrozen(caller, lambda: caller.application.login(handle, user, attempt))


def login(caller: Caller, args: Args) -> Args:
    handle, user, attempt = args
    return _login(caller, handle, user, attempt)


def login_user(caller: Caller, args: Args) -> Args:
    handle, user, attempt, _name = args
    return _login(caller, handle, user, attempt)


def logout(caller: Caller, args: Args) -> Args:
    caller.application.logout(args[0])
    return ()


def session_cancel(caller: Caller, args: Args) -> Args:
    handle, flags = args
    session = caller.application.session(handle)
    with session.lock:
        for flag, name in CANCEL_FLAGS.items():
            if flags & flag:
                session.cancel(name)
    return ()


def get_session_validation_flags(caller: Caller, args: Args) -> Args:
    """The token has no validation (CKO_VALIDATION), so no operation was one under it (PKCS#11 3.2, 4.15.3)."""
    session_handle, kind = args
    caller.application.session(session_handle)
    if kind != ck.CKS_LAST_VALIDATION_OK:
        raise CkError(ck.CKR_ARGUMENTS_BAD, "there is no such kind of validation flags")
    return (0,)


def seed_random(caller: Caller, args: Args) -> Args:
    handle, seed = args
    caller.application.session(handle)
    if seed is not None and len(seed) > limits.MAX_RANDOM:
        raise CkError(ck.CKR_ARGUMENTS_BAD, f"at most {limits.MAX_RANDOM} bytes at a time")
    caller.token.seeds.add(seed or b"")
    return ()


def wait_for_slot_event(caller: Caller, args: Args) -> Args:
    (flags,) = args
    application, token = caller.application, caller.token

    def ready() -> Args | None:
        if application.seen_slot_events == token.slot_events:
            return None
        application.seen_slot_events = token.slot_events
        return (MANAGED_SLOT,)

    answer = ready()
    if answer is not None:
        return answer
    if flags & ck.CKF_DONT_BLOCK:
        raise CkError(ck.CKR_NO_EVENT)
    raise Parked(ready)


TABLE: dict[Call, Handler] = {
    Call.INITIALIZE: initialize,
    Call.FINALIZE: finalize,
    Call.GET_INFO: get_info,
    Call.GET_SLOT_LIST: get_slot_list,
    Call.GET_SLOT_INFO: get_slot_info,
    Call.GET_TOKEN_INFO: get_token_info,
    Call.GET_MECHANISM_LIST: get_mechanism_list,
    Call.GET_MECHANISM_INFO: get_mechanism_info,
    Call.INIT_TOKEN: init_token,
    Call.INIT_TOKEN2: init_token,
    Call.OPEN_SESSION: open_session,
    Call.CLOSE_SESSION: close_session,
    Call.CLOSE_ALL_SESSIONS: close_all_sessions,
    Call.GET_SESSION_INFO: get_session_info,
    Call.INIT_PIN: init_pin,
    Call.SET_PIN: set_pin,
    Call.GET_OPERATION_STATE: get_operation_state,
    Call.SET_OPERATION_STATE: set_operation_state,
    Call.LOGIN: login,
    Call.LOGIN_USER: login_user,
    Call.LOGOUT: logout,
    Call.SESSION_CANCEL: session_cancel,
    Call.SEED_RANDOM: seed_random,
    Call.GET_SESSION_VALIDATION_FLAGS: get_session_validation_flags,
    Call.WAIT_FOR_SLOT_EVENT: wait_for_slot_event,
}
