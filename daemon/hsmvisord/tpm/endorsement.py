"""Who a TPM is: its endorsement keys and their certificates, as swtpm_setup leaves them for a guest, and the key by which its
module attests what the guest was booted as."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import reduce
from operator import or_

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hsmvisord import limits
from hsmvisord.tpm.certificates import Certificates
from hsmvisord.tpm.commands import Commands
from hsmvisord.wire import tpm2
from hsmvisord.wire.tpm2 import ENDORSEMENT, NULL_ALGORITHM, PLATFORM, Attributes, Code, sized

#: NV indices of the certificates (EK Credential Profile 2.3, 2.2.1.4 and 2.2.1.5; of the platform's, as swtpm_setup has it).
RSA_INDEX, P256_INDEX, PLATFORM_INDEX = INDICES = 0x01C00002, 0x01C0000A, 0x01C08000

_MADE_HERE = (Attributes.FIXED_TPM, Attributes.FIXED_PARENT, Attributes.SENSITIVE_DATA_ORIGIN, Attributes.RESTRICTED)
_AES_CFB = struct.pack(">HHH", tpm2.AES, 128, tpm2.CFB)
_P256 = tpm2.CURVES["secp256r1"]


def _endorsement(kind: int, parameters: bytes, unique: bytes) -> bytes:
    attributes = reduce(or_, _MADE_HERE) | Attributes.ADMIN_WITH_POLICY | Attributes.DECRYPT
    return tpm2.template(kind, attributes, _AES_CFB + parameters, unique, tpm2.secret_policy(ENDORSEMENT))


#: TPMT_PUBLIC of the endorsement keys (EK Credential Profile 2.3, annex B.3.3 and B.3.4: templates L-1 and L-2).
RSA_KEY = _endorsement(tpm2.RSA, struct.pack(">HHI", NULL_ALGORITHM, 2048, 0), sized(bytes(256)))
P256_KEY = _endorsement(tpm2.ECC, struct.pack(">HHH", NULL_ALGORITHM, _P256, NULL_ALGORITHM), sized(bytes(32)) * 2)

#: TPMT_PUBLIC of the attestation key, of the platform's hierarchy: it signs what the TPM itself says, and nothing else
#: (part 1, 31.4: RESTRICTED).  The same template makes the same key of the TPM's seed.
ATTESTATION_KEY = tpm2.template(
    tpm2.ECC,
    reduce(or_, _MADE_HERE) | Attributes.USER_WITH_AUTH | Attributes.NO_DA | Attributes.SIGN,
    struct.pack(">HHHHH", NULL_ALGORITHM, tpm2.ECDSA, tpm2.SHA256, _P256, NULL_ALGORITHM),
    sized(b"hsmvisor attestation key 1") + sized(b""),
)


@dataclass(frozen=True)
class Identity:
    """SubjectPublicKeyInfo, DER, of each key."""

    rsa: bytes
    p256: bytes
    attestation: bytes
    certificates: tuple[bytes, ...]  #: those that are there, of these endorsement keys and of the platform; or none


def check(found: Identity, rsa: bytes, p256: bytes, platform: bytes) -> None:
    """Raises ValueError unless these are certificates (DER) of its endorsement keys, and one of the platform."""
    for der in (rsa, p256, platform):
        if not 0 < len(der) <= limits.MAX_TPM_CERTIFICATE:
            raise ValueError(f"a certificate in a TPM has 1 to {limits.MAX_TPM_CERTIFICATE} bytes: {len(der)}")
    for name, der, key in (("RSA", rsa, found.rsa), ("P-256", p256, found.p256)):
        if not _is_for(der, key):
            raise ValueError(f"a certificate that is not of the TPM's endorsement key of {name}")


def put(certificates: Certificates, rsa: bytes, p256: bytes, platform: bytes) -> None:
    for index, der in ((RSA_INDEX, rsa), (P256_INDEX, p256), (PLATFORM_INDEX, platform)):
        if certificates.at(index) != der:
            certificates.put(index, der)


def identity(commands: Commands, certificates: Certificates) -> Identity:
    """Of a TPM that was started to be asked this and nothing else: its owner's hierarchies are cleared, or a guest's password of
    one of them would be asked for.  That changes no seed that these keys are made of."""
    commands.by_policy(Code.CLEAR_CONTROL, (PLATFORM,), b"\0")
    commands.by_policy(Code.CLEAR, (PLATFORM,))
    found = []
    for hierarchy, template in ((ENDORSEMENT, RSA_KEY), (ENDORSEMENT, P256_KEY), (PLATFORM, ATTESTATION_KEY)):
        with commands.primary(hierarchy, template) as (_, public):
            found.append(tpm2.subject_public_key_info(public))
    there = tuple(certificates.at(index) for index in (RSA_INDEX, P256_INDEX, PLATFORM_INDEX))
    whole = _is_for(there[0], found[0]) and _is_for(there[1], found[1]) and bool(there[2])
    return Identity(found[0], found[1], found[2], there if whole else ())


def _is_for(certificate: bytes, key: bytes) -> bool:
    try:
        found = x509.load_der_x509_certificate(certificate).public_key()
    except ValueError:
        return False
    return found.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == key
