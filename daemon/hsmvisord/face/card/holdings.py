"""What the card holds of the token: a fixed picture of its slots, and what may be done with the keys in them.

Operations go the way of all faces: the key's profile, the module's policy and rate, statistics, the log of signatures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.face.card.slots import CardSettings, assigned
from hsmvisord.keystore.state import Generation, Material
from hsmvisord.token.application import Application
from hsmvisord.token.objects import KeyUse
from hsmvisord.token.statistics import Counters
from hsmvisord.token.token import Token
from hsmvisord.wire.calls import Mechanism

#: PIV's algorithm of a key, by the name of its kind (NIST SP 800-78-4, table 6-2; Ed25519 and X25519 as YubiKey 5.7 has them).
ALGORITHMS = {
    "RSA 2048": 0x07,
    "RSA 3072": 0x05,
    "EC P-256": 0x11,
    "EC P-384": 0x14,
    "Ed25519": 0xE0,
    "X25519": 0xE1,
}
RSA = (0x05, 0x07)
EC = {0x11: 32, 0x14: 48}  #: bytes of a coordinate


@dataclass(frozen=True)
class SlotKey:
    """One slot as it is shown."""

    material: str
    generation: int
    handle: int
    algorithm: int
    bits: int
    key_id: bytes
    spki: bytes
    certificate: bytes  #: DER; empty: none


Contents = Mapping[int, SlotKey]


class Holdings:
    def __init__(self, token: Token) -> None:
        self._token = token
        self._application = Application(token, os.urandom(16), "smart card", token.watermark)
        self._counters = Counters()
        token.add_counters(self._counters)

    def close(self) -> None:
        self._token.remove_counters(self._counters)

    @property
    def present(self) -> bool:
        """Says whether the operator has the token attached."""
        return self._token.present

    @property
    def pin_set(self) -> bool:
        return self._token.pin_set

    @property
    def pin_mark(self) -> bytes:
        """Is another one when the operator has set another PIN."""
        return self._token.index.state.pin.salt

    @property
    def tries_left(self) -> int:
        """How many wrong PINs until it is locked for a while; 0: it is."""
        return 0 if self._token.pin_locked else max(1, _FREE - self._token.index.state.pin.failures)

    def try_pin(self, attempt: bytes) -> bool | None:
        """Returns whether it is the PIN, None when it is locked.  Raises CkError when the attempt could not be counted."""
        try:
            self._token.try_pin(attempt)
        except CkError as error:
            if error.rv == ck.CKR_PIN_LOCKED:
                return None
            if error.rv in (ck.CKR_PIN_INCORRECT, ck.CKR_PIN_LEN_RANGE):
                return False
            raise
        return True

    def contents(self, settings: CardSettings) -> Contents:
        """Returns what the card would show now."""
        index = self._token.index
        state = index.state
        shown: dict[str, tuple[Material, Generation]] = {}
        for material in sorted(state.materials.values(), key=lambda m: (m.since, m.name)):
            generation = material.seen_at(state.watermark)
            if generation is not None and state.keys[generation.key].private.kind.name in ALGORITHMS:
                shown[material.name] = (material, generation)
        found = {}
        for slot, name in assigned(settings, shown).items():
            material, generation = shown[name]
            private = index.objects_of(material, generation)[0]
            key = state.keys[generation.key].private
            leaf = state.certificates.get(generation.leaf)
            found[slot] = SlotKey(
                name,
                generation.number,
                private.handle,
                ALGORITHMS[key.kind.name],
                key.kind.bits,
                key.public.key_id,
                key.public.spki,
                leaf.der if leaf else b"",
            )
        return found

    # ---- operations ---------------------------------------------------------------------------------------------

    def _use(self, key: SlotKey) -> KeyUse:
        """Returns the key that was shown, and never another one."""
        found = self._token.index.by_handle.get(key.handle)
        use = found.use if found is not None else None
        if use is None or use.generation != (key.material, key.generation):
            raise CkError(ck.CKR_KEY_HANDLE_INVALID, "the key that was shown is there no more")
        if self._token.wall() >= use.refuse_after:
            raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED, "the key's certificate has expired and its material refuses then")
        return use

    def _counted(self, operation: str, use: KeyUse, mechanism: int, act: Callable[[], bytes]) -> bytes:
        cell, began = self._counters.cell(operation, mechanism, use.generation), perf_counter()
        try:
            output = act()
        except BaseException:
            cell.errors += 1
            raise
        cell.observe(perf_counter() - began, self._token.wall())
        if self._token.on_signature:
            self._token.on_signature(self._application, operation, mechanism, use.generation)
        return output

    def _sign(self, key: SlotKey, mechanism: Mechanism, data: bytes) -> bytes:
        use = self._use(key)
        if not use.may_sign:
            raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
        self._token.begin(mechanism, use.allowed, use.private.kind, ck.CKF_SIGN)
        signer = use.private.signer(mechanism)
        return self._counted("sign", use, mechanism.type, lambda: signer.sign(data))

    def sign_rsa(self, key: SlotKey, block: bytes) -> bytes:
        """Of a padded block of the modulus' length.  One that is padded as PKCS #1 v1.5 has it is signed by that mechanism, which a
        profile without raw RSA permits too; the other ones raw, whatever they are for.  Raises CkError."""
        info = digest_info(block)
        if info is not None and self._use(key).may_sign:
            return self._sign(key, Mechanism(ck.CKM_RSA_PKCS), info)
        use = self._use(key)
        mechanism = Mechanism(ck.CKM_RSA_X_509)
        function = ck.CKF_DECRYPT if use.may_decrypt else ck.CKF_SIGN
        self._token.begin(mechanism, use.allowed, use.private.kind, function)
        if use.may_decrypt:
            cipher = use.private.decrypter(mechanism)
            return self._counted("decrypt", use, mechanism.type, lambda: cipher.run(block).rjust(len(block), b"\0"))
        signer = use.private.signer(mechanism)
        return self._counted("sign", use, mechanism.type, lambda: signer.sign(block))

    def sign_ecdsa(self, key: SlotKey, digest: bytes) -> bytes:
        """Returns an ECDSA-Sig-Value in DER (NIST SP 800-73-4, part 2, appendix A.3)."""
        signature = self._sign(key, Mechanism(ck.CKM_ECDSA), digest)
        half = len(signature) // 2
        return encode_dss_signature(int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big"))

    def sign_eddsa(self, key: SlotKey, message: bytes) -> bytes:
        return self._sign(key, Mechanism(ck.CKM_EDDSA), message)

    def agree(self, key: SlotKey, point: bytes) -> bytes:
        """Returns the shared secret: the x coordinate."""
        use = self._use(key)
        if not use.may_derive:
            raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
        mechanism = Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_NULL, b"", point))
        self._token.begin(mechanism, use.allowed, use.private.kind, ck.CKF_DERIVE)
        private = use.private
        return self._counted("derive", use, mechanism.type, lambda: private.derive(mechanism))


_FREE = 3  #: wrong PINs before the first lock (hsmvisord/keystore/pin.py)


def digest_info(block: bytes) -> bytes | None:
    """Returns what EMSA-PKCS1-v1_5 has padded (RFC 8017, 9.2): 00 01 FF...FF 00 T, with at least eight FF; None: it is padded
    otherwise."""
    if block[:2] != b"\0\1":
        return None
    end = block.find(b"\0", 2)
    if end < 10 or block[2:end].strip(b"\xff"):
        return None
    return block[end + 1 :]
