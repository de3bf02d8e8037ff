"""What a host answers when it is asked what a guest's boot was: verified, or why it counts for nothing."""

from __future__ import annotations

import json
import logging

from hsmvisor.manager import limits
from hsmvisor.manager.store import measurements
from hsmvisor.manager.store.rows import HostRow, MeasurementRow
from hsmvisor.serving.text import clean
from hsmvisor_rpc.sealed.attestation import verify_attestation
from hsmvisor_rpc.sealed.endorsement import verify_certificates
from hsmvisor_rpc.sealed.refusal import Reason, Refusal
from sqlalchemy.ext.asyncio import AsyncConnection

_log = logging.getLogger(__name__)


async def take(
    connection: AsyncConnection,
    host: HostRow,
    id: str,
    done: bool,
    reason: str,
    detail: str,
    attestation: bytes,
    certificates: bytes,
    now: float,
) -> None:
    """Writes down what came of the question `id`; of one that nobody asked, nothing.  `certificates`: of the TPM."""
    row = await measurements.one(connection, id)
    if row is None or row.told_at:
        return
    found, why = _verified(host, row, attestation, certificates) if done else ({}, _why(host, reason, detail))
    told = json.dumps({str(number): value.hex() for number, value in sorted(found.items())}) if found else ""
    kept = {"attestation": attestation, "certificates": certificates} if found else {}
    await measurements.tell(connection, id, told_at=now, found=told, why=clean(why, limits.MAX_DETAIL), **kept)


def _why(host: HostRow, reason: str, detail: str) -> str:
    if reason == Reason.MALFORMED:  # that is what a host says of a command without a signed one in it, which it does not know
        release = host.version or "unknown"
        return f"the release of its host ({release}) is too old to attest a guest's boot: upgrade host {host.name}"
    return detail or reason or "its host does not say why"


def _verified(host: HostRow, row: MeasurementRow, attestation: bytes, certificates: bytes) -> tuple[dict[int, bytes], str]:
    """Returns the PCRs that were asked for, or why there are none."""
    if len(attestation) > limits.MAX_ATTESTATION:
        return {}, f"its host's attestation has {len(attestation)} bytes, at most {limits.MAX_ATTESTATION} are taken"
    try:
        attested = verify_attestation(attestation, host.host_key, bytes.fromhex(row.module_id), row.nonce)
        verify_certificates(certificates, attested.identity)
    except Refusal as refusal:
        _log.error("%s: its host's attestation is not taken: %s", row.resource_id, refusal)
        return {}, f"its host's attestation is not taken: {refusal.reason}: {refusal.detail}"
    if missing := sorted(row.asked - attested.pcrs.keys()):
        return {}, f"its host's attestation says nothing of PCR {', '.join(map(str, missing))}"
    return {number: attested.pcrs[number] for number in row.asked}, ""
