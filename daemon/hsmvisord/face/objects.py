"""Object functions (PKCS#11 3.1, 5.7) of both slots: delivered objects (slot 0) are never changed from inside the guest."""

from __future__ import annotations

from typing import Any

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.face import guest
from hsmvisord.face.caller import Args, Caller, Handler
from hsmvisord.token.application import AnyObject
from hsmvisord.token.info import GUEST_SLOT
from hsmvisord.token.objects import SENSITIVE_ATTRIBUTES, TokenObject
from hsmvisord.token.operations import FindOperation
from hsmvisord.wire.calls import INVALID, SENSITIVE, Call


def known_object(caller: Caller, handle: int) -> AnyObject:
    found = caller.application.object(handle)
    if found is None:
        raise CkError(ck.CKR_OBJECT_HANDLE_INVALID)
    return found


def _value(caller: Caller, item: AnyObject, kind: int) -> Any:
    if kind == ck.CKA_PRIVATE:
        return caller.application.is_private(item)
    if isinstance(item, TokenObject):
        if item.use is not None and kind in SENSITIVE_ATTRIBUTES[item.use.private.kind.key_type]:
            return SENSITIVE
    elif item.hides(kind):
        return SENSITIVE
    return item.attributes.get(kind, INVALID)


def get_attribute_value(caller: Caller, args: Args) -> Args:
    session_handle, handle, wanted = args
    if caller.application.session(session_handle).slot == GUEST_SLOT:
        own = caller.application.guest.known(handle)
        return ([(kind, guest.value(own, kind)) for kind, _room in wanted],)
    item = known_object(caller, handle)
    return ([(kind, _value(caller, item, kind)) for kind, _room in wanted],)


def get_object_size(caller: Caller, args: Args) -> Args:
    session_handle, handle = args
    if caller.application.session(session_handle).slot == GUEST_SLOT:
        return (guest.size(caller.application.guest.known(handle)),)
    item = known_object(caller, handle)
    return (sum(len(v) if isinstance(v, bytes) else 8 for v in item.attributes.values()),)


def find_objects_init(caller: Caller, args: Args) -> Args:
    session_handle, template = args
    application = caller.application
    session = application.session(session_handle)
    with session.lock:
        session.begin(application.find(session, tuple(template)))
    return ()


def find_objects(caller: Caller, args: Args) -> Args:
    session_handle, room = args
    session = caller.application.session(session_handle)
    with session.lock:
        operation = session.operations.get("find")
        if not isinstance(operation, FindOperation):
            raise CkError(ck.CKR_OPERATION_NOT_INITIALIZED, "no search is open")
        return (operation.take(room or 0),)


def find_objects_final(caller: Caller, args: Args) -> Args:
    session = caller.application.session(args[0])
    with session.lock:
        if "find" not in session.operations:
            raise CkError(ck.CKR_OPERATION_NOT_INITIALIZED, "no search is open")
        session.cancel("find")
    return ()


def find_once(caller: Caller, args: Args) -> Args:
    session_handle, template, most = args
    application = caller.application
    session = application.session(session_handle)
    with session.lock:
        operation = application.find(session, tuple(template))
        taken = operation.take(min(most, ck.CK_UNAVAILABLE_INFORMATION))
        if operation.more:
            session.begin(operation)
    return taken, int(operation.more), application.watermark


def create_object(caller: Caller, args: Args) -> Args:
    session_handle, template = args
    session = caller.application.session(session_handle)
    if session.slot == GUEST_SLOT:
        return guest.create_object(caller, session, template)
    if any(kind == ck.CKA_TOKEN and value is True for kind, value in template):
        raise CkError(ck.CKR_TOKEN_WRITE_PROTECTED, "slot 0 is the operator's: it takes no objects of the guest")
    raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED, "objects of the guest's own are in slot 1")


