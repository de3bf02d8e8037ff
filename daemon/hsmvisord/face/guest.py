"""Slot 1's functions: objects, keys and PINs of the guest's own (PKCS#11 3.1, 5.5-5.7, 5.18)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import domain, generation
from hsmvisord.crypto.ec import CURVES
from hsmvisord.crypto.interface import KeyKind, PrivateKey, SecretKey
from hsmvisord.face.caller import Args, Caller, Parked
from hsmvisord.keystore import pin
from hsmvisord.keystore.state import Pin
from hsmvisord.token import domain_parameters, info, keepers, making, rules
from hsmvisord.token.application import Application
from hsmvisord.token.catalogue import Template
from hsmvisord.token.guest import GuestItem
from hsmvisord.token.making import Made
from hsmvisord.token.rules import By
from hsmvisord.token.session import Session
from hsmvisord.wire.calls import INVALID, SENSITIVE, Mechanism, Needed


def unfrozen(caller: Caller, act: Callable[[], Any]) -> Args:
    """Nothing is stored while the state is handed to a successor: such a request waits and goes along."""
    keystore = caller.token.keystore

    def ready() -> Args | None:
        if keystore.frozen:
            return None
        answer = act()
        return answer if isinstance(answer, tuple) else ()

    if keystore.frozen:
        raise Parked(ready)
    return ready() or ()


def token_info(application: Application) -> Args:
    token = application.token
    state, unknown = token.keystore.state, ck.CK_UNAVAILABLE_INFORMATION

    def locked(role: Pin) -> bool:
        return pin.locked_until(role) > token.wall()

    texts = (
        state.guest.label or b" " * 32,
        info.padded(info.MANUFACTURER, 32),
        info.padded(info.MODEL, 16),
        info.padded(state.module_id.hex()[16:].encode(), 16),
    )
    limit, sessions = token.settings.max_sessions, application.session_count(info.GUEST_SLOT)
    least = token.policing.policy.min_pin or pin.MIN_PIN
    counts = (limit, sessions, limit, application.rw_session_count(info.GUEST_SLOT), pin.MAX_PIN, least)
    memory = (unknown, unknown, unknown, unknown)
    return (*texts, info.guest_token_flags(state.guest, locked), *counts, *memory, info.VERSION, info.VERSION, b" " * 16)


# ---- objects ------------------------------------------------------------------------------------------------------------


def value(item: GuestItem, kind: int) -> Any:
    try:
        return item.value(kind)
    except KeyError:
        return INVALID
    except CkError:
        return SENSITIVE


def size(item: GuestItem) -> int:
    return sum(len(v) if isinstance(v, bytes) else 8 for v in item.attributes.values())


def added(caller: Caller, session: Session, make: Callable[[], Sequence[Made]]) -> Args:
    """Makes objects, adds them and returns their handles; what is the token's waits while nothing can be stored."""
    made: list[Made] = []

    def add() -> Args:
        if not made:
            made.extend(_checked(caller, one) for one in make())
        return tuple(caller.application.guest.add(session, made))

    return unfrozen(caller, add)


def _checked(caller: Caller, one: Made) -> Made:
    """Raises for what is old or weak where the module's policy does not have it."""
    if one.key is not None:
        given = one.attributes.get(ck.CKA_EC_PARAMS, one.key.kind.parameters)
        caller.token.policing.check_key(one.key.kind, explicit=given != one.key.kind.parameters)
    elif one.attributes[ck.CKA_CLASS] == ck.CKO_DOMAIN_PARAMETERS:
        caller.token.policing.check_key(KeyKind("what has domain parameters", one.attributes[ck.CKA_KEY_TYPE], 0, b""))
    return one


def create_object(caller: Caller, session: Session, template: Template) -> Args:
    application = caller.application
    caller.token.policing.permit("create")
    return added(caller, session, lambda: [making.created(template, application.guest.officer, caller.token.provider)])


