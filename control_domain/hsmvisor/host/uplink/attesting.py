"""What a manager asks of a guest's boot: its module's TPM attests it.  It changes nothing, so it may be asked twice."""

from __future__ import annotations

import asyncio
import logging

from hsmvisor.host import limits
from hsmvisor.host.modules import Modules
from hsmvisor.host.uplink.told import Given, Result
from hsmvisor.serving.errors import ServiceError
from hsmvisor.serving.text import clean
from hsmvisor_rpc.sealed.canonical import MalformedRecord
from hsmvisor_rpc.sealed.endorsement import TpmCertificates
from hsmvisor_rpc.sealed.fleet import AttestationAsked

_log = logging.getLogger(__name__)

_WITHIN = 20.0  #: seconds that a TPM has


async def attest(modules: Modules, given: Given) -> Result:
    """Never `again`: how often it is asked is the manager's to say.  Nor MALFORMED: so speaks a host that cannot attest."""
    try:
        asked = AttestationAsked.parse(given.attest)
        tpm = modules.get(limits.module_name(given.module)).faces.tpm
        async with asyncio.timeout(_WITHIN):
            attestation = await tpm.attest(asked.nonce, asked.pcrs)
        rsa, p256, platform = tpm.life.certificates
        certificates = TpmCertificates(rsa, p256, platform, tpm.ca_certificate).encode()
    except MalformedRecord as error:
        return Result(given.id, reason="QUESTION", detail=clean(str(error)))
    except ServiceError as error:
        return Result(given.id, reason=error.reason, detail=clean("; ".join(filter(None, (error.detail, error.hint)))))
    except TimeoutError:
        why = f"the TPM of module {clean(given.module)} has not answered within {_WITHIN:.0f} s"
        return Result(given.id, reason="TPM", detail=why)
    except Exception as error:
        _log.exception("module %s is not attested", clean(given.module))
        return Result(given.id, reason="INTERNAL", detail=f"an error inside the host service: {type(error).__name__}")
    return Result(given.id, done=True, attestation=attestation, tpm_certificates=certificates)
