"""When the card shows other keys: taken out and put in again, so that nobody signs with a new key under an old certificate.

A certificate alone is renewed in silence, for its key is the same.  For another key the card goes out, stays out long enough for
clients to notice, and comes back with another id.  Whoever sleeps through that and signs without having read the slot's new
certificate is refused.  Clocks are the caller's: seconds that only rise.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from hsmvisord import limits
from hsmvisord.face.card.holdings import Contents, SlotKey
from hsmvisord.face.card.slots import SLOTS

STAY, OUT, IN = "stay", "out", "in"
_DIGEST = re.compile("[0-9a-f]{64}")  #: as `shown` has it


@dataclass(frozen=True)
class Move:
    """What is done with the card now; `again`: seconds until the next look, None: when something has changed."""

    step: str
    again: float | None = None


def _digest(key: SlotKey) -> str:
    return hashlib.sha256(key.spki).hexdigest()


def _keys(contents: Contents) -> dict[int, bytes]:
    return {slot: key.spki for slot, key in contents.items()}


class Generations:
    """`contents` is what the card shows; nothing while it is out."""

    def __init__(self, shown: bytes = b"") -> None:
        """`shown`: of an earlier card of this module, as `shown` gave it."""
        self.contents: Contents = {}
        self.inserted = False
        self._out_since: float | None = None  #: None: it was never in
        self._read = _decoded(shown)  #: slot, to the digest of the newest key whose certificate was read there

    def look(self, now: float, wanted: Contents | None) -> Move:
        """`wanted`: what the token has; None: it is detached."""
        if self.inserted:
            if wanted is self.contents:
                return Move(STAY)
            if wanted is not None and _keys(wanted) == _keys(self.contents):
                self.contents = wanted
                return Move(STAY)
            self.inserted, self.contents, self._out_since = False, {}, now
            return Move(OUT, limits.CARD_OUT_SECONDS if wanted is not None else None)
        if wanted is None:
            return Move(STAY)
        if self._out_since is not None and (left := self._out_since + limits.CARD_OUT_SECONDS - now) > 0:
            return Move(STAY, left)
        self.inserted, self.contents = True, wanted
        return Move(IN)

    def was_read(self, slot: int) -> None:
        """A client has read the slot's certificate to its end, or that there is none."""
        if slot in self.contents:
            self._read[slot] = _digest(self.contents[slot])

    def may_use(self, slot: int) -> bool:
        """Says whether clients know the slot's key: its certificate is the newest that was read there, by whichever card of this
        module.  Until then one may still hold another key's, and would take the signature for that one's."""
        return self._read.get(slot) == _digest(self.contents[slot])

    @property
    def shown(self) -> bytes:
        """For the next card of this module; at most limits.MAX_CARD_SHOWN bytes."""
        return json.dumps({f"{slot:02x}": key for slot, key in sorted(self._read.items())}).encode()


def _decoded(shown: bytes) -> dict[int, str]:
    """Of what cannot be, nothing is taken: then certificates have to be read again."""
    if len(shown) > limits.MAX_CARD_SHOWN:
        return {}
    try:
        read = {int(slot, 16): str(key) for slot, key in json.loads(shown.decode("ascii") or "{}").items()}
    except (ValueError, AttributeError, RecursionError):
        return {}
    return {slot: key for slot, key in read.items() if slot in SLOTS and _DIGEST.fullmatch(key)}
