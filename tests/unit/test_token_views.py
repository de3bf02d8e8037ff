"""What searches find: templates, views that move, exact searches, alias ids, PINs, session objects."""

from __future__ import annotations

from typing import Any

import pytest
from hsmvisor_rpc.sealed.refusal import Refusal
from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.keystore import pin
from hsmvisord.keystore.keystore import Cause
from hsmvisord.limits import FIRST_SESSION_OBJECT, LAST_HANDLE, MAX_TEMPLATE, VIEW_PAUSE
from hsmvisord.token.application import Application
from hsmvisord.token.operations import DecryptOperation
from hsmvisord.token.statistics import Counters
from hsmvisord.token.token import Settings, Token
from hsmvisord.wire.calls import Mechanism, Needed
from support.certificates import key_id, new_key, spki
from support.keystores import Bench

PRIVATE = (ck.CKA_CLASS, ck.CKO_PRIVATE_KEY)
CERTIFICATE = (ck.CKA_CLASS, ck.CKO_CERTIFICATE)


class Guest:
    def __init__(self, bench: Bench, token: Token, watermark: int = 0, inherited: bool = False) -> None:
        self.bench, self.token = bench, token
        self.application: Application = token.new_application("test", watermark, inherited)
        self.handle = self.application.open_session(0, ck.CKF_SERIAL_SESSION)

    def find(self, *template: tuple[int, Any]) -> list[int]:
        session = self.application.session(self.handle)
        return list(self.application.find(session, template).take(1000))

    def ids(self, *template: tuple[int, Any]) -> list[bytes]:
        return [self.token.index.by_handle[h].attributes[ck.CKA_ID] for h in self.find(*template)]

    def sign(self, handle: int, data: bytes = b"d" * 32) -> bytes:
        session = self.application.session(self.handle)
        self.application.sign_init(session, Mechanism(ck.CKM_ECDSA), handle)
        signature = self.application.sign(session, data, 1000, Counters())
        assert isinstance(signature, bytes)
        return signature


@pytest.fixture
def bench() -> Bench:
    return Bench()


def guest(bench: Bench) -> Guest:
    return Guest(bench, bench.token())


def refused(rv: int, act: Any, *arguments: Any) -> None:
    with pytest.raises(CkError) as caught:
        act(*arguments)
    assert caught.value.rv == rv, caught.value


def test_a_view_stays_while_searches_follow_one_another(bench: Bench) -> None:
    first = bench.push(1)
    g = guest(bench)
    assert g.ids(PRIVATE) == [key_id(first)]
    second = bench.push(2)
    for _ in range(5):
        bench.monotonic += VIEW_PAUSE
        assert g.ids(PRIVATE) == [key_id(first)], "each search within two seconds of the one before"
    bench.monotonic += VIEW_PAUSE + 0.001
    assert g.ids(PRIVATE) == [key_id(second)]


def test_a_view_moves_at_the_first_session_after_none(bench: Bench) -> None:
    bench.push(1)
    g = guest(bench)
    second = bench.push(2)
    another = g.application.open_session(0, ck.CKF_SERIAL_SESSION)
    assert g.ids(PRIVATE) != [key_id(second)]
    g.application.close_session(another)
    g.application.close_session(g.handle)
    g.handle = g.application.open_session(0, ck.CKF_SERIAL_SESSION)
    assert g.ids(PRIVATE) == [key_id(second)]


def test_a_forked_child_keeps_its_parents_view_until_a_pause(bench: Bench) -> None:
    first = bench.push(1)
    parent = guest(bench)
    second = bench.push(2)
    child = Guest(bench, parent.token, parent.application.watermark, inherited=True)
    assert child.ids(PRIVATE) == [key_id(first)], "its first session does not move it on"
    child.application.close_session(child.handle)
    child.handle = child.application.open_session(0, ck.CKF_SERIAL_SESSION)
    assert child.ids(PRIVATE) == [key_id(second)], "the next first one does"
    assert parent.ids(PRIVATE) == [key_id(first)]
    patient = Guest(bench, parent.token, parent.application.watermark, inherited=True)
    bench.monotonic += VIEW_PAUSE + 0.001
    assert patient.ids(PRIVATE) == [key_id(second)]


def test_a_view_is_of_one_piece(bench: Bench) -> None:
    first = bench.push(1, chained=True)
    g = guest(bench)
    bench.push(2, chained=True)
    assert g.ids(PRIVATE) == g.ids(CERTIFICATE, (ck.CKA_LABEL, b"tls")) == [key_id(first)]


