"""What a module's worker asks of its TPM's process: which keys are wanted, and which may stay instead."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hsmvisor_rpc.internal import hsm, tpm
from hsmvisord import limits
from hsmvisord.tpm import stored
from hsmvisord.tpm.blobs import Blobs
from hsmvisord.tpm.keys import Keys
from hsmvisord.tpm.managed import Wanted
from hsmvisord.tpm.seals import Seals
from hsmvisord.tpm.wanted import index_of
from hsmvisord.wire.tpm2 import Authorization
from support.certificates import new_key, pkcs8
from support.tpm_guest import DIGEST, HANDLE, WAYS, Machine, new_p256, started_either_way, verify

machine = pytest.fixture(started_either_way, params=WAYS)
KEY = new_p256()


class Worker:
    """Its end."""

    def __init__(self, machine: Machine, sock: socket.socket, keys: Keys | None = None) -> None:
        self.machine, self.sock = machine, sock
        self.told: list[str] = []
        self.keys = keys or Keys(machine.managed, Seals(Blobs(bytes(32), b"m" * 16)), self.told.append)

    def asks(self, question: tpm.WantKeys) -> tuple[str, str]:
        hsm.send(self.sock, question)
        answer = hsm.receive(self.sock, tpm.ANSWERS)
        assert isinstance(answer, tpm.KeysWanted)
        assert self.told[-1] == answer.detail
        return answer.result, answer.detail


@pytest.fixture
def worker(machine: Machine) -> Iterator[Worker]:
    mine, theirs = socket.socketpair()
    with mine:
        worker = Worker(machine, mine)
        worker.keys.take(theirs)
        yield worker


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def wants(*keys: ec.EllipticCurvePrivateKey) -> tpm.WantKeys:
    count = len(keys)
    return tpm.WantKeys(
        tuple(range(HANDLE, HANDLE + count)), tuple(map(pkcs8, keys)), (False,) * count, tuple(b"%d" % n for n in range(count))
    )


def test_keys_come_and_go(worker: Worker) -> None:
    assert worker.asks(wants(KEY)) == (tpm.DONE, "")
    verify(KEY, DIGEST, worker.machine.guest.sign(HANDLE, DIGEST)[1])
    assert worker.asks(wants()) == (tpm.DONE, "")
    assert worker.machine.managed.names() == {}


def test_an_earlier_one_stays_as_long_as_it_may(worker: Worker) -> None:
    """The host's disk is full."""
    newer = new_p256()
    assert worker.asks(wants(KEY)) == (tpm.DONE, "")
    worker.machine.refuses = True
    others = (spki(new_p256()), spki(KEY))
    asked = replace(wants(newer), earlier_handles=(HANDLE,) * 2, earlier=others)
    assert worker.asks(asked) == (tpm.FAILED, "no space")
    verify(KEY, DIGEST, worker.machine.guest.sign(HANDLE, DIGEST)[1])
    for other in (replace(asked, earlier=(others[0],) * 2), replace(asked, earlier_handles=(HANDLE + 1,) * 2), wants(newer)):
        assert worker.asks(other) == (tpm.FAILED, "no space")
        assert worker.machine.guest.sign(HANDLE, DIGEST)[0] == 0x18B, "nobody reaches it"
    worker.machine.refuses = False
    assert worker.asks(wants(newer)) == (tpm.DONE, "")
    verify(newer, DIGEST, worker.machine.guest.sign(HANDLE, DIGEST)[1])


def test_as_many_as_there_may_be(worker: Worker) -> None:
    worker.machine.managed.switch_off()  # so that the TPM does not say how many it has room for
    most = replace(
        wants(*[KEY] * tpm.MAX_KEYS), earlier_handles=(HANDLE,) * tpm.MAX_EARLIER, earlier=(spki(KEY),) * tpm.MAX_EARLIER
    )
    assert worker.asks(most) == (tpm.LATER, "")
    assert worker.asks(wants(*[KEY] * (tpm.MAX_KEYS + 1)))[0] == tpm.FAILED
    more = replace(most, earlier_handles=(HANDLE,) * (tpm.MAX_EARLIER + 1), earlier=(spki(KEY),) * (tpm.MAX_EARLIER + 1))
    assert worker.asks(more)[0] == tpm.FAILED


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"handles": (HANDLE,) * 2}, "each with a handle"),
        ({"earlier": (spki(KEY),)}, "each with a handle"),
    ],
)
def test_what_is_no_question(worker: Worker, change: dict[str, object], why: str) -> None:
    """Nothing has changed."""
    assert worker.asks(wants(KEY)) == (tpm.DONE, "")
    result, detail = worker.asks(replace(wants(new_p256()), **change))  # type: ignore[arg-type]
    assert result == tpm.FAILED and why in detail and detail
    verify(KEY, DIGEST, worker.machine.guest.sign(HANDLE, DIGEST)[1])


def test_a_handle_has_one_key(worker: Worker) -> None:
    assert worker.asks(wants(KEY)) == (tpm.DONE, "")
    asked = replace(wants(new_p256(), new_p256()), handles=(HANDLE,) * 2)
    assert worker.asks(asked) == (tpm.FAILED, "a handle has one key")
    verify(KEY, DIGEST, worker.machine.guest.sign(HANDLE, DIGEST)[1])


SMALL = math.prod(n for n in range(3, 2000) if pow(2, n - 1, n) == 1)


def prime(bits: int, chosen: random.Random) -> int:
    while True:
        found = chosen.getrandbits(bits) | 3 << bits - 2 | 1
        if math.gcd(found, SMALL) == 1 and pow(2, found - 1, found) == 1:
            return found


