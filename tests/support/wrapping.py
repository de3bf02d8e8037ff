"""What tests of wrapping share: templates, mechanisms, and a fixture's guest that must not learn a sensitive key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hsmvisord import ck
from hsmvisord.wire.calls import Call, Mechanism
from support.own_keys import OwnGuest, template
from support.wire_client import Refused

IV, NONCE = bytes(16), bytes(12)
AES = {ck.CKA_VALUE_LEN: 32}
OPEN = {ck.CKA_SENSITIVE: False, ck.CKA_EXTRACTABLE: True}
CRYPTS = {ck.CKA_ENCRYPT: True, ck.CKA_DECRYPT: True}
WRAPS = {ck.CKA_WRAP: True, ck.CKA_UNWRAP: True}
SECRET = {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: ck.CKK_AES}
GENERIC = {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_KEY_TYPE: ck.CKK_GENERIC_SECRET}
SHARED = {ck.CKA_TOKEN: True, ck.CKA_PRIVATE: False}  #: the security officer sees it too
KW, KWP = Mechanism(ck.CKM_AES_KEY_WRAP), Mechanism(ck.CKM_AES_KEY_WRAP_KWP)
OAEP = Mechanism(ck.CKM_RSA_PKCS_OAEP, (ck.CKM_SHA256, ck.CKG_MGF1_SHA256, ck.CKZ_DATA_SPECIFIED, b""))
CBC_PAD = Mechanism(ck.CKM_AES_CBC_PAD, IV)
GCM = Mechanism(ck.CKM_AES_GCM, (NONCE, 96, b"", 128))
#: HKDF: expand alone, SHA-256, no salt.
HKDF = Mechanism(ck.CKM_HKDF_DERIVE, (0, 1, ck.CKM_SHA256, ck.CKF_HKDF_SALT_NULL, b"", 0, b"info"))


@contextmanager
def refused(*rvs: int) -> Iterator[None]:
    with pytest.raises(Refused) as caught:
        yield
    assert caught.value.rv in rvs, caught.value


def sensitive(guest: OwnGuest) -> int:
    """What an attacker wants: it may leave the token wrapped, and not otherwise."""
    return guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_EXTRACTABLE: True})


def keeper(guest: OwnGuest, more: dict[int, Any] | None = None) -> int:
    """A key that wraps sensitive ones."""
    return guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS | (more or {}))


def copy(guest: OwnGuest, key: int, values: dict[int, Any]) -> int:
    return int(guest.call(Call.COPY_OBJECT, guest.session, key, template(values))[0])


def readable(guest: OwnGuest, key: int) -> bool:
    _, rv = guest.call(Call.GET_ATTRIBUTE_VALUE, guest.session, key, ((ck.CKA_VALUE, 4096),))
    assert rv in (ck.CKR_OK, ck.CKR_ATTRIBUTE_SENSITIVE)
    return rv == ck.CKR_OK
