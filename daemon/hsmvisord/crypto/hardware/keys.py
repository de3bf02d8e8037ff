"""Keys whose private or secret part is in hardware: the software's with another key inside (adapters.py), and secret keys."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

from hsmvisor_rpc.internal import hsm

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.crypto import ciphers, eddsa, macs
from hsmvisord.crypto.base import BasePrivateKey
from hsmvisord.crypto.ec import EcPrivateKey
from hsmvisord.crypto.edwards import EdwardsPrivateKey, KeptSign, KeptVerify
from hsmvisord.crypto.hardware.adapters import Ask, EcKey, Ed448Key, Ed25519Key, RsaKey
from hsmvisord.crypto.interface import KeyKind, SaltKey, Signer, Verifier, no_salt_key
from hsmvisord.crypto.operations import ReadyCipher, ReadySigner, ReadyVerifier
from hsmvisord.crypto.rsa import RsaPrivateKey
from hsmvisord.crypto.secret import kind_of
from hsmvisord.crypto.streams import WholeStream
from hsmvisord.wire.calls import Mechanism

Export = Callable[[], bytes]


class InHardware:
    """Mixed into a private key: it is stored as where it is, and leaves if the hardware lets it."""

    name: bytes  #: of the key, in the hardware
    _stored: bytes
    _export: Export

    def pkcs8(self) -> bytes:
        return self._export()

    def stored(self) -> bytes:
        return self._stored


class HardRsa(InHardware, RsaPrivateKey):
    def _raw_key(self) -> Any:
        return self._key


class HardEc(InHardware, EcPrivateKey):
    pass


class HardEdwards(InHardware, EdwardsPrivateKey):
    def make_signer(self, mechanism: Mechanism) -> Signer:
        if mechanism.type == ck.CKM_EDDSA and eddsa.scheme(mechanism) is not None:
            raise CkError(ck.CKR_MECHANISM_PARAM_INVALID, "keys in hardware sign without a context, and no hash")
        return super().make_signer(mechanism)


_PRIVATE: dict[tuple[int, int], tuple[Any, Any]] = {
    (ck.CKK_EC_EDWARDS, 255): (Ed25519Key, HardEdwards),
    (ck.CKK_EC_EDWARDS, 448): (Ed448Key, HardEdwards),
}


def private_key(public: Any, name: bytes, stored: bytes, ask: Ask, export: Export) -> BasePrivateKey:
    """`public`: the software's public key.  Raises CkError(KEY_TYPE_INCONSISTENT) for a type that hardware does not keep."""
    kinds = {ck.CKK_RSA: (RsaKey, HardRsa), ck.CKK_EC: (EcKey, HardEc)}
    row = kinds.get(public.kind.key_type) or _PRIVATE.get((public.kind.key_type, public.kind.bits))
    if row is None:
        raise CkError(ck.CKR_KEY_TYPE_INCONSISTENT, f"the module's hardware keeps no {public.kind.name} keys")
    adapter, wrapper = row
    key: Any = wrapper(adapter(public._key, ask))
    key.name, key._stored, key._export = name, stored, export
    key.lane = None  # lanes sign by themselves
    return key  # type: ignore[no-any-return]


# ---- secret keys --------------------------------------------------------------------------------------------------------

#: Mechanisms whose output is as long as their input.
_SAME = (ck.CKM_AES_ECB, ck.CKM_AES_CBC, ck.CKM_AES_CTR)


