"""A running guest goes to another host with its TPM, by QEMU's own migration; where the TPM's state is not taken, it stays."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hsmvisord.wire.tpm2 import TRANSIENT
from support.certificates import PrivateKey, new_key
from support.guest_machine import GuestProcess, image
from support.host import Host, wait_for
from support.tpm_vm import CRB, HANDLE, TIS, TpmMachine, VmTpm, name_of, permit_move, signed, verify_signed

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(400)]

OUTPUT = "/root/signed"
INDEX, CONTENT = 0x01800007, b"kept by the guest in its TPM"
MEASURED = bytes(range(32))
#: How a part of QEMU's stream begins: the length of its name, and that; then come its instance, its version and its fields.
SECTION = b"\x0ctpm-emulator"
NUMBERS = itertools.count()


@dataclass
class Ends:
    """A module on each of two hosts of one authority, which both have the same key for the guest."""

    here: VmTpm
    there: VmTpm
    key: PrivateKey


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with Host() as first:
        second = Host()
        second.authority, second.process.root_public = first.authority, first.process.root_public
        with second:
            yield first, second


@pytest.fixture
def ends(hosts: tuple[Host, Host]) -> Iterator[Ends]:
    name, key = f"guest-{next(NUMBERS)}", new_key("p256")
    here, there = (VmTpm(host, name, firmware=False) for host in hosts)
    for tpm in (here, there):
        tpm.deliver(HANDLE, key)
    yield Ends(here, there, key)
    here.close()
    there.close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """That both machines have, one after the other."""
    return Path(shutil.copy(image() / "root.ext4", tmp_path / "root"))


@pytest.mark.parametrize("driver", [CRB, TIS])
def test_a_running_guest_moves(ends: Ends, disk: Path, tmp_path: Path, driver: str) -> None:
    with TpmMachine(ends.here, driver, root=disk) as source:
        source.wait_for(HANDLE, ends.key)
        fill(source)
        signing = source.start_signing(OUTPUT)
        wait_for(lambda: lines(source) > 20, 30, "the first signatures")
        before = seen(source)
        permit_move(ends.here, ends.there)
        with TpmMachine(ends.there, driver, root=disk, incoming="defer") as destination:
            destination.qmp("migrate-incoming", uri=f"unix:{tmp_path / 'way'}")
            source.stop()  # QEMU 7.2 does not bring all memory of an emulated guest that goes on meanwhile, also without a TPM
            assert migrate(source, f"unix:{tmp_path / 'way'}") == "completed"
            wait_for(lambda: destination.qmp("query-status")["status"] == "paused", 30, "the guest's arrival")
            destination.cont()
            destination.wait_ready()
            at_arrival = lines(destination)
            assert seen(destination) == before
            wait_for(lambda: lines(destination) > at_arrival + 20, 30, "signatures after the move")
            other = new_key("p256")
            ends.there.deliver(HANDLE, other)
            destination.wait_for(HANDLE, other)
            at_swap = lines(destination)
            wait_for(lambda: lines(destination) > at_swap + 20, 30, "signatures with the other key")
            made = stop(destination, signing)
            keys = {name_of(HANDLE, key): key for key in (ends.key, other)}
            for one in made:
                verify_signed(one, keys)
            assert made[0].before != made[-1].after
            assert destination.tpm.attested(7).pcrs[7] == before["pcrs"][7]
    ends.there.wait_free()


def test_a_guest_whose_tpm_is_not_taken_stays(ends: Ends, disk: Path, tmp_path: Path) -> None:
    """Neither without the authority's permission, nor with an altered state; and it goes on as if nothing had been tried."""
    with TpmMachine(ends.here, root=disk) as source:
        source.wait_for(HANDLE, ends.key)
        fill(source)
        before = seen(source)
        signing = source.start_signing(OUTPUT)

        with TpmMachine(ends.there, root=disk, incoming="defer") as destination:
            refuses(destination, f"unix:{tmp_path / 'way'}", lambda: migrate(source, f"unix:{tmp_path / 'way'}", returns=True))
        assert source.qmp("query-status")["status"] == "running"

        permit_move(ends.here, ends.there)
        stream = tmp_path / "stream"
        assert migrate(source, f"exec:cat >{stream}") == "completed"
        source.cont()
        bend(stream)
        with TpmMachine(ends.there, root=disk, incoming="defer") as destination:
            refuses(destination, f"exec:cat {stream}")

        at_end = lines(source)
        wait_for(lambda: lines(source) > at_end + 20, 30, "signatures of the one that stays")
        assert seen(source) == before
        for one in stop(source, signing):
            verify_signed(one, {name_of(HANDLE, ends.key): ends.key})


