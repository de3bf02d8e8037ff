"""A guest that would keep a key that is taken away from it.

By another authorization the TPM would wrap the key anew for the guest, which could load it under the same parent later on.  Two
things keep it from that, and each is shown without the other; without both the attack goes through, so it is one.
"""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest
from hsmvisord.tpm.platform import Platform
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, HEAD, NULL, OWNER, PLATFORM, Attributes, Authorization, Code, sized
from support import tpm_guest as g
from support.tpm_guest import DIGEST, ENDORSEMENT, HANDLE, WAYS, Guest, Machine, started_either_way, verify

MINE = 0x81000007
POLICY_COMMAND_CODE = 0x16C
AUTH_TYPE, POLICY_FAIL = 0x124, 0x99D  #: TPM_RC (part 2, 6.6); the second one of the first session
NOT_ITS_PARENT, NOT_FOR_IT = 0x28A, 0x1DF  #: TPM_RC_TYPE of the second handle, TPM_RC_INTEGRITY of the first parameter
NOT_ITS_HANDLE, NOT_ITS_HIERARCHY = 0x28B, 0x285  #: TPM_RC_HANDLE, TPM_RC_HIERARCHY of the second handle
REFUSED, NOT_TRANSIENT = 0x185, 0x184  #: by the module, TPM_RC_HIERARCHY of the first handle; TPM_RC_VALUE
WRONG_PASSWORD, WRONG_LOCALITY = 0x9A2, 0x907  #: TPM_RC_BAD_AUTH of the first session, TPM_RC_LOCALITY

WRAPPED_FOR_NOBODY = sized(b"") + struct.pack(">H", tpm2.NULL_ALGORITHM)  #: what Duplicate is asked for

machine = pytest.fixture(started_either_way, params=WAYS)


@pytest.fixture
def guest(machine: Machine) -> Guest:
    return machine.guest


@pytest.fixture(params=[HANDLE, MINE], ids=["platform", "owner"])
def handle(request: pytest.FixtureRequest) -> int:
    """Of a module's key."""
    return int(request.param)


#: Parents that a guest can make: the module's template with what it may guess of `unique`.
guesses = pytest.mark.parametrize("unique", [b"", bytes(32), bytes(31) + b"\1"], ids=["empty", "zeros", "one"])
hierarchies = pytest.mark.parametrize("hierarchy", [OWNER, PLATFORM, ENDORSEMENT, NULL], ids=["owner", "platform", "ek", "null"])


def without_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first defence away: whoever may use a key may give it another authorization."""
    defended = Platform.attributes
    monkeypatch.setattr(Platform, "attributes", staticmethod(lambda decrypt: defended(decrypt) & ~Attributes.ADMIN_WITH_POLICY))


def without_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one: the parent is made of nothing that a guest does not know."""
    monkeypatch.setattr("hsmvisord.tpm.platform.os", SimpleNamespace(urandom=lambda size: b""))


def rewrap(guest: Guest, handle: int, parent: int, authorization: Authorization = EMPTY_PASSWORD) -> tuple[int, bytes]:
    """The response's code, and the content of TPM2B_PRIVATE."""
    result, answer = guest.say(g.OBJECT_CHANGE_AUTH, (handle, parent), sized(b"mine"), authorization)
    return result, answer[6 : 6 + int.from_bytes(answer[4:6], "big")]


def bring_back(machine: Machine, handle: int, hierarchy: int, unique: bytes) -> list[int]:
    """The whole attack; the codes of its steps, up to the first that is refused."""
    guest, key = machine.guest, machine.deliver(handle=handle)
    public = guest.public(handle)
    parent, _ = guest.made(hierarchy, tpm2.parent_template(unique))
    result, private = rewrap(guest, handle, parent)
    if result:
        return [result]
    machine.managed.want({})
    assert handle not in guest.handles(tpm2.PERSISTENT << 24)
    loaded, answer = guest.say(Code.LOAD, (parent,), sized(private) + sized(public), EMPTY_PASSWORD)
    if loaded:
        return [result, loaded]
    again, mine = int.from_bytes(answer[:4], "big"), Authorization(password=b"mine")
    answer = guest.process(tpm2.command(Code.SIGN, (again,), g.sign_parameters(DIGEST, g.ECDSA), mine))
    verify(key, DIGEST, g.signature_in(answer))
    return [result, loaded, HEAD.unpack_from(answer)[2]]


