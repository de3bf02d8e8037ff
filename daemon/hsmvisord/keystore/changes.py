"""Changes of a module's state: pure functions from a State to the next one.  Refusals change nothing."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor_rpc.sealed import limits
from hsmvisor_rpc.sealed.commands import Generate, Retire, Stage
from hsmvisor_rpc.sealed.refusal import Reason, Refusal

from hsmvisord import ck
from hsmvisord.crypto import profiles
from hsmvisord.crypto.interface import PrivateKey
from hsmvisord.keystore.state import (
    AFTER_DRAIN,
    FOLLOW,
    MODES,
    ON_EXPIRY,
    PROFILES,
    TRANSITIONS,
    Activation,
    Certificate,
    Generation,
    GenerationState,
    Key,
    Material,
    Request,
    State,
    Step,
)

BARE_DRAIN = 24 * 3600  #: seconds that a bare key drains unless its stage command says otherwise
KEPT_DESTROYED = 8  #: destroyed generations that the operator still sees
KEPT_ACTIVATIONS = 64  #: views older than these see the current generation
MAX_SKIP = 2**29  #: handles, of the 2^30 that token objects have: 17 years, whatever a clock says
_BARE = "follow is for bare signing keys: with a certificate, clients would meet a key that does not fit it"
IN_USE = 24 * 3600  #: seconds since its last use in which a drain is extended


def skip_handles(state: State, now: int) -> State:
    """Returns the state as a process begins with it: handles that it will give are none that an application may hold of another
    key, from a module that had its place before, or from a time that was lost with an older copy of the state.

    Where they begin depends on the module, and they rise by at least one a second.
    """
    first = int.from_bytes(hashlib.sha256(b"hsmvisor handles\0" + state.module_id).digest()[:4], "big") % 2**28 + 1
    lived = min(max(now - state.created_at, 0), MAX_SKIP)
    return replace(state, next_handle=max(state.next_handle, first + lived))


def check_stage(state: State, name: str, number: int, body: Stage) -> None:
    """Raises Refusal unless the words of a stage command fit together and fit the state; looks at no key."""
    check_new(state, name, number, body)
    if body.mode == FOLLOW and body.certificates:
        raise Refusal(Reason.MALFORMED, _BARE)
    if not body.envelope and not body.certificates:
        raise Refusal(Reason.MALFORMED, "neither a key nor a certificate is delivered")


def check_new(state: State, name: str, number: int, body: Stage | Generate) -> None:
    """What holds for every new generation, wherever its key comes from."""
    if not 1 <= len(name) <= limits.MAX_NAME or not name.isprintable():
        raise Refusal(Reason.MALFORMED, f"a material's name has 1 to {limits.MAX_NAME} printable characters")
    for value, allowed, what in (
        (body.mode, MODES, "mode"),
        (body.profile, PROFILES, "profile"),
        (body.after_drain, AFTER_DRAIN, "after_drain"),
        (body.on_expiry, ON_EXPIRY, "on_expiry"),
    ):
        if value not in allowed:
            raise Refusal(Reason.MALFORMED, f"{what} is one of {', '.join(allowed)}")
    if len(body.alias_id) > limits.MAX_ALIAS_ID:
        raise Refusal(Reason.TOO_LARGE, f"an alias id has at most {limits.MAX_ALIAS_ID} bytes")
    if body.drain_seconds > limits.MAX_DRAIN:
        raise Refusal(Reason.TOO_LARGE, f"a drain has at most {limits.MAX_DRAIN} s")
    if body.mode == FOLLOW and body.self_signed:
        raise Refusal(Reason.MALFORMED, _BARE)
    if body.mode == FOLLOW and body.profile == "decrypt":
        raise Refusal(Reason.MALFORMED, "follow is for keys that sign: what was sealed to an older key needs that key")
    material = state.materials.get(name)
    if material is None:
        if len(state.materials) >= limits.MAX_MATERIALS:
            raise Refusal(Reason.LIMIT, f"a module has at most {limits.MAX_MATERIALS} materials")
    else:
        if body.mode != material.mode:
            raise Refusal(Reason.WRONG_STATE, f"material {name!r} has mode {material.mode}; it cannot change")
        if sum(g.state is not GenerationState.DESTROYED for g in material.generations) >= limits.MAX_GENERATIONS:
            raise Refusal(Reason.LIMIT, f"a material has at most {limits.MAX_GENERATIONS} generations: destroy retiring ones")
    newest = material.newest if material else 0
    if number <= newest:
        raise Refusal(Reason.STALE_GENERATION, f"generation {number} is not newer than {newest}, the newest of material {name!r}")
    if number >= 2**31:
        raise Refusal(Reason.MALFORMED, "a generation number is below 2^31")


def find_key(state: State, name: str, public_key: bytes) -> Key | None:
    """Returns the material's live key with this SubjectPublicKeyInfo."""
    material = state.materials.get(name)
    for generation in reversed(material.generations if material else ()):
        if generation.key and generation.public_key == public_key:
            return state.keys[generation.key]
    return None


