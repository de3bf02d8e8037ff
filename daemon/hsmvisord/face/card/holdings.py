"""What the card holds of the token: a fixed picture of its slots, and what may be done with the keys in them.

Operations go the way of all faces: the key's profile, the module's policy and rate, statistics, the log of signatures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import der
from hsmvisord.crypto.interface import KeyKind
from hsmvisord.face.card.slots import CardSettings, assigned
from hsmvisord.keystore import pin
from hsmvisord.keystore.state import Generation, Material
from hsmvisord.token.application import Application
from hsmvisord.token.catalogue import Index
from hsmvisord.token.objects import KeyUse
from hsmvisord.token.statistics import Counters
from hsmvisord.token.token import Token
from hsmvisord.wire.calls import Mechanism

RSA_2048, RSA_3072, P_256, P_384, ED25519, X25519 = 0x07, 0x05, 0x11, 0x14, 0xE0, 0xE1

#: PIV's algorithm of a key, by the name of its kind (NIST SP 800-78-4, table 6-2; RSA 3072 from SP 800-78-5 on; Ed25519 and X25519
#: as YubiKey 5.7 has them).
ALGORITHMS = {
    "RSA 2048": RSA_2048,
    "RSA 3072": RSA_3072,
    "EC P-256": P_256,
    "EC P-384": P_384,
    "Ed25519": ED25519,
    "X25519": X25519,
}


@dataclass(frozen=True)
class SlotKey:
    """One slot as it is shown."""

    material: str
    generation: int
    kind: KeyKind
    algorithm: int  #: of ALGORITHMS
    key_id: bytes  #: CKA_ID
    spki: bytes
    certificate: bytes  #: DER; empty: none
    made_here: bool  #: by the module; or it was delivered


Contents = Mapping[int, SlotKey]


class Holdings:
    """Of one card.  Contents are values: what the card shows stays as it is, whatever other threads do to the token."""

    def __init__(self, token: Token) -> None:
        self._token = token
        self._application = Application(token, os.urandom(16), "smart card", token.watermark)
        self._counters = Counters()
        token.add_counters(self._counters)
        self._made: tuple[Mapping[str, Material], CardSettings, Contents] | None = None  #: what `contents` was made of, and gave

    def close(self) -> None:
        self._token.remove_counters(self._counters)

    def fault(self, what: str, error: Exception) -> None:
        """A fault of ours is told, without its text: that may hold a guest's data."""
        self._token.on_fault(what, error)

    # ---- the PIN ------------------------------------------------------------------------------------------------

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
        return 0 if self._token.pin_locked else max(1, pin.FREE_ATTEMPTS - self._token.index.state.pin.failures)

    def try_pin(self, attempt: bytes) -> None:
        """Raises as Token.try_pin.  A wrong one is on the host's disk before this returns, so it may take long."""
        self._token.try_pin(attempt)

    # ---- contents -----------------------------------------------------------------------------------------------

    def contents(self, settings: CardSettings) -> Contents | None:
        """Returns what the card would show now, None while the token is detached; the same object while nothing has changed."""
        return self.picture(settings) if self._token.index.state.token_present else None

    def picture(self, settings: CardSettings) -> Contents:
        """Returns what the card would show, also while the token is detached; the same object while nothing has changed."""
        index = self._token.index
        state = index.state
        if self._made is None or self._made[0] is not state.materials or self._made[1] != settings:
            self._made = state.materials, settings, _picture(index, settings)
        return self._made[2]

    def begin(self) -> None:
        """A card is put in: from now on it is no user of keys that were used before."""
        self._token.remove_counters(self._counters)
        self._counters = Counters()
        self._token.add_counters(self._counters)

    # ---- operations ---------------------------------------------------------------------------------------------

    def _use(self, key: SlotKey) -> KeyUse:
        """Returns the key that was shown, current or retiring, and never another one."""
        index = self._token.index
        material = index.state.materials.get(key.material)
        generation = material.generation(key.generation) if material is not None else None
        if material is None or generation is None or not generation.live or generation.public_key != key.spki:
            raise CkError(ck.CKR_KEY_HANDLE_INVALID, "the key that was shown is there no more")
        use = index.objects_of(material, generation)[0].use
        assert use is not None, "a generation's first object is its private key"
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
        return output

    def _sign(self, use: KeyUse, mechanism: Mechanism, data: bytes) -> bytes:
        if not use.may_sign:
            raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
        self._token.begin(mechanism, use.allowed, use.private.kind, ck.CKF_SIGN)
        signer = use.private.signer(mechanism)
        signature = self._counted("sign", use, mechanism.type, lambda: signer.sign(data))
        if told := self._token.on_signature:
            told(self._application, "sign", mechanism.type, use.generation)
        return signature

    def rsa(self, key: SlotKey, block: bytes) -> bytes:
        """The private operation on a block of the modulus's length; clients pad.  Raises CkError.

        What is padded as PKCS #1 v1.5 has it is signed by that mechanism, which a profile without raw RSA permits too.  Of any
        other block nobody can say whether it is to be signed or decrypted; where the profile permits both it counts as a signature.
        """
        use, padded = self._use(key), digest_info(block)
        if padded is not None and use.may_sign and ck.CKM_RSA_PKCS in use.allowed:
            return self._sign(use, Mechanism(ck.CKM_RSA_PKCS), padded)
        raw = Mechanism(ck.CKM_RSA_X_509)
        if use.may_sign or not use.may_decrypt:
            return self._sign(use, raw, block)
        self._token.begin(raw, use.allowed, use.private.kind, ck.CKF_DECRYPT)
        cipher = use.private.decrypter(raw)
        return self._counted("decrypt", use, raw.type, lambda: cipher.run(block).rjust(len(block), b"\0"))

    def ecdsa(self, key: SlotKey, digest: bytes) -> bytes:
        """Returns an ECDSA-Sig-Value in DER (NIST SP 800-73-4, part 2, appendix A.3)."""
        signature = self._sign(self._use(key), Mechanism(ck.CKM_ECDSA), digest)
        half = len(signature) // 2
        return der.sequence(*(der.integer(int.from_bytes(number, "big")) for number in (signature[:half], signature[half:])))

    def eddsa(self, key: SlotKey, message: bytes) -> bytes:
        return self._sign(self._use(key), Mechanism(ck.CKM_EDDSA), message)

    def agree(self, key: SlotKey, point: bytes) -> bytes:
        """Returns the shared secret: the x coordinate.  Raises CkError, also for a point that is not on the curve."""
        use = self._use(key)
        if not use.may_derive:
            raise CkError(ck.CKR_KEY_FUNCTION_NOT_PERMITTED)
        mechanism = Mechanism(ck.CKM_ECDH1_DERIVE, (ck.CKD_NULL, b"", point))
        self._token.begin(mechanism, use.allowed, use.private.kind, ck.CKF_DERIVE)
        return self._counted("derive", use, mechanism.type, lambda: use.private.derive(mechanism))


