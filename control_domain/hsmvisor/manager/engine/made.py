"""What came out of a module of which a host says that it carried out a command: it has to fit what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cryptography import x509
from hsmvisor.manager.ca import names, requests
from hsmvisor.manager.ca.interface import Refused
from hsmvisor.manager.ca.names import BadName
from hsmvisor.manager.store.rows import GenerationRow, lines_of
from hsmvisor_rpc.sealed.commands import Action

#: The states in which a generation may be right after these.
_AFTER: Mapping[str, tuple[str, ...]] = {
    Action.GENERATE: ("staged", "current", "retiring"),
    Action.STAGE: ("staged", "current", "retiring"),
    Action.CERTIFY: ("staged", "current", "retiring"),
    Action.ACTIVATE: ("current",),
    Action.ROLL_BACK: ("current",),
    Action.RETIRE: ("retiring", "destroyed", ""),
    Action.DESTROY: ("destroyed", ""),
}


def wrong_state(action: str, number: int, states: Mapping[int, str] | None) -> str:
    """Says why it is not so; empty where it is, or is not told."""
    if states is None:
        return ""
    state = states.get(number, "")
    return (
        "" if state in _AFTER[action] else f"it says that it has done {action}, and generation {number} is {state or 'not there'}"
    )


def wrong_key(csr: bytes, public_key: bytes, key_type: str, working: GenerationRow, others: Sequence[GenerationRow]) -> str:
    """Says what is wrong with the certificate request of a key that a module made; empty: nothing.

    What policy permitted is this kind of key and these names, and a new key is not one that there was.
    """
    try:
        wanted = names.parse_all(lines_of(working.names)) if working.names else ()
        checked = requests.check(csr, wanted)
    except (Refused, BadName) as error:
        return str(error)
    if checked.key_type != key_type:
        return f"the key is {checked.key_type}, {key_type} was asked for"
    if set(checked.names) != set(wanted):
        return "the request is not for the names that were asked for"
    own = requests.spki(x509.load_der_x509_csr(csr).public_key())
    if own != public_key:
        return "the request is that of another key than the one that was made"
    if any(other.public_key == own for other in others if other.number != working.number):
        return "the key is that of an earlier generation: a new one was asked for"
    return ""
