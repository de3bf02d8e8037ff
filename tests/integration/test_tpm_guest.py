"""Guests with Debian's kernel and a TPM of ours: seen by CRB and by TIS, used while its module swaps the key; two of them."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hsmvisord.tpm.guard import RC_HIERARCHY
from hsmvisord.tpm.platform import PrivateKey
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, PLATFORM, Code, sized
from support.host import Host, wait_for
from support.tpm_guest import DUPLICATE, OBJECT_CHANGE_AUTH, OWNER, verify
from support.tpm_vm import (
    CRB,
    HANDLE,
    SECOND,
    TIS,
    Signed,
    TpmMachine,
    VmTpm,
    name_of,
    signed,
    signing,
    verifies,
    verify_signed,
)

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]

SWAPS = 100
DIGEST = hashlib.sha256(b"what a guest has to sign").digest()
#: What tpm2-tools make of one signature, each program by itself: which key it is, the signature, which key it is then.  tpm2_sign
#: reads the public part, and binds the command to the Name that this has: where another key comes between, it is
#: refused with TPM_RC_BAD_AUTH, and is right when it is run again.
SIGN = f"""set -e
for n in $(seq $1); do
    tpm2_readpublic -Q -c {HANDLE:#x} -n before.$n
    until tpm2_sign -Q -c {HANDLE:#x} -g sha256 -d -f tss -o signature.$n digest 2>errors; do
        grep -q 0x000009a2 errors || {{ cat errors; exit 1; }}
        echo again >>again
    done
    tpm2_readpublic -Q -c {HANDLE:#x} -n after.$n
done
"""
BY_TOOLS = 12


@pytest.fixture(scope="module", params=[CRB, TIS])
def machine(request: pytest.FixtureRequest, shared_host: Host) -> Iterator[TpmMachine]:
    """No firmware takes the platform's hierarchy: of the first one the module knows it, of the second one nobody has said so."""
    tpm = VmTpm(shared_host, f"with-{request.param}", firmware=request.param == TIS)
    with TpmMachine(tpm, request.param) as machine:
        yield machine
    tpm.close()


def deliver(machine: TpmMachine, handle: int = HANDLE) -> ec.EllipticCurvePrivateKey:
    """Returns a new key that the guest has."""
    key = ec.generate_private_key(ec.SECP256R1())
    machine.tpm.deliver(handle, key)
    machine.wait_for(handle, key)
    return key


def test_the_kernel_sees_it(machine: TpmMachine) -> None:
    found = machine.run("cat /sys/class/tpm/tpm0/tpm_version_major; ls -d /sys/class/tpm/tpm0/pcr-*; ls /dev/tpm0 /dev/tpmrm0")
    assert found.stdout.decode().split() == ["2", "/sys/class/tpm/tpm0/pcr-sha256", "/dev/tpm0", "/dev/tpmrm0"]
    driver = machine.run("basename $(readlink /sys/class/tpm/tpm0/device/driver)").stdout.decode().strip()
    assert driver == machine.driver.replace("-", "_")


def test_it_signs_with_a_delivered_key(machine: TpmMachine) -> None:
    key = deliver(machine)
    result, signature = machine.guest().sign(HANDLE, DIGEST)
    assert result == 0
    verify(key, DIGEST, signature)


# ---- swaps ------------------------------------------------------------------------------------------------------------------


@dataclass
class Heard:
    """What a guest's program says that signs without a pause, as it comes."""

    lines: list[str] = field(default_factory=list)

    def listen(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock.makefile() as file:
            self.lines.extend(iter(file.readline, ""))

    def saw(self, name: bytes) -> bool:
        return bool(self.lines) and name in (signed(self.lines[-1]).before, signed(self.lines[-1]).after)


def test_swaps_while_it_signs(machine: TpmMachine) -> None:
    """A hundred, each of which the guest sees: it reads the public part at each use, meets no error, and each signature is that of
    the key of its time."""
    keys: dict[bytes, PrivateKey] = {}

    heard = Heard()

    def swap() -> PrivateKey:
        key = ec.generate_private_key(ec.SECP256R1())
        keys[name_of(HANDLE, key)] = key
        machine.tpm.deliver(HANDLE, key)
        return key

    def wait_heard() -> None:
        wait_for(lambda: heard.saw(list(keys)[-1]), 20, "a signature with the key")

    machine.wait_for(HANDLE, swap())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listening = threading.Thread(target=heard.listen, args=(listener,))
        listening.start()
        command = f"python3 /root/tpm_sign.py {' '.join(signing())} 2>/root/errors | busybox nc 10.0.2.2 {port}"
        process = machine.start(command)
        wait_heard()
        for _ in range(SWAPS):
            swap()
            wait_heard()
        process.kill()
        listening.join(20)
    assert machine.read("/root/errors") == b""
    seen = [signed(line) for line in heard.lines if line.endswith("\n")]
    for one in seen:
        verify_signed(one, keys)
    assert {name for one in seen for name in (one.before, one.after)} == keys.keys() and len(keys) == SWAPS + 1


def test_swaps_while_tpm2_sign_does(machine: TpmMachine) -> None:
    keys = {name_of(HANDLE, key): key for key in [deliver(machine)]}
    machine.write("/root/sign", SIGN)
    machine.write("/root/digest", DIGEST)
    process = machine.start(["sh", "/root/sign", str(BY_TOOLS)], output="/root/said")
    while process.poll() is None:
        key = ec.generate_private_key(ec.SECP256R1())
        keys[name_of(HANDLE, key)] = key
        machine.tpm.deliver(HANDLE, key)
        time.sleep(0.3)
    assert process.wait() == 0, process.output().decode()
    made = [
        Signed(DIGEST, *(machine.read(f"/root/{part}.{number}") for part in ("before", "signature", "after")))
        for number in range(1, BY_TOOLS + 1)
    ]
    order = list(keys)
    for one in made:
        between = order[order.index(one.before) : order.index(one.after) + 1]  # several came while a program ran
        assert any(verifies(keys[name], one) for name in between)
    assert len({one.before for one in made}) > BY_TOOLS / 3
    refused = machine.run("cat again 2>/dev/null || true").stdout.split()
    assert len(refused) < len(keys), "no more often than another key came"


def test_the_guest_cannot_take_it_away(machine: TpmMachine) -> None:
    """Nor give it another authorization, duplicate it, or keep the module out."""
    key, guest = deliver(machine), machine.guest()
    evict, nobody = struct.pack(">I", HANDLE), sized(b"") + struct.pack(">H", tpm2.NULL_ALGORITHM)
    for code, handles, parameters, refused in (
        (Code.EVICT_CONTROL, (OWNER, HANDLE), evict, 0x285),
        (Code.EVICT_CONTROL, (PLATFORM, HANDLE), evict, RC_HIERARCHY),
        (Code.SET_PRIMARY_POLICY, (PLATFORM,), sized(bytes(32)) + struct.pack(">H", tpm2.SHA256), RC_HIERARCHY),
        (OBJECT_CHANGE_AUTH, (HANDLE, HANDLE), sized(b"mine"), 0x124),
        (DUPLICATE, (HANDLE, tpm2.NULL), nobody, 0x124),
    ):
        assert guest.say(code, handles, parameters, EMPTY_PASSWORD)[0] == refused, hex(code)
    verify(key, DIGEST, machine.guest().sign(HANDLE, DIGEST)[1])
    machine.tpm.withdraw()
    machine.wait_for(HANDLE, None)
    assert machine.guest().sign(HANDLE, DIGEST)[0] == 0x18B, "and the module may"


# ---- two of them ------------------------------------------------------------------------------------------------------------


def test_two_guests_side_by_side(shared_host: Host) -> None:
    """Each has its own TPM: other keys, PCRs and endorsement keys; what is done to one is not done to the other."""
    ours, theirs = (VmTpm(shared_host, name, firmware=False) for name in ("one", "another"))
    with TpmMachine(ours) as one, TpmMachine(theirs) as another:
        mine, yours = deliver(one), deliver(another)
        deliver(one, SECOND)
        for machine, key in ((one, mine), (another, yours)):
            verify(key, DIGEST, machine.guest().sign(HANDLE, DIGEST)[1])
        assert another.has(SECOND, None)

        one.run(f"tpm2_pcrextend 7:sha256={'01' * 32}")
        assert one.pcrs()[7] != another.pcrs()[7] == bytes(32)
        assert ours.attested(7).pcrs[7] == one.pcrs()[7] and theirs.attested(7).pcrs[7] == bytes(32)

        endorsements = []
        for machine, tpm in ((one, ours), (another, theirs)):
            machine.run("tpm2_createek -Q -c ek.ctx -G ecc -u ek.der -f der && tpm2_flushcontext -t")
            endorsements.append(machine.read("/root/ek.der"))
            assert endorsements[-1] in tpm.attested(7).identity.endorsement_keys
        assert endorsements[0] != endorsements[1]

        ours.withdraw()
        one.wait_for(HANDLE, None)
        assert another.has(HANDLE, yours)
    ours.close()
    theirs.close()
