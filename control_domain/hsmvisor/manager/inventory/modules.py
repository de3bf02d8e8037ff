"""A module's identity and state, as its host tells it: taken where it can be, so that what one host says breaks nothing of others'.

A key that all share is sealed to all modules in one go, and its generations are counted over all of them: one recipient key that
cannot be sealed to, one number that is too high, one state that is none would keep it from everybody.
"""

from __future__ import annotations

from collections.abc import Iterable

from hsmvisor.manager import limits
from hsmvisor_rpc.sealed import envelope
from hsmvisor_rpc.sealed.envelope import EnvelopeContext, KeyMaterial
from hsmvisor_rpc.sealed.identity import ModuleIdentity

MODULE_ID = 16  #: bytes
STATES = frozenset({"staged", "current", "retiring", "destroyed"})


def wrong_identity(identity: ModuleIdentity, recipient_before: bytes) -> str:
    """Says what cannot be, of an identity whose signature was verified; empty: nothing.  `recipient_before`: was taken already."""
    if not 1 <= len(identity.name) <= limits.MAX_NAME or not identity.name.isprintable():
        return f"a module's name has 1 to {limits.MAX_NAME} printable characters"
    if len(identity.module_id) != MODULE_ID:
        return f"a module's id has {MODULE_ID} bytes"
    if identity.recipient != recipient_before:
        try:
            envelope.seal(KeyMaterial(b""), identity.recipient, EnvelopeContext(b"", b"", b"", "", 0, 0))
        except ValueError:
            return "nothing can be sealed to its recipient key"
    return ""


def wrong_sequence(number: int) -> str:
    return "" if number <= limits.MAX_SEQUENCE else f"a sequence number is at most {limits.MAX_SEQUENCE}"


def wrong_generations(told: Iterable[tuple[int, str]]) -> str:
    """`told`: numbers and states of one material."""
    for number, state in told:
        if not 1 <= number <= limits.MAX_GENERATION:
            return f"a generation's number is 1 to {limits.MAX_GENERATION}"
        if state not in STATES:
            return f"a generation is one of {', '.join(sorted(STATES))}"
    return ""


def believed(number: int, newest: int) -> bool:
    """Numbers far above what was given out are a host's invention: nobody's next generation is above them.  A few may be of a time
    that this database does not remember."""
    return number <= newest + limits.MOST_AHEAD