def stage(
    state: State,
    name: str,
    number: int,
    body: Stage,
    private: PrivateKey | None,
    chain: list[x509.Certificate],
    now: int,
    request: bytes = b"",
) -> State:
    """Returns the state with one more staged generation; `private` is None when the key is there already, `request` is that of a
    key that was made here."""
    following = body.mode == FOLLOW
    material = state.materials.get(name)
    handle = state.next_handle
    if material is None:
        material = Material(name, body.mode, body.profile, body.alias_id, handle if following else 0, 0, (), ())
        handle += following
    keys, certificates = dict(state.keys), dict(state.certificates)
    key = find_key(state, name, body.public_key)
    renewed = key is not None
    if key is None:
        if private is None:
            raise Refusal(Reason.UNKNOWN_GENERATION, "a certificate alone renews a key that is there; this key is not")
        if following:
            _check_follows(state, material, private)
        key = Key(handle, handle + 1, name, private, Request(handle, request) if request else None)
        keys[key.handle] = key
        handle += 2
    may = profiles.usage(body.profile, key.private.kind, following)
    if not (may.sign or may.decrypt or may.derive):
        raise Refusal(
            Reason.UNSUPPORTED_KEY,
            f"{key.private.kind.name} keys can do nothing with profile {body.profile!r} in mode {body.mode!r}",
        )
    ders = [c.public_bytes(Encoding.DER) for c in chain]
    if not ders and body.self_signed:
        if key.private.kind.key_type == ck.CKK_EC_MONTGOMERY:
            raise Refusal(Reason.UNSUPPORTED_KEY, f"{key.private.kind.name} keys sign nothing, their own certificate neither")
        ders = [key.private.self_signed(name, now - limits.MAX_CLOCK_SKEW, now + limits.MAX_DRAIN)]
    leaf, intermediates, handle = _add_chain(certificates, ders, handle)
    generation = Generation(
        number=number,
        state=GenerationState.STAGED,
        key=key.handle,
        leaf=leaf,
        intermediates=intermediates,
        public_key=body.public_key,
        certificate_only=renewed,
        staged_at=now,
        activated_at=0,
        retired_at=0,
        drain_ends_at=0,
        drain_seconds=body.drain_seconds,
        after_drain=body.after_drain,
        on_expiry=body.on_expiry,
    )
    material = replace(
        material, profile=body.profile, alias_id=body.alias_id, generations=_bounded((*material.generations, generation))
    )
    return replace(
        state,
        next_handle=handle,
        keys=keys,
        certificates=certificates,
        materials={**state.materials, name: material},
    )


def _add_chain(certificates: dict[int, Certificate], ders: list[bytes], handle: int) -> tuple[int, tuple[int, ...], int]:
    """Adds a chain to `certificates`, from `handle` on; returns the handles of its leaf (0: none) and of the others, and the next
    one.  Intermediates are there once."""
    leaf, intermediates = 0, []
    known = {c.der: c.handle for c in certificates.values() if c.authority}
    for position, der in enumerate(ders):
        if position and der in known:
            intermediates.append(known[der])
            continue
        certificates[handle] = Certificate(handle, position > 0, der)
        if position:
            intermediates.append(handle)
        else:
            leaf = handle
        handle += 1
    return leaf, tuple(intermediates), handle


def generate(state: State, name: str, number: int, body: Generate, private: PrivateKey, request: bytes, now: int) -> State:
    """Returns the state with one more staged generation, of a key that was just made and has no certificate yet."""
    staged = Stage(
        public_key=private.public.spki,
        certificates=(),
        envelope=b"",
        mode=body.mode,
        profile=body.profile,
        alias_id=body.alias_id,
        drain_seconds=body.drain_seconds,
        after_drain=body.after_drain,
        on_expiry=body.on_expiry,
        self_signed=body.self_signed,
    )
    return stage(state, name, number, staged, private, [], now, request)


def uncertified(state: State, name: str, number: int) -> Generation:
    """Returns a generation that a certificate may come to.  Raises Refusal."""
    material, generation = find(state, name, number)
    next_state(generation, Step.CERTIFY)
    if generation.leaf:
        raise Refusal(
            Reason.WRONG_STATE, f"generation {number} has a certificate already: a new one for its key is a generation of its own"
        )
    if material.mode == FOLLOW:
        raise Refusal(Reason.WRONG_STATE, _BARE)
    return generation


def certify(state: State, name: str, number: int, chain: list[x509.Certificate]) -> State:
    """Returns the state in which a staged generation has its certificates."""
    material, generation = find(state, name, number)
    certificates = dict(state.certificates)
    ders = [c.public_bytes(Encoding.DER) for c in chain]
    leaf, intermediates, handle = _add_chain(certificates, ders, state.next_handle)
    certified = replace(generation, state=next_state(generation, Step.CERTIFY), leaf=leaf, intermediates=intermediates)
    return _with_generations(replace(state, next_handle=handle, certificates=certificates), material, {number: certified})