def copy_object(caller: Caller, args: Args) -> Args:
    session_handle, handle, template = args
    session = caller.application.session(session_handle)
    if session.slot == GUEST_SLOT:
        return guest.copy_object(caller, session, handle, template)
    item = known_object(caller, handle)
    if isinstance(item, TokenObject):
        raise CkError(ck.CKR_ACTION_PROHIBITED, "delivered objects cannot be copied")
    raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED, "objects of the guest's own are in slot 1")


def set_attribute_value(caller: Caller, args: Args) -> Args:
    session_handle, handle, template = args
    session = caller.application.session(session_handle)
    if session.slot == GUEST_SLOT:
        return guest.set_attribute_value(caller, session, handle, template)
    item = known_object(caller, handle)
    if isinstance(item, TokenObject):
        raise CkError(ck.CKR_ACTION_PROHIBITED, "delivered objects are the operator's")
    raise CkError(ck.CKR_FUNCTION_NOT_SUPPORTED, "objects of the guest's own are in slot 1")


def destroy_object(caller: Caller, args: Args) -> Args:
    session_handle, handle = args
    session = caller.application.session(session_handle)
    if session.slot == GUEST_SLOT:
        return guest.destroy_object(caller, session, handle)
    caller.application.remove_object(handle)
    return ()


def generate_key(caller: Caller, args: Args) -> Args:
    if caller.application.session(args[0]).slot == GUEST_SLOT:
        return guest.generate_key(caller, args)
    raise CkError(ck.CKR_MECHANISM_INVALID, "slot 0 generates no keys")


def generate_key_pair(caller: Caller, args: Args) -> Args:
    if caller.application.session(args[0]).slot == GUEST_SLOT:
        return guest.generate_key_pair(caller, args)
    raise CkError(ck.CKR_MECHANISM_INVALID, "slot 0 generates no keys")


def wrap_key(caller: Caller, args: Args) -> Args:
    session_handle, _mechanism, wrapping, key, _room = args
    if caller.application.session(session_handle).slot == GUEST_SLOT:
        return guest.wrap_key(caller, args)
    if caller.application.object(wrapping) is None:
        raise CkError(ck.CKR_WRAPPING_KEY_HANDLE_INVALID)
    item = caller.application.object(key)
    if item is None:
        raise CkError(ck.CKR_KEY_HANDLE_INVALID)
    if isinstance(item, TokenObject) and item.use is not None:
        raise CkError(ck.CKR_KEY_UNEXTRACTABLE, "delivered keys are never wrapped")
    raise CkError(ck.CKR_MECHANISM_INVALID, "slot 0 wraps no keys")


def unwrap_key(caller: Caller, args: Args) -> Args:
    if caller.application.session(args[0]).slot == GUEST_SLOT:
        return guest.unwrap_key(caller, args)
    if caller.application.object(args[2]) is None:
        raise CkError(ck.CKR_UNWRAPPING_KEY_HANDLE_INVALID)
    raise CkError(ck.CKR_MECHANISM_INVALID, "slot 0 unwraps no keys")


TABLE: dict[Call, Handler] = {
    Call.CREATE_OBJECT: create_object,
    Call.COPY_OBJECT: copy_object,
    Call.DESTROY_OBJECT: destroy_object,
    Call.GET_OBJECT_SIZE: get_object_size,
    Call.GET_ATTRIBUTE_VALUE: get_attribute_value,
    Call.SET_ATTRIBUTE_VALUE: set_attribute_value,
    Call.FIND_OBJECTS_INIT: find_objects_init,
    Call.FIND_OBJECTS: find_objects,
    Call.FIND_OBJECTS_FINAL: find_objects_final,
    Call.FIND_ONCE: find_once,
    Call.GENERATE_KEY: generate_key,
    Call.GENERATE_KEY_PAIR: generate_key_pair,
    Call.WRAP_KEY: wrap_key,
    Call.UNWRAP_KEY: unwrap_key,
}