class HardSecret:
    """Its repr shows its kind alone."""

    def __init__(self, key_type: int, size: int, name: bytes, stored: bytes, ask: Ask, export: Export) -> None:
        """`size` in bytes."""
        self.kind: KeyKind = kind_of(key_type, size)
        self.name, self._stored, self._ask, self._export = name, stored, ask, export

    def __repr__(self) -> str:
        return f"<secret key in hardware, {self.kind.name}>"

    @property
    def value(self) -> bytes:
        return self._export()

    def stored(self) -> bytes:
        return self._stored

    @property
    def check_value(self) -> bytes:
        """Of a block cipher the first bytes of a block of zeros; of others none: their hash would need the value."""
        if self.kind.key_type != ck.CKK_AES:
            return b""
        return self._ask(hsm.ENCRYPT, ck.CKM_AES_ECB, None, bytes(16))[:3]

    # ---- MACs ----

    def _mac(self, mechanism: Mechanism) -> tuple[int, Callable[[bytes], bytes]]:
        """Returns the MAC's length and what makes it."""
        if mechanism.type in macs.HMACS and self.kind.key_type != ck.CKK_AES:
            name, chosen = macs.HMACS[mechanism.type]
            whole = hmac.new(b"", None, name).digest_size
        elif mechanism.type in (ck.CKM_AES_CMAC, ck.CKM_AES_CMAC_GENERAL) and self.kind.key_type == ck.CKK_AES:
            chosen, whole = mechanism.type == ck.CKM_AES_CMAC_GENERAL, 16
        else:
            raise self._inconsistent(mechanism)
        size = macs.size_of(mechanism, whole, chosen)
        base = WHOLE[mechanism.type]
        return size, lambda data: self._ask(hsm.SIGN, base, None, data)[:size]

    def signer(self, mechanism: Mechanism) -> Signer:
        size, make = self._mac(mechanism)
        return ReadySigner(size, make, lambda: KeptSign(make))

    def verifier(self, mechanism: Mechanism) -> Verifier:
        size, make = self._mac(mechanism)

        def verify(data: bytes, signature: bytes) -> None:
            if len(signature) != size:
                raise CkError(ck.CKR_SIGNATURE_LEN_RANGE, f"the MAC has {size} bytes")
            if not hmac.compare_digest(make(data), signature):
                raise CkError(ck.CKR_SIGNATURE_INVALID)

        return ReadyVerifier(verify, lambda: KeptVerify(verify))

    # ---- encryption: the hardware's own check of the parameter is the last, ours the first ----

    def encrypter(self, mechanism: Mechanism) -> ReadyCipher:
        return self._cipher(mechanism, True)

    def decrypter(self, mechanism: Mechanism) -> ReadyCipher:
        return self._cipher(mechanism, False)

    def _cipher(self, mechanism: Mechanism, encrypting: bool) -> ReadyCipher:
        if self.kind.key_type != ck.CKK_AES or mechanism.type not in ciphers.AES:
            raise self._inconsistent(mechanism)
        like = ciphers.checked(mechanism, encrypting)  # of a key of zeros: its bounds and the parameter's checks are ours
        wrong = ck.CKR_DATA_LEN_RANGE if encrypting else ck.CKR_ENCRYPTED_DATA_LEN_RANGE
        operation = hsm.ENCRYPT if encrypting else hsm.DECRYPT
        least = ciphers.gcm_parameter(mechanism)[2] if mechanism.type == ck.CKM_AES_GCM and not encrypting else 0

        def run(data: bytes) -> bytes:
            if mechanism.type in (ck.CKM_AES_ECB, ck.CKM_AES_CBC) and len(data) % 16:
                raise CkError(wrong, f"{len(data)} bytes are no whole blocks")
            if len(data) < least:
                raise CkError(wrong, f"the tag alone has {least} bytes")
            if not data and mechanism.type in _SAME:
                return b""
            try:
                return self._ask(operation, mechanism.type, mechanism.parameter, data)
            except CkError as error:
                if encrypting or error.rv != ck.CKR_FUNCTION_FAILED:
                    raise
                raise CkError(ck.CKR_ENCRYPTED_DATA_INVALID) from None

        return ReadyCipher(like.bound, run, lambda: WholeStream(run, like.bound))

    def derive(self, mechanism: Mechanism, length: int = 0, salt_key: SaltKey = no_salt_key) -> bytes:
        raise self._inconsistent(mechanism)

    def _inconsistent(self, mechanism: Mechanism) -> CkError:
        return CkError(
            ck.CKR_KEY_TYPE_INCONSISTENT, f"{ck.mechanism_name(mechanism.type)} and a key of type {self.kind.name} in hardware"
        )


#: From a MAC's mechanism to that which gives it whole.
WHOLE = {mechanism: mechanism for mechanism, (_, chosen) in macs.HMACS.items() if not chosen} | {
    ck.CKM_AES_CMAC: ck.CKM_AES_CMAC,
    ck.CKM_AES_CMAC_GENERAL: ck.CKM_AES_CMAC,
}
WHOLE |= {
    mechanism: next(whole for whole, (name, chosen) in macs.HMACS.items() if name == of and not chosen)
    for mechanism, (of, general) in macs.HMACS.items()
    if general
}