def unguarded(machine: Machine, locality: int = 0) -> Guest:
    """One whose commands the TPM itself has to refuse."""
    return Guest(lambda command: machine.managed.tpm.process(command, locality))


# ---- another authorization ------------------------------------------------------------------------------------------------


@hierarchies
@guesses
def test_it_gets_no_other_authorization(machine: Machine, handle: int, hierarchy: int, unique: bytes) -> None:
    """The policy's defence alone: its code is another one than that of the parent."""
    assert bring_back(machine, handle, hierarchy, unique) == [AUTH_TYPE]


def test_it_gets_none_where_the_parent_is_known(machine: Machine, handle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_secret(monkeypatch)
    hierarchy = OWNER if handle == MINE else PLATFORM
    assert bring_back(machine, handle, hierarchy, b"") == [AUTH_TYPE]


@hierarchies
@guesses
def test_without_the_policy_no_parent_fits(
    machine: Machine, handle: int, hierarchy: int, unique: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_policy(monkeypatch)
    assert bring_back(machine, handle, hierarchy, unique) == [NOT_ITS_PARENT]


def test_without_the_policy_it_is_not_its_own_parent(machine: Machine, handle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_policy(monkeypatch)
    machine.deliver(handle=handle)
    assert rewrap(machine.guest, handle, handle)[0] == NOT_ITS_PARENT


def test_without_both_a_key_that_was_taken_away_signs(machine: Machine, handle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So what is tried above is the attack."""
    without_policy(monkeypatch)
    without_secret(monkeypatch)
    hierarchy = OWNER if handle == MINE else PLATFORM
    assert bring_back(machine, handle, hierarchy, b"") == [0, 0, 0]


# ---- what the module itself loaded ----------------------------------------------------------------------------------------


def imported(machine: Machine, handle: int, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, bytes]:
    """A key as the TPM wrapped it for the module (no guest sees that), and its TPMT_PUBLIC."""
    found, process = list[bytes](), machine.managed._commands._process

    def overheard(command: bytes, locality: int) -> bytes:
        answer = process(command, locality)
        if int.from_bytes(command[6 : HEAD.size], "big") == Code.IMPORT:
            found.append(answer[HEAD.size + 4 :])
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(machine.managed._commands, "_process", overheard)
        machine.deliver(handle=handle)
    (answer,) = found
    return answer[2 : 2 + int.from_bytes(answer[:2], "big")], machine.guest.public(handle)


@hierarchies
@guesses
def test_what_was_wrapped_for_the_module_opens_for_nobody_else(
    machine: Machine, guest: Guest, handle: int, hierarchy: int, unique: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = imported(machine, handle, monkeypatch)
    parent, _ = guest.made(hierarchy, tpm2.parent_template(unique))
    assert guest.say(Code.LOAD, (parent,), sized(private) + sized(public), EMPTY_PASSWORD)[0] == NOT_FOR_IT


def test_it_would_where_the_parent_is_known(machine: Machine, guest: Guest, handle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_secret(monkeypatch)
    private, public = imported(machine, handle, monkeypatch)
    parent, _ = guest.made(OWNER if handle == MINE else PLATFORM, tpm2.parent_template(b""))
    guest.good(Code.LOAD, (parent,), sized(private) + sized(public), EMPTY_PASSWORD)


def test_each_key_has_another_parent(machine: Machine, handle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = list[bytes](), tpm2.parent_template

    def template(unique: bytes) -> bytes:
        made.append(unique)
        return real(unique)

    monkeypatch.setattr(tpm2, "parent_template", template)
    for _ in range(3):
        machine.deliver(handle=handle)
    assert len(set(made)) == len(made) == 3 and {len(unique) for unique in made} == {32}


# ---- other ways -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [g.OBJECT_CHANGE_AUTH, g.DUPLICATE], ids=["change auth", "duplicate"])
@pytest.mark.parametrize("named", [False, True], ids=["nothing", "the command"])
def test_no_policy_of_a_guest_is_the_keys(machine: Machine, guest: Guest, handle: int, code: int, named: bool) -> None:
    """A session that says nothing, and one that says which command it is for (part 1, 19.7.3)."""
    machine.deliver(handle=handle)
    parent, session = guest.primary(), guest.session(tpm2.POLICY_SESSION)
    if named:
        guest.good(POLICY_COMMAND_CODE, (session,), struct.pack(">I", code))
    parameters = sized(b"mine") if code == g.OBJECT_CHANGE_AUTH else WRAPPED_FOR_NOBODY
    assert guest.say(code, (handle, parent), parameters, Authorization(session))[0] == POLICY_FAIL


def test_it_is_not_duplicated(machine: Machine, guest: Guest, handle: int) -> None:
    machine.deliver(handle=handle)
    for parent in (guest.primary(), NULL):
        assert guest.say(g.DUPLICATE, (handle, parent), WRAPPED_FOR_NOBODY, EMPTY_PASSWORD)[0] == AUTH_TYPE


def test_its_context_is_not_saved(machine: Machine, guest: Guest, handle: int) -> None:
    machine.deliver(handle=handle)
    assert guest.say(Code.CONTEXT_SAVE, (handle,))[0] == NOT_TRANSIENT


@pytest.mark.parametrize("hierarchy", [OWNER, PLATFORM], ids=["owner", "platform"])
@pytest.mark.parametrize("other", [0x81000008, 0x81800008])
def test_it_is_copied_to_no_other_handle(machine: Machine, guest: Guest, handle: int, hierarchy: int, other: int) -> None:
    """EvictControl of what is persistent takes it away, and no more (part 3, 28.5); the platform's is no guest's."""
    machine.deliver(handle=handle)
    asked = (Code.EVICT_CONTROL, (hierarchy, handle), struct.pack(">I", other), EMPTY_PASSWORD)
    assert guest.say(*asked)[0] == (REFUSED if hierarchy == PLATFORM else NOT_ITS_HANDLE)
    assert unguarded(machine).say(*asked)[0] == NOT_ITS_HANDLE
    assert guest.handles(tpm2.PERSISTENT << 24) == [handle]


def test_a_guest_takes_no_key_away(machine: Machine, guest: Guest) -> None:
    machine.deliver()
    persistent = struct.pack(">I", HANDLE)
    assert guest.say(Code.EVICT_CONTROL, (OWNER, HANDLE), persistent, EMPTY_PASSWORD)[0] == NOT_ITS_HIERARCHY
    assert guest.say(Code.EVICT_CONTROL, (PLATFORM, HANDLE), persistent, EMPTY_PASSWORD)[0] == REFUSED, "with its password"
    guest.good(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b"the firmware's"), EMPTY_PASSWORD)
    assert guest.say(Code.EVICT_CONTROL, (PLATFORM, HANDLE), persistent, EMPTY_PASSWORD)[0] == REFUSED
    assert unguarded(machine).say(Code.EVICT_CONTROL, (PLATFORM, HANDLE), persistent, EMPTY_PASSWORD)[0] == WRONG_PASSWORD
    guest.good(Code.CLEAR, (g.LOCKOUT,), b"", EMPTY_PASSWORD)
    assert guest.sign(HANDLE, DIGEST)[0] == 0
    machine.deliver()  # and the module may as before


@pytest.mark.parametrize("locality", range(5))
def test_no_locality_of_a_guest_fulfils_the_policy(machine: Machine, locality: int) -> None:
    machine.deliver()
    guest = unguarded(machine, locality)
    guest.good(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b"the firmware's"), EMPTY_PASSWORD)
    session = guest.session(tpm2.POLICY_SESSION)
    guest.good(Code.POLICY_LOCALITY, (session,), bytes([200]))
    result, _ = guest.say(Code.EVICT_CONTROL, (PLATFORM, HANDLE), struct.pack(">I", HANDLE), Authorization(session))
    assert result == WRONG_LOCALITY and machine.managed.names().keys() == {HANDLE}
