"""A process of the host dies before every step of a swap in a TPM: its guest has the old key with the old certificate, or both new.

The same walks as test_steps, under a machine that signs.  That what was kept is whole without anybody who mends it, test_tpm_swaps
shows for each command.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisord.tpm import wanted
from hsmvisord.wire import tpm2
from support.certificates import Authority, new_key
from support.host import Host, Module, wait_for
from support.steps import VARIABLE, Board
from support.tpm_guest import DIGEST, Guest, verify
from support.tpm_host import FIRST, create, machine, serving

pytestmark = pytest.mark.slow

AUTHORITY = Authority()


class Walked:
    """A host whose processes can be told to die at a step."""

    def __init__(self) -> None:
        self.host = Host()
        self.host.process.module = "support.stepping_host"
        self.host.process.state.mkdir(mode=0o700)
        path = self.host.process.state / "steps"
        self.board = Board(path)
        self.host.process.environment = {VARIABLE: str(path)}

    def again(self, role: str, module: Module, worker: int, tpm: int) -> None:
        """Returns when who has died is there again: until now the pids of the module's were these."""
        if role == "supervisor":
            assert self.host.process.process is not None and self.host.process.process.wait(10) == 9
            self.host.start()
        module.serving(not_pid=worker if role == "worker" else 0)
        assert serving(module, not_pid=tpm if role == "tpm" else 0).pid == tpm or role == "tpm"


@pytest.fixture(scope="module")
def walked() -> Iterator[Walked]:
    walked = Walked()
    try:
        walked.host.start()
        yield walked
    finally:
        walked.host.clean()


class Generation(NamedTuple):
    key: ec.EllipticCurvePrivateKey
    chain: tuple[x509.Certificate, ...]

    @classmethod
    def new(cls) -> Generation:
        key = new_key("p256")
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(key, AUTHORITY.chain(key))

    def pair(self) -> tuple[bytes, bytes | None]:
        """What a guest sees of it: the key's Name, and the certificate beside it."""
        return wanted.name_of(FIRST, wanted.Wanted(self.key)), self.chain[0].public_bytes(Encoding.DER)


def seen(guest: Guest) -> tuple[bytes, bytes | None]:
    """Read while nothing came between; no name: there is no key."""
    while True:
        before = guest.say(tpm2.Code.READ_PUBLIC, (FIRST,))
        if before[0]:
            return b"", None
        try:
            certificate = guest.nv(wanted.index_of(FIRST))
        except AssertionError:
            continue  # another one came, or the TPM has died
        if guest.say(tpm2.Code.READ_PUBLIC, (FIRST,)) == before:
            public = before[1]
            return tpm2.name_of(public[2 : 2 + int.from_bytes(public[:2], "big")]), certificate


def activate(module: Module, generation: int) -> None:
    """As one who tries again while told to."""
    for _ in range(100):
        try:
            if module.states("web")[generation] == "staged":
                module.activate("web", generation)
            return
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE, error
            time.sleep(0.05)
    raise AssertionError("it stays unavailable")


@pytest.mark.parametrize("role", ["supervisor", "worker", "tpm"])
@pytest.mark.timeout(300)
def test_death_before_every_step_of_a_swap(walked: Walked, role: str) -> None:
    module = create(walked.host, f"{role}-1", h0="web")
    steps: list[str] = []
    with machine(module) as (qemu, guest):
        old = Generation.new()
        module.push("web", old.key, old.chain)
        wait_for(lambda: seen(guest) == old.pair(), what="the first pair")
        for step in itertools.count(1):
            new = Generation.new()
            number = module.stage("web", new.key, new.chain)
            worker, tpm = module.pid, serving(module).pid
            walked.board.arm(role, step)
            try:
                module.activate("web", number)
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.UNAVAILABLE, error
            if role != "supervisor":  # without it the guest's TPM waits, in the middle of a swap
                wait_for(lambda g=new: walked.board.died(role) or seen(guest) == g.pair(), what="a death, or the new pair")
            walked.board.rests(role, 1.0 if role == "supervisor" else 0.2)
            if died := walked.board.died(role):
                walked.again(role, module, worker, tpm)
                if role == "tpm":  # it lost its power
                    qemu.start()
                    assert guest.startup() == 0
                assert seen(guest) in (old.pair(), new.pair()), f"{step}: {died}"
                steps.append(died)
            else:
                walked.board.disarm()
            activate(module, number)
            wait_for(lambda g=new: seen(guest) == g.pair(), what="the new pair")
            verify(new.key, DIGEST, guest.sign(FIRST, DIGEST)[1])
            module.destroy_generation("web", number - 1)
            old = new
            if not died:
                break
    module.destroy()
    print(f"a swap, {role}: {len(steps)} deaths, before: {'; '.join(steps)}")
    assert len(steps) > 3
