"""Keys of an owner's own on their way to a manager's issuer: sealed here, so that nobody between sees them."""

from __future__ import annotations

from hsmvisor.bundle import Bundle, BundleError
from hsmvisor_rpc.sealed import envelope
from hsmvisor_rpc.sealed.commands import check
from hsmvisor_rpc.sealed.envelope import KeyMaterial, recipient_fingerprint
from hsmvisor_rpc.sealed.fleet import ImportContext, IssuerStatement
from hsmvisor_rpc.sealed.limits import MAX_PKCS8


def checked_issuer(recipient: bytes, signature: bytes, root: bytes) -> bytes:
    """Returns the issuer's key, which the fleet's root (raw Ed25519) has signed.  Raises Refusal."""
    check(signature, IssuerStatement(recipient).encode(), root, "issuer's key")
    return recipient


def seal_import(bundle: Bundle, issuer_public: bytes, request_id: str) -> bytes:
    """Returns the envelope; the certificates and the public key travel beside it.  Raises BundleError."""
    if bundle.pkcs8 is None:
        raise BundleError("certificates alone were given: to import is to give the private key")
    if len(bundle.pkcs8) > MAX_PKCS8:
        raise BundleError(f"the key has {len(bundle.pkcs8)} bytes, at most {MAX_PKCS8} are taken")
    context = ImportContext(request_id, bundle.public_key, recipient_fingerprint(issuer_public))
    try:
        return envelope.seal(KeyMaterial(bundle.pkcs8), issuer_public, context)
    except ValueError as error:
        raise BundleError(f"the issuer's key cannot be sealed to: {error}") from None
