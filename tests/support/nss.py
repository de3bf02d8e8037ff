"""Mozilla's NSS tools with a guest's library in a database of their own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from support.guest import Guest


@dataclass(frozen=True)
class Nss:
    """`pins` (token -> PIN) are what every tool is told; the database itself has none."""

    guest: Guest
    pins: dict[str, str]

    def __post_init__(self) -> None:
        self.directory.mkdir()
        self.guest.write("pins", "".join(f"{token}:{pin}\n" for token, pin in self.pins.items()))
        self.guest.write("noise", os.urandom(64))
        self.tool("certutil", "-N", "--empty-password")
        said = self.guest.run("modutil", "-dbdir", self.database, "-add", "hsmvisor", "-libfile", self.guest.library.path, "-force")
        assert b'Module "hsmvisor" added to database' in said.stdout
        # certificates are public objects: without this NSS logs in before it looks for one, and asks a terminal for the PIN
        self.guest.run("modutil", "-dbdir", self.database, "-default", "hsmvisor", "-mechanisms", "FRIENDLY", "-force")

    @property
    def directory(self) -> Path:
        return self.guest.directory / "nss"

    @property
    def database(self) -> str:
        return f"sql:{self.directory}"

    def tool(self, name: str, *arguments: object, check: bool = True, stdin: bytes = b"") -> str:
        return self.guest.run(name, "-d", self.database, *map(str, arguments), check=check, stdin=stdin).stdout.decode()

    def certutil(self, *arguments: object, check: bool = True) -> str:
        return self.tool("certutil", *arguments, "-f", self.guest.directory / "pins", check=check)

    def generate(
        self, token: str, name: str, *kind: str, subject: str = "", trust: str = "u,u,u", more: tuple[str, ...] = ()
    ) -> None:
        """Makes a key pair in `token` and a self-signed certificate for it."""
        common = ("-n", name, "-s", subject or f"CN={name}", "-x", "-t", trust, "-z", self.guest.directory / "noise", *more)
        self.certutil("-S", "-h", token, *kind, *common)

    def keys(self, token: str) -> dict[str, str]:
        """Returns the token's private keys: nickname -> id (hex)."""
        rows = (line.split() for line in self.certutil("-K", "-h", token).splitlines() if line.startswith("<"))
        return {" ".join(row[-1:]): row[-2] for row in rows}

    def trust(self, name: str, certificate: Path, trust: str) -> None:
        """Keeps a certificate in the database itself."""
        self.certutil("-A", "-n", name, "-t", trust, "-i", certificate)