def rsa_of(p: int, q: int, e: int) -> bytes:
    d = pow(e, -1, (p - 1) * (q - 1))
    numbers = rsa.RSAPublicNumbers(e, p * q)
    return pkcs8(rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), rsa.rsa_crt_iqmp(p, q), numbers).private_key())


@functools.cache
def lopsided() -> bytes:
    chosen = random.Random(1)
    return rsa_of(prime(1032, chosen), prime(1016, chosen), 65537)


@functools.cache
def with_exponent_of_33_bits() -> bytes:
    numbers = new_key("rsa2048").private_numbers()
    return rsa_of(numbers.p, numbers.q, next(e for e in itertools.count((1 << 32) + 1, 2) if _fits(e, numbers.p, numbers.q)))


def _fits(e: int, p: int, q: int) -> bool:
    return math.gcd(e, (p - 1) * (q - 1)) == 1


@pytest.mark.parametrize("asleep", [False, True], ids=["awake", "off"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda: {"handles": 0x81800000 - 1}, "no handle for a key"),
        (lambda: {"keys": b"no key"}, "cannot be read"),
        (lambda: {"keys": pkcs8(new_key("ed25519"))}, "a TPM has RSA keys"),
        (lambda: {"keys": pkcs8(ec.generate_private_key(ec.SECP256K1()))}, "a curve that TPMs do not have"),
        (lambda: {"keys": lopsided()}, "primes are not of one size"),
        (lambda: {"keys": with_exponent_of_33_bits()}, "public exponent"),
        (lambda: {"keys": pkcs8(rsa.generate_private_key(3, 2048))}, "public exponent"),
    ],
    ids=["handle", "bytes", "kind", "curve", "primes", "large exponent", "small exponent"],
)
def test_one_that_cannot_be_keeps_no_other_from_coming_or_going(
    worker: Worker, change: Callable[[], dict[str, object]], why: str, asleep: bool
) -> None:
    """Nothing is at its handle; what was destroyed goes, what is new comes."""
    destroyed, kept, newer = new_p256(), new_p256(), new_p256()
    machine = worker.machine
    assert worker.asks(wants(KEY, destroyed, kept)) == (tpm.DONE, "")
    asked = wants(new_p256(), newer)
    asked = replace(asked, handles=(HANDLE, HANDLE + 2))
    for name, value in change().items():
        asked = replace(asked, **{name: (value, getattr(asked, name)[1])})  # type: ignore[arg-type]
    if asleep:
        machine.managed.switch_off()
    result, detail = worker.asks(asked)
    assert result == tpm.FAILED and why in detail and detail.startswith(f"{asked.handles[0]:#x}: ")
    if asleep:
        machine.managed.switch_on()
        assert machine.guest.startup() == 0
    for gone in (HANDLE, HANDLE + 1):
        assert machine.guest.sign(gone, DIGEST)[0] == 0x18B
    verify(newer, DIGEST, machine.guest.sign(HANDLE + 2, DIGEST)[1])
    assert machine.managed.names().keys() == {HANDLE + 2}


def test_a_certificate_that_is_too_large_stays_outside(worker: Worker) -> None:
    """Its key comes, what was destroyed goes."""
    destroyed, newer = new_p256(), new_p256()
    assert worker.asks(wants(KEY, destroyed)) == (tpm.DONE, "")
    fits = replace(wants(newer), certificates=(bytes(limits.MAX_TPM_CERTIFICATE),))
    assert worker.asks(fits) == (tpm.DONE, "")
    assert worker.asks(wants(KEY, destroyed)) == (tpm.DONE, "")
    too_large = replace(fits, certificates=(bytes(limits.MAX_TPM_CERTIFICATE + 1),))
    result, detail = worker.asks(too_large)
    assert (result, detail) == (tpm.FAILED, f"{HANDLE:#x}: its certificate has 2049 bytes, a TPM's at most 2048")
    guest = worker.machine.guest
    verify(newer, DIGEST, guest.sign(HANDLE, DIGEST)[1])
    assert guest.sign(HANDLE + 1, DIGEST)[0] == 0x18B
    assert guest.nv(index_of(HANDLE)) is None


def test_an_earlier_one_that_cannot_be_was_never_there(worker: Worker) -> None:
    earlier = (b"no key", spki(KEY), spki(ec.generate_private_key(ec.SECP256K1())))
    assert worker.asks(wants(KEY)) == (tpm.DONE, "")
    worker.machine.refuses = True
    asked = replace(wants(new_p256()), earlier=earlier, earlier_handles=(HANDLE,) * 3)
    assert worker.asks(asked) == (tpm.FAILED, "no space")
    verify(KEY, DIGEST, worker.machine.guest.sign(HANDLE, DIGEST)[1])


def test_what_an_earlier_worker_asks_does_not_come_after_the_next_ones(worker: Worker) -> None:
    first, managed = worker.sock, worker.machine.managed
    assert worker.asks(wants(KEY)) == (tpm.DONE, "")
    mine, theirs = socket.socketpair()
    with mine:
        with managed.turn():  # the guest has its turn
            hsm.send(first, wants(KEY, new_p256()))
            time.sleep(0.2)  # it is read, and waits
            worker.keys.take(theirs)
        second = Worker(worker.machine, mine, worker.keys)
        second.told = worker.told
        assert second.asks(wants()) == (tpm.DONE, "")
        with contextlib.suppress(ConnectionError):
            assert first.recv(1) == b"", "nobody answers"
        assert managed.names() == {}


def test_reprs_show_no_secret() -> None:
    secret = b"a secret that nobody sees"
    of_provider = stored.keys(secret)
    for text in (repr(of_provider), repr(Authorization(password=secret)), repr(Wanted(KEY)), repr(wants(KEY))):
        for value in (secret, of_provider.stored, of_provider.blobs, of_provider.successor, pkcs8(KEY)):
            assert repr(value)[2:-1] not in text
