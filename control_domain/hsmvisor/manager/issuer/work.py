"""What a child does with the one key of its call: makes, opens or unwraps it, seals it, and tells what is public."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hsmvisor.bundle import Bundle, BundleError
from hsmvisor.manager.ca import names
from hsmvisor.manager.ca.names import BadName, Name
from hsmvisor.manager.issuer import calls, escrow, keys, limits
from hsmvisor.manager.issuer.calls import Answer, Envelopes, Make, SealTo, Take, Whole
from hsmvisor.manager.issuer.escrow import EscrowContext, ProviderFault, Wrapper
from hsmvisor.manager.issuer.keys import BadKey, PrivateKey
from hsmvisor_rpc.sealed import envelope
from hsmvisor_rpc.sealed import limits as sealed
from hsmvisor_rpc.sealed.canonical import Record
from hsmvisor_rpc.sealed.envelope import EnvelopeContext, KeyMaterial, RecipientKey, recipient_fingerprint
from hsmvisor_rpc.sealed.fleet import ImportContext
from hsmvisor_rpc.sealed.refusal import Refusal

Tell = Callable[[Record], None]


class Work:
    """Its repr shows nothing."""

    def __init__(self, recipient: RecipientKey, wrapper: Wrapper | None) -> None:
        self._recipient, self._wrapper = recipient, wrapper

    def probe(self, tell: Tell) -> None:
        """Tells an empty answer when the provider is there.  Raises ProviderFault."""
        self._provider().probe()
        tell(Answer(b"", b"", (), b""))

    def carry_out(self, whole: Whole, tell: Tell) -> None:
        """Tells envelopes, and then the answer.  Raises BadKey, ProviderFault, OverLimit, MalformedRecord."""
        call = whole.call
        certificates: tuple[bytes, ...] = ()
        if isinstance(call, Make):
            key, wanted = keys.make(call.key_type), _names(call.names)
        elif isinstance(call, Take):
            key, wanted = self._opened(call), ()
            certificates = _chain(keys.pkcs8(key), call.certificates)
        else:
            key, wanted = self._unwrapped(call), ()
        pkcs8, public_key = keys.pkcs8(key), keys.spki(key)
        csr = keys.request(key, wanted)  # of one that was not made here too: its signature shows that the key is whole
        wrapped = b""
        if call.line and not isinstance(call, calls.Reseal):
            wrapped = escrow.wrap(self._provider(), pkcs8, EscrowContext(call.line, call.generation, public_key))
        for portion in _sealed(KeyMaterial(pkcs8), whole.targets):
            tell(Envelopes(tuple(portion)))
        tell(Answer(public_key, csr, certificates, wrapped))

    def _provider(self) -> Wrapper:
        if self._wrapper is None:
            raise ProviderFault("no keys are kept: the manager is configured without escrow")
        return self._wrapper

    def _opened(self, call: Take) -> PrivateKey:
        context = ImportContext(call.request, call.public_key, recipient_fingerprint(self._recipient.public))
        try:
            material = self._recipient.open(call.envelope, context)
        except Refusal:
            raise BadKey(
                "the imported key's envelope does not open: it was altered, or sealed for another issuer, request or public key"
            ) from None
        key = keys.load(material.pkcs8)
        if keys.spki(key) != call.public_key:
            raise BadKey("the imported key is not the one of the public key that was told with it")
        return key

    def _unwrapped(self, call: calls.Reseal) -> PrivateKey:
        pkcs8, public_key = escrow.unwrap(self._provider(), call.wrapped, call.line, call.generation)
        key = keys.load(pkcs8)
        if keys.spki(key) != public_key:
            raise BadKey("the kept key is not the one of its public key")
        return key

    def rehearse(self) -> None:
        """Loads what all this needs, with keys that nobody gets: files cannot be opened later."""
        every_kind = ("dns:example.org", "ip:192.0.2.1", "uri:urn:x", "email:a@example.org")
        target = SealTo(bytes(32), bytes(16), RecipientKey().public, "x", 1, 1).encode()
        for call in (Make("P-256", every_kind, "", 0, 1), Make("RSA-2048", (), "", 0, 1), Make("Ed25519", (), "", 0, 1)):
            self.carry_out(Whole(call, [target]), lambda record: None)
        with contextlib.suppress(BadKey):
            self.carry_out(Whole(Take("x", b"", b"", (), "", 0, 0)), lambda record: None)


def _names(texts: Sequence[str]) -> tuple[Name, ...]:
    try:
        return names.parse_all(texts) if texts else ()
    except BadName as error:
        raise BadKey(f"no request can be made: {error}") from None


def _chain(pkcs8: bytes, certificates: Sequence[bytes]) -> tuple[bytes, ...]:
    """Returns the key's chain in order.  Raises BadKey."""
    try:
        pem = b"".join(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in certificates)
        chain = Bundle.make(pkcs8, pem).certificates
    except (ValueError, x509.InvalidVersion):
        raise BadKey("a certificate that came with the key is not an X.509 certificate in DER") from None
    except BundleError as error:
        raise BadKey(str(error)) from None
    if len(chain) > sealed.MAX_CERTIFICATES:
        raise BadKey(f"a chain of {len(chain)} certificates, modules take at most {sealed.MAX_CERTIFICATES}")
    return chain


def _sealed(material: KeyMaterial, targets: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Gives envelopes in portions.  Raises BadKey, OverLimit, MalformedRecord."""
    portion: list[bytes] = []
    size = 0
    for encoded in targets:
        made = _seal(material, SealTo.decode(encoded))
        portion.append(made)
        size += len(made)
        if len(portion) == limits.PORTION or size >= limits.PORTION_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _seal(material: KeyMaterial, target: SealTo) -> bytes:
    calls.check_target(target)
    context = EnvelopeContext(
        target.host_id,
        target.module_id,
        recipient_fingerprint(target.recipient),
        target.material,
        target.generation,
        target.expires_at,
    )
    try:
        return envelope.seal(material, target.recipient, context)
    except ValueError:
        raise BadKey(f"module {target.module_id.hex()}: its recipient key cannot be sealed to") from None
