"""Slot 1 of a guest as stock programs meet it: initialized by pkcs11-tool, with the user's PIN set."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from support.guest import Guest
from support.host import Module

LABEL, SO, USER = "own", "officer-1", "user-1"
CURVES: dict[str, ec.EllipticCurve] = {
    "prime256v1": ec.SECP256R1(),
    "secp384r1": ec.SECP384R1(),
    "secp521r1": ec.SECP521R1(),
    "secp256k1": ec.SECP256K1(),
}
#: For what p11-kit 0.24.1 cannot carry, or where a client loads its library in a way of its own.
OURS_ALONE = pytest.mark.parametrize("library", ["ours"], indirect=True)


@dataclass(frozen=True)
class OwnSlot:
    guest: Guest
    module: Module

    def tool(self, *arguments: object, check: bool = True) -> str:
        """pkcs11-tool on slot 1, nobody logged in."""
        command = ("pkcs11-tool", "--module", self.guest.library.path, "--slot", "1")
        return self.guest.run(*command, *map(str, arguments), check=check).stdout.decode()

    def as_user(self, *arguments: object, check: bool = True) -> str:
        return self.tool("--login", "--pin", USER, *arguments, check=check)

    def prepare(self) -> OwnSlot:
        self.tool("--init-token", "--label", LABEL, "--so-pin", SO)
        self.tool("--login", "--login-type", "so", "--so-pin", SO, "--init-pin", "--new-pin", USER)
        return self

    def generate(self, kind: str, label: str, key_id: str, *usage: str) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
        """Makes a key pair in the token: `kind` as pkcs11-tool names it (rsa:2048, EC:prime256v1), `key_id` in hex.

        Returns the public key that the token tells.
        """
        said = self.as_user("--keypairgen", "--key-type", kind, "--label", label, "--id", key_id, *usage)
        if kind.startswith("rsa"):
            public = self.public(key_id)
            assert isinstance(public, rsa.RSAPublicKey)
            return public
        # OpenSC 0.23 reads no public key on other curves than P-256, but prints the point of a new one
        octets = bytes.fromhex(next(line.split()[1] for line in said.splitlines() if "EC_POINT:" in line))
        curve = CURVES[kind.partition(":")[2]]
        return ec.EllipticCurvePublicKey.from_encoded_point(curve, octets[-(2 * ((curve.key_size + 7) // 8) + 1) :])

    def public(self, key_id: str) -> PublicKeyTypes:
        path = self.guest.directory / f"public-{key_id}"
        self.tool("--read-object", "--type", "pubkey", "--id", key_id, "--output-file", path)
        return serialization.load_der_public_key(path.read_bytes())

    def uri(self, label: str, pin: bool = False) -> str:
        return f"pkcs11:token={LABEL};object={label};type=private" + (f";pin-value={USER}" if pin else "")
