"""A guest with Debian's kernel and a TPM of ours: seen by CRB and by TIS, used while the module swaps its key."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hsmvisord.tpm.platform import Platform
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, PLATFORM, Code
from support.certificates import pkcs8
from support.guest_machine import GuestMachine
from support.tpm_guest import OWNER, Guest, sign_command, signature_in, verify
from support.tpm_rig import TpmProcess

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]

PROGRAM = Path(__file__).parent / "programs" / "tpm_say.py"
HANDLE = 0x81800001
DIGEST = hashlib.sha256(b"what a guest has to sign").digest()
READ = tpm2.command(Code.READ_PUBLIC, (HANDLE,))


@dataclass
class Stand:
    tpm: TpmProcess
    machine: GuestMachine

    def say(self, command: bytes) -> bytes:
        return self.says([command])[0][0]

    def says(self, commands: list[bytes], loops: int = 1) -> list[list[bytes]]:
        text = "".join(f"{command.hex()}\n" for command in commands).encode()
        self.machine.write("/root/said", text)
        done = self.machine.run(f"python3 /root/tpm_say.py {loops} </root/said", timeout=120)
        return [[bytes.fromhex(word) for word in line.split()] for line in done.stdout.decode().splitlines()]

    @property
    def guest(self) -> Guest:
        return Guest(self.say)

    def deliver(self) -> ec.EllipticCurvePrivateKey:
        key = ec.generate_private_key(ec.SECP256R1())
        self.want({HANDLE: key})
        return key

    def want(self, keys: dict[int, ec.EllipticCurvePrivateKey]) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.tpm.directory / "manage.sock"))
            sock.sendall(json.dumps({str(handle): pkcs8(key).hex() for handle, key in keys.items()}).encode() + b"\n")
            assert sock.recv(1000) == b"done\n"


@pytest.fixture(scope="module", params=["tpm-crb", "tpm-tis"])
def stand(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    tpm = TpmProcess(tmp_path_factory.mktemp("tpm"), for_qemu=True)
    arguments = ["-chardev", f"socket,id=tpm,path={tpm.control}", "-tpmdev", "emulator,id=tpm0,chardev=tpm"]
    with GuestMachine(arguments=[*arguments, "-device", f"{request.param},tpmdev=tpm0"]) as machine:
        machine.copy_in(PROGRAM, "/root/tpm_say.py")
        yield Stand(tpm, machine)
    tpm.close()


def test_the_kernel_sees_it(stand: Stand) -> None:
    found = stand.machine.run(
        "cat /sys/class/tpm/tpm0/tpm_version_major; ls -d /sys/class/tpm/tpm0/pcr-*; ls /dev/tpm0 /dev/tpmrm0"
    )
    assert found.stdout.decode().split() == ["2", "/sys/class/tpm/tpm0/pcr-sha256", "/dev/tpm0", "/dev/tpmrm0"]


def test_it_signs_with_a_delivered_key(stand: Stand) -> None:
    key = stand.deliver()
    result, signature = stand.guest.sign(HANDLE, DIGEST)
    assert result == 0
    verify(key, DIGEST, signature)


def test_swaps_while_it_signs(stand: Stand) -> None:
    """It reads the public part at each use: no error, and each signature is that of the key of its time."""
    keys = {tpm2.name_of(public(key)): key for key in [stand.deliver()]}
    loops = 300
    stand.machine.write("/root/loop", "".join(f"{c.hex()}\n" for c in (READ, sign_command(HANDLE, DIGEST), READ)).encode())
    process = stand.machine.start(f"python3 /root/tpm_say.py {loops} </root/loop", output="/root/looped")
    for _ in range(20):
        key = stand.deliver()
        keys[tpm2.name_of(public(key))] = key
        time.sleep(0.02)
    assert process.wait(120) == 0
    lines = stand.machine.read("/root/looped").decode().splitlines()
    assert len(lines) == loops
    names = set()
    for before, signed, after in (map(bytes.fromhex, line.split()) for line in lines):
        assert all(tpm2.HEAD.unpack_from(answer)[2] == 0 for answer in (before, signed, after))
        if before == after:
            names.add(name := name_in(before))
            verify(keys[name], DIGEST, signature_in(signed))
    assert len(names) > 3


def test_the_guest_cannot_take_it_away(stand: Stand) -> None:
    """Without a firmware nobody else has the platform's hierarchy."""
    key = stand.deliver()
    for hierarchy in (OWNER, PLATFORM):
        result, _ = stand.guest.say(Code.EVICT_CONTROL, (hierarchy, HANDLE), struct.pack(">I", HANDLE), EMPTY_PASSWORD)
        assert result
    verify(key, DIGEST, stand.guest.sign(HANDLE, DIGEST)[1])
    stand.want({})
    assert stand.guest.sign(HANDLE, DIGEST)[0], "and the module may"


def public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return tpm2.public_area(key.public_key(), Platform.attributes(decrypt=False))


def name_in(answer: bytes) -> bytes:
    """Of a response to ReadPublic."""
    response = tpm2.Response(Code.READ_PUBLIC, answer)
    response.sized()
    return response.sized()