def test_an_exact_id_finds_a_retiring_generation(bench: Bench) -> None:
    first = bench.push(1, chained=True)
    second = bench.push(2, chained=True)
    g = guest(bench)
    assert g.ids(PRIVATE) == [key_id(second)]
    assert g.ids(PRIVATE, (ck.CKA_ID, key_id(first))) == [key_id(first)]
    old = next(
        o for o in g.token.index.by_handle.values() if o.attributes[ck.CKA_ID] == key_id(first) and ck.CKA_VALUE in o.attributes
    )
    assert g.find((ck.CKA_VALUE, old.attributes[ck.CKA_VALUE])) == [old.handle]
    exact = ((ck.CKA_ISSUER, old.attributes[ck.CKA_ISSUER]), (ck.CKA_SERIAL_NUMBER, old.attributes[ck.CKA_SERIAL_NUMBER]))
    assert g.find(*exact) == [old.handle]
    bench.execute("destroy", "tls", 1)
    assert g.find(PRIVATE, (ck.CKA_ID, key_id(first))) == []


def test_an_alias_is_matched_and_never_returned(bench: Bench) -> None:
    first = bench.push(1, alias_id=b"\x01")
    g = guest(bench)
    assert g.ids(PRIVATE, (ck.CKA_ID, b"\x01")) == [key_id(first)]
    second = bench.push(2, alias_id=b"\x01")
    bench.monotonic += VIEW_PAUSE + 1
    assert g.ids(PRIVATE, (ck.CKA_ID, b"\x01")) == [key_id(second)]


def test_a_staged_generation_is_invisible(bench: Bench) -> None:
    key = bench.stage(1)
    g = guest(bench)
    assert g.find() == []
    assert g.find((ck.CKA_ID, key_id(key))) == []


def test_templates(bench: Bench) -> None:
    bench.push(1, chained=True)
    g = guest(bench)
    everything = g.find()
    assert len(everything) == 4  # two keys, leaf, intermediate
    assert g.find((ck.CKA_TOKEN, False)) == []
    assert g.find((0x80000001, b"vendor")) == []
    assert g.find((ck.CKA_CLASS, 0x80000001)) == []
    assert g.find(PRIVATE, (ck.CKA_LABEL, b"other")) == []
    assert g.find((ck.CKA_CLASS, b"\x03")) == [], "a value of the wrong length matches nothing"
    assert len(g.find((ck.CKA_CERTIFICATE_CATEGORY, 2))) == 1
    assert len(g.find(*[(ck.CKA_LABEL, b"tls")] * MAX_TEMPLATE)) == 3, "said twice with one value is said once"
    assert g.find((ck.CKA_LABEL, b"tls"), (ck.CKA_LABEL, b"other")) == []
    assert len(g.find((ck.CKA_UNWRAP_TEMPLATE, ()))) == 1
    assert len(g.find((ck.CKA_URL, b""))) == 2
    assert g.find((ck.CKA_ALLOWED_MECHANISMS, ())) == g.find((ck.CKA_ID, b"")) == g.find((ck.CKA_LABEL, b"")) == []
    (private,) = g.find(PRIVATE)
    allowed = g.token.index.by_handle[private].attributes[ck.CKA_ALLOWED_MECHANISMS]
    assert g.find(PRIVATE, (ck.CKA_ALLOWED_MECHANISMS, allowed)) == [private]
    assert g.find(PRIVATE, (ck.CKA_ALLOWED_MECHANISMS, allowed[:-1])) == []
    end = g.token.index.by_handle[private].attributes[ck.CKA_END_DATE]
    assert len(end) == 8 and len(g.find((ck.CKA_LABEL, b"tls"), (ck.CKA_END_DATE, end))) == 3
    refused(ck.CKR_TEMPLATE_INCONSISTENT, g.find, *[(ck.CKA_LABEL, b"tls")] * (MAX_TEMPLATE + 1))


def test_pinned_handles_sign_with_their_own_key_until_it_is_destroyed(bench: Bench) -> None:
    first = bench.push(1)
    g = guest(bench)
    (handle,) = g.find(PRIVATE)
    bench.push(2)
    public = bench.provider.load_public_key(g.token.index.by_handle[handle].use.private.public.spki)  # type: ignore[union-attr]
    assert public.key_id == key_id(first)
    public.verifier(Mechanism(ck.CKM_ECDSA)).verify(b"d" * 32, g.sign(handle))
    bench.execute("destroy", "tls", 1)
    refused(ck.CKR_KEY_HANDLE_INVALID, g.sign, handle)


