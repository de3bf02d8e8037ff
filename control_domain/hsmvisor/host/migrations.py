"""The schema of the state file, as the steps that led to it.  A step is never changed once released: a new one follows."""

from __future__ import annotations

import sqlite3

from hsmvisor.serving.errors import Broken

APPLICATION_ID = 0x68736D76  #: "hsmv": PRAGMA application_id of a state file
NUMBERED = 2  #: the schema from which on commits are numbered

STEPS: tuple[tuple[str, ...], ...] = (
    (
        f"PRAGMA application_id = {APPLICATION_ID}",
        """CREATE TABLE modules (
            module_id BLOB PRIMARY KEY,
            name TEXT NOT NULL UNIQUE,
            number INTEGER NOT NULL UNIQUE,     -- its worker's uid is uid_base + number
            created_at INTEGER NOT NULL,        -- seconds
            root BLOB NOT NULL,                 -- raw key that it was created with
            settings TEXT NOT NULL,             -- JSON
            intent TEXT NOT NULL CHECK (intent IN ('creating', 'present', 'destroying')),
            version INTEGER NOT NULL,           -- of its sealed state; 0 = none yet
            digest BLOB NOT NULL                -- SHA-256 of the last StoreState
        ) STRICT""",
        """CREATE TABLE sealed (
            module_id BLOB NOT NULL REFERENCES modules (module_id) ON DELETE CASCADE,
            name TEXT NOT NULL,
            blob BLOB NOT NULL,
            PRIMARY KEY (module_id, name)
        ) STRICT""",
        """CREATE TABLE requests (
            request_id TEXT PRIMARY KEY,
            method TEXT NOT NULL,
            content BLOB NOT NULL,              -- SHA-256 of what was asked
            result BLOB NOT NULL,
            at INTEGER NOT NULL                 -- seconds
        ) STRICT""",
        "CREATE INDEX requests_at ON requests (at)",
        """CREATE TABLE enrolments (
            id BLOB PRIMARY KEY,
            secret_hash BLOB NOT NULL,
            expires_at INTEGER NOT NULL,        -- seconds
            attempts INTEGER NOT NULL,          -- wrong proofs while it was open
            used_by TEXT                        -- the manager that used it
        ) STRICT""",
        """CREATE TABLE nonces (
            key TEXT NOT NULL,
            nonce BLOB NOT NULL,
            expires_at INTEGER NOT NULL,        -- seconds
            PRIMARY KEY (key, nonce)
        ) STRICT""",
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY,
            at_ms INTEGER NOT NULL,
            kind TEXT NOT NULL,
            module TEXT NOT NULL,
            detail TEXT NOT NULL
        ) STRICT""",
    ),
    (
        "CREATE TABLE commits (number INTEGER NOT NULL) STRICT",  # one row: how many changes there were
        "INSERT INTO commits VALUES (0)",
    ),
    (
        """CREATE TABLE attachments (
            module_id BLOB PRIMARY KEY REFERENCES modules (module_id) ON DELETE CASCADE,
            qmp TEXT NOT NULL,                  -- path of the QMP socket of the guest's QEMU
            asked_bus TEXT NOT NULL,            -- as the operator asked for it; empty = any
            bus TEXT NOT NULL,                  -- where it was plugged in
            device TEXT NOT NULL,               -- ids in QEMU
            chardev TEXT NOT NULL,
            at INTEGER NOT NULL                 -- seconds
        ) STRICT""",
    ),
    ("ALTER TABLE attachments ADD COLUMN hybrid TEXT NOT NULL DEFAULT ''",),  # the monitor's vsock path; then the others are empty
    (
        """CREATE TABLE purges (
            module_id BLOB PRIMARY KEY,         -- of a module that is gone, whose keys may still be in its HSM
            name TEXT NOT NULL,
            hsm TEXT NOT NULL
        ) STRICT""",
    ),
    (
        """CREATE TABLE guests (
            name TEXT PRIMARY KEY,
            kind TEXT NOT NULL,
            owner TEXT NOT NULL,
            attributes TEXT NOT NULL,           -- JSON object of texts
            module TEXT NOT NULL,               -- its module's name; empty = it has none
            changed INTEGER NOT NULL,           -- number of the commit that changed it last
            at INTEGER NOT NULL                 -- seconds, of that
        ) STRICT""",
        "CREATE UNIQUE INDEX guests_module ON guests (module) WHERE module <> ''",
    ),
    (
        """CREATE TABLE usb_attachments (
            module_id BLOB PRIMARY KEY REFERENCES modules (module_id) ON DELETE CASCADE,
            qmp TEXT NOT NULL,                  -- path of the QMP socket of the guest's QEMU; empty = USB/IP
            device TEXT NOT NULL,               -- id in QEMU
            listen TEXT NOT NULL,               -- HOST:PORT for USB/IP; empty = by QMP
            peers TEXT NOT NULL,                -- JSON array of networks that may import
            at INTEGER NOT NULL                 -- seconds
        ) STRICT""",
    ),
    (
        """CREATE TABLE tpms (
            module_id BLOB PRIMARY KEY REFERENCES modules (module_id) ON DELETE CASCADE,
            version INTEGER NOT NULL,
            sealed BLOB NOT NULL                -- the whole state of the module's TPM
        ) STRICT""",
    ),
)


def migrate(connection: sqlite3.Connection, path: str) -> int:
    """Brings the schema up to date, each step in one transaction; returns the version it had.

    Raises Broken when the file was written by a newer release, sqlite3.Error when it is damaged; it is not touched then.
    """
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if found > len(STEPS):
        raise Broken(
            "STATE_NEWER",
            f"{path} has schema {found}, this release knows {len(STEPS)}; nothing was changed",
            "start the release that wrote it, or restore a backup made with this one",
        )
    if found < 0:
        raise sqlite3.DatabaseError(f"schema {found} does not exist")
    for version in range(found, len(STEPS)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in STEPS[version]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version + 1}")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
    return found
