"""Slot 1 with and without `legacy`: old keys and mechanisms, their objects, and what they may never do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hsmvisord import ck, limits
from hsmvisord.crypto import der, des, generation
from hsmvisord.crypto.mechanisms import LEGACY
from hsmvisord.crypto.rsa import big_endian
from hsmvisord.token.policy import Policy
from hsmvisord.wire.calls import Call, Mechanism
from support.certificates import pkcs8
from support.own_keys import OwnGuest, OwnToken, template
from support.wire_client import Refused

P192 = bytes.fromhex("06082a8648ce3d030101")
IV8, IV16 = bytes(8), bytes(16)
AES = {ck.CKA_VALUE_LEN: 16}
OPEN = {ck.CKA_SENSITIVE: False, ck.CKA_EXTRACTABLE: True}
TOKEN = {ck.CKA_TOKEN: True}
SECRET = {ck.CKA_CLASS: ck.CKO_SECRET_KEY}
DES3 = SECRET | {ck.CKA_KEY_TYPE: ck.CKK_DES3}
WRAPS = {ck.CKA_WRAP: True, ck.CKA_UNWRAP: True}
KW, KWP = Mechanism(ck.CKM_AES_KEY_WRAP), Mechanism(ck.CKM_AES_KEY_WRAP_KWP)
KEY24 = bytes.fromhex("0123456789abcdef23456789abcdef01456789abcdef0123")
DSA_PARAMETERS = {ck.CKA_CLASS: ck.CKO_DOMAIN_PARAMETERS, ck.CKA_KEY_TYPE: ck.CKK_DSA}


@contextmanager
def refused(*rvs: int) -> Iterator[None]:
    with pytest.raises(Refused) as caught:
        yield
    assert caught.value.rv in rvs, caught.value


@pytest.fixture
def own() -> OwnToken:
    return OwnToken(policy=Policy(legacy=True))


@pytest.fixture
def guest(own: OwnToken) -> OwnGuest:
    return own.guest().begin()


@pytest.fixture
def strict() -> OwnGuest:
    """Without legacy."""
    return OwnToken().guest().begin()


def dsa_domain(guest: OwnGuest, **more: Any) -> tuple[int, dict[int, Any]]:
    handle = guest.generate(ck.CKM_DSA_PARAMETER_GEN, {ck.CKA_PRIME_BITS: 1024})
    kinds = (ck.CKA_PRIME, ck.CKA_SUBPRIME, ck.CKA_BASE)
    return handle, dict(zip(kinds, guest.get(handle, *kinds), strict=True))


def dh_domain(guest: OwnGuest) -> dict[int, Any]:
    handle = guest.generate(ck.CKM_DH_PKCS_PARAMETER_GEN, {ck.CKA_PRIME_BITS: 2048})
    kinds = (ck.CKA_PRIME, ck.CKA_BASE)
    return dict(zip(kinds, guest.get(handle, *kinds), strict=True))


def short_rsa() -> dict[int, Any]:
    """A public key of 512 bits."""
    p, q = (1 << 255) + 95, (1 << 256) - 189
    return {
        ck.CKA_CLASS: ck.CKO_PUBLIC_KEY,
        ck.CKA_KEY_TYPE: ck.CKK_RSA,
        ck.CKA_MODULUS: big_endian(p * q | 1 << 511),
        ck.CKA_PUBLIC_EXPONENT: b"\1\0\1",
    }


def described_p256() -> tuple[bytes, bytes]:
    """Its parameters, and a point as CKA_EC_POINT."""
    base, other = (ec.derive_private_key(n, ec.SECP256R1()).public_key().public_numbers() for n in (1, 2))
    p = 2**256 - 2**224 + 2**192 + 2**96 - 1
    b = (base.y**2 - base.x**3 + 3 * base.x) % p
    points = [b"\4" + n.x.to_bytes(32) + n.y.to_bytes(32) for n in (base, other)]
    curve = der.sequence(der.element(4, (p - 3).to_bytes(32)), der.element(4, b.to_bytes(32)))
    field = der.sequence(bytes.fromhex("06072a8648ce3d0101"), der.integer(p))
    order = der.integer(ec.SECP256R1().group_order)
    whole = der.sequence(der.integer(1), field, curve, der.element(4, points[0]), order, der.integer(1))
    return whole, der.element(4, points[1])


# ---- without legacy -----------------------------------------------------------------------------------------------------


def test_without_legacy_there_is_nothing_of_it(strict: OwnGuest) -> None:
    assert not set(strict.call(Call.GET_MECHANISM_LIST, 1, 256)[0]) & set(LEGACY)
    for mechanism in LEGACY:
        with refused(ck.CKR_MECHANISM_INVALID):
            strict.call(Call.GET_MECHANISM_INFO, 1, mechanism)
    assert strict.call(Call.GET_MECHANISM_INFO, 1, ck.CKM_ECDSA)[0] == 256
    assert strict.call(Call.GET_MECHANISM_INFO, 1, ck.CKM_SHA256_RSA_PKCS)[0] == 1024
    aes = strict.generate(ck.CKM_AES_KEY_GEN, AES)
    before = strict.find({})
    for mechanism in (ck.CKM_DES2_KEY_GEN, ck.CKM_DES3_KEY_GEN, ck.CKM_DSA_PARAMETER_GEN, ck.CKM_DH_PKCS_PARAMETER_GEN):
        with refused(ck.CKR_MECHANISM_INVALID):
            strict.generate(mechanism, {ck.CKA_PRIME_BITS: 1024} if mechanism > 0x1000 else {})
    for mechanism in (ck.CKM_DSA_KEY_PAIR_GEN, ck.CKM_DH_PKCS_KEY_PAIR_GEN):
        with refused(ck.CKR_MECHANISM_INVALID):
            strict.pair(mechanism, {ck.CKA_PRIME: bytes(128), ck.CKA_SUBPRIME: bytes(20), ck.CKA_BASE: b"\2"}, {})
    for call in (Call.SIGN_INIT, Call.VERIFY_INIT):
        for mechanism in (ck.CKM_AES_MAC, ck.CKM_DSA, ck.CKM_DSA_SHA256):
            with refused(ck.CKR_MECHANISM_INVALID):
                strict.call(call, strict.session, Mechanism(mechanism), aes)
    for call in (Call.ENCRYPT_INIT, Call.DECRYPT_INIT):
        with refused(ck.CKR_MECHANISM_INVALID):
            strict.call(call, strict.session, Mechanism(ck.CKM_DES3_CBC, IV8), aes)
    with refused(ck.CKR_MECHANISM_INVALID):
        strict.derive(Mechanism(ck.CKM_DH_PKCS_DERIVE, b"\5" * 128), aes, {})
    assert strict.find({}) == before


def test_without_legacy_no_object_is_of_it(own: OwnToken, guest: OwnGuest, strict: OwnGuest) -> None:
    """The same templates make objects with it."""
    _, domain = dsa_domain(guest)
    public, private = guest.pair(ck.CKM_DSA_KEY_PAIR_GEN, domain, OPEN)
    x, y = guest.get(private, ck.CKA_VALUE) + guest.get(public, ck.CKA_VALUE)
    of_dsa = domain | {ck.CKA_KEY_TYPE: ck.CKK_DSA}
    curve, point = described_p256()
    p192 = ec.generate_private_key(ec.SECP192R1())
    named = {ck.CKA_KEY_TYPE: ck.CKK_EC, ck.CKA_EC_PARAMS: P192}
    cases = [
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, DES3 | {ck.CKA_VALUE: KEY24}),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, DES3 | {ck.CKA_KEY_TYPE: ck.CKK_DES2, ck.CKA_VALUE: KEY24[:16]}),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, of_dsa | {ck.CKA_CLASS: ck.CKO_PRIVATE_KEY, ck.CKA_VALUE: x}),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, of_dsa | {ck.CKA_CLASS: ck.CKO_PUBLIC_KEY, ck.CKA_VALUE: y}),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, DSA_PARAMETERS | domain),
        (ck.CKR_KEY_SIZE_RANGE, short_rsa()),
        (ck.CKR_CURVE_NOT_SUPPORTED, named | {ck.CKA_CLASS: ck.CKO_PRIVATE_KEY, ck.CKA_VALUE: b"\1" * 24}),
        (
            ck.CKR_CURVE_NOT_SUPPORTED,
            {ck.CKA_CLASS: ck.CKO_PUBLIC_KEY, ck.CKA_KEY_TYPE: ck.CKK_EC, ck.CKA_EC_PARAMS: curve, ck.CKA_EC_POINT: point},
        ),
    ]
    for rv, values in cases:
        for more in ({}, TOKEN):
            with refused(rv):
                strict.create(values | more)
            assert guest.create(values | more)
    with refused(ck.CKR_CURVE_NOT_SUPPORTED):
        strict.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P192}, {})
    assert strict.find({}) == []
    secret = strict.generate(ck.CKM_GENERIC_SECRET_KEY_GEN, {ck.CKA_VALUE_LEN: 32})
    hkdf = Mechanism(ck.CKM_HKDF_DERIVE, (1, 1, ck.CKM_SHA256, ck.CKF_HKDF_SALT_NULL, b"", 0, b""))
    with refused(ck.CKR_ATTRIBUTE_VALUE_INVALID):
        strict.derive(hkdf, secret, DES3 | {ck.CKA_VALUE_LEN: 24})
    wrapping = strict.create(SECRET | {ck.CKA_KEY_TYPE: ck.CKK_AES, ck.CKA_VALUE: bytes(16)} | WRAPS)
    with refused(ck.CKR_ATTRIBUTE_VALUE_INVALID):
        strict.unwrap(KW, wrapping, keywrap.aes_key_wrap(bytes(16), KEY24), DES3)
    with refused(ck.CKR_CURVE_NOT_SUPPORTED):
        wrapped = keywrap.aes_key_wrap_with_padding(bytes(16), pkcs8(p192))
        strict.unwrap(KWP, wrapping, wrapped, {ck.CKA_CLASS: ck.CKO_PRIVATE_KEY, ck.CKA_KEY_TYPE: ck.CKK_EC})
    assert len(strict.find({})) == 2


def test_what_was_made_stays_and_is_not_used(own: OwnToken, guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_DES3_KEY_GEN, TOKEN)
    public, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P192} | TOKEN, TOKEN)
    short = guest.create(short_rsa() | TOKEN)
    guest.encrypt(Mechanism(ck.CKM_DES3_CBC, IV8), key, bytes(8))
    own.settings = own.settings.__class__(guest_token=True)
    own.token.settings = own.settings  # in service
    with refused(ck.CKR_MECHANISM_INVALID):
        guest.encrypt(Mechanism(ck.CKM_DES3_CBC, IV8), key, bytes(8))
    with refused(ck.CKR_CURVE_NOT_SUPPORTED):
        guest.sign(Mechanism(ck.CKM_ECDSA), private, bytes(24))
    with refused(ck.CKR_KEY_SIZE_RANGE):
        guest.verify(Mechanism(ck.CKM_SHA256_RSA_PKCS), short, b"message", bytes(64))
    for handle in (key, public, private, short):
        with refused(ck.CKR_ATTRIBUTE_VALUE_INVALID, ck.CKR_CURVE_NOT_SUPPORTED, ck.CKR_KEY_SIZE_RANGE):
            guest.call(Call.COPY_OBJECT, guest.session, handle, ())
    own.restart()
    again = own.guest().begin()
    assert sorted(again.find({})) == sorted((key, public, private, short))
    again.call(Call.DESTROY_OBJECT, again.session, key)
    assert len(again.find({})) == 3


# ---- triple DES and AES -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mechanism", "kind", "size"), [(ck.CKM_DES2_KEY_GEN, ck.CKK_DES2, 16), (ck.CKM_DES3_KEY_GEN, ck.CKK_DES3, 24)]
)
def test_des_keys(own: OwnToken, guest: OwnGuest, mechanism: int, kind: int, size: int) -> None:
    key = guest.generate(mechanism, OPEN | TOKEN)
    value, told, length, check = guest.get(key, ck.CKA_VALUE, ck.CKA_KEY_TYPE, ck.CKA_VALUE_LEN, ck.CKA_CHECK_VALUE)
    assert (told, length, len(value)) == (kind, size, size) and des.with_parity(value) == value
    cbc = Mechanism(ck.CKM_DES3_CBC_PAD, b"8 bytes.")
    expected = Cipher(TripleDES((value * 2)[:24]), modes.CBC(b"8 bytes.")).encryptor().update(b"message\1")
    assert guest.encrypt(cbc, key, b"message") == expected
    assert check == guest.encrypt(Mechanism(ck.CKM_DES3_ECB), key, bytes(8))[:3]
    same = guest.create(DES3 | {ck.CKA_KEY_TYPE: kind, ck.CKA_VALUE: value})
    own.restart()
    again = own.guest().begin()
    assert again.decrypt(cbc, key, expected) == b"message"
    with refused(ck.CKR_KEY_TYPE_INCONSISTENT):
        again.encrypt(Mechanism(ck.CKM_AES_CBC, IV16), key, bytes(16))
    assert same not in again.find({})


def test_templates_of_des_keys(guest: OwnGuest) -> None:
    for rv, mechanism, values in [
        (ck.CKR_KEY_SIZE_RANGE, ck.CKM_DES3_KEY_GEN, {ck.CKA_VALUE_LEN: 16}),
        (ck.CKR_TEMPLATE_INCONSISTENT, ck.CKM_DES3_KEY_GEN, {ck.CKA_KEY_TYPE: ck.CKK_DES2}),
        (ck.CKR_TEMPLATE_INCONSISTENT, ck.CKM_DES3_KEY_GEN, {ck.CKA_VALUE: KEY24}),
        (ck.CKR_ATTRIBUTE_TYPE_INVALID, ck.CKM_DES2_KEY_GEN, {ck.CKA_PRIME_BITS: 1024}),
    ]:
        with refused(rv):
            guest.generate(mechanism, values)
    guest.generate(ck.CKM_DES3_KEY_GEN, {ck.CKA_VALUE_LEN: 24})
    wrong = bytes((KEY24[0] ^ 1,)) + KEY24[1:]
    for rv, value in [(ck.CKR_KEY_SIZE_RANGE, KEY24[:16]), (ck.CKR_KEY_SIZE_RANGE, b""), (ck.CKR_ATTRIBUTE_VALUE_INVALID, wrong)]:
        with refused(rv):
            guest.create(DES3 | {ck.CKA_VALUE: value})
    wrapping = guest.create(SECRET | {ck.CKA_KEY_TYPE: ck.CKK_AES, ck.CKA_VALUE: bytes(16)} | WRAPS)
    taken = guest.unwrap(KW, wrapping, keywrap.aes_key_wrap(bytes(16), KEY24), DES3 | OPEN)
    assert guest.get(taken, ck.CKA_VALUE) == [KEY24]
    short, long = KEY24[:16], KEY24 + KEY24[:8]
    for value, rv in ((wrong, ck.CKR_WRAPPED_KEY_INVALID), *((value, ck.CKR_WRAPPED_KEY_LEN_RANGE) for value in (short, long))):
        with refused(rv):
            guest.unwrap(KW, wrapping, keywrap.aes_key_wrap(bytes(16), value), DES3)


def test_aes_mac(guest: OwnGuest) -> None:
    key = guest.generate(ck.CKM_AES_KEY_GEN, AES)
    mac = guest.sign(Mechanism(ck.CKM_AES_MAC), key, b"HELLO WORLD")
    assert len(mac) == 8
    guest.verify(Mechanism(ck.CKM_AES_MAC), key, b"HELLO WORLD", mac)
    guest.verify(Mechanism(ck.CKM_AES_MAC_GENERAL, (4,)), key, b"HELLO WORLD", mac[:4])
    with refused(ck.CKR_SIGNATURE_INVALID):
        guest.verify(Mechanism(ck.CKM_AES_MAC), key, b"HELLO WORLE", mac)


def test_keys_from_encrypted_data() -> None:
    """No legacy."""
    guest = OwnToken().guest().begin()
    assert {ck.CKM_AES_ECB_ENCRYPT_DATA, ck.CKM_AES_CBC_ENCRYPT_DATA} <= set(guest.call(Call.GET_MECHANISM_LIST, 1, 256)[0])
    base = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN)
    (value,) = guest.get(base, ck.CKA_VALUE)
    data = bytes(range(64))
    encrypted = Cipher(algorithms.AES(value), modes.ECB()).encryptor().update(data)
    ecb = Mechanism(ck.CKM_AES_ECB_ENCRYPT_DATA, (data,))
    of_aes = SECRET | {ck.CKA_KEY_TYPE: ck.CKK_AES} | OPEN
    assert guest.get(guest.derive(ecb, base, OPEN), ck.CKA_VALUE, ck.CKA_VALUE_LEN) == [encrypted, 64]
    assert guest.get(guest.derive(ecb, base, of_aes | AES), ck.CKA_VALUE) == [encrypted[:16]]
    assert guest.get(guest.derive(ecb, base, of_aes), ck.CKA_VALUE) == [encrypted[:32]]
    told = guest.get(guest.derive(ecb, base, {}), ck.CKA_LOCAL, ck.CKA_ALWAYS_SENSITIVE, ck.CKA_NEVER_EXTRACTABLE)
    assert told == [False, False, False], "its base could be read"
    with refused(ck.CKR_MECHANISM_PARAM_INVALID):
        guest.derive(ecb, base, {ck.CKA_VALUE_LEN: 65})
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
        guest.derive(ecb, guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS), {})
    with refused(ck.CKR_KEY_TYPE_INCONSISTENT):
        guest.derive(ecb, guest.generate(ck.CKM_GENERIC_SECRET_KEY_GEN, AES), {})


# ---- DSA and Diffie-Hellman ---------------------------------------------------------------------------------------------


def test_dsa(own: OwnToken, guest: OwnGuest) -> None:
    handle, domain = dsa_domain(guest)
    told = guest.get(handle, ck.CKA_CLASS, ck.CKA_KEY_TYPE, ck.CKA_LOCAL, ck.CKA_PRIME_BITS, ck.CKA_PRIVATE)
    assert told == [ck.CKO_DOMAIN_PARAMETERS, ck.CKK_DSA, True, 1024, False]
    public, private = guest.pair(ck.CKM_DSA_KEY_PAIR_GEN, domain | TOKEN, TOKEN | OPEN)
    for mechanism in (ck.CKM_DSA_SHA1, ck.CKM_DSA_SHA224, ck.CKM_DSA_SHA256, ck.CKM_DSA_SHA384, ck.CKM_DSA_SHA512):
        signature = guest.sign(Mechanism(mechanism), private, b"message")
        guest.verify(Mechanism(mechanism), public, b"message", signature)
        with refused(ck.CKR_SIGNATURE_INVALID):
            guest.verify(Mechanism(mechanism), public, b"massage", signature)
    assert len(guest.sign(Mechanism(ck.CKM_DSA), private, bytes(20))) == 40
    kinds = (ck.CKA_PRIME, ck.CKA_SUBPRIME, ck.CKA_BASE)
    assert guest.get(public, *kinds) == guest.get(private, *kinds) == list(domain.values())
    assert guest.get(private, ck.CKA_SIGN, ck.CKA_DECRYPT, ck.CKA_DERIVE) == [True, False, False]
    x, y = guest.get(private, ck.CKA_VALUE) + guest.get(public, ck.CKA_VALUE)
    of_dsa = domain | {ck.CKA_KEY_TYPE: ck.CKK_DSA}
    taken = guest.create(of_dsa | {ck.CKA_CLASS: ck.CKO_PRIVATE_KEY, ck.CKA_VALUE: x})
    given = guest.create(of_dsa | {ck.CKA_CLASS: ck.CKO_PUBLIC_KEY, ck.CKA_VALUE: y})
    guest.verify(Mechanism(ck.CKM_DSA), public, bytes(20), guest.sign(Mechanism(ck.CKM_DSA), taken, bytes(20)))
    guest.verify(Mechanism(ck.CKM_DSA), given, bytes(20), guest.sign(Mechanism(ck.CKM_DSA), private, bytes(20)))
    _, hidden = guest.pair(ck.CKM_DSA_KEY_PAIR_GEN, domain, {})
    assert guest.get(hidden, ck.CKA_VALUE)[0] is None
    own.restart()
    again = own.guest().begin()
    again.verify(Mechanism(ck.CKM_DSA), public, bytes(20), again.sign(Mechanism(ck.CKM_DSA), private, bytes(20)))


def test_dh(own: OwnToken, guest: OwnGuest) -> None:
    domain = dh_domain(guest)
    pairs = [guest.pair(ck.CKM_DH_PKCS_KEY_PAIR_GEN, domain | TOKEN, TOKEN | OPEN) for _ in range(2)]
    values = [guest.get(public, ck.CKA_VALUE)[0] for public, _ in pairs]
    of_aes = SECRET | {ck.CKA_KEY_TYPE: ck.CKK_AES} | OPEN | AES
    own.restart()
    guest = own.guest().begin()
    mechanisms = [Mechanism(ck.CKM_DH_PKCS_DERIVE, value) for value in values]
    for wanted in (OPEN, of_aes, DES3 | OPEN, OPEN | {ck.CKA_VALUE_LEN: 7}):
        one = guest.get(guest.derive(mechanisms[1], pairs[0][1], wanted), ck.CKA_VALUE)
        assert one == guest.get(guest.derive(mechanisms[0], pairs[1][1], wanted), ck.CKA_VALUE) and one[0]
    (whole,) = guest.get(guest.derive(mechanisms[1], pairs[0][1], OPEN), ck.CKA_VALUE)
    assert len(whole) == 256
    assert guest.get(guest.derive(mechanisms[1], pairs[0][1], of_aes), ck.CKA_VALUE) == [whole[-16:]], "the last bytes (6.4.8)"
    assert guest.get(guest.derive(mechanisms[1], pairs[0][1], DES3 | OPEN), ck.CKA_VALUE) == [des.with_parity(whole[-24:])]
    x, bits, p = guest.get(pairs[0][1], ck.CKA_VALUE, ck.CKA_VALUE_BITS, ck.CKA_PRIME)
    assert int.from_bytes(x).bit_length() == bits
    of_dh = domain | {ck.CKA_CLASS: ck.CKO_PRIVATE_KEY, ck.CKA_KEY_TYPE: ck.CKK_DH, ck.CKA_VALUE: x}
    assert guest.get(guest.derive(mechanisms[1], guest.create(of_dh), OPEN), ck.CKA_VALUE) == [whole]
    with refused(ck.CKR_KEY_SIZE_RANGE):
        guest.derive(mechanisms[1], pairs[0][1], {ck.CKA_VALUE_LEN: 257})
    for value in (b"", b"\1", p, big_endian(int.from_bytes(p) - 1), bytes(4000)):
        with refused(ck.CKR_MECHANISM_PARAM_INVALID):
            guest.derive(Mechanism(ck.CKM_DH_PKCS_DERIVE, value), pairs[0][1], {})
    with refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED):
        guest.sign(Mechanism(ck.CKM_DSA), pairs[0][1], bytes(20))


def test_objects_of_domain_parameters(own: OwnToken, guest: OwnGuest) -> None:
    _, domain = dsa_domain(guest)
    handle = guest.create(DSA_PARAMETERS | domain | TOKEN | {ck.CKA_LABEL: b"mine"})
    assert guest.get(handle, ck.CKA_PRIME_BITS, ck.CKA_LOCAL, ck.CKA_LABEL) == [1024, False, b"mine"]
    guest.set(handle, {ck.CKA_LABEL: b"ours"})
    for change in ({ck.CKA_PRIME: b"\1"}, {ck.CKA_PRIME_BITS: 2048}, {ck.CKA_LOCAL: True}):
        with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
            guest.set(handle, change)
    (copy,) = guest.call(Call.COPY_OBJECT, guest.session, handle, template({ck.CKA_LABEL: b"copy"}))
    assert guest.get(copy, ck.CKA_PRIME) == [domain[ck.CKA_PRIME]]
    for call in (Call.SIGN_INIT, Call.VERIFY_INIT):
        with refused(ck.CKR_KEY_HANDLE_INVALID):
            guest.call(call, guest.session, Mechanism(ck.CKM_DSA), handle)
    wrapper = guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS)
    with refused(ck.CKR_KEY_NOT_WRAPPABLE):
        guest.wrap(KWP, wrapper, handle)
    own.restart()
    again = own.guest().begin(None)
    assert again.find(DSA_PARAMETERS) == [handle, copy], "public objects, with the same handles"
    assert again.get(handle, ck.CKA_LABEL, ck.CKA_BASE) == [b"ours", domain[ck.CKA_BASE]]


def test_templates_of_domain_parameters(guest: OwnGuest) -> None:
    _, domain = dsa_domain(guest)
    create, generate = guest.create, guest.generate
    base = {kind: value for kind, value in domain.items() if kind != ck.CKA_SUBPRIME}
    for rv, values in [
        (ck.CKR_TEMPLATE_INCOMPLETE, {ck.CKA_CLASS: ck.CKO_DOMAIN_PARAMETERS} | domain),
        (ck.CKR_TEMPLATE_INCOMPLETE, DSA_PARAMETERS | base),
        (ck.CKR_TEMPLATE_INCONSISTENT, DSA_PARAMETERS | domain | {ck.CKA_PRIME_BITS: 1024}),
        (ck.CKR_ATTRIBUTE_TYPE_INVALID, DSA_PARAMETERS | domain | {ck.CKA_VALUE: b"\5"}),
        (ck.CKR_ATTRIBUTE_TYPE_INVALID, DSA_PARAMETERS | domain | {ck.CKA_SIGN: True}),
        (ck.CKR_ATTRIBUTE_READ_ONLY, DSA_PARAMETERS | domain | {ck.CKA_LOCAL: True}),
        (ck.CKR_DOMAIN_PARAMS_INVALID, DSA_PARAMETERS | domain | {ck.CKA_BASE: b"\2"}),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, DSA_PARAMETERS | domain | {ck.CKA_PRIME: bytes(limits.MAX_VALUE + 1)}),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, DSA_PARAMETERS | {ck.CKA_KEY_TYPE: ck.CKK_EC, ck.CKA_EC_PARAMS: P192}),
        (ck.CKR_ATTRIBUTE_TYPE_INVALID, DSA_PARAMETERS | {ck.CKA_KEY_TYPE: ck.CKK_DH} | domain),
    ]:
        with refused(rv):
            create(values)
    create(DSA_PARAMETERS | {ck.CKA_KEY_TYPE: ck.CKK_DH} | base)
    for rv, values in [
        (ck.CKR_TEMPLATE_INCOMPLETE, {}),
        (ck.CKR_KEY_SIZE_RANGE, {ck.CKA_PRIME_BITS: 512}),
        (ck.CKR_KEY_SIZE_RANGE, {ck.CKA_PRIME_BITS: 1 << 60}),
        (ck.CKR_TEMPLATE_INCONSISTENT, {ck.CKA_PRIME_BITS: 1024, ck.CKA_PRIME: b"\5"}),
        (ck.CKR_TEMPLATE_INCONSISTENT, {ck.CKA_PRIME_BITS: 1024, ck.CKA_CLASS: ck.CKO_SECRET_KEY}),
        (ck.CKR_ATTRIBUTE_VALUE_INVALID, {ck.CKA_PRIME_BITS: b"1024"}),
    ]:
        for mechanism in (ck.CKM_DSA_PARAMETER_GEN, ck.CKM_DH_PKCS_PARAMETER_GEN):
            with refused(rv):
                generate(mechanism, values)
    for mechanism in (ck.CKM_DSA_PARAMETER_GEN, ck.CKM_DH_PKCS_PARAMETER_GEN):
        with generation.making_rsa(), refused(ck.CKR_FUNCTION_REJECTED):
            generate(mechanism, {ck.CKA_PRIME_BITS: 1024})


def test_templates_of_pairs(guest: OwnGuest) -> None:
    _, domain = dsa_domain(guest)
    for change in ({ck.CKA_PRIME: b""}, {ck.CKA_SUBPRIME: b"\5"}, {ck.CKA_BASE: b"\1"}):
        with refused(ck.CKR_DOMAIN_PARAMS_INVALID):
            guest.pair(ck.CKM_DSA_KEY_PAIR_GEN, domain | change, {})
    for kind in domain:
        with refused(ck.CKR_TEMPLATE_INCOMPLETE):
            guest.pair(ck.CKM_DSA_KEY_PAIR_GEN, {k: v for k, v in domain.items() if k != kind}, {})
        with refused(ck.CKR_TEMPLATE_INCONSISTENT):
            guest.pair(ck.CKM_DSA_KEY_PAIR_GEN, domain, {kind: domain[kind]})
    with refused(ck.CKR_ATTRIBUTE_TYPE_INVALID):
        guest.pair(ck.CKM_DH_PKCS_KEY_PAIR_GEN, domain, {})
    of_dh = dh_domain(guest)
    with refused(ck.CKR_ATTRIBUTE_READ_ONLY):
        guest.pair(ck.CKM_DH_PKCS_KEY_PAIR_GEN, of_dh, {ck.CKA_VALUE_BITS: 8})
    with refused(ck.CKR_DOMAIN_PARAMS_INVALID):
        guest.pair(ck.CKM_DH_PKCS_KEY_PAIR_GEN, of_dh | {ck.CKA_PRIME: b"\xff" * 127}, {})


# ---- curves and RSA -----------------------------------------------------------------------------------------------------


def test_p192_and_curves_by_their_parameters(own: OwnToken, guest: OwnGuest) -> None:
    public, private = guest.pair(ck.CKM_EC_KEY_PAIR_GEN, {ck.CKA_EC_PARAMS: P192} | TOKEN, TOKEN)
    guest.verify(Mechanism(ck.CKM_ECDSA_SHA256), public, b"m", guest.sign(Mechanism(ck.CKM_ECDSA_SHA256), private, b"m"))
    assert guest.call(Call.GET_MECHANISM_INFO, 1, ck.CKM_EC_KEY_PAIR_GEN)[0] == 192
    curve, point = described_p256()
    values = {ck.CKA_CLASS: ck.CKO_PUBLIC_KEY, ck.CKA_KEY_TYPE: ck.CKK_EC, ck.CKA_EC_PARAMS: curve, ck.CKA_EC_POINT: point}
    key = guest.create(values | TOKEN)
    own.restart()
    again = own.guest().begin()
    assert again.get(key, ck.CKA_EC_PARAMS, ck.CKA_EC_POINT) == [curve, point], "as they were given"
    assert again.find({ck.CKA_EC_PARAMS: curve}) == [key]
    signature = ec.derive_private_key(2, ec.SECP256R1()).sign(b"message", ec.ECDSA(hashes.SHA256()))
    r, s = decode_dss_signature(signature)
    again.verify(Mechanism(ck.CKM_ECDSA_SHA256), key, b"message", r.to_bytes(32) + s.to_bytes(32))
    with refused(ck.CKR_CURVE_NOT_SUPPORTED):
        again.create(values | {ck.CKA_EC_PARAMS: curve[:-1] + b"\2"})


# ---- what none of them may do -------------------------------------------------------------------------------------------


def trusted(own: OwnToken, values: dict[int, Any]) -> int:
    """Makes a key that the security officer trusts, whatever it is."""
    officer = own.guest().begin(ck.CKU_SO)
    key = officer.create(values | TOKEN | {ck.CKA_PRIVATE: False, ck.CKA_TRUSTED: True})
    officer.call(Call.LOGOUT, officer.session)
    return key


def test_no_old_key_wraps_a_sensitive_one(own: OwnToken, guest: OwnGuest) -> None:
    secret = guest.generate(ck.CKM_AES_KEY_GEN, AES | {ck.CKA_EXTRACTABLE: True})
    plain = guest.generate(ck.CKM_AES_KEY_GEN, AES | OPEN)
    small = rsa.generate_private_key(65537, 2048).public_key().public_numbers()
    long = short_rsa() | {ck.CKA_MODULUS: big_endian(small.n), ck.CKA_WRAP: True}
    oaep = Mechanism(ck.CKM_RSA_PKCS_OAEP, (ck.CKM_SHA_1, ck.CKG_MGF1_SHA1, ck.CKZ_DATA_SPECIFIED, b""))
    guest.wrap(oaep, trusted(own, long), secret)  # so it is with a key that is not old
    for mechanism in (oaep, Mechanism(ck.CKM_RSA_PKCS)):
        with refused(ck.CKR_KEY_NOT_WRAPPABLE):
            guest.wrap(mechanism, trusted(own, short_rsa() | {ck.CKA_WRAP: True}), secret)
    made = guest.generate(ck.CKM_DES3_KEY_GEN, WRAPS)
    given = trusted(own, DES3 | {ck.CKA_VALUE: KEY24} | WRAPS)
    for key in (made, given):
        for mechanism in (Mechanism(ck.CKM_DES3_CBC, IV8), Mechanism(ck.CKM_DES3_CBC_PAD, IV8)):
            with refused(ck.CKR_KEY_NOT_WRAPPABLE):
                guest.wrap(mechanism, key, secret)
            again = guest.unwrap(mechanism, key, guest.wrap(mechanism, key, plain), SECRET | {ck.CKA_KEY_TYPE: ck.CKK_AES} | OPEN)
            assert guest.get(again, ck.CKA_VALUE) == guest.get(plain, ck.CKA_VALUE)
        with refused(ck.CKR_KEY_NOT_WRAPPABLE):
            guest.wrap(KW, key, secret)
        with refused(ck.CKR_KEY_TYPE_INCONSISTENT):
            guest.wrap(KW, key, plain)


def test_old_keys_are_wrapped_as_others(guest: OwnGuest) -> None:
    wrapper = guest.generate(ck.CKM_AES_KEY_GEN, AES | WRAPS)
    with refused(ck.CKR_KEY_UNEXTRACTABLE):
        guest.wrap(KW, wrapper, guest.generate(ck.CKM_DES3_KEY_GEN, {}))
    key = guest.generate(ck.CKM_DES3_KEY_GEN, {ck.CKA_EXTRACTABLE: True})
    sealed = guest.encrypt(Mechanism(ck.CKM_DES3_CBC, IV8), key, bytes(8))
    again = guest.unwrap(KW, wrapper, guest.wrap(KW, wrapper, key), DES3)
    assert guest.decrypt(Mechanism(ck.CKM_DES3_CBC, IV8), again, sealed) == bytes(8)
    assert guest.get(again, ck.CKA_SENSITIVE) == [True]
    _, domain = dsa_domain(guest)
    for kind, mechanism, parameters in (
        (ck.CKK_DSA, ck.CKM_DSA_KEY_PAIR_GEN, domain),
        (ck.CKK_DH, ck.CKM_DH_PKCS_KEY_PAIR_GEN, dh_domain(guest)),
    ):
        _, private = guest.pair(mechanism, parameters, {ck.CKA_EXTRACTABLE: True})
        of_type = {ck.CKA_CLASS: ck.CKO_PRIVATE_KEY, ck.CKA_KEY_TYPE: kind}
        wrapped = guest.wrap(KWP, wrapper, private)
        again = guest.unwrap(KWP, wrapper, wrapped, of_type)
        assert guest.get(again, ck.CKA_PRIME, ck.CKA_BASE) == guest.get(private, ck.CKA_PRIME, ck.CKA_BASE)
        with refused(ck.CKR_WRAPPED_KEY_INVALID):
            guest.unwrap(KWP, wrapper, wrapped, of_type | {ck.CKA_KEY_TYPE: ck.CKK_RSA})


def test_an_unwrapped_key_with_parameters_that_are_none(guest: OwnGuest) -> None:
    _, domain = dsa_domain(guest)
    p, q = int.from_bytes(domain[ck.CKA_PRIME]), int.from_bytes(domain[ck.CKA_SUBPRIME])
    wrapping = guest.create(SECRET | {ck.CKA_KEY_TYPE: ck.CKK_AES, ck.CKA_VALUE: bytes(16)} | WRAPS)
    oid = bytes.fromhex("06072a8648ce380401")
    for wrong in ((p, q, 1), (p, q, 2), (p, q - 1, 4), (p - 1, q, 4)):
        algorithm = der.sequence(oid, der.sequence(*map(der.integer, wrong)))
        info = der.sequence(der.integer(0), algorithm, der.element(der.OCTET_STRING, der.integer(5)))
        wrapped = keywrap.aes_key_wrap_with_padding(bytes(16), info)
        with refused(ck.CKR_WRAPPED_KEY_INVALID):
            guest.unwrap(KWP, wrapping, wrapped, {ck.CKA_CLASS: ck.CKO_PRIVATE_KEY, ck.CKA_KEY_TYPE: ck.CKK_DSA})