def copy_object(caller: Caller, session: Session, handle: int, template: Template) -> Args:
    guest = caller.application.guest
    item = guest.known(handle)
    return added(caller, session, lambda: [making.copied(item.attributes, item.key, template, guest.officer)])


def set_attribute_value(caller: Caller, session: Session, handle: int, template: Template) -> Args:
    return unfrozen(caller, lambda: caller.application.guest.change(session, handle, template))


def destroy_object(caller: Caller, session: Session, handle: int) -> Args:
    return unfrozen(caller, lambda: caller.application.guest.destroy(session, handle))


# ---- new keys -----------------------------------------------------------------------------------------------------------


def _begin(caller: Caller, mechanism: Mechanism | None, function: int, bits: int, kinds: dict[int, Any]) -> tuple[Mechanism, int]:
    """Raises unless a key may be generated now; returns the mechanism and the key's type."""
    caller.token.policing.permit("generate")
    if mechanism is None:
        raise CkError(ck.CKR_ARGUMENTS_BAD)
    if mechanism.type not in kinds:
        raise CkError(ck.CKR_MECHANISM_INVALID, f"{ck.mechanism_name(mechanism.type)} is not a mechanism of this function")
    if mechanism.parameter not in (None, b"", ()):
        raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "this mechanism takes no parameter")
    key_type = kinds[mechanism.type][0]
    kind = KeyKind("a new key", key_type, bits, b"")
    caller.token.begin(mechanism, (mechanism.type,), kind, function)
    return mechanism, key_type


def generate_key(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, template = args
    session = caller.application.session(session_handle)
    wanted = rules.as_dict(template)
    length, bits = wanted.get(ck.CKA_VALUE_LEN), wanted.get(ck.CKA_PRIME_BITS)
    bits = 8 * length if isinstance(length, int) else bits if isinstance(bits, int) else 0
    mechanism, _ = _begin(caller, mechanism, ck.CKF_GENERATE, bits, generation.SECRETS | domain.PARAMETERS)
    began = perf_counter()
    guest, provider = caller.application.guest, caller.token.provider

    def make() -> list[Made]:
        if mechanism.type in domain.PARAMETERS:
            return [Made(domain_parameters.generated(mechanism.type, template, guest.officer))]
        return [making.generated(mechanism.type, template, guest.officer, provider)]

    (handle,) = added(caller, session, make)
    caller.counters.cell("generate", mechanism.type, None).observe(perf_counter() - began, caller.token.wall())
    return (handle,)


_CURVE_BITS = {oid: bits for _, bits, oid in CURVES.values()}


def _prime_bits(template: dict[int, Any]) -> int:
    prime = template.get(ck.CKA_PRIME)
    return int.from_bytes(prime).bit_length() if isinstance(prime, bytes) else 0


def generate_key_pair(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, public, private = args
    session = caller.application.session(session_handle)
    wanted = rules.as_dict(public)
    unknown = 0 if mechanism is not None and mechanism.type == ck.CKM_RSA_PKCS_KEY_PAIR_GEN else 256
    bits = wanted.get(ck.CKA_MODULUS_BITS, _CURVE_BITS.get(wanted.get(ck.CKA_EC_PARAMS, b""), unknown))
    bits = _prime_bits(wanted) or bits
    mechanism, _ = _begin(caller, mechanism, ck.CKF_GENERATE_KEY_PAIR, bits if isinstance(bits, int) else 0, generation.PAIRS)
    began = perf_counter()
    guest, provider = caller.application.guest, caller.token.provider
    handles = added(caller, session, lambda: making.generated_pair(mechanism.type, public, private, guest.officer, provider))
    caller.counters.cell("generate", mechanism.type, None).observe(perf_counter() - began, caller.token.wall())
    return handles


def derive_key(caller: Caller, session: Session, mechanism: Mechanism, handle: int, template: Template) -> int:
    application, guest = caller.application, caller.application.guest
    item, use = guest.known(handle, ck.CKR_KEY_HANDLE_INVALID), guest.use(handle)
    if not use.may_derive:
        raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
    caller.token.begin(mechanism, use.allowed, use.private.kind, ck.CKF_DERIVE)
    began = perf_counter()
    bases = [item.attributes]

    def salt(handle: int) -> bytes:
        found = _salt(application, mechanism, handle)
        bases.append(found.attributes)
        return found.key.value  # type: ignore[union-attr]

    length = keepers.derived_from(bases, rules.as_dict(template)).get(ck.CKA_VALUE_LEN)
    secret = use.private.derive(mechanism, length if isinstance(length, int) else 0, salt)
    values = keepers.derived_from(bases, rules.as_dict(template))
    provider = caller.token.provider

    def make() -> list[Made]:
        made = making.from_secret(secret, values.items(), guest.officer, mechanism.type, By.DERIVE, item.attributes, provider)
        keepers.check_length(bases, made.attributes[ck.CKA_VALUE_LEN])
        return [made]

    (derived,) = added(caller, session, make)
    caller.counters.cell("derive", mechanism.type, None).observe(perf_counter() - began, caller.token.wall())
    return int(derived)


def _salt(application: Application, mechanism: Mechanism, handle: int) -> GuestItem:
    """A key that is a salt is used like one that is derived from: what comes out is a MAC by it."""
    item = application.guest.known(handle, ck.CKR_KEY_HANDLE_INVALID)
    if item.attributes[ck.CKA_CLASS] != ck.CKO_SECRET_KEY:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, "a salt is a secret key")
    if not item.may(ck.CKA_DERIVE):
        raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED, "a salt is a key that may derive")
    if mechanism.type not in item.allowed:
        raise CkError(ck.CKR_MECHANISM_INVALID, f"{ck.mechanism_name(mechanism.type)} is not among the salt's allowed mechanisms")
    return item


