"""Keys in hardware: how long they live there, helpers that end and others that take their place, and what is refused."""

from __future__ import annotations

import contextlib
import gc
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hsmvisor_rpc.internal import hsm
from hsmvisor_rpc.sealed.canonical import Record
from hsmvisord import ck, limits
from hsmvisord.ck import CkError
from hsmvisord.crypto.hardware.channel import Away
from hsmvisord.crypto.hardware.provider import HardwareProvider
from hsmvisord.wire.calls import Mechanism
from support.cryptoprocessors import KEYS, NEW, pkcs8, refused, signs
from support.softhsm import Helper, Token, make_token

ONE, OTHER = b"1" * 16, b"2" * 16


@pytest.fixture
def token(tmp_path: Path) -> Token:
    return make_token(tmp_path / "hsm")


@pytest.fixture
def helper(token: Token) -> Iterator[Helper]:
    with contextlib.closing(Helper(token, ONE)) as running:
        yield running


def names(provider: HardwareProvider) -> set[bytes]:
    return set(provider.channel.ask(hsm.List(), hsm.Keys).names)


def clean(provider: HardwareProvider) -> None:
    gc.collect()
    provider.clean()


#: The helper's program, to which nothing that was installed can be read any more: a helper may be a user who is not let in there.
IMPORTED_BEFORE = """
import sys
from hsmvisord.hsm import main

class Unreadable:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names:
            raise ImportError(f"{name} is imported late")

sys.meta_path.insert(0, Unreadable())
main.main()
"""


@pytest.mark.parametrize("name", ["P-256", "RSA"])
def test_a_helper_has_imported_all_before_it_is_somebody_else(token: Token, name: str) -> None:
    with contextlib.closing(Helper(token, ONE, ("-c", IMPORTED_BEFORE))) as running:
        provider = running.provider()
        signs(provider, provider.generate_pair(*KEYS[name]), name)
        signs(provider, provider.load_private_key(pkcs8(NEW[name]())), name)
        signs(provider, provider.open_private(provider.generate_pair(*KEYS[name]).stored()), name)


# ---- how long keys live -------------------------------------------------------------------------------------------------


def test_a_key_goes_with_the_last_that_refers_to_it(helper: Helper) -> None:
    provider = helper.provider()
    key = provider.generate_pair(*KEYS["P-256"])
    other = provider.generate_secret(ck.CKM_AES_KEY_GEN, 16)
    copy = provider.open_private(key.stored())
    del key
    clean(provider)
    assert len(names(provider)) == 2, "the copy refers to it"
    signer = copy.signer(Mechanism(ck.CKM_ECDSA))
    del copy
    clean(provider)
    signer.sign(bytes(32))
    del signer
    clean(provider)
    assert names(provider) == {other.name}  # type: ignore[attr-defined]


def test_what_a_worker_left_behind_is_swept_by_the_next(helper: Helper) -> None:
    first = helper.provider()
    kept, lost = first.generate_pair(*KEYS["P-256"]), first.generate_pair(*KEYS["P-256"])
    second = helper.provider()
    again = second.open_private(kept.stored())
    assert second.sweep() == 1
    signs(second, again, "P-256")
    refused(ck.CKR_DEVICE_ERROR, lost.signer(Mechanism(ck.CKM_ECDSA)).sign, bytes(32))


def test_who_has_a_successor_destroys_nothing(helper: Helper) -> None:
    provider = helper.provider()
    key = provider.generate_pair(*KEYS["P-256"])
    provider.retired = True
    del key
    clean(provider)
    assert len(names(provider)) == 1


def test_a_key_that_is_refused_after_it_was_made_is_not_left(helper: Helper) -> None:
    provider = helper.provider()
    wrapper, target = provider.generate_secret(ck.CKM_AES_KEY_GEN, 32), provider.load_secret_key(ck.CKK_AES, bytes(16))
    reference = provider.load_secret_key(ck.CKK_AES, bytes(16))
    mechanism = Mechanism(ck.CKM_AES_KEY_WRAP)
    refused(ck.CKR_KEY_UNEXTRACTABLE, provider.wrap(wrapper, mechanism, target)[1])
    del target, reference
    clean(provider)
    assert len(names(provider)) == 1


