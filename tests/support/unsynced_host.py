"""The host service that never syncs: what a test of power loss must find out.  Run as a module, as hsmvisor-host."""

from __future__ import annotations

import os
import sqlite3

from hsmvisor.host import database
from hsmvisor.host.main import main

_real = database._connect


def _connect(*arguments: object) -> sqlite3.Connection:
    connection = _real(*arguments)  # type: ignore[arg-type]
    connection.execute("PRAGMA synchronous=OFF")
    return connection


if __name__ == "__main__":
    database._connect = _connect
    os.fsync = os.fdatasync = lambda descriptor: None
    main()