def _picture(index: Index, settings: CardSettings) -> Contents:
    """Of the current generation of each material whose key a card knows."""
    state = index.state
    shown: dict[str, tuple[Material, Generation]] = {}
    for material in sorted(state.materials.values(), key=lambda m: (m.since, m.name)):
        current = material.current
        if current is not None and state.keys[current.key].private.kind.name in ALGORITHMS:
            shown[material.name] = (material, current)
    found = {}
    for slot, name in assigned(settings, shown).items():
        material, current = shown[name]
        key, leaf = state.keys[current.key], state.certificates.get(current.leaf)
        private, public = key.private, key.private.public
        found[slot] = SlotKey(
            material=name,
            generation=current.number,
            kind=private.kind,
            algorithm=ALGORITHMS[private.kind.name],
            key_id=public.key_id,
            spki=public.spki,
            certificate=leaf.der if leaf else b"",
            made_here=key.request is not None,
        )
    return found


def digest_info(block: bytes) -> bytes | None:
    """Returns what EMSA-PKCS1-v1_5 has padded (RFC 8017, 9.2): 00 01 FF...FF 00 T, with at least eight FF; None: it is padded
    otherwise."""
    if block[:2] != b"\0\1":
        return None
    end = block.find(b"\0", 2)
    if end < 10 or block[2:end].strip(b"\xff"):
        return None
    return block[end + 1 :]
