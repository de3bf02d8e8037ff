"""The host service for a test that traces it: events are stored at its end only, so that each write belongs to an action, and the
audit log goes on in a new file after a few lines.

HSMVISOR_UNSYNCED takes the state file's syncs away: the trace must show that they are missing.  Run as a module, as hsmvisor-host.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

from hsmvisor.host import database, supervisor
from hsmvisor.host.main import main
from hsmvisor.serving import events
from hsmvisor.serving.audit import Audit

connect = database._connect


def unsynced(path: Path) -> sqlite3.Connection:
    connection = connect(path)
    connection.execute("PRAGMA synchronous=OFF")
    return connection


def short_audit(*arguments: Any, **options: Any) -> Audit:
    return Audit(*arguments, **{**options, "rotate_bytes": 2500})


if __name__ == "__main__":
    events._STORE_EVERY = 3600.0
    supervisor.Audit = short_audit  # type: ignore[misc,assignment]
    if "HSMVISOR_UNSYNCED" in os.environ:
        database._connect = unsynced
    main()
