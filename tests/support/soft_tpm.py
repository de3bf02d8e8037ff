"""A TPM of a test's own: PCRs that a boot extends, quoted with a key of ours (support/attesting.py has the structures)."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.tpm_ca import TpmCa
from hsmvisor_rpc.sealed.attestation import TpmIdentity
from hsmvisor_rpc.sealed.commands import fingerprint, raw_public
from hsmvisor_rpc.sealed.endorsement import TpmCertificates
from support.attesting import Quote, attestation
from support.certificates import spki

SHA256 = 0x000B


@functools.cache
def rsa_key() -> rsa.RSAPrivateKey:
    """Of all TPMs: it takes a while to make one."""
    return rsa.generate_private_key(65537, 2048)


@dataclass
class SoftTpm:
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    endorsement: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    pcrs: list[bytes] = field(default_factory=lambda: [bytes(32)] * 24)
    resets: int = 0
    off: bool = False

    def extend(self, pcr: int, event: bytes) -> None:
        self.pcrs[pcr] = hashlib.sha256(self.pcrs[pcr] + hashlib.sha256(event).digest()).digest()

    def boot(self, kernel: bytes) -> SoftTpm:
        """The guest starts anew, with this; all else is as ever."""
        self.pcrs, self.resets, self.off = [bytes(32)] * 24, self.resets + 1, False
        for pcr, event in ((0, b"firmware"), (2, b"option ROMs"), (4, kernel), (7, b"secure boot")):
            self.extend(pcr, event)
        return self

    @property
    def endorsement_keys(self) -> tuple[bytes, bytes]:
        return spki(rsa_key()), spki(self.endorsement)

    def certificates(self, host: Ed25519PrivateKey, module_id: bytes, name: str) -> TpmCertificates:
        ca = TpmCa(HostIdentity(host.private_bytes_raw()))
        return TpmCertificates(*astuple(ca.issue(name, module_id, *self.endorsement_keys)), ca.certificate)

    def attestation(self, host: Ed25519PrivateKey, module_id: bytes, name: str, nonce: bytes, pcrs: Sequence[int]) -> bytes:
        """Returns an encoded Attestation; `pcrs`: ascending."""
        host_id = fingerprint(raw_public(host.public_key()))
        authority = TpmCa(HostIdentity(host.private_bytes_raw())).public
        identity = TpmIdentity(host_id, module_id, name, spki(self.key), self.endorsement_keys, authority)
        values = tuple(self.pcrs[pcr] for pcr in pcrs)
        bits = sum(1 << pcr for pcr in pcrs).to_bytes(3, "little")
        digest = hashlib.sha256(b"".join(values)).digest()
        quote = Quote(nonce=nonce, resets=self.resets, selections=((SHA256, bits),), digest=digest)
        return attestation(quote.encode(), identity, self.key, host, pcrs=tuple(pcrs), values=values)