def digestible(application: Application, handle: int) -> bytes:
    """Returns a secret key's value for C_DigestKey (5.14.4): of one that may be read."""
    item = application.guest.known(handle, ck.CKR_KEY_HANDLE_INVALID)
    if item.attributes[ck.CKA_CLASS] != ck.CKO_SECRET_KEY or rules.hides(item.attributes, ck.CKA_VALUE):
        raise CkError(ck.CKR_KEY_INDIGESTIBLE)
    key: SecretKey = item.key  # type: ignore[assignment]
    return key.value


# ---- wrapping -----------------------------------------------------------------------------------------------------------


def _wrapped_key(item: GuestItem) -> PrivateKey | SecretKey:
    if item.attributes[ck.CKA_CLASS] not in (ck.CKO_SECRET_KEY, ck.CKO_PRIVATE_KEY):
        raise CkError(ck.CKR_KEY_NOT_WRAPPABLE, "only private and secret keys are wrapped")
    return item.key  # type: ignore[return-value]


#: From a mechanism with its parameter to the most bytes that come out, and what wraps.
Wrapping = Callable[[Mechanism], tuple[int, Callable[[], bytes]]]


def wrapping_of(caller: Caller, mechanism: int, wrapping: int, handle: int) -> Wrapping:
    """Returns what wraps a key with another, which may be done now."""
    guest = caller.application.guest
    wrapper = guest.known(wrapping, ck.CKR_WRAPPING_KEY_HANDLE_INVALID)
    item = guest.known(handle, ck.CKR_KEY_HANDLE_INVALID)
    if wrapper.attributes[ck.CKA_CLASS] not in (ck.CKO_PUBLIC_KEY, ck.CKO_SECRET_KEY):
        raise CkError(ck.CKR_WRAPPING_KEY_TYPE_INCONSISTENT)
    target = _wrapped_key(item)
    key, allowed = guest.other(wrapping, ck.CKA_WRAP)
    keepers.check_wrapping(item.attributes, wrapper.attributes, mechanism)
    guest.check_private_half(item, wrapper)
    caller.token.begin(Mechanism(mechanism), allowed, key.kind, ck.CKF_WRAP)
    return lambda told: caller.token.provider.wrap(key, told, target)