def test_a_key_that_was_made_and_not_heard_of_is_not_left(helper: Helper, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = helper.provider()
    ask = provider.channel.ask

    def deaf(question: Record, expected: type[Record]) -> Record:
        answer = ask(question, expected)
        if isinstance(question, hsm.MakeSecret):
            raise Away("the answer did not come")
        return answer

    monkeypatch.setattr(provider.channel, "ask", deaf)
    refused(ck.CKR_DEVICE_ERROR, provider.generate_secret, ck.CKM_AES_KEY_GEN, 16)
    assert len(names(provider)) == 1
    clean(provider)
    assert not names(provider)


def test_a_question_that_is_asked_again_makes_one_key(helper: Helper) -> None:
    channel = helper.provider().channel
    for _ in range(2):
        channel.ask(hsm.MakeSecret(b"n" * 16, ck.CKK_AES, 16, False, False), hsm.Made)
    assert channel.ask(hsm.List(), hsm.Keys).names == (b"n" * 16,)


def test_modules_do_not_see_each_others_keys(token: Token, helper: Helper) -> None:
    with contextlib.closing(Helper(token, OTHER)) as other:
        mine, theirs = helper.provider(), other.provider()
        key = mine.generate_pair(*KEYS["P-256"])
        assert not names(theirs)
        stolen = theirs.open_private(key.stored())
        refused(ck.CKR_DEVICE_ERROR, stolen.signer(Mechanism(ck.CKM_ECDSA)).sign, bytes(32))
        assert theirs.sweep() == 0
        signs(mine, key, "P-256")


def test_purge(token: Token, helper: Helper) -> None:
    provider = helper.provider()
    key = provider.generate_pair(*KEYS["P-256"])
    for module_id in (OTHER, ONE):
        signs(provider, key, "P-256")
        command = [sys.executable, "-m", "hsmvisord.hsm.main", "--purge", *token.arguments(module_id)]
        subprocess.run(command, check=True, timeout=30)
    assert not names(provider)


# ---- helpers ------------------------------------------------------------------------------------------------------------


def test_another_helper_takes_the_place_of_one_that_died(token: Token, helper: Helper) -> None:
    provider = helper.provider()
    key = provider.generate_pair(*KEYS["P-256"])
    helper.kill()
    began = time.monotonic()
    refused(ck.CKR_DEVICE_ERROR, key.signer(Mechanism(ck.CKM_ECDSA)).sign, bytes(32))
    assert time.monotonic() - began < limits.HSM_WAIT + 5
    with contextlib.closing(Helper(token, ONE)) as second:
        provider.connect(second.socket())
        signs(provider, key, "P-256")


def test_a_call_waits_for_the_helper_that_is_being_started(token: Token, helper: Helper) -> None:
    provider = helper.provider()
    signer = provider.generate_pair(*KEYS["P-256"]).signer(Mechanism(ck.CKM_ECDSA))
    with contextlib.closing(Helper(token, ONE)) as second:
        sock = second.socket()
        helper.kill()
        later = threading.Timer(0.5, provider.connect, (sock,))
        later.start()
        try:
            assert len(signer.sign(bytes(32))) == 64
        finally:
            later.join()


def test_a_helper_outlives_the_supervisor_while_a_worker_needs_it(helper: Helper) -> None:
    provider = helper.provider()
    key = provider.generate_pair(*KEYS["P-256"])
    helper.leave()
    signs(provider, key, "P-256")
    provider.channel.close()
    assert helper.process.wait(10) == 0


def test_a_wrong_pin_is_tried_once(token: Token) -> None:
    token.pin_file.write_text("00000000\n")
    with contextlib.closing(Helper(token, ONE)) as helper:
        for _ in range(3):
            assert helper.refusal().startswith("the PIN is not taken: PinIncorrect")
        helper.leave()
        assert helper.process.stderr is not None
        said = helper.process.stderr.read().decode()
        assert said.count("\n") == 1 and "the PIN is not taken" in said and "00000000" not in said


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("library", "/nowhere/lib.so", "no PKCS#11 library that can be used"),
        ("token", "another", "there is no token with the label 'another'"),
        ("pin_file", "/nowhere/pin", "the PIN's file /nowhere/pin: No such file"),
    ],
)
def test_hardware_that_cannot_be_used(token: Token, name: str, wrong: str, said: str) -> None:
    with contextlib.closing(Helper(token, ONE, **{name: wrong})) as helper:
        assert said in helper.refusal()


# ---- a worker in its guest's hands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [b"", b"\0\0\0\1x", (hsm.MAX_MESSAGE + 1).to_bytes(4, "big"), b"\0\0\0\5hsm"])
def test_a_worker_that_says_what_cannot_be_is_left(helper: Helper, bad: bytes) -> None:
    with helper.socket() as sock:
        sock.settimeout(10)
        assert isinstance(hsm.receive(sock, hsm.ANSWERS), hsm.Welcome)
        sock.sendall(bad)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    provider = helper.provider()
    signs(provider, provider.generate_pair(*KEYS["P-256"]), "P-256")


def test_questions_that_nobody_should_ask(helper: Helper) -> None:
    channel = helper.provider().channel
    for question in (
        hsm.Use("format", bytes(16), ck.CKM_ECDSA, (), b""),
        hsm.Use(hsm.SIGN, bytes(16), ck.CKM_ECDSA, (), b""),
        hsm.Use(hsm.SIGN, b"", ck.CKM_ECDSA, (b"x",), b""),
        hsm.MakePair(bytes(16), ck.CKK_RSA, 7, b"", False, False),
        hsm.MakeSecret(bytes(16), 0x1234, 16, False, False),
        hsm.TakePrivate(bytes(16), b"x", False, False),
        hsm.Unwrap(bytes(16), bytes(16), 1 << 40, (), b"", True, 5, 0, True, True),
        hsm.Wrap(b"", b"spki", ck.CKM_RSA_PKCS, (), bytes(16)),
        hsm.Export(b"x" * 1000),
        hsm.MakeSecret(b"short", ck.CKK_AES, 16, False, False),
        hsm.MakeSecret(bytes(17), ck.CKK_AES, 16, False, False),
    ):
        with pytest.raises(CkError):
            channel.ask(question, hsm.Data)
    assert channel.ask(hsm.List(), hsm.Keys).names == ()


@pytest.mark.parametrize("value", [None, b"iv", (), (1, b"", 2, b"x"), (0,), (2**64 - 1, b"")])
def test_parameters_go_and_come(value: object) -> None:
    assert hsm.decode_parameter(hsm.encode_parameter(value)) == (value or None)


@pytest.mark.parametrize("bad", [(b"",), (b"x",), (b"y", b"y"), (b"t", b""), (b"t", b"u1"), (b"t", b"t")])
def test_parameters_that_cannot_be(bad: tuple[bytes, ...]) -> None:
    with pytest.raises(hsm.MalformedRecord):
        hsm.decode_parameter(bad)