def _check_follows(state: State, material: Material, private: PrivateKey) -> None:
    for generation in material.generations:
        if generation.key and state.keys[generation.key].private.kind != private.kind:
            kind = state.keys[generation.key].private.kind.name
            raise Refusal(
                Reason.UNSUPPORTED_KEY,
                f"material {material.name!r} follows with keys of one kind, {kind}; this is {private.kind.name}",
            )


def _bounded(generations: tuple[Generation, ...]) -> tuple[Generation, ...]:
    """Forgets the oldest destroyed generations."""
    destroyed = [g.number for g in generations if g.state is GenerationState.DESTROYED]
    forgotten = set(destroyed[:-KEPT_DESTROYED]) if len(destroyed) > KEPT_DESTROYED else set()
    return tuple(g for g in generations if g.number not in forgotten)


def find(state: State, name: str, number: int) -> tuple[Material, Generation]:
    """Raises Refusal when there is no such material or generation."""
    material = state.materials.get(name)
    if material is None:
        raise Refusal(Reason.UNKNOWN_MATERIAL, f"this module has no material {name!r}")
    generation = material.generation(number)
    if generation is None:
        raise Refusal(Reason.UNKNOWN_GENERATION, f"material {name!r} has no generation {number}")
    return material, generation


def next_state(generation: Generation, step: Step) -> GenerationState:
    """Raises Refusal(WRONG_STATE) for a step that the table does not have."""
    try:
        return TRANSITIONS[generation.state, step]
    except KeyError:
        raise Refusal(Reason.WRONG_STATE, f"generation {generation.number} is {generation.state}: {step} is not possible") from None


def activate(state: State, name: str, number: int, step: Step, now: int) -> State:
    """ACTIVATE or ROLL_BACK: the generation becomes current, the current one retires, one step."""
    material, generation = find(state, name, number)
    chosen = replace(generation, state=next_state(generation, step), activated_at=now, retired_at=0, drain_ends_at=0)
    if step is Step.ACTIVATE and material.current and material.current.number > number:
        raise Refusal(
            Reason.STALE_GENERATION, f"generation {material.current.number} is current already; roll back goes to a retiring one"
        )
    changed = {number: chosen}
    if (current := material.current) is not None:
        changed[current.number] = _retired(
            state, current, next_state(current, Step.SUPERSEDE), current.drain_seconds, current.after_drain, now
        )
    return _with_activation(state, material, changed, number)


def retire(state: State, name: str, number: int, body: Retire, now: int) -> State:
    """The current generation leaves service without a successor, or a drain is set anew."""
    material, generation = find(state, name, number)
    if body.after_drain not in AFTER_DRAIN or body.drain_seconds > limits.MAX_DRAIN:
        raise Refusal(Reason.MALFORMED, f"after_drain is extend or refuse, a drain has at most {limits.MAX_DRAIN} s")
    after = next_state(generation, Step.RETIRE)
    seconds = body.drain_seconds or generation.drain_seconds
    retired = _retired(state, generation, after, seconds, body.after_drain, now)
    if generation.state is GenerationState.CURRENT:
        return _with_activation(state, material, {number: retired}, 0)
    return _with_generations(state, material, {number: replace(retired, retired_at=generation.retired_at)})


def _retired(state: State, generation: Generation, after: GenerationState, seconds: int, after_drain: str, now: int) -> Generation:
    ends = now + (seconds or BARE_DRAIN)
    if not seconds and generation.leaf:
        leaf = x509.load_der_x509_certificate(state.certificates[generation.leaf].der)
        ends = max(now, int(leaf.not_valid_after_utc.timestamp()))
    return replace(generation, state=after, retired_at=now, drain_ends_at=ends, after_drain=after_drain)


def destroy(state: State, name: str, number: int, step: Step) -> State:
    """DESTROY or END_DRAIN: the generation is gone; its key too when no other generation uses it."""
    material, generation = find(state, name, number)
    gone = replace(generation, state=next_state(generation, step), key=0, leaf=0, intermediates=())
    return _collected(_with_generations(state, material, {number: gone}))


def _with_activation(state: State, material: Material, changed: dict[int, Generation], number: int) -> State:
    activation = Activation(state.next_activation, number)
    state = replace(state, next_activation=state.next_activation + 1)
    activations = (*material.activations, activation)[-KEPT_ACTIVATIONS:]
    material = replace(material, since=material.since or activation.number, activations=activations)
    return _with_generations(state, material, changed)


def _with_generations(state: State, material: Material, changed: dict[int, Generation]) -> State:
    generations = tuple(changed.get(g.number, g) for g in material.generations)
    return replace(state, materials={**state.materials, material.name: replace(material, generations=_bounded(generations))})


def _collected(state: State) -> State:
    """Drops keys and certificates that no generation holds."""
    generations = [g for m in state.materials.values() for g in m.generations]
    keys = {g.key for g in generations}
    certificates = {handle for g in generations for handle in (g.leaf, *g.intermediates)}
    return replace(
        state,
        keys={h: k for h, k in state.keys.items() if h in keys},
        certificates={h: c for h, c in state.certificates.items() if h in certificates},
    )