def wrapped_by(wrap: Callable[[], bytes]) -> bytes:
    """Returns the wrapped key."""
    try:
        return wrap()
    except CkError as error:
        if error.rv in (ck.CKR_DATA_LEN_RANGE, ck.CKR_DATA_INVALID):
            raise CkError(ck.CKR_KEY_SIZE_RANGE, "this mechanism does not wrap a key of this length") from None
        raise


def wrap_key(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, wrapping, handle, room = args
    caller.application.session(session_handle)
    if mechanism is None:
        raise CkError(ck.CKR_ARGUMENTS_BAD)
    prepared = wrapping_of(caller, mechanism.type, wrapping, handle)
    began = perf_counter()
    bound, wrap = prepared(mechanism)
    if room is None:
        return (Needed(bound),)
    wrapped = wrapped_by(wrap)
    caller.counters.cell("wrap", mechanism.type, None).observe(perf_counter() - began, caller.token.wall())
    return (wrapped if len(wrapped) <= room else Needed(len(wrapped)),)


_UNWRAPPED_AS = {
    ck.CKR_ENCRYPTED_DATA_INVALID: ck.CKR_WRAPPED_KEY_INVALID,
    ck.CKR_ENCRYPTED_DATA_LEN_RANGE: ck.CKR_WRAPPED_KEY_LEN_RANGE,
    ck.CKR_DATA_LEN_RANGE: ck.CKR_WRAPPED_KEY_LEN_RANGE,
    ck.CKR_KEY_SIZE_RANGE: ck.CKR_WRAPPED_KEY_LEN_RANGE,
}


def unwrap_key(caller: Caller, args: Args) -> Args:
    session_handle, mechanism, unwrapping, wrapped, template = args
    session = caller.application.session(session_handle)
    if mechanism is None:
        raise CkError(ck.CKR_ARGUMENTS_BAD)
    return unwrapped(caller, session, mechanism, unwrapping, wrapped or b"", template)


def unwrapped(caller: Caller, session: Session, mechanism: Mechanism, unwrapping: int, wrapped: bytes, template: Template) -> Args:
    """Returns the handle of the new key."""
    guest = caller.application.guest
    unwrapper = guest.known(unwrapping, ck.CKR_UNWRAPPING_KEY_HANDLE_INVALID)
    if unwrapper.attributes[ck.CKA_CLASS] not in (ck.CKO_PRIVATE_KEY, ck.CKO_SECRET_KEY):
        raise CkError(ck.CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT)
    if not unwrapper.may(ck.CKA_UNWRAP):
        raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
    use = guest.use(unwrapping)
    caller.token.begin(mechanism, use.allowed, use.private.kind, ck.CKF_UNWRAP)
    keepers.check_unwrapping(unwrapper.attributes, mechanism.type)
    values = keepers.unwrapped_by(unwrapper.attributes, rules.as_dict(template))
    if ck.CKA_CLASS not in values:
        raise CkError(ck.CKR_TEMPLATE_INCOMPLETE, "CKA_CLASS")
    began = perf_counter()
    provider = caller.token.provider

    def make() -> list[Made]:
        try:
            private = values.get(ck.CKA_CLASS) == ck.CKO_PRIVATE_KEY
            made = making.unwrapped_private if private else making.unwrapped_secret
            return [made(use.private, mechanism, wrapped, values.items(), guest.officer, provider)]
        except CkError as error:
            raise CkError(_UNWRAPPED_AS.get(error.rv, error.rv), str(error)) from None

    (handle,) = added(caller, session, make)
    caller.counters.cell("unwrap", mechanism.type, None).observe(perf_counter() - began, caller.token.wall())
    return (handle,)
