"""Virtual machines with a TPM of ours, which is a module of a host: what its owner does with it, and what its guest says to it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from cryptography import x509
from hsmvisor_rpc.sealed.attestation import Attested, verify_attestation
from hsmvisor_rpc.sealed.commands import MOVE_IDENT, MOVE_KEY
from hsmvisor_rpc.v1 import hsmvisor_pb2 as pb
from hsmvisord.tpm.platform import Platform, PrivateKey
from hsmvisord.tpm.wanted import index_of
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import Code
from support.guest_machine import GuestMachine, GuestProcess
from support.host import Host, wait_for
from support.host_process import new_id
from support.tpm_guest import Guest, sign_command, signature_in, verify
from support.tpm_host import serving

HANDLE, SECOND = 0x81800001, 0x81800002  #: at which a module has keys
MATERIALS = {HANDLE: "first", SECOND: "second"}
INDEX = index_of(HANDLE)  #: of the certificate of the key at HANDLE
CRB, TIS = "tpm-crb", "tpm-tis"
PROGRAMS = Path(__file__).resolve().parents[1] / "integration/programs"
_PLACE = b"\xdd" * 32


class VmTpm:
    """A module of `host`, the TPM of one machine after the other.  `firmware`: theirs takes the platform's hierarchy."""

    def __init__(self, host: Host, name: str, firmware: bool = True) -> None:
        keys = {f"{handle:#x}": material for handle, material in MATERIALS.items()}
        self.host = host
        self.module = host.create(name, tpm=pb.Tpm(enabled=True, keys=keys, no_firmware=not firmware))
        serving(self.module)

    def qemu_arguments(self, driver: str = CRB) -> list[str]:
        asked = pb.DescribeDeviceRequest(name=self.module.name, face=pb.TPM, tpm_driver=driver)
        return list(self.host.process.modules.DescribeDevice(asked, timeout=20).qemu_arguments)

    def deliver(self, handle: int, key: PrivateKey, chain: tuple[x509.Certificate, ...] = ()) -> None:
        """The TPM has it a moment later; the key before it is destroyed."""
        material = MATERIALS[handle]
        if (generation := self.module.push(material, key, chain)) > 1:
            self.module.destroy_generation(material, generation - 1)

    def withdraw(self) -> None:
        """All keys, a moment later."""
        asked = pb.SetTokenPresentRequest(request_id=new_id(), name=self.module.name, present=False)
        self.host.process.modules.SetTokenPresent(asked, timeout=20)

    def kill(self) -> None:
        """Ends the TPM's process; returns when another one serves, with the state that was kept."""
        before = serving(self.module).pid
        os.kill(before, signal.SIGKILL)
        serving(self.module, not_pid=before)

    def wait_free(self) -> None:
        """Until no machine has it."""
        wait_for(lambda: not self.module.status().tpm.peer, 30, "the end of the machine before")

    def attested(self, *pcrs: int) -> Attested:
        """What the TPM itself says of its PCRs."""
        nonce = os.urandom(32)
        asked = pb.AttestTpmRequest(name=self.module.name, nonce=nonce, pcrs=pcrs)
        answer = self.host.process.modules.AttestTpm(asked, timeout=20)
        return verify_attestation(answer.attestation, self.host.key, self.module.status().module_id, nonce)

    def permit(self, leaves: bool, ident: bytes, key: bytes) -> None:
        """It may leave, or come: one end of a move."""
        self.host.pusher.move_tpm(self.module.name, leaves, ident, key)

    def close(self) -> None:
        self.module.destroy()


def permit_move(source: VmTpm, destination: VmTpm) -> None:
    """As `hsmvisor module move-tpm` does."""
    ident, key = os.urandom(MOVE_IDENT), os.urandom(MOVE_KEY)
    destination.permit(False, ident, key)
    source.permit(True, ident, key)