@pytest.mark.parametrize("parts", [False, True])
def test_a_signature_that_was_begun_with_a_destroyed_key_is_not_made(bench: Bench, parts: bool) -> None:
    bench.push(1)
    g = guest(bench)
    (handle,) = g.find(PRIVATE)
    second = bench.push(2)
    session = g.application.session(g.handle)
    g.application.sign_init(session, Mechanism(ck.CKM_ECDSA_SHA256 if parts else ck.CKM_ECDSA), handle)
    if parts:
        with g.application.signing(session, Counters()) as operation:
            operation.update(b"begun")
    bench.execute("destroy", "tls", 1)
    counters = Counters()
    if parts:
        with pytest.raises(CkError) as caught, g.application.signing(session, counters) as operation:
            operation.final(64)
        assert caught.value.rv == ck.CKR_KEY_HANDLE_INVALID
    else:
        refused(ck.CKR_KEY_HANDLE_INVALID, g.application.sign, session, b"d" * 32, None, counters)
    assert not session.operations
    g.sign(g.find(PRIVATE, (ck.CKA_ID, key_id(second)))[0])


def test_a_plaintext_that_waits_for_room_ends_with_its_key(bench: Bench) -> None:
    key = bench.push(1, new_key("rsa2048"))
    g = guest(bench)
    (handle,) = g.find(PRIVATE)
    bench.push(2)
    mechanism = Mechanism(ck.CKM_RSA_PKCS)
    use = g.application.key(handle)
    operation = DecryptOperation(mechanism.type, use.generation, use.private.decrypter(mechanism))
    g.application.session(g.handle).begin(operation)
    sealed = bench.provider.load_public_key(spki(key)).encrypter(mechanism).run(b"hello")
    assert operation.run(sealed, 1) == Needed(5)
    bench.execute("destroy", "tls", 1)
    refused(ck.CKR_KEY_HANDLE_INVALID, operation.run, sealed, 5)


def test_a_following_handle_signs_with_the_newest(bench: Bench) -> None:
    bench.push(1, mode="follow")
    g = guest(bench)
    (handle,) = g.find(PRIVATE)
    second = bench.push(2, mode="follow")
    bench.execute("destroy", "tls", 1)
    public = bench.provider.load_public_key(bench.keystore.state.materials["tls"].generations[-1].public_key)
    assert public.key_id == key_id(second)
    public.verifier(Mechanism(ck.CKM_ECDSA)).verify(b"d" * 32, g.sign(handle))


def test_a_following_key_signs_and_does_nothing_else(bench: Bench) -> None:
    for material, kind in (("ec", "p256"), ("rsa", "rsa2048")):
        bench.push(1, new_key(kind), material=material, mode="follow", profile="any")
    g = guest(bench)
    for handle in g.find(PRIVATE):
        item = g.token.index.by_handle[handle]
        assert item.use is not None and item.use.may_sign
        assert not (
            item.use.may_decrypt or item.use.may_derive or item.attributes[ck.CKA_DECRYPT] or item.attributes[ck.CKA_DERIVE]
        )
        assert not item.use.allowed & {ck.CKM_ECDH1_DERIVE, ck.CKM_ECDH1_COFACTOR_DERIVE, ck.CKM_RSA_PKCS_OAEP}
    for public in g.find((ck.CKA_CLASS, ck.CKO_PUBLIC_KEY)):
        assert g.token.index.by_handle[public].attributes[ck.CKA_ENCRYPT] is False
    with pytest.raises(Refusal, match="sign"):
        bench.push(1, material="sealed", mode="follow", profile="decrypt")


def test_on_expiry_refuse(bench: Bench) -> None:
    key = new_key("p256")
    bench.push(1, key, chained=True, on_expiry="refuse")
    g = guest(bench)
    (handle,) = g.find(PRIVATE)
    g.sign(handle)
    bench.now += 31 * 86400
    refused(ck.CKR_KEY_FUNCTION_NOT_PERMITTED, g.sign, handle)


