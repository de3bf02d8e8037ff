"""A key that is made here because a signed command says so, and the request for its certificate."""

from __future__ import annotations

from dataclasses import dataclass, field

from hsmvisor_rpc.sealed import limits
from hsmvisor_rpc.sealed import names as certificate_names
from hsmvisor_rpc.sealed.commands import KEY_TYPES, Generate
from hsmvisor_rpc.sealed.names import BadName, Name
from hsmvisor_rpc.sealed.refusal import Reason, Refusal

from hsmvisord import ck
from hsmvisord import limits as daemon_limits
from hsmvisord.ck import CkError
from hsmvisord.crypto import generation
from hsmvisord.crypto.hardware.channel import Away
from hsmvisord.crypto.interface import CryptoProvider, PrivateKey


@dataclass(frozen=True)
class NewKey:
    """Nothing of it is stored yet."""

    private: PrivateKey = field(repr=False)
    request: bytes  #: PKCS #10, DER


def names_of(body: Generate) -> tuple[Name, ...]:
    """Raises Refusal."""
    if len(body.names) > limits.MAX_NAMES:
        raise Refusal(Reason.TOO_LARGE, f"a request has at most {limits.MAX_NAMES} names, this has {len(body.names)}")
    if sum(map(len, body.names)) > limits.MAX_NAMES_TEXT:
        raise Refusal(Reason.TOO_LARGE, f"the names of a request have at most {limits.MAX_NAMES_TEXT} characters together")
    try:
        return certificate_names.exact(body.names)
    except BadName as error:
        raise Refusal(Reason.MALFORMED, str(error)) from None


def check(body: Generate, provider: CryptoProvider) -> None:
    """Raises Refusal for what cannot be made, before any time is spent on it."""
    if body.key_type not in KEY_TYPES:
        raise Refusal(Reason.UNSUPPORTED_KEY, f"a module makes {', '.join(KEY_TYPES)}")
    if not provider.offers(generation.BY_NAME[body.key_type][0]):
        raise Refusal(Reason.UNSUPPORTED_KEY, f"the module's hardware makes no {body.key_type} keys")
    names_of(body)


def make(body: Generate, provider: CryptoProvider) -> NewKey:
    """An RSA key takes seconds.  Raises Refusal, and Away when nothing is wrong with the command."""
    names = names_of(body)
    try:
        private = provider.generate_pair(*generation.BY_NAME[body.key_type], wait=daemon_limits.RSA_WAIT)
        return NewKey(private, private.certificate_request(names))
    except Away:
        raise
    except CkError as error:
        if error.rv == ck.CKR_FUNCTION_REJECTED:
            raise Refusal(
                Reason.LIMIT, "the guest is having an RSA key made, and a module makes one at a time: try again"
            ) from None
        raise Refusal(Reason.UNSUPPORTED_KEY, f"the key could not be made: {error}") from None
