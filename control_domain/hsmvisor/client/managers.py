"""Where a fleet's manager is, and how we show it who we are: a small file of the user's own, and a channel made of it."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

import grpc
from hsmvisor.client.channel import TlsFiles, connect
from hsmvisor.client.metadata import with_metadata

_MAX_TOKEN = 4096  #: characters of an access token's file


class BadManagerFile(ValueError):
    """The file says something that cannot be; the message says what."""


@dataclass(frozen=True)
class ManagerAt:
    """Paths of the file are its own directory's where they are not absolute."""

    address: str = ""  #: unix:/path or host:port
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token_file: Path | None = None
    root: str = ""  #: the fleet's root in hexadecimal: whose word counts for the issuer's key
    server_name: str = ""  #: to expect in the manager's certificate, where that is not the address

    @classmethod
    def read(cls, path: Path) -> ManagerAt:
        """Raises BadManagerFile, OSError."""
        try:
            told = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadManagerFile(f"{path}: {error}") from None
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in told.items():
            if name not in known:
                raise BadManagerFile(f"{path}: {name} is not known; known are {', '.join(known)}")
            if not isinstance(value, str):
                raise BadManagerFile(f"{path}: {name} is a text")
        for name in ("ca", "certificate", "key", "token_file"):
            if name in told:
                told[name] = path.parent / Path(told[name]).expanduser()
        return cls(**told)

    def channel(self) -> grpc.Channel:
        """Raises ValueError, OSError."""
        tls = None
        if self.ca is not None and not self.address.startswith("unix:"):
            tls = TlsFiles(self.ca, self.certificate, self.key, self.server_name or None)
        channel = connect(self.address, tls=tls)
        return channel if self.token_file is None else with_token(channel, read_token(self.token_file))


def read_token(path: Path) -> str:
    """Raises ValueError, OSError."""
    with path.open("rb") as file:
        text = file.read(_MAX_TOKEN + 1).strip()
    if not text or len(text) > _MAX_TOKEN or not text.isascii() or len(text.split()) != 1:
        raise ValueError(f"{path}: this is no access token (one line, as hsmvisor fleet token create writes it)")
    return text.decode()


def with_token(channel: grpc.Channel, token: str) -> grpc.Channel:
    """Returns a channel whose every call shows an access token."""
    return with_metadata(channel, "authorization", f"Bearer {token}")
