"""One authority's account and orders, with the `acme` library: calls that block, for a thread.

What that library lacks: an order that is taken up again by its URL, and one that says which certificate it replaces (RFC 9773, 5).
"""

from __future__ import annotations

import base64
import datetime
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from acme import client, errors, messages
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from hsmvisor.files import write_private
from hsmvisor.manager.ca.acme.challenges import DNS, HTTP, ChallengeFailed, Responder
from hsmvisor.manager.ca.interface import Later, Order, Reason, Refused, Window
from hsmvisor.manager.ca.names import Name
from josepy.json_util import field
from josepy.jwa import ES256
from josepy.jwk import JWKEC
from josepy.util import ComparableECKey
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

VALIDATION = datetime.timedelta(seconds=120)  #: that the authority may take to look at challenges
FINALIZATION = datetime.timedelta(seconds=120)
LEAST_PAUSE, LONGEST_PAUSE, AFTER_ERROR = 60.0, 86400.0, 6 * 3600.0  #: seconds between questions for windows (RFC 9773, 4.3.1)

#: What the authority says for good; all else may be otherwise later.
_FOR_GOOD = frozenset(
    {"badCSR", "badPublicKey", "caa", "rejectedIdentifier", "unsupportedIdentifier", "externalAccountRequired", "malformed"}
)
_REASONS = {
    Reason.UNSPECIFIED: 0,
    Reason.KEY_COMPROMISE: 1,
    Reason.AFFILIATION_CHANGED: 3,
    Reason.SUPERSEDED: 4,
    Reason.CESSATION: 5,
}
#: With which a server does not take what an order replaces (RFC 9773, 5); of those that RFC 8555 has not, the library says None.
_NOT_REPLACED = frozenset({None, "malformed", "unauthorized"})
NONCES = 4  #: attempts of which each may have had an old nonce
LONGEST_ANSWER = 1 << 20  #: bytes; a chain has a few thousand


class Replacing(messages.NewOrder):
    """A new order that says what it replaces."""

    replaces: str = field("replaces", omitempty=True)


