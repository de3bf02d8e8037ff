"""What all managers of a fleet have the same, in STATE/fleet: an operator copies that directory to each further manager.

root/           the fleet's root and this manager's signer (hsmvisor.authority.store)
ca/             keys of the authority `fleet`, which certifies hosts and managers
token.key       what join tokens and access tokens are made of
authorities/    keys of the built-in authorities, ACME accounts
issuer/         the issuer's own key, and the one that wraps keys which owners ask to keep

The database holds fingerprints of them, and a manager whose files do not fit does not start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hsmvisor.authority.store import Authority, AuthorityError
from hsmvisor.manager import secrets
from hsmvisor.manager.authority_rows import FLEET
from hsmvisor.manager.ca.builtin.authority import open_authority
from hsmvisor.manager.ca.builtin.keys import FileKeys, NoKey
from hsmvisor.manager.ca.builtin.profiles import PROFILES
from hsmvisor.manager.config import Config
from hsmvisor.manager.inventory.identities import Identities
from hsmvisor.manager.store import fleet
from hsmvisor.manager.store.database import Database, IntegrityError
from hsmvisor.serving.errors import Broken
from hsmvisor_rpc.sealed.commands import fingerprint


@dataclass(frozen=True)
class FleetKeys:
    authority: Authority
    identities: Identities
    token_key: bytes = field(repr=False)

    @property
    def root(self) -> bytes:
        """Raw Ed25519: what the fleet's modules obey."""
        return self.authority.root_public


async def settle(config: Config, database: Database, audited: bool, clock: Callable[[], float]) -> FleetKeys:
    """Opens what there is; begins a fleet where database and directory are empty.  `audited`: this manager has acted before.

    Raises Broken, DatabaseError.
    """
    async with database.reading() as connection:
        known = await fleet.fingerprints(connection)
    if not known and audited:
        raise Broken(
            "DATABASE_EMPTY",
            f"the database {database.shown} is empty, but {config.audit_file} tells of this manager; nothing was written",
            f"restore the database, or move {config.state} away to begin a new fleet",
        )
    authority, token_key = await asyncio.to_thread(_files, config, not known)
    found = {"root": fingerprint(authority.root_public).hex(), "token-key": secrets.fingerprint_of(token_key)}
    if not known:
        known = await _note(database, found, int(clock()))
    for name, expected in known.items():
        if found.get(name) != expected:
            what = "root" if name == "root" else "token key"
            raise Broken(
                "FLEET_KEYS",
                f"the database {database.shown} is that of a fleet with another {what} than {config.fleet} has",
                copy_hint(config.fleet),
            )
    try:
        profiles = {"host": PROFILES["host"]}
        ca = await open_authority(FLEET, FileKeys(config.fleet / "ca"), database, profiles, clock=clock)
    except NoKey as error:
        raise Broken("FLEET_KEYS", str(error), copy_hint(config.fleet)) from None
    return FleetKeys(authority, Identities(ca), token_key)


async def _note(database: Database, found: dict[str, str], now: int) -> dict[str, str]:
    try:
        async with database.transaction() as connection:
            await fleet.put_fingerprints(connection, found, now)
    except IntegrityError:  # another manager began the fleet at the same time
        async with database.reading() as connection:
            return await fleet.fingerprints(connection)
    return found


def copy_hint(directory: Path) -> str:
    return (
        f"all managers of a fleet have the same files in {directory}: stop this one, copy that directory from another manager "
        "(owner and mode too), or restore it from a backup"
    )


def _files(config: Config, make: bool) -> tuple[Authority, bytes]:
    """Raises Broken."""
    directory, hint = config.fleet / "root", copy_hint(config.fleet)
    token_key = secrets.load(config.fleet / "token.key", make, hint)
    try:
        if make and not (directory / "root.key").exists():
            Authority.create(directory)
        authority = Authority.open(directory)
        if _signer_name(authority) != config.manager:
            authority.renew_signer(config.manager)
        authority.signer()
    except AuthorityError as error:
        raise Broken("FLEET_KEYS", str(error), hint) from None
    return authority, token_key


def _signer_name(authority: Authority) -> str:
    try:
        return authority.certificate().name
    except AuthorityError:  # killed before there was one
        return ""
