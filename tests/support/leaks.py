"""Searches memory and files for private keys: any 16 bytes of a private component, big-endian or as little-endian limbs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, mldsa, rsa
from support.certificates import MlDsaPrivateKey, PrivateKey
from support.processes import memory

WINDOW, WORD = 16, 8
BLOCK = 4096  #: a page


def components(key: PrivateKey) -> dict[str, bytes]:
    """The secret numbers and strings of a key, big-endian as in their standards."""
    if isinstance(key, rsa.RSAPrivateKey):
        n = key.private_numbers()
        values = {"d": n.d, "p": n.p, "q": n.q, "dmp1": n.dmp1, "dmq1": n.dmq1, "iqmp": n.iqmp}
        return {name: value.to_bytes((value.bit_length() + 7) // 8, "big") for name, value in values.items()}
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return {"d": key.private_numbers().private_value.to_bytes((key.curve.key_size + 7) // 8, "big")}
    seed = key.private_bytes_raw()
    if isinstance(key, MlDsaPrivateKey):
        k_l = {mldsa.MLDSA44PrivateKey: (4, 4), mldsa.MLDSA65PrivateKey: (6, 5), mldsa.MLDSA87PrivateKey: (8, 7)}
        expanded = hashlib.shake_256(seed + bytes(next(v for t, v in k_l.items() if isinstance(key, t)))).digest(128)
        return {"seed": seed, "rho'": expanded[32:96], "K": expanded[96:]}  # FIPS 204, algorithm 6
    if isinstance(key, ed448.Ed448PrivateKey):
        half = hashlib.shake_256(seed).digest(114)  # RFC 8032, 5.2.5
        scalar = bytearray(half[:57])
        scalar[0], scalar[55], scalar[56] = scalar[0] & 252, scalar[55] | 128, 0
        return {"seed": seed, "scalar": bytes(scalar[::-1]), "prefix": half[57:]}
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    half = hashlib.sha512(seed).digest()
    scalar = bytearray(half[:32])  # RFC 8032, 5.1.5
    scalar[0], scalar[31] = scalar[0] & 248, scalar[31] & 63 | 64
    return {"seed": seed, "scalar": bytes(scalar[::-1]), "prefix": half[32:]}


class Needles:
    """Every window of every component.  A fragment of 16 bytes holds a whole aligned word of 8 wherever it lies in memory: so
    the aligned words of the memory are looked up, and only then is the window itself looked for.  Most of memory is zeros, or
    what was seen elsewhere: a block without such a word is not looked at again."""

    def __init__(self, keys: Iterable[PrivateKey]) -> None:
        self.words: dict[int, list[tuple[str, bytes]]] = {}
        self._clean: set[int] = set()  #: hashes of blocks without any of the words
        for number, key in enumerate(keys):
            for name, value in components(key).items():
                for order, data in (("big-endian", value), ("limbs", value[::-1])):
                    self.add(f"key {number} {name} {order}", data)

    def add(self, name: str, data: bytes) -> None:
        self._clean.clear()
        for at in range(len(data) - WINDOW + 1):
            window = data[at : at + WINDOW]
            for part in range(WORD + 1):
                word = int.from_bytes(window[part : part + WORD], "little")
                self.words.setdefault(word, []).append((name, window))

    def found_in(self, data: bytes) -> set[str]:
        padded = memoryview(data + bytes(-len(data) % WORD))
        hits = set[int]()
        for at in range(0, len(padded), BLOCK):
            block = padded[at : at + BLOCK]
            if (mark := hash(block.tobytes())) in self._clean:
                continue
            words = block.cast("Q")
            if self.words.keys().isdisjoint(words):
                self._clean.add(mark)
            else:
                hits |= self.words.keys() & set(words)
        return {name for word in hits for name, window in self.words[word] if window in data}

    def in_process(self, pid: int) -> set[str]:
        found: set[str] = set()
        for region in memory(pid):
            found |= self.found_in(region)
        return found

    def in_files(self, *directories: Path) -> dict[str, set[str]]:
        found = {}
        for directory in directories:
            for path in directory.rglob("*"):
                if path.is_file() and (hits := self.found_in(path.read_bytes())):
                    found[str(path)] = hits
        return found
