"""A module with delivered keys, in this process, that each input finds as it was: what several targets share.

Root, recipient key and handles are the same in every run; the clock (certificates begin today) and the private keys are not.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key
from cryptography.x509.oid import NameOID
from hsmvisor_rpc.sealed.envelope import RecipientKey
from hsmvisord import ck
from hsmvisord.crypto.software import SoftwareProvider
from hsmvisord.keystore import pin
from hsmvisord.keystore.keystore import Cause, Keystore
from hsmvisord.keystore.persistence import SealedChange
from hsmvisord.keystore.state import GuestToken, Pin, State
from hsmvisord.keystore.vault import Manifest
from hsmvisord.token import making
from hsmvisord.token.catalogue import Index
from hsmvisord.token.policy import Policy
from hsmvisord.token.token import Settings, Token
from support.certificates import PrivateKey, new_key
from support.keystores import NOW, Bench, signed_by

ROOT = Ed25519PrivateKey.from_private_bytes(b"r" * 32)
SIGNER = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
RECIPIENT = bytes(range(96))
EPOCH = NOW  #: what the clock says when an input begins
WINDOW = 16  #: bytes of a private key that may not appear anywhere
PIN = b"123456"


class CachingProvider(SoftwareProvider):
    """Does not check the same RSA key again for each input."""

    load_private_key = lru_cache(64)(SoftwareProvider.load_private_key)


class World:
    """The bench is put back by `fresh`; `changes` are the commits since."""

    def __init__(self) -> None:
        self.bench = Bench(root=ROOT)
        self.bench.signer = signed_by(ROOT, SIGNER)
        self.bench.provider = CachingProvider()
        self.changes: list[SealedChange] = []
        self.recipient = RecipientKey(RECIPIENT)
        self._open(self.bench.keystore.state, Manifest())
        self.keys: list[PrivateKey] = []
        for generation in (1, 2):
            self.keys.append(self.bench.push(generation, chained=True, alias_id=b"alias"))
        self.keys.append(self.bench.stage(3, chained=True))
        self.keys.append(self.bench.push(1, new_key("rsa2048"), "rsa"))
        self.keys.append(self.bench.push(1, new_key("ed25519"), "ed", self_signed=True))
        self.keys.append(self.bench.push(1, new_key("p384"), "follow", mode="follow", profile="request-signing"))
        large = new_key("p256")
        self.bench.execute("stage", "large", 1, self.bench.body(large, (large_certificate(large),), "large", 1))
        self.bench.execute("activate", "large", 1)
        self.keys.append(large)
        self.own = self._own_token()
        self._state, self._manifest = self.bench.keystore.state, self.bench.keystore._manifest
        self._pin = pin.make(PIN)
        self._index = Index(self._state)
        self.version, self.stored = self._state.version, self._everything()

    def _own_token(self) -> list[int]:
        """A token of the guest's own, initialized: handles of an AES key, a wrapping key, a private and a public EC key, the
        same of ML-KEM and of RSA."""
        keystore, provider, of_token = self.bench.keystore, self.bench.provider, (ck.CKA_TOKEN, True)
        cheap = Pin(b"salt" * 4, b"v" * 32)  # of no PIN that there is
        keystore._commit(replace(keystore.state, guest=GuestToken(b"own".ljust(32), cheap, cheap)), Cause())
        uses = [(kind, True) for kind in (ck.CKA_ENCRYPT, ck.CKA_DECRYPT, ck.CKA_SIGN, ck.CKA_EXTRACTABLE)]
        size, wraps = (ck.CKA_VALUE_LEN, 32), [(ck.CKA_WRAP, True), (ck.CKA_UNWRAP, True)]
        curve = [(ck.CKA_EC_PARAMS, bytes.fromhex("06082a8648ce3d030107")), (ck.CKA_VERIFY, True), of_token]
        aes = making.generated(ck.CKM_AES_KEY_GEN, [size, of_token, *uses], False, provider)
        wrapper = making.generated(ck.CKM_AES_KEY_GEN, [size, of_token, *wraps], False, provider)
        private = [(ck.CKA_SIGN, True), (ck.CKA_EXTRACTABLE, True), of_token]
        public, pair = making.generated_pair(ck.CKM_EC_KEY_PAIR_GEN, curve, private, False, provider)
        set_ = [(ck.CKA_PARAMETER_SET, ck.CKP_ML_KEM_768), of_token]
        encapsulates, decapsulates = making.generated_pair(ck.CKM_ML_KEM_KEY_PAIR_GEN, set_, [of_token], False, provider)
        rsa_bits = [(ck.CKA_MODULUS_BITS, 1024), of_token]
        recovers, signs = making.generated_pair(ck.CKM_RSA_PKCS_KEY_PAIR_GEN, rsa_bits, [of_token], False, provider)
        made = [aes, wrapper, pair, public, decapsulates, encapsulates, signs, recovers]
        self.values = [one.key.value for one in (aes, wrapper)]  # type: ignore[union-attr]
        self.keys.append(load_der_private_key(pair.key.pkcs8(), None))  # type: ignore[union-attr, arg-type]
        return [item.handle for item in keystore.add_objects([(one.attributes, one.key) for one in made])]

    def _open(self, state: State, manifest: Manifest) -> None:
        bench = self.bench
        bench.keystore = Keystore(
            state, self.recipient, manifest, bench.vault, bench.provider, lambda: self.bench.now, self._persist
        )
        bench._watch()

    def _persist(self, change: SealedChange, request_id: str, result: bytes) -> None:
        self.changes.append(change)

    def _everything(self) -> dict[str, bytes]:
        """What the state file holds."""
        found: dict[str, bytes] = {}
        for change in self.changes:
            found = {name: blob for name, blob in (found | change.put).items() if name not in change.delete}
        return found

    def fresh(self, with_pin: bool = False) -> Keystore:
        """Puts everything back and returns the keystore."""
        self.changes.clear()
        self.bench.happened.clear()
        self.bench.now = EPOCH
        state = replace(self._state, pin=self._pin) if with_pin else self._state
        self._open(state, self._manifest)
        return self.bench.keystore

    def token(self, with_pin: bool = False) -> Token:
        """A token over a fresh keystore; the objects, which take long to make, are those of the first one."""
        keystore = self.fresh(with_pin)
        state = keystore.state
        keystore.state = replace(state, materials={})
        token = self.bench.token()
        token.settings = Settings(guest_token=True, policy=Policy(legacy=True))
        keystore.state, token.index = state, Index(state, self._index)
        return token


def large_certificate(key: PrivateKey) -> x509.Certificate:
    """One of which a message holds few."""
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "large")]), datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(30))
    extension = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"x" * 24 * 1024)
    return builder.add_extension(extension, critical=False).sign(key, SHA256())  # type: ignore[arg-type]


@cache
def world() -> World:
    return World()


@cache
def secrets() -> frozenset[bytes]:
    """Every window of every private component: big-endian, and as it stands in PKCS#8."""
    found: set[bytes] = set()
    for components_of in [*map(components, world().keys), world().values]:
        for component in components_of:
            found |= {component[i : i + WINDOW] for i in range(len(component) - WINDOW + 1)}
    return frozenset(found)


def components(key: PrivateKey) -> list[bytes]:
    if isinstance(key, rsa.RSAPrivateKey):
        n = key.private_numbers()
        return [number.to_bytes((number.bit_length() + 7) // 8, "big") for number in (n.d, n.p, n.q, n.dmp1, n.dmq1, n.iqmp)]
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return [key.private_numbers().private_value.to_bytes((key.key_size + 7) // 8, "big")]
    return [key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())]


def shows_a_key(data: bytes) -> bool:
    windows = secrets()
    return any(data[i : i + WINDOW] in windows for i in range(len(data) - WINDOW + 1))
