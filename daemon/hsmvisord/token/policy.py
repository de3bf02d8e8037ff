"""What the operator lets a module's guest do with its keys: which mechanisms, from which sizes on, how many operations a second.

What is refused is told to `told(what, mechanism, key)`: "mechanism", "key size" or "rate".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import legacy
from hsmvisord.crypto.interface import KeyKind
from hsmvisord.crypto.mechanisms import GUEST_TABLE, LEGACY

Told = Callable[[str, int, str], None]


@dataclass(frozen=True)
class Policy:
    mechanisms: frozenset[int] = frozenset()  #: those with keys; empty: all.  Digests need no key
    min_rsa_bits: int = 0  #: of DSA and Diffie-Hellman too: as strong as RSA of their size
    min_ec_bits: int = 0  #: of curves; Ed25519 and X25519 count as 256
    rate: int = 0  #: operations a second; 0: no limit
    burst: int = 0  #: at once; 0: as many as `rate`
    forbidden: frozenset[str] = frozenset()  #: in slot 1: of hsmvisor_rpc.internal.mechanisms.FORBIDDABLE
    min_pin: int = 0  #: bytes of a new PIN in slot 1; 0: the least that there is
    legacy: bool = False  #: slot 1 has what is old or weak (crypto/legacy.py)


EVERYTHING = Policy()


def _forget(what: str, mechanism: int, key: str) -> None:
    return


class Policing:
    """One policy, kept; any thread."""

    def __init__(self, policy: Policy, monotonic: Callable[[], float], told: Told = _forget) -> None:
        self.policy, self._monotonic, self.told = policy, monotonic, told
        self._most = float(policy.burst or policy.rate)
        self._left, self._at = self._most, monotonic()
        self._lock = threading.Lock()

    def offers(self, mechanism: int) -> bool:
        """Says whether a guest may find it in the list of mechanisms."""
        if mechanism in LEGACY and not self.policy.legacy:
            return False
        return not self.policy.mechanisms or mechanism in self.policy.mechanisms or not GUEST_TABLE[mechanism].key_types

    def check_legacy(self, mechanism: int) -> None:
        """Without `legacy` its mechanisms are as those that there are not: CKR_MECHANISM_INVALID."""
        if mechanism in LEGACY and not self.policy.legacy:
            self.told("mechanism", mechanism, "")
            raise CkError(ck.CKR_MECHANISM_INVALID, f"{ck.mechanism_name(mechanism)} is there where the policy says legacy")

    def check(self, mechanism: int, kind: KeyKind) -> None:
        """Raises CKR_MECHANISM_INVALID, CKR_KEY_SIZE_RANGE."""
        if legacy.is_kind(kind):
            self.check_key(kind)
        if self.policy.mechanisms and mechanism not in self.policy.mechanisms:
            self.told("mechanism", mechanism, kind.name)
            raise CkError(ck.CKR_MECHANISM_INVALID, f"the module's policy does not allow {ck.mechanism_name(mechanism)}")
        least = self._least_bits(kind.key_type)
        if least and (256 if kind.bits == 255 else kind.bits) < least:
            self.told("key size", mechanism, kind.name)
            raise CkError(ck.CKR_KEY_SIZE_RANGE, f"the module's policy demands {least} bits; this is {kind.name}")

    def check_key(self, kind: KeyKind, explicit: bool = False) -> None:
        """Raises for a key that is old or weak without `legacy`; `explicit`: its curve stands there by its parameters."""
        if self.policy.legacy or not (explicit or legacy.is_kind(kind)):
            return
        rv = {ck.CKK_RSA: ck.CKR_KEY_SIZE_RANGE, ck.CKK_EC: ck.CKR_CURVE_NOT_SUPPORTED}
        raise CkError(rv.get(kind.key_type, ck.CKR_ATTRIBUTE_VALUE_INVALID), f"{kind.name} is there where the policy says legacy")

    def permit(self, what: str) -> None:
        """Raises CKR_ACTION_PROHIBITED for what the guest may not do in slot 1."""
        if what in self.policy.forbidden:
            self.told(what, ck.CK_UNAVAILABLE_INFORMATION, "")
            raise CkError(ck.CKR_ACTION_PROHIBITED, f"the module's policy forbids the guest to {what.replace('-', ' ')}")

    def _least_bits(self, key_type: int) -> int:
        if key_type in (ck.CKK_RSA, ck.CKK_DSA, ck.CKK_DH):
            return self.policy.min_rsa_bits
        return self.policy.min_ec_bits if key_type in (ck.CKK_EC, ck.CKK_EC_EDWARDS, ck.CKK_EC_MONTGOMERY) else 0

    def admit(self, mechanism: int, kind: KeyKind) -> None:
        """Counts an operation.  Raises CKR_FUNCTION_REJECTED when there were too many of late."""
        if not self.policy.rate:
            return
        with self._lock:
            now = self._monotonic()
            self._left = min(self._most, self._left + (now - self._at) * self.policy.rate)
            self._at = now
            admitted = self._left >= 1
            if admitted:
                self._left -= 1
        if not admitted:
            self.told("rate", mechanism, kind.name)
            raise CkError(ck.CKR_FUNCTION_REJECTED, f"the module's policy allows {self.policy.rate} operations a second")
