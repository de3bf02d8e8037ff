"""A guest's sessions while the module swaps its keys: what one sees that knew the key before, and that hoarding keeps no key."""

from __future__ import annotations

import os
import struct

import pytest
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import NULL, Code, sized
from support.tpm_guest import DIGEST, HANDLE, WAYS, Guest, HmacSession, Machine, started_either_way, verify

ACTIVE, LOADED = 64, 3  #: of libtpms
SESSIONS_FULL, SESSION_HANDLES = 0x903, 0x905  #: TPM_RC_SESSION_MEMORY, TPM_RC_SESSION_HANDLES

machine = pytest.fixture(started_either_way, params=WAYS)


@pytest.fixture
def guest(machine: Machine) -> Guest:
    return machine.guest


def name(guest: Guest) -> bytes:
    return tpm2.name_of(guest.public(HANDLE))


def test_a_session_that_knew_the_old_key(machine: Machine, guest: Guest) -> None:
    """It is told TPM_RC_BAD_AUTH with session 1: its HMAC binds the Name of the object (part 1, 19.6.5).  Reading the public part
    again mends it, and it is the same session that goes on."""
    first = machine.deliver()
    session, old = HmacSession(guest), name(guest)
    for _ in range(2):
        result, signature = session.sign(HANDLE, old, DIGEST)
        assert result == 0
        verify(first, DIGEST, signature)
    second = machine.deliver()
    assert session.sign(HANDLE, old, DIGEST) == (0x9A2, b"")
    assert session.sign(HANDLE, old, DIGEST)[0] == 0x9A2
    result, signature = session.sign(HANDLE, name(guest), DIGEST)
    assert result == 0
    verify(second, DIGEST, signature)
    assert guest.handles(tpm2.LOADED_SESSION) == [session.handle]


def test_a_password_needs_no_name(machine: Machine, guest: Guest) -> None:
    machine.deliver()
    verify(machine.deliver(), DIGEST, guest.sign(HANDLE, DIGEST)[1])


@pytest.mark.parametrize("others", range(LOADED))
def test_a_session_goes_on_over_swaps(machine: Machine, guest: Guest, others: int) -> None:
    """Also when it had to make room meanwhile: its nonce, and the TPM's proof, are right."""
    machine.deliver()
    session = HmacSession(guest)
    for _ in range(others):
        guest.session(tpm2.POLICY_SESSION)
    for _ in range(3):
        key = machine.deliver()
        result, signature = session.sign(HANDLE, name(guest), DIGEST)
        assert result == 0
        verify(key, DIGEST, signature)


def begin(guest: Guest) -> tuple[int, int]:
    """The response's code, and the session."""
    parameters = sized(os.urandom(16)) + sized(b"") + struct.pack(">BHH", 0, tpm2.NULL_ALGORITHM, tpm2.SHA256)
    result, answer = guest.say(Code.START_AUTH_SESSION, (NULL, NULL), parameters)
    return result, int.from_bytes(answer[:4], "big")


@pytest.mark.parametrize("loaded", range(LOADED + 1))
def test_a_guest_that_hoards_sessions_keeps_no_key(machine: Machine, guest: Guest, loaded: int) -> None:
    """As many as there can be.  It loses those that it has saved; those that are loaded stay."""
    machine.deliver()
    for _ in range(ACTIVE - loaded):
        result, session = begin(guest)
        assert result == 0
        guest.good(Code.CONTEXT_SAVE, (session,))
    kept = [guest.session() for _ in range(loaded)]
    assert begin(guest)[0] == (SESSIONS_FULL if loaded == LOADED else SESSION_HANDLES)
    machine.deliver(certificate=b"beside")
    assert guest.handles(tpm2.LOADED_SESSION) == kept and guest.handles(tpm2.SAVED_SESSION) == []
    machine.managed.want({})
    assert guest.sign(HANDLE, DIGEST)[0]
    assert guest.handles(tpm2.LOADED_SESSION) == kept


def test_nor_one_that_holds_an_old_context(machine: Machine, guest: Guest) -> None:
    """No session can begin while one that was saved 65536 contexts ago is not loaded again (TPM_RC_CONTEXT_GAP)."""
    machine.deliver()
    guest.good(Code.CONTEXT_SAVE, (guest.session(),))
    mine = guest.session()
    result = 0
    for _ in range(1 << 17):
        result, context = guest.say(Code.CONTEXT_SAVE, (mine,))
        if result:
            break
        guest.good(Code.CONTEXT_LOAD, (), context)
    assert result == 0x901
    loaded = [mine, guest.session()]
    machine.deliver(certificate=b"beside")
    assert guest.handles(tpm2.LOADED_SESSION) == loaded and guest.handles(tpm2.SAVED_SESSION) == []
    machine.managed.want({})
    assert guest.sign(HANDLE, DIGEST)[0]


def test_nor_one_that_fills_all_there_is(machine: Machine, guest: Guest) -> None:
    machine.deliver(certificate=b"beside")
    objects = [guest.primary() for _ in range(3)]
    sessions = [guest.session() for _ in range(LOADED)]
    guest.fill()
    machine.managed.want({})
    assert guest.handles(tpm2.TRANSIENT) == objects and guest.handles(tpm2.LOADED_SESSION) == sessions
    assert guest.handles(0x81800000) == []
