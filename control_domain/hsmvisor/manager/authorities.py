"""The authorities of the configuration, as plugs by name; each is given its orders at a pace that it can bear."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hsmvisor import addresses
from hsmvisor.manager.authority_rows import Acme, Authority, Builtin, Command
from hsmvisor.manager.ca.acme.authority import AcmeCa
from hsmvisor.manager.ca.acme.challenges import DNS, HTTP, ChallengeFailed, Hook, HttpServer, Responder
from hsmvisor.manager.ca.builtin.authority import BuiltinCa, open_authority
from hsmvisor.manager.ca.builtin.keys import FileKeys, KeyStore, NoKey
from hsmvisor.manager.ca.command import CommandCa
from hsmvisor.manager.ca.interface import Ca, Issued, Keep, NotYet, Order, Reason, Window
from hsmvisor.manager.config import Config
from hsmvisor.manager.store.database import Database
from hsmvisor.serving.errors import Broken

LONGEST_WAIT = 0.5  #: seconds that an order waits for its turn; one that would wait longer comes again, and keeps nobody waiting


class Pace:
    """At most so many a second, evenly; 0: as many as come.  When thousands come at once each is told when to come again, one after
    the other, so that they do not all come again at once."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = (1 / per_second if per_second else 0.0), clock
        self._next = self._told = 0.0

    async def wait(self) -> None:
        """Raises NotYet."""
        now = self._clock()
        turn = max(self._next, now)
        if turn - now > LONGEST_WAIT:
            self._told = max(self._told + self._every, turn)
            raise NotYet("other orders come first", self._told - now)
        self._next = turn + self._every
        await asyncio.sleep(turn - now)


class Paced:
    """An authority that is given its new orders one by one; those that it knows are taken up at any time."""

    def __init__(self, ca: Ca, per_second: float) -> None:
        self.ca, self._pace = ca, Pace(per_second)

    @property
    def kind(self) -> str:
        return self.ca.kind

    async def issue(self, order: Order, keep: Keep) -> Issued:
        if not order.kept:
            await self._pace.wait()
        return await self.ca.issue(order, keep)

    async def revoke(self, certificate: bytes, reason: Reason) -> None:
        await self.ca.revoke(certificate, reason)

    async def window(self, certificate: bytes) -> Window | None:
        return await self.ca.window(certificate)

    async def close(self) -> None:
        await self.ca.close()


class Authorities(Mapping[str, Ca]):
    """By name; the manager's own authority for hosts is not among them."""

    def __init__(self, plugs: Mapping[str, Ca], default: str, servers: tuple[HttpServer, ...] = ()) -> None:
        self._plugs, self.default, self._servers = dict(plugs), default, servers

    def __getitem__(self, name: str) -> Ca:
        return self._plugs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plugs)

    def __len__(self) -> int:
        return len(self._plugs)

    def root(self, name: str) -> bytes:
        """DER; empty where the authority is somebody else's."""
        ca = self._plugs[name]
        inner = ca.ca if isinstance(ca, Paced) else ca
        return inner.root if isinstance(inner, BuiltinCa) else b""

    @property
    def builtin(self) -> dict[str, BuiltinCa]:
        """The built-in ones, by name."""
        inner = {name: ca.ca if isinstance(ca, Paced) else ca for name, ca in self._plugs.items()}
        return {name: ca for name, ca in inner.items() if isinstance(ca, BuiltinCa)}

    async def close(self) -> None:
        for ca in self._plugs.values():
            await ca.close()
        for server in self._servers:
            await asyncio.to_thread(server.close)


async def open_all(config: Config, database: Database, clock: Callable[[], float]) -> Authorities:
    """Raises Broken, DatabaseError."""
    plugs: dict[str, Ca] = {}
    servers: list[HttpServer] = []
    for row in config.all_authorities:
        directory = config.fleet / "authorities" / row.name
        try:
            plugs[row.name] = Paced(await _opened(row, directory, database, clock, servers), row.orders_per_second)
        except (NoKey, ChallengeFailed) as error:
            raise Broken("AUTHORITY", f"authority {row.name}: {error}", _HINT.format(fleet=config.fleet)) from None
    default = next((row.name for row in config.all_authorities if row.default), config.all_authorities[0].name)
    return Authorities(plugs, default, tuple(servers))


_HINT = "all managers of a fleet have the same keys: copy {fleet} from another one, or restore it from a backup"


async def _opened(row: Authority, directory: Path, database: Database, clock: Callable[[], float], servers: list[HttpServer]) -> Ca:
    match row:
        case Builtin():
            keys = _keys(row, directory)
            return await open_authority(row.name, keys, database, row.all_profiles(), row.crl_url, row.ocsp_url, clock)
        case Acme():
            key = Path(row.account_key) if row.account_key else directory / "account.key"
            await asyncio.to_thread(key.parent.mkdir, mode=0o700, parents=True, exist_ok=True)
            return AcmeCa(row.directory, key, _responders(row, servers), row.contact, row.ca_file)
        case Command():
            environment = dict(setting.split("=", 1) for setting in row.environment)
            return CommandCa(row.command, row.seconds, environment)


def _keys(row: Builtin, directory: Path) -> KeyStore:
    if not row.library:
        return FileKeys(Path(row.keys) if row.keys else directory)
    from hsmvisor.manager.ca.builtin.token_keys import TokenKeys

    return TokenKeys(Path(row.library), row.token, Path(row.pin_file))


def _responders(row: Acme, servers: list[HttpServer]) -> list[Responder]:
    found: list[Responder] = []
    if row.http:
        server = HttpServer(*addresses.split(row.http))
        servers.append(server)
        found.append(server)
    if row.http_hook:
        found.append(Hook(HTTP, row.http_hook, row.hook_seconds))
    if row.dns_hook:
        found.append(Hook(DNS, row.dns_hook, row.hook_seconds))
    return found