# ---- what the guest has ----------------------------------------------------------------------------------------------------------


def fill(machine: TpmMachine) -> None:
    """Its TPM gets a loaded key, a session, an index and a measurement."""
    machine.run(["tpm2_pcrextend", f"7:sha256={MEASURED.hex()}"])
    machine.write("/root/content", CONTENT)
    machine.run(f"tpm2_nvdefine -C o -s {len(CONTENT)} {INDEX:#x} && tpm2_nvwrite -C o -i /root/content {INDEX:#x}")
    guest = machine.guest("/dev/tpm0")
    guest.primary()
    guest.session()


def seen(machine: TpmMachine) -> dict[str, Any]:
    guest = machine.guest("/dev/tpm0")
    (loaded,) = guest.handles(TRANSIENT)
    return {
        "pcrs": machine.pcrs(),
        "loaded": (loaded, guest.public(loaded)),
        "sessions": guest.handles(0x02000000),
        "index": machine.run(["tpm2_nvread", "-C", "o", f"{INDEX:#x}"]).stdout,
        "persistent": guest.handles(0x81000000),
        "key": guest.public(HANDLE),
    }


def lines(machine: TpmMachine) -> int:
    return int(machine.run(["wc", "-l", OUTPUT]).stdout.split()[0])


def stop(machine: TpmMachine, signing: GuestProcess) -> list[Any]:
    """Of a process that began in another machine, perhaps; returns what it has made."""
    machine.run(["kill", str(signing.pid)])
    return [signed(line) for line in machine.read(OUTPUT).decode().split("\n")[:-1]]


# ---- QEMU ------------------------------------------------------------------------------------------------------------------------


def migrate(machine: TpmMachine, uri: str, returns: bool = False) -> str:
    """Returns how it ended.  With `returns` the source waits for what the destination says, as libvirt has it."""
    capability = {"capability": "return-path", "state": returns}
    machine.qmp("migrate-set-capabilities", capabilities=[capability])
    machine.qmp("migrate-set-parameters", max_bandwidth=1 << 33)
    machine.qmp("migrate", uri=uri)
    end = time.monotonic() + 60
    while (status := machine.qmp("query-migrate")["status"]) not in ("completed", "failed"):
        assert time.monotonic() < end, f"it is {status} after 60 s"
        time.sleep(0.1)
    return str(status)


def refuses(destination: TpmMachine, uri: str, send: Callable[[], str] | None = None) -> None:
    """What comes from there, after `send` if that is not there yet."""
    returns = {"capability": "return-path", "state": send is not None}
    destination.qmp("migrate-set-capabilities", capabilities=[returns])
    destination.qmp("migrate-incoming", uri=uri)
    assert send is None or send() == "failed"
    wait_for(lambda: not destination.running, 30, "the end of the machine that was to come")
    assert "Setting the stateblob (type 1) failed" in destination.said()


def bend(stream: Path) -> None:
    """Another byte in the state of the TPM."""
    data = bytearray(stream.read_bytes())
    place = data.index(SECTION) + len(SECTION) + 400
    data[place] ^= 1
    stream.write_bytes(data)
