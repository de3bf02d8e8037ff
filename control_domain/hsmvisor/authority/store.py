"""An authority's directory: the root that modules obey, a signer that it certifies, and the hosts that it trusts.

root.key       Ed25519, PEM (PKCS #8, encrypted when a passphrase was given)
signer.key     Ed25519, PEM; signs the commands
signer.cert    the root's word for the signer (hsmvisor_rpc.sealed.commands, Signed)
hosts.json     pinned identity keys by the address they were met at
modules/       what was delivered to each module (records.py); no key
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hsmvisor.files import write_private
from hsmvisor_rpc.sealed.commands import Signed, Signer, SignerCertificate, certify, raw_public

SIGNER_LIFETIME = 90 * 86400  #: seconds
RENEW_BEFORE = 30 * 86400


class AuthorityError(Exception):
    """The authority cannot do what is asked; the message says what to do."""


def default_directory() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/hsmvisor-authority")
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    return Path(base) / "hsmvisor/authority"


class Authority:
    """Its repr shows nothing but where it is."""

    def __init__(self, directory: Path, root_public: bytes, passphrase: bytes | None) -> None:
        self.directory, self.root_public, self._passphrase = directory, root_public, passphrase

    def __repr__(self) -> str:
        return f"Authority({str(self.directory)!r})"

    @classmethod
    def create(cls, directory: Path, passphrase: bytes | None = None) -> Authority:
        """Makes root and signer; raises AuthorityError when there is one already."""
        if (directory / "root.key").exists():
            raise AuthorityError(f"{directory} holds an authority already")
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            root = Ed25519PrivateKey.generate()
            write_private(directory / "root.pub", raw_public(root.public_key()).hex().encode() + b"\n")
            write_private(directory / "root.key", _pem(root, passphrase))
        except OSError as error:
            raise AuthorityError(f"{directory} cannot be written: {error.strerror}") from None
        authority = cls(directory, raw_public(root.public_key()), passphrase)
        authority.renew_signer()
        return authority

    @classmethod
    def open(cls, directory: Path, passphrase: bytes | None = None) -> Authority:
        try:
            public = bytes.fromhex((directory / "root.pub").read_text().strip())
        except FileNotFoundError:
            raise AuthorityError(f"there is no authority in {directory}: hsmvisor authority init makes one") from None
        except (OSError, ValueError) as error:
            raise AuthorityError(f"the authority in {directory} cannot be read: {error}") from None
        return cls(directory, public, passphrase)

    # ---- keys ---------------------------------------------------------------------------------------------------

    def _load(self, name: str, passphrase: bytes | None) -> Ed25519PrivateKey:
        path = self.directory / name
        try:
            if path.stat().st_mode & 0o077:
                raise AuthorityError(f"others may read {path}: chmod 600 it, and think of who may have read it")
            key = serialization.load_pem_private_key(path.read_bytes(), passphrase)
        except FileNotFoundError:
            raise AuthorityError(f"{path} is missing: restore it from where it is kept") from None
        except TypeError:
            raise AuthorityError(f"{path} is encrypted: give its passphrase (--root-passphrase-file)") from None
        except (OSError, ValueError, UnsupportedAlgorithm):
            raise AuthorityError(f"{path} cannot be read: wrong passphrase, or not a key") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise AuthorityError(f"{path} is not an Ed25519 key")
        return key

    def root(self) -> Signer:
        """Returns the root as signer: for change-root alone."""
        return Signer(self._load("root.key", self._passphrase))

    def renew_signer(self, name: str = "") -> SignerCertificate:
        """Makes a new signer key and has the root certify it."""
        root = self._load("root.key", self._passphrase)
        signer = Ed25519PrivateKey.generate()
        now = int(time.time())
        certificate = SignerCertificate(
            name or f"cli@{os.uname().nodename}", raw_public(signer.public_key()), now, now + SIGNER_LIFETIME
        )
        write_private(self.directory / "signer.key", _pem(signer, None))
        write_private(self.directory / "signer.cert", certify(root, certificate))
        return certificate

    def certificate(self) -> SignerCertificate:
        try:
            return SignerCertificate.decode(Signed.decode((self.directory / "signer.cert").read_bytes()).payload)
        except (OSError, ValueError):
            raise AuthorityError(f"there is no signer in {self.directory}: hsmvisor authority certify makes one") from None

    def signer(self) -> Signer:
        """Returns the signer, renewed first when its certificate nears its end and the root is at hand."""
        left = self.certificate().not_after - time.time()
        if left < RENEW_BEFORE:
            try:
                self.renew_signer(self.certificate().name)
            except AuthorityError as error:
                if left <= 0:
                    raise AuthorityError(f"the signer's certificate has expired and cannot be renewed: {error}") from None
        return Signer(self._load("signer.key", None), (self.directory / "signer.cert").read_bytes())

    # ---- hosts --------------------------------------------------------------------------------------------------

    @property
    def hosts(self) -> dict[str, bytes]:
        """Pinned identity keys (raw Ed25519) by address."""
        try:
            return {a: bytes.fromhex(k) for a, k in json.loads((self.directory / "hosts.json").read_text()).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, TypeError):
            raise AuthorityError(f"{self.directory / 'hosts.json'} cannot be read, or is not a list of hosts: restore it") from None

    def pin(self, address: str, host_key: bytes) -> None:
        """Raises AuthorityError when another key is pinned for the address."""
        hosts = self.hosts
        if address in hosts and hosts[address] != host_key:
            raise AuthorityError(
                f"{address} shows another identity key than the pinned one: somebody stands between, or the host was set up anew "
                "(then: hsmvisor host enrol --replace)"
            )
        if address not in hosts:
            self._write_hosts(hosts | {address: host_key})

    def replace(self, address: str, host_key: bytes) -> None:
        """Pins the key of a host that was set up anew, in the place of the old one."""
        self._write_hosts(self.hosts | {address: host_key})

    def forget(self, address: str) -> None:
        self._write_hosts({a: k for a, k in self.hosts.items() if a != address})

    def _write_hosts(self, hosts: dict[str, bytes]) -> None:
        write_private(self.directory / "hosts.json", json.dumps({a: k.hex() for a, k in hosts.items()}, indent=1).encode())


def _pem(key: Ed25519PrivateKey, passphrase: bytes | None) -> bytes:
    protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        protection = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