def test_profiles_bound_what_a_key_may_do(bench: Bench) -> None:
    bench.push(1, new_key("rsa2048"), profile="tls")
    g = guest(bench)
    (handle,) = g.find(PRIVATE)
    session = g.application.session(g.handle)
    refused(ck.CKR_MECHANISM_INVALID, g.application.sign_init, session, Mechanism(ck.CKM_RSA_X_509), handle)
    refused(ck.CKR_KEY_TYPE_INCONSISTENT, g.application.sign_init, session, Mechanism(ck.CKM_ECDSA), handle)
    attributes = g.token.index.by_handle[handle].attributes
    assert attributes[ck.CKA_DECRYPT] is False and attributes[ck.CKA_SIGN] is True


def test_a_pin_hides_private_keys_until_login(bench: Bench) -> None:
    bench.push(1, chained=True)
    bench.keystore.set_pin(b"123456", Cause())
    g = guest(bench)
    (seen,) = g.find((ck.CKA_CLASS, ck.CKO_PUBLIC_KEY))
    assert g.find(PRIVATE) == []
    refused(ck.CKR_KEY_HANDLE_INVALID, g.sign, seen - 1)
    refused(ck.CKR_PIN_INCORRECT, g.application.login, g.handle, ck.CKU_USER, b"wrong!")
    g.application.login(g.handle, ck.CKU_USER, b"123456")
    refused(ck.CKR_USER_ALREADY_LOGGED_IN, g.application.login, g.handle, ck.CKU_USER, b"123456")
    (handle,) = g.find(PRIVATE)
    g.sign(handle)
    g.application.close_session(g.handle)
    g.handle = g.application.open_session(0, ck.CKF_SERIAL_SESSION)
    assert g.find(PRIVATE) == [], "the last session closed logs out"


def test_a_login_ends_when_the_operator_sets_another_pin(bench: Bench) -> None:
    bench.push(1)
    g = guest(bench)
    g.application.login(g.handle, ck.CKU_USER, b"whatever a URI carries")
    (handle,) = g.find(PRIVATE)
    bench.keystore.set_pin(b"123456", Cause())
    refused(ck.CKR_KEY_HANDLE_INVALID, g.sign, handle)
    g.application.login(g.handle, ck.CKU_USER, b"123456")
    assert bench.keystore.try_pin(b"wrong!") is False
    g.sign(handle)
    bench.keystore.set_pin(b"654321", Cause())
    refused(ck.CKR_KEY_HANDLE_INVALID, g.sign, handle)
    bench.keystore.set_pin(b"", Cause())
    g.sign(handle)


def test_wrong_pins_are_counted_and_slowed_across_restarts(bench: Bench) -> None:
    bench.keystore.set_pin(b"123456", Cause())
    for _ in range(pin.FREE_ATTEMPTS):
        assert bench.keystore.try_pin(b"wrong") is False
    assert bench.keystore.try_pin(b"123456") is None, "locked, even for the right PIN"
    bench.restart()
    assert bench.keystore.try_pin(b"123456") is None
    bench.now += 1
    assert bench.keystore.try_pin(b"wrong") is False
    bench.now += 1
    assert bench.keystore.try_pin(b"123456") is None
    bench.now += 1
    assert bench.keystore.try_pin(b"123456") is True
    assert bench.keystore.state.pin.failures == 0


def test_a_wrong_pin_that_cannot_be_counted_is_an_error(bench: Bench) -> None:
    bench.keystore.set_pin(b"123456", Cause())
    g = guest(bench)
    bench.full = True
    refused(ck.CKR_DEVICE_ERROR, g.application.login, g.handle, ck.CKU_USER, b"wrong!")
    g.application.login(g.handle, ck.CKU_USER, b"123456")


@pytest.mark.parametrize("size", [pin.MIN_PIN - 1, pin.MAX_PIN + 1])
def test_pins_out_of_bounds(bench: Bench, size: int) -> None:
    with pytest.raises(ValueError, match="PIN"):
        bench.keystore.set_pin(b"1" * size, Cause())
    bench.keystore.set_pin(b"1" * pin.MIN_PIN, Cause())
    bench.keystore.set_pin(b"1" * pin.MAX_PIN, Cause())


def test_without_a_pin_any_login_is_accepted(bench: Bench) -> None:
    g = guest(bench)
    g.application.login(g.handle, ck.CKU_USER, b"whatever a URI carries")
    g.application.logout(g.handle)
    g.application.login(g.handle, ck.CKU_USER, None)


