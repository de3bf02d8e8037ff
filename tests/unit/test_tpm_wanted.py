"""What a module's worker asks of its TPM's process: which keys are wanted, and which may stay instead."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hsmvisor_rpc.internal import hsm, tpm
from hsmvisord.tpm import stored
from hsmvisord.tpm.blobs import Blobs
from hsmvisord.tpm.keys import Keys
from hsmvisord.tpm.managed import Wanted
from hsmvisord.tpm.seals import Seals
from hsmvisord.wire.tpm2 import Authorization
from support.certificates import new_key, pkcs8
from support.tpm_guest import DIGEST, HANDLE, WAYS, Machine, new_p256, started_either_way, verify

machine = pytest.fixture(started_either_way, params=WAYS)
KEY = new_p256()


class Worker:
    """Its end."""

    def __init__(self, machine: Machine, sock: socket.socket) -> None:
        self.machine, self._sock = machine, sock
        self.told: list[str] = []

    def asks(self, question: tpm.WantKeys) -> tuple[str, str]:
        hsm.send(self._sock, question)
        answer = hsm.receive(self._sock, tpm.ANSWERS)
        assert isinstance(answer, tpm.KeysWanted)
        assert self.told[-1] == answer.detail
        return answer.result, answer.detail


@pytest.fixture
def worker(machine: Machine) -> Iterator[Worker]:
    mine, theirs = socket.socketpair()
    with mine:
        worker = Worker(machine, mine)
        Keys(machine.managed, Seals(Blobs(bytes(32), b"m" * 16)), worker.told.append).take(theirs)
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
        ({"handles": (0x81800000 - 1,)}, "is no handle for a key"),
        ({"keys": (b"no key",)}, ""),
        ({"keys": (pkcs8(new_key("ed25519")),)}, "a TPM has RSA keys"),
        ({"keys": (pkcs8(ec.generate_private_key(ec.SECP256K1())),)}, "a curve that TPMs do not have"),
        ({"certificates": (bytes(2049),)}, "at most 2048"),
        ({"earlier": (spki(KEY),)}, "each with a handle"),
        ({"earlier": (b"no key",), "earlier_handles": (HANDLE,)}, ""),
    ],
)
def test_what_cannot_be(worker: Worker, change: dict[str, object], why: str) -> None:
    assert worker.asks(wants(KEY)) == (tpm.DONE, "")
    result, detail = worker.asks(replace(wants(new_p256()), **change))  # type: ignore[arg-type]
    assert result == tpm.FAILED and why in detail and detail
    verify(KEY, DIGEST, worker.machine.guest.sign(HANDLE, DIGEST)[1])


def test_reprs_show_no_secret() -> None:
    secret = b"a secret that nobody sees"
    of_provider = stored.keys(secret)
    for text in (repr(of_provider), repr(Authorization(password=secret)), repr(Wanted(KEY)), repr(wants(KEY))):
        for value in (secret, of_provider.stored, of_provider.blobs, of_provider.successor, pkcs8(KEY)):
            assert repr(value)[2:-1] not in text
