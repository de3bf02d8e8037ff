"""Secrets of channels, read for each attempt: a new one counts at once."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from hsmvisor.files import OthersRead, read_private
from hsmvisor.manager.notify import limits
from hsmvisor.manager.notify.errors import Undelivered


def signing_keys(path: str) -> list[bytes]:
    """Returns a webhook's keys.  Raises Undelivered."""
    keys = []
    for line in _read(path, "secret_file").split():
        try:
            key = base64.b64decode(line.removeprefix("whsec_"), validate=True)
        except (binascii.Error, ValueError):
            raise Undelivered("secret_file: a secret is whsec_ and base64") from None
        if len(key) not in limits.SECRET_SIZES:
            shortest, longest = limits.SECRET_SIZES[0], limits.SECRET_SIZES[-1]
            raise Undelivered(f"secret_file: a secret has {shortest} to {longest} bytes, this one has {len(key)}")
        keys.append(key)
    if not 1 <= len(keys) <= limits.MOST_SECRETS:
        raise Undelivered(f"secret_file has 1 to {limits.MOST_SECRETS} secrets, a line each, not {len(keys)}")
    return keys


def password(path: str) -> str:
    """Raises Undelivered."""
    text = _read(path, "password_file").removesuffix("\n").removesuffix("\r")
    if not text or not text.isascii() or not text.isprintable():
        raise Undelivered("password_file has one line of printable ASCII")
    return text


def _read(path: str, key: str) -> str:
    try:
        content = read_private(Path(path), limits.MAX_SECRET_FILE + 1)
        if len(content) <= limits.MAX_SECRET_FILE:
            return content.decode("utf-8")
    except OthersRead:
        raise Undelivered(f"{key} can be read by others: chmod 600 {path}") from None
    except OSError as error:
        raise Undelivered(f"{key} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        pass
    raise Undelivered(f"{key} {path} is a text of at most {limits.MAX_SECRET_FILE} bytes")
