"""Guests in the state file; each method is one transaction and may raise StorageUnavailable."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass

from hsmvisor.host import limits
from hsmvisor.host.database import Database
from hsmvisor.host.state import store_answer
from hsmvisor.serving.errors import Exhausted, Exists, NotFound, WrongState
from hsmvisor.serving.requests import Request

_COLUMNS = "name, kind, owner, attributes, module, changed, at"


@dataclass(frozen=True)
class Guest:
    name: str
    kind: str
    owner: str
    attributes: Mapping[str, str]
    module: str  #: empty: it has none
    changed: int = 0  #: rises with each change of any guest
    at: int = 0  #: seconds

    def same(self, other: Guest) -> bool:
        """Says whether it was asked for as `other` was."""
        mine = self.name, self.kind, self.owner, self.attributes, self.module
        return mine == (other.name, other.kind, other.owner, other.attributes, other.module)


class GuestRows:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> list[Guest]:
        sql = f"SELECT {_COLUMNS} FROM guests ORDER BY name"
        return await self._database.run(lambda c: [_guest(row) for row in c.execute(sql)])

    async def register(self, guest: Guest, request: Request) -> Guest:
        """Returns it as it stands there now: the same again changes nothing.  Raises Exists, WrongState, Exhausted."""

        def work(connection: sqlite3.Connection) -> Guest:
            found = _find(connection, guest.name)
            if found is None:
                if connection.execute("SELECT count(*) FROM guests").fetchone()[0] >= limits.MAX_GUESTS:
                    raise Exhausted("GUESTS", f"a host has at most {limits.MAX_GUESTS} guests", "remove one that is gone")
                _demand_free(connection, guest)
                found = _store(connection, guest)
            elif not found.same(guest):
                raise differs(guest.name)
            store_answer(connection, request, b"")
            return found

        return await self._database.run(work)

    async def update(self, name: str, owner: str, attributes: Mapping[str, str], request: Request) -> Guest:
        """Raises NotFound."""

        def work(connection: sqlite3.Connection) -> Guest:
            found = _find(connection, name)
            if found is None:
                raise not_found(name)
            if (found.owner, found.attributes) != (owner, attributes):
                found = _store(connection, Guest(name, found.kind, owner, attributes, found.module))
            store_answer(connection, request, b"")
            return found

        return await self._database.run(work)

    async def remove(self, name: str, request: Request, result: bytes) -> None:
        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM guests WHERE name = ?", (name,))
            store_answer(connection, request, result)

        await self._database.run(work)


def _guest(row: tuple[str, str, str, str, str, int, int]) -> Guest:
    name, kind, owner, attributes, module, changed, at = row
    return Guest(name, kind, owner, json.loads(attributes), module, changed, at)


def _find(connection: sqlite3.Connection, name: str) -> Guest | None:
    row = connection.execute(f"SELECT {_COLUMNS} FROM guests WHERE name = ?", (name,)).fetchone()
    return _guest(row) if row else None


def _demand_free(connection: sqlite3.Connection, guest: Guest) -> None:
    """Raises WrongState when the module is another guest's."""
    sql = "SELECT name FROM guests WHERE module = ? AND module <> ''"
    if (row := connection.execute(sql, (guest.module,)).fetchone()) is not None:
        raise taken(guest.module, row[0])


def _store(connection: sqlite3.Connection, guest: Guest) -> Guest:
    """The number of this commit, which is written at its end, is the guest's: it never falls, and no two have the same."""
    number: int = connection.execute("SELECT number + 1 FROM commits").fetchone()[0]
    stored = Guest(guest.name, guest.kind, guest.owner, guest.attributes, guest.module, number, int(time.time()))
    row = (stored.name, stored.kind, stored.owner, json.dumps(dict(stored.attributes)), stored.module, stored.changed, stored.at)
    connection.execute(f"INSERT OR REPLACE INTO guests ({_COLUMNS}) VALUES (?,?,?,?,?,?,?)", row)
    return stored


def differs(name: str) -> Exists:
    return Exists("GUEST", f"guest {name} is registered otherwise", f"hsmvisor guest set {name} changes its owner and attributes")


def taken(module: str, guest: str) -> WrongState:
    return WrongState("MODULE_TAKEN", f"module {module} is guest {guest}'s", "a module is one guest's: name another one")


def not_found(name: str) -> NotFound:
    return NotFound("GUEST", f"there is no guest {name}", "hsmvisor guest list shows those there are")
