"""A search for attacks that nobody thought of: random calls on a few keys, and all that their answers tell is used again.

As Bortolozzo et al. did with a model of the token, here with the token itself.  A run begins with one sensitive key that may be
wrapped; the attacker's program makes, copies, changes, wraps, unwraps, encrypts, decrypts, derives and reads, with keys and
ciphertexts of its own choice, and must never read that key's value.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.token import keepers
from hsmvisord.wire.calls import Call, Mechanism
from support.own_keys import OwnGuest, OwnToken, template
from support.wire_client import Refused
from support.wrapping import AES, CBC_PAD, CRYPTS, GCM, HKDF, IV, KW, KWP, NONCE, OPEN, SECRET, SHARED, WRAPS, copy, sensitive

KW_OR_OTHER = (KW, KW, KW, KWP, CBC_PAD, Mechanism(ck.CKM_AES_CBC, IV), GCM)
BLANK = {ck.CKA_VERIFY: False}  #: a use is named, so no other one is there by default
OPENING = {ck.CKA_UNWRAP_TEMPLATE: tuple(OPEN.items())}
HIDING = {ck.CKA_DERIVE_TEMPLATE: ((ck.CKA_SENSITIVE, True),)}
TEMPLATES: tuple[dict[int, Any], ...] = (
    BLANK, WRAPS, {ck.CKA_WRAP: True}, CRYPTS, {ck.CKA_DECRYPT: True}, WRAPS | CRYPTS, WRAPS | OPENING, {ck.CKA_DERIVE: True},
    {ck.CKA_DERIVE: True} | HIDING, {}, WRAPS | {ck.CKA_EXTRACTABLE: True},
)  # fmt: skip
CHANGES: tuple[dict[int, Any], ...] = (
    {ck.CKA_WRAP: True}, {ck.CKA_UNWRAP: True}, {ck.CKA_DECRYPT: True}, {ck.CKA_WRAP: False}, {ck.CKA_TRUSTED: False}, OPEN,
    {ck.CKA_SENSITIVE: False}, {ck.CKA_EXTRACTABLE: True}, {ck.CKA_SENSITIVE: True}, {ck.CKA_EXTRACTABLE: False}, {},
)  # fmt: skip
RUNS, STEPS = 150, 80


class Attacker:
    """What it has: handles of keys, and byte strings that answers told."""

    def __init__(self, guest: OwnGuest, officer: OwnGuest, rng: random.Random) -> None:
        self.guest, self.officer, self.rng = guest, officer, rng
        self.target = sensitive(self.guest)
        self.keys, self.known, self.refused = [self.target], [bytes(32)], 0
        self._acts: tuple[Callable[[], None], ...] = (
            self.generate, self.create, self.copy, self.change, self.trust,
            self.wrap, self.wrap_target, self.unwrap, self.decrypt, self.encrypt, self.derive, self.read,
            self.wrap_authenticated, self.unwrap_authenticated, self.encrypt_message, self.decrypt_message,
        )  # fmt: skip

    def step(self) -> None:
        try:
            self.rng.choice(self._acts)()
        except Refused:
            self.refused += 1

    def key(self) -> int:
        return self.rng.choice(self.keys[-6:])

    def told(self) -> bytes:
        return self.rng.choice(self.known[-4:])

    def template(self) -> dict[int, Any]:
        return self.rng.choice(TEMPLATES) | (SHARED if self.rng.random() < 0.3 else {})

    # ---- what it may do -------------------------------------------------------------------------------------------------

    def generate(self) -> None:
        self.keys.append(self.guest.generate(ck.CKM_AES_KEY_GEN, AES | self.template()))

    def create(self) -> None:
        self.keys.append(self.guest.create(SECRET | {ck.CKA_VALUE: bytes(32)} | self.template()))

    def copy(self) -> None:
        self.keys.append(copy(self.guest, self.key(), self.rng.choice(CHANGES)))

    def change(self) -> None:
        self.guest.set(self.key(), self.rng.choice(CHANGES))

    def trust(self) -> None:
        """The officer trusts what it sees to be hidden and to do nothing but wrap."""
        key, looks = self.key(), (ck.CKA_SENSITIVE, ck.CKA_EXTRACTABLE, ck.CKA_DECRYPT, ck.CKA_ENCRYPT, ck.CKA_DERIVE, ck.CKA_LOCAL)
        if self.officer.get(key, *looks) == [True, False, False, False, False, True]:
            self.officer.set(key, {ck.CKA_TRUSTED: True})

    def wrap(self) -> None:
        self.known.append(self.guest.wrap(self.rng.choice(KW_OR_OTHER), self.key(), self.key()))

    def wrap_target(self) -> None:
        self.known.append(self.guest.wrap(KW, self.key(), self.target))

    def unwrap(self) -> None:
        template = self.rng.choice((SECRET, SECRET | OPEN, SECRET | self.template()))
        self.keys.append(self.guest.unwrap(self.rng.choice(KW_OR_OTHER), self.key(), self.told(), template))

    def decrypt(self) -> None:
        self.known.append(self.guest.decrypt(self.rng.choice(KW_OR_OTHER), self.key(), self.told()))

    def encrypt(self) -> None:
        self.known.append(self.guest.encrypt(self.rng.choice(KW_OR_OTHER), self.key(), self.told()))

    def derive(self) -> None:
        template = self.rng.choice((OPEN, self.template()))
        self.keys.append(self.guest.derive(HKDF, self.key(), SECRET | template | {ck.CKA_VALUE_LEN: 32}))

    def wrap_authenticated(self) -> None:
        key = self.rng.choice((self.key(), self.target))
        arguments = (self.message(b""), self.key(), key, b"", 64)
        _, tag, wrapped = self.guest.call(Call.WRAP_KEY_AUTHENTICATED, self.guest.session, *arguments)
        self.known.append(wrapped + tag)

    def unwrap_authenticated(self) -> None:
        told, values = self.told(), self.rng.choice((SECRET, SECRET | OPEN, SECRET | self.template()))
        arguments = (self.message(told[-16:]), self.key(), told[:-16], template(values), b"")
        self.keys.append(int(self.guest.call(Call.UNWRAP_KEY_AUTHENTICATED, self.guest.session, *arguments)[0]))

    def encrypt_message(self) -> None:
        self.guest.call(Call.SESSION_CANCEL, self.guest.session, ck.CKF_MESSAGE_ENCRYPT)
        self.guest.call(Call.MESSAGE_ENCRYPT_INIT, self.guest.session, Mechanism(ck.CKM_AES_GCM), self.key())
        _, tag, sealed = self.guest.call(Call.ENCRYPT_MESSAGE, self.guest.session, self.message(b""), b"", self.told(), 4096)
        self.known.append(sealed + tag)

    def decrypt_message(self) -> None:
        told = self.told()
        self.guest.call(Call.SESSION_CANCEL, self.guest.session, ck.CKF_MESSAGE_DECRYPT)
        self.guest.call(Call.MESSAGE_DECRYPT_INIT, self.guest.session, Mechanism(ck.CKM_AES_GCM), self.key())
        arguments = (self.message(told[-16:]), b"", told[:-16], 4096)
        self.known.append(self.guest.call(Call.DECRYPT_MESSAGE, self.guest.session, *arguments)[0])

    @staticmethod
    def message(tag: bytes) -> Mechanism:
        return Mechanism(ck.CKM_AES_GCM, (NONCE, 0, ck.CKG_NO_GENERATE, tag, 128))

    def read(self) -> None:
        for key in self.keys[-6:]:
            (value,) = self.guest.get(key, ck.CKA_VALUE)
            if isinstance(value, bytes) and value not in self.known:
                self.known.append(value)


@pytest.fixture(scope="module")
def token() -> OwnToken:
    return OwnToken()


@pytest.fixture(scope="module")
def programs(token: OwnToken) -> tuple[OwnGuest, OwnGuest]:
    """The attacker's, which is logged in as the user, and the security officer's."""
    return token.guest().begin(), token.guest().begin(ck.CKU_SO)


def run(token: OwnToken, programs: tuple[OwnGuest, OwnGuest], number: int) -> tuple[bool, int]:
    """Returns whether the attacker read the key, and how much it was told."""
    attacker = Attacker(*programs, random.Random(number))
    item = programs[0].caller.application.guest.known(attacker.target)
    value = item.key.value  # type: ignore[union-attr]
    for _ in range(STEPS):
        attacker.step()
        if value in attacker.known:
            break
    for handle in attacker.keys:
        programs[0].call(Call.DESTROY_OBJECT, programs[0].session, handle)
    token.bench.now += STEPS  # as many changes may be stored again
    return value in attacker.known, len(attacker.known)


@pytest.mark.parametrize("part", range(4))
def test_a_search_for_attacks(token: OwnToken, programs: tuple[OwnGuest, OwnGuest], part: int) -> None:
    results = {number: run(token, programs, number) for number in range(part * RUNS, (part + 1) * RUNS)}
    assert [number for number, (found, _) in results.items() if found] == [], "runs that read the key"
    assert sum(told > 4 for _, told in results.values()) > RUNS / 4, "the search does something"


def test_the_search_finds_what_is_there(
    token: OwnToken, programs: tuple[OwnGuest, OwnGuest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that forget what they could do before are opened."""
    monkeypatch.setattr(keepers, "check_change", lambda before, after: None)
    monkeypatch.setattr(keepers, "remembered", lambda attributes: {**attributes, keepers.EVER: ()})
    assert any(run(token, programs, number)[0] for number in range(4 * RUNS))