class TpmMachine(GuestMachine):
    """A machine that has a TPM.  `driver`: the interface that its guest sees."""

    def __init__(self, tpm: VmTpm, driver: str = CRB, arguments: Sequence[str] = (), **options: Any) -> None:
        tpm.wait_free()
        super().__init__(arguments=[*tpm.qemu_arguments(driver), *arguments], **options)
        self.tpm, self.driver = tpm, driver

    def boot(self, within: float = 120) -> Self:
        super().boot(within)
        if not self.incoming:
            for program in ("tpm_say.py", "tpm_sign.py"):
                self.copy_in(PROGRAMS / program, f"/root/{program}")
        return self

    def switch_off(self) -> None:
        """As a guest does it, whose kernel tells its TPM; what comes after `with` is a power cut."""
        self.start("sync; sleep 0.2; exec busybox poweroff -f")
        wait_for(lambda: not self.running, 30, "the machine's end")

    def says(self, commands: Sequence[bytes], device: str = "/dev/tpmrm0") -> list[bytes]:
        """Returns the responses."""
        text = "".join(f"{command.hex()}\n" for command in commands).encode()
        said = self.run(["python3", "/root/tpm_say.py", device], stdin=text, timeout=60).stdout
        return [bytes.fromhex(line) for line in said.decode().split()]

    def guest(self, device: str = "/dev/tpmrm0") -> Guest:
        """`device`: by /dev/tpm0, without the kernel's resource manager, what it loads stays loaded."""
        return Guest(lambda command: self.says([command], device)[0])

    def start_signing(self, output: str) -> GuestProcess:
        """With the key at HANDLE, without a pause; each signature is a line (signed) of the guest's file `output`."""
        return self.start(["python3", "/root/tpm_sign.py", *signing()], output=output)

    def has(self, handle: int, key: PrivateKey | None) -> bool:
        """Says whether that is the key at `handle`; None: whether there is none."""
        name = name_in(self.says([tpm2.command(Code.READ_PUBLIC, (handle,))])[0])
        return name == (name_of(handle, key) if key is not None else b"")

    def wait_for(self, handle: int, key: PrivateKey | None) -> None:
        """Until that is the key at `handle`; None: until there is none."""
        wait_for(lambda: self.has(handle, key), 20, "the key in the TPM")

    def pcrs(self) -> Mapping[int, bytes]:
        """Of the SHA-256 bank, as the guest's kernel tells them."""
        said = self.run("cd /sys/class/tpm/tpm0/pcr-sha256 && for n in $(seq 0 23); do cat $n; done").stdout.decode().split()
        return {number: bytes.fromhex(value) for number, value in enumerate(said)}


def name_of(handle: int, key: PrivateKey) -> bytes:
    """What its Name is in the TPM, of one that signs."""
    return tpm2.name_of(Platform.public(handle, key.public_key(), False))


def name_in(answer: bytes) -> bytes:
    """Of a response to ReadPublic; empty of one that failed."""
    if tpm2.HEAD.unpack_from(answer)[2]:
        return b""
    response = tpm2.Response(Code.READ_PUBLIC, answer)
    response.sized()
    return response.sized()


# ---- signatures without a pause -----------------------------------------------------------------------------------------


class Signed(NamedTuple):
    """One line of programs/tpm_sign.py."""

    digest: bytes
    before: bytes  #: the Name of the key at that time
    signature: bytes  #: TPMT_SIGNATURE
    after: bytes  #: the Name of the key then


def signing() -> list[str]:
    """The arguments of programs/tpm_sign.py."""
    return [tpm2.command(Code.READ_PUBLIC, (HANDLE,)).hex(), sign_command(HANDLE, _PLACE).hex()]


def signed(line: str) -> Signed:
    """Fails where the TPM refused anything."""
    digest, *answers = map(bytes.fromhex, line.split())
    results = [tpm2.HEAD.unpack_from(answer)[2] for answer in answers]
    assert results == [0, 0, 0], [f"{result:#x}" for result in results]
    before, made, after = answers
    return Signed(digest, name_in(before), signature_in(made), name_in(after))


def verify_signed(one: Signed, keys: Mapping[bytes, PrivateKey]) -> None:
    """Fails unless it is the signature of the key that was there, of all by Name: of one of two, where that changed meanwhile."""
    if one.before == one.after:
        verify(keys[one.before], one.digest, one.signature)
    else:
        assert verifies(keys[one.before], one) or verifies(keys[one.after], one)


def verifies(key: PrivateKey, one: Signed) -> bool:
    try:
        verify(key, one.digest, one.signature)
    except Exception:
        return False
    return True
