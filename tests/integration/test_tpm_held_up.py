"""What a host does about a module's TPM while a process of its own does not answer, and after that."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import struct
import time
from collections.abc import Iterator

import pytest
from grpc import StatusCode
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, PLATFORM, Code, sized
from support.certificates import new_key
from support.host import SETTINGS, Host, Module, wait_for
from support.host_process import refused
from support.processes import titled
from support.tpm_guest import DIGEST, OWNER, verify
from support.tpm_host import FIRST, create, machine, plugged, serving, tpm_settings, update

NUMBERS = itertools.count()
UNAVAILABLE = StatusCode.UNAVAILABLE
RC_FAILURE, RC_BAD_AUTH = 0x101, 0x9A2


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host(SETTINGS + "[workers]\nstart_timeout_seconds = 5\n") as host:
        yield host


@pytest.fixture
def module(host: Host) -> Iterator[Module]:
    module = create(host, f"tpm-{next(NUMBERS)}", h0="web")
    yield module
    module.destroy()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def launcher(host: Host) -> int:
    return titled(host.pid(), "hsmvisord: launcher of TPMs")


def without_firmware() -> pb.Tpm:
    settings = tpm_settings(h0="web")
    settings.no_firmware = True
    return settings


@pytest.mark.parametrize("dies", [False, True], ids=["the service goes on", "the service dies"])
def test_what_was_set_is_so_in_the_end(module: Module, dies: bool) -> None:
    """The process cannot be replaced at that moment: who asked is told so, and it is replaced when it can be."""
    host = module.host
    with machine(module) as (qemu, guest):
        before = serving(module).pid
        with stopped(launcher(host)):
            assert refused(update, module, without_firmware()) == (UNAVAILABLE, "TPM")
            assert serving(module).pid == before
            if dies:
                host.stop(signal.SIGKILL)
        if dies:
            host.start()
            wait_for(lambda: module.status().tpm.peer, what="the machine")
        serving(module, not_pid=before)
        qemu.start()
        assert guest.startup() == 0
        assert guest.say(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b""), EMPTY_PASSWORD)[0] == RC_BAD_AUTH


def test_what_is_set_while_it_is_made_is_so(host: Host) -> None:
    module = host.create(f"tpm-{next(NUMBERS)}", tpm=tpm_settings(h0="web"))
    update(module, without_firmware())
    serving(module)

    def closed() -> bool:
        with machine(module) as (_, guest):
            return guest.say(Code.HIERARCHY_CHANGE_AUTH, (PLATFORM,), sized(b""), EMPTY_PASSWORD)[0] == RC_BAD_AUTH

    wait_for(closed, 20, "a process that knows it")
    module.destroy()


def test_a_worker_that_does_not_reach_the_tpm_tries_on(module: Module) -> None:
    key, other = new_key("p256"), new_key("p256")
    module.push("web", key)
    with machine(module) as (_, guest):
        wait_for(lambda: FIRST in guest.handles(FIRST), what="the key")
        with stopped(serving(module).pid):
            worker = module.pid
            os.kill(worker, signal.SIGKILL)
            module.serving(not_pid=worker)
            module.push("web", other)
            wait_for(lambda: "does not reach its TPM" in module.status().tpm.keys_failure, 20, "why the key is not there")

        def swapped() -> bool:
            result, signature = guest.sign(FIRST, DIGEST)
            with contextlib.suppress(Exception):
                verify(other, DIGEST, signature)
                return result == 0
            return False

        wait_for(swapped, 20, "the other key")
        assert module.status().tpm.keys_failure == ""


def test_a_machine_that_ended_before_it_was_served_keeps_no_other_out(host: Host) -> None:
    with stopped(launcher(host)):
        module = host.create(f"tpm-{next(NUMBERS)}", tpm=tpm_settings(h0="web"))
        first = plugged(module)
        wait_for(lambda: module.status().tpm.peer, what="the first machine")
        first.close()
        second = plugged(module)
        time.sleep(0.2)  # one that is refused is closed at once
    guest = second.connect()
    second.start()
    assert guest.startup() == 0
    second.close()
    module.destroy()


def test_a_tpm_that_dies_over_a_command_answers_it_also_after_the_service_was_another(module: Module) -> None:
    """QEMU waits for the answer, and its guest with it."""
    host = module.host
    template = tpm2.template(
        tpm2.RSA,
        tpm2.Attributes.SENSITIVE_DATA_ORIGIN | tpm2.Attributes.USER_WITH_AUTH | tpm2.Attributes.SIGN,
        struct.pack(">HHHI", tpm2.NULL_ALGORITHM, tpm2.NULL_ALGORITHM, 3072, 0),
        sized(os.urandom(32)),
    )
    parameters = sized(sized(b"") + sized(b"")) + sized(template) + sized(b"") + struct.pack(">I", 0)
    long = tpm2.command(Code.CREATE_PRIMARY, (OWNER,), parameters, EMPTY_PASSWORD)
    with machine(module) as (qemu, guest):
        host.stop(signal.SIGKILL)
        host.start()
        wait_for(lambda: module.status().tpm.peer, what="the machine")
        before = serving(module).pid
        assert qemu.commands is not None
        qemu.commands.sendall(long)
        time.sleep(0.05)  # an RSA key of 3,072 bits takes longer
        os.kill(before, signal.SIGKILL)
        head = qemu.commands.recv(10)
        assert tpm2.HEAD.unpack(head)[2] == RC_FAILURE
        serving(module, not_pid=before)
        qemu.start()
        assert guest.startup() == 0
