"""What a guest was booted as, signed by the TPM for whoever asked with a nonce (part 1, 31; TPM2_Quote, part 3, 18.4)."""

from __future__ import annotations

from dataclasses import dataclass

from hsmvisord import limits
from hsmvisord.tpm.commands import Commands
from hsmvisord.tpm.endorsement import ATTESTATION_KEY
from hsmvisord.tpm.engine import TpmFault
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import EMPTY_PASSWORD, PCRS, PLATFORM, Code, sized


@dataclass(frozen=True)
class Quoted:
    attest: bytes  #: TPMS_ATTEST
    signature: bytes  #: ECDSA-Sig-Value, DER
    values: tuple[bytes, ...]  #: of the PCRs, ascending; SHA-256
    key: bytes  #: SubjectPublicKeyInfo, DER, of the attestation key


def check(nonce: bytes, pcrs: tuple[int, ...]) -> None:
    """Raises ValueError."""
    if not limits.MIN_TPM_NONCE <= len(nonce) <= limits.MAX_TPM_NONCE:
        raise ValueError(f"a nonce has {limits.MIN_TPM_NONCE} to {limits.MAX_TPM_NONCE} bytes: {len(nonce)}")
    if not pcrs or len(set(pcrs)) != len(pcrs) or not set(pcrs) <= set(range(PCRS)):
        raise ValueError(f"PCRs are 1 to {PCRS} different ones of 0 to {PCRS - 1}")


def quote(commands: Commands, nonce: bytes, pcrs: tuple[int, ...]) -> Quoted:
    """Within `Commands.room`, so that values and signature are of one moment.  Raises Tpm2Error, BadResponse, TpmFault."""
    values = _values(commands, pcrs)
    with commands.primary(PLATFORM, ATTESTATION_KEY) as (handle, public):
        parameters = sized(nonce) + tpm2.number(tpm2.NULL_ALGORITHM) + tpm2.selection(pcrs)
        answer = commands.do(Code.QUOTE, (handle,), parameters, EMPTY_PASSWORD)
        answer.parameters()
        attest, signature = answer.sized(), tpm2.ecdsa_signature(answer.rest())
    return Quoted(attest, signature, values, tpm2.subject_public_key_info(public))


def _values(commands: Commands, pcrs: tuple[int, ...]) -> tuple[bytes, ...]:
    """A response has eight at most (part 2, 10.9.7)."""
    found: list[bytes] = []
    left = sorted(pcrs)
    while left:
        answer = commands.do(Code.PCR_READ, (), tpm2.selection(left))
        answer.number()
        answer.take(len(tpm2.selection(left)))
        count = answer.number()
        if not 0 < count <= len(left):
            raise TpmFault("the guest's firmware gave the TPM a bank of PCRs that is not for SHA-256")
        found += [answer.sized() for _ in range(count)]
        left = left[count:]
    return tuple(found)