def test_the_limit_of_sessions_is_the_modules(bench: Bench) -> None:
    token = bench.token()
    token.settings = Settings(max_sessions=3)
    one, two = token.new_application("one"), token.new_application("two")
    for application in (one, one, two):
        last = application.open_session(0, ck.CKF_SERIAL_SESSION)
    refused(ck.CKR_SESSION_COUNT, one.open_session, 0, ck.CKF_SERIAL_SESSION)
    two.close_session(last)
    one.open_session(0, ck.CKF_SERIAL_SESSION)
    one.close_all_sessions()
    assert token.sessions == 0


def test_restored_sessions_keep_their_handles_and_the_view(bench: Bench) -> None:
    bench.push(1)
    token = bench.token()
    mark = token.watermark
    bench.push(2)
    application = token.new_application("again", mark)
    flags = ck.CKF_SERIAL_SESSION
    assert application.restore_sessions(
        [(7, 0, flags), (9, 0, flags), (7, 0, flags), (0, 0, flags), (LAST_HANDLE + 1, 0, flags), (11, 1, flags)]
    ) == [
        0,
        0,
        ck.CKR_SESSION_HANDLE_INVALID,
        ck.CKR_SESSION_HANDLE_INVALID,
        ck.CKR_SESSION_HANDLE_INVALID,
        ck.CKR_SLOT_ID_INVALID,
    ]
    assert application.watermark == mark
    assert application.open_session(0, flags) == 10
    refused(ck.CKR_SESSION_EXISTS, application.restore_sessions, [(1, 0, flags)])


def test_detaching_the_token_ends_sessions_and_is_an_event(bench: Bench) -> None:
    g = guest(bench)
    bench.keystore.set_token_present(False)
    refused(ck.CKR_SESSION_HANDLE_INVALID, g.application.session, g.handle)
    refused(ck.CKR_TOKEN_NOT_PRESENT, g.application.open_session, 0, ck.CKF_SERIAL_SESSION)
    assert g.token.slot_events == 1
    bench.keystore.set_token_present(True)
    assert g.token.slot_events == 2
    g.application.open_session(0, ck.CKF_SERIAL_SESSION)


def test_session_objects_have_handles_of_their_own(bench: Bench) -> None:
    g = guest(bench)
    session = g.application.session(g.handle)
    made = g.application.add_object(session, {ck.CKA_CLASS: ck.CKO_SECRET_KEY, ck.CKA_LABEL: b"mine"})
    assert made >= FIRST_SESSION_OBJECT
    assert g.find((ck.CKA_LABEL, b"mine")) == [made]
    other = Guest(bench, g.token)
    assert other.find((ck.CKA_LABEL, b"mine")) == []
    g.application.close_session(g.handle)
    assert g.application.object(made) is None


def test_a_sensitive_secret_is_not_found_by_its_value(bench: Bench) -> None:
    g = guest(bench)
    session = g.application.session(g.handle)
    open_one = g.application.add_object(session, {ck.CKA_VALUE: b"secret", ck.CKA_SENSITIVE: False, ck.CKA_EXTRACTABLE: True})
    for closed in ({ck.CKA_SENSITIVE: True, ck.CKA_EXTRACTABLE: True}, {ck.CKA_SENSITIVE: False, ck.CKA_EXTRACTABLE: False}):
        g.application.add_object(session, {ck.CKA_VALUE: b"secret"} | closed)
    assert g.find((ck.CKA_VALUE, b"secret")) == [open_one]


def test_a_private_secret_ends_with_the_login(bench: Bench) -> None:
    bench.keystore.set_pin(b"123456", Cause())
    g = guest(bench)
    g.application.login(g.handle, ck.CKU_USER, b"123456")
    session = g.application.session(g.handle)
    private, public = (g.application.add_object(session, {ck.CKA_PRIVATE: p, ck.CKA_LABEL: b"mine"}) for p in (True, False))
    assert g.find((ck.CKA_LABEL, b"mine")) == [private, public]
    assert g.find((ck.CKA_PRIVATE, True), (ck.CKA_LABEL, b"mine")) == [private]
    g.application.logout(g.handle)
    assert g.find((ck.CKA_LABEL, b"mine")) == [public]
    assert g.application.object(private) is None


def test_joined_connections_share_one_application(bench: Bench) -> None:
    token = bench.token()
    application = token.new_application("one")
    handle = application.open_session(0, ck.CKF_SERIAL_SESSION)
    assert token.join(application.ticket) is application
    token.leave(application)
    application.session(handle)
    token.leave(application)
    assert token.join(application.ticket) is None
    assert token.sessions == 0
