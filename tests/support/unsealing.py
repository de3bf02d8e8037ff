"""What a host keeps sealed, as whoever has its master key could read it."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from hsmvisor_rpc.internal.messages import STORAGE
from hsmvisord.crypto.software import SoftwareProvider
from hsmvisord.keyprovider.main import _INFO
from hsmvisord.keyprovider.sources import FileSource
from hsmvisord.keystore import persistence
from hsmvisord.keystore.vault import Vault
from support.certificates import PrivateKey


def private_keys(state_directory: Path, module_id: bytes) -> list[PrivateKey]:
    """Returns the delivered private keys of a module's state."""
    with contextlib.closing(sqlite3.connect(state_directory / "state.db")) as database:
        rows = dict(database.execute("SELECT name, blob FROM sealed WHERE module_id = ?", (module_id,)))
        (version,) = database.execute("SELECT version FROM modules WHERE module_id = ?", (module_id,)).fetchone()
    storage_key = FileSource(state_directory / "master.key").derive(_INFO[STORAGE] + module_id)
    state, _, _ = persistence.load(rows, Vault(module_id, storage_key), SoftwareProvider(), version)
    found: list[Any] = [serialization.load_der_private_key(key.private.pkcs8(), None) for key in state.keys.values()]
    return found