def account_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Returns the key of the account, made and stored where there is none.  Raises Later."""
    try:
        if not path.exists():
            made = ec.generate_private_key(ec.SECP256R1())
            write_private(path, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise Later(f"the ACME account's key {path}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise Later(f"the ACME account's key {path} is no private key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Later(f"the ACME account's key {path} is no EC key")
    return key


def certificate_id(certificate: x509.Certificate) -> str:
    """Returns the certificate's unique identifier (RFC 9773, 4.1); empty where it names no authority key."""
    try:
        issuer = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        issuer = None
    if issuer is None:
        return ""
    serial = certificate.serial_number
    parts = (issuer, serial.to_bytes(serial.bit_length() // 8 + 1, "big"))
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


class _Bounded(HTTPAdapter):
    """The library reads an answer to its end, whatever it is."""

    def send(self, *arguments: Any, **options: Any) -> requests.Response:
        response = super().send(*arguments, **options)
        content = response.raw.read(LONGEST_ANSWER + 1, decode_content=True)
        response.close()
        if len(content) > LONGEST_ANSWER:
            raise requests.RequestException(f"an answer of more than {LONGEST_ANSWER} bytes")
        response.raw = io.BytesIO(content)
        return response


class _Network(client.ClientNetwork):
    """A nonce that the server does not take is another one's turn (RFC 8555, 6.5); the library tries twice, which is not enough."""

    def post(self, *arguments: Any, **options: Any) -> Any:
        for _ in range(NONCES):
            try:
                return super().post(*arguments, **options)
            except messages.Error as error:
                if error.code != "badNonce":
                    raise
        return super().post(*arguments, **options)


@dataclass(frozen=True)
class Finished:
    chain: str  #: PEM
    shown: tuple[str, ...]  #: names of which control was shown for this order
    known: tuple[str, ...]  #: names of which the authority knew it


class Session:
    def __init__(
        self,
        directory: str,
        key: ec.EllipticCurvePrivateKey,
        responders: Mapping[str, Responder],
        contact: Sequence[str] = (),
        ca_file: str = "",
    ) -> None:
        """`ca_file`: roots that the authority's own server is verified with, where the system's are not.  Raises Later, Refused."""
        self._responders = responders
        jwk = JWKEC(key=ComparableECKey(key))
        verify: Any = ca_file or True
        network = _Network(jwk, alg=ES256, user_agent="hsmvisor", verify_ssl=verify, timeout=30)
        network.session.mount("https://", _Bounded())
        network.session.mount("http://", _Bounded())
        with _told():
            self._client = client.ClientV2(client.ClientV2.get_directory(directory, network), network)
            self._register(contact)

    def _register(self, contact: Sequence[str]) -> None:
        wanted = messages.NewRegistration(contact=tuple(f"mailto:{c}" for c in contact), terms_of_service_agreed=True)
        try:
            self._client.new_account(wanted)
        except errors.ConflictError as known:
            body = messages.Registration(contact=wanted.contact)
            self._client.net.account = messages.RegistrationResource(uri=known.location, body=body)

    # ---- orders ---------------------------------------------------------------------------------------------------

    def begin(self, order: Order) -> str:
        """Returns the URL of a new order."""
        told = tuple(map(_identifier, order.names))
        replaced = certificate_id(x509.load_der_x509_certificate(order.replaces)) if order.replaces and self.has_windows else ""
        with _told():
            try:
                response = self._client._post(self._client.directory["newOrder"], _new(told, replaced))
            except (messages.Error, errors.ConflictError) as error:  # a conflict: it has been replaced already
                if not replaced or getattr(error, "code", None) not in _NOT_REPLACED:
                    raise
                response = self._client._post(self._client.directory["newOrder"], _new(told, ""))
        return str(response.headers["Location"])

    def finish(self, order: Order, url: str) -> Finished:
        """Raises Later, Refused; Lost when there is no such order any more."""
        csr = x509.load_der_x509_csr(order.csr).public_bytes(Encoding.PEM)
        with _told():
            resource = self._resource(url, csr)
            shown, known = _names(resource, messages.STATUS_PENDING), _names(resource, messages.STATUS_VALID)
            if resource.body.status == messages.STATUS_PENDING:
                self._prove(resource)
            deadline = datetime.datetime.now() + FINALIZATION
            if resource.body.status in (messages.STATUS_PENDING, messages.STATUS_READY):
                done = self._client.finalize_order(resource, deadline)
            else:
                done = self._client.poll_finalization(resource, deadline)
            return Finished(str(done.fullchain_pem), shown, known)

    def _resource(self, url: str, csr: bytes) -> Any:
        try:
            body = messages.Order.from_json(self._client._post_as_get(url).json())
        except messages.Error as error:
            if error.code == "malformed" or "404" in str(error):
                raise Lost("the authority does not know the order any more") from None
            raise
        if body.status == messages.STATUS_INVALID:
            raise Lost(f"the order failed: {_words(body.error)}")
        fetched = [self._client._authzr_from_response(self._client._post_as_get(u), uri=u) for u in body.authorizations]
        return messages.OrderResource(body=body, uri=url, authorizations=fetched, csr_pem=csr)

    def _prove(self, resource: Any) -> None:
        shown: list[Callable[[], None]] = []
        try:
            for authorization in resource.authorizations:
                if authorization.body.status == messages.STATUS_PENDING:
                    shown.append(self._show(authorization))
            self._client.poll_authorizations(resource, datetime.datetime.now() + VALIDATION)
        except errors.ValidationError as error:
            raise Lost(f"the authority does not believe it: {_failures(error)}") from None
        finally:
            for remove in shown:
                remove()

    def _show(self, authorization: Any) -> Callable[[], None]:
        """Presents a challenge and has the authority look; returns what removes it."""
        name = authorization.body.identifier.value
        offered = {challenge.chall.typ: challenge for challenge in authorization.body.challenges}
        kind = next((kind for kind in (HTTP, DNS) if kind in offered and kind in self._responders), None)
        if kind is None:
            raise Refused(f"the authority wants {name} shown by {' or '.join(sorted(offered))}; none of them is set up")
        responder, challenge = self._responders[kind], offered[kind]
        response, validation = challenge.response_and_validation(self._client.net.key)
        label = challenge.chall.encode("token") if kind == HTTP else challenge.chall.validation_domain_name(name)

        def remove() -> None:
            try:
                responder.remove(name, label, validation)
            except ChallengeFailed:
                return  # it does no harm where it is

        try:
            responder.present(name, label, validation)
        except ChallengeFailed as error:
            raise Later(f"{name}: {error}") from None
        try:
            self._client.answer_challenge(challenge, response)
        except BaseException:
            remove()
            raise
        return remove

    # ---- certificates ---------------------------------------------------------------------------------------------

    def revoke(self, certificate: bytes, reason: Reason) -> None:
        with _told():
            try:
                self._client.revoke(x509.load_der_x509_certificate(certificate), _REASONS[reason])
            except messages.Error as error:
                if error.code != "alreadyRevoked":
                    raise

    @property
    def has_windows(self) -> bool:
        return "renewalInfo" in self._client.directory.to_partial_json()

    def window(self, certificate: bytes) -> Window | None:
        """Of a certificate that has expired nothing is asked (RFC 9773, 4.3)."""
        made = x509.load_der_x509_certificate(certificate)
        identifier = certificate_id(made)
        if not self.has_windows or not identifier or made.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
            return None
        url = f"{self._client.directory['renewalInfo']}/{identifier}"
        with _told():
            response = self._client.net.get(url, content_type="application/json")
        try:
            told = response.json()
            start, end = (_seconds(told["suggestedWindow"][which]) for which in ("start", "end"))
            why = told.get("explanationURL")
        except (ValueError, KeyError, TypeError):
            raise Later("the authority's renewal information cannot be read", AFTER_ERROR) from None
        if end <= start:
            raise Later("the authority's renewal window ends before it begins", AFTER_ERROR)
        pause = response.headers.get("Retry-After", "")
        seconds = float(pause) if pause.isdecimal() else AFTER_ERROR
        return Window(start, end, min(max(seconds, LEAST_PAUSE), LONGEST_PAUSE), _line(why)[:500] if isinstance(why, str) else "")


def _names(resource: Any, status: Any) -> tuple[str, ...]:
    """The identifiers of an order whose authorizations have this status."""
    found = (one.body for one in resource.authorizations if one.body.status == status)
    return tuple(sorted(str(body.identifier.value) for body in found))


class Lost(Exception):
    """This order leads nowhere; another one may."""


def _seconds(text: str) -> float:
    """Since 1970, of a time as RFC 3339 writes it.  Raises ValueError, TypeError."""
    at = datetime.datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"{text} has no offset from UTC")
    return at.timestamp()


def _identifier(name: Name) -> Any:
    if name.kind not in ("dns", "ip"):
        raise Refused(f"ACME has no names of kind {name.kind}")
    return messages.Identifier(typ=messages.IDENTIFIER_FQDN if name.kind == "dns" else messages.IDENTIFIER_IP, value=name.value)


def _new(identifiers: tuple[Any, ...], replaces: str) -> Any:
    return Replacing(identifiers=identifiers, replaces=replaces) if replaces else messages.NewOrder(identifiers=identifiers)


class _told:
    """From what the libraries raise to what the manager knows.  Of JSON that they did not expect they may raise anything."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        match error:
            case messages.Error():
                if error.code in _FOR_GOOD:
                    raise Refused(f"the authority: {_words(error)}") from None
                raise Later(f"the authority: {_words(error)}", 3600 if error.code == "rateLimited" else 0) from None
            case errors.IssuanceError():
                raise Lost(f"the order failed: {_words(error.error)}") from None
            case errors.TimeoutError():
                raise Later("the authority has not decided yet") from None
            case (errors.Error() | requests.RequestException() | HTTPError()) | (
                ValueError() | LookupError() | TypeError() | AttributeError() | RecursionError()
            ):
                raise Later(f"the authority does not answer as it should ({type(error).__name__})") from None


def _words(error: Any) -> str:
    code, detail = getattr(error, "code", None), getattr(error, "detail", None)
    text = f"{code or 'an error'}: {detail}" if detail else str(code or "it did not say why")
    return _line(text)[:300]


def _line(text: str) -> str:
    return "".join(c for c in text if c.isprintable())


def _failures(error: errors.ValidationError) -> str:
    said = []
    for authorization in error.failed_authzrs:
        for challenge in authorization.body.challenges:
            if challenge.error is not None:
                said.append(f"{authorization.body.identifier.value}: {_words(challenge.error)}")
    return "; ".join(said)[:1000] or "it did not say why"
