"""What a manager's configuration says of its issuer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class FileEscrow:
    """Kept keys are wrapped by a key in a file, which is made when it is missing."""

    path: Path

    def arguments(self) -> list[str]:
        return ["--escrow", "file", "--escrow-file", str(self.path)]


@dataclass(frozen=True)
class TokenEscrow:
    """Kept keys are wrapped by a key in a PKCS #11 token, which is made when it is missing."""

    library: Path
    token: str  #: its label
    pin_file: Path
    label: str = "hsmvisor-escrow"  #: the key's
    environment: Mapping[str, str] = field(default_factory=dict)  #: for the library
    writes: tuple[Path, ...] = ()  #: directories that the library writes into
    network: bool = False  #: the library reaches its token by a network

    def arguments(self) -> list[str]:
        found = ["--escrow", "token", "--library", str(self.library), "--token", self.token]
        found += ["--label", self.label, "--pin-file", str(self.pin_file)]
        found += [part for path in self.writes for part in ("--writes", str(path))]
        return [*found, "--network"] if self.network else found


@dataclass(frozen=True)
class Settings:
    recipient_file: Path  #: the issuer's own key, to which owners seal; made when it is missing
    escrow: FileEscrow | TokenEscrow | None = None  #: None: no keys are kept

    def arguments(self) -> list[str]:
        return ["--recipient-file", str(self.recipient_file), *(self.escrow.arguments() if self.escrow else [])]

    def environment(self) -> dict[str, str]:
        return dict(self.escrow.environment) if isinstance(self.escrow, TokenEscrow) else {}
