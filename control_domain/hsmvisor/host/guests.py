"""The guests that are registered on this host: who they are, whose, and which module is theirs.

A guest is what the management plane decides about; a module is what carries it out.  Registering makes the module first, removing
destroys it first, so that what was cut short is finished when it is asked for again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from hsmvisor.host import limits
from hsmvisor.host.attachments import Attachments
from hsmvisor.host.guest_rows import Guest, GuestRows, differs, not_found, taken
from hsmvisor.host.modules import Modules
from hsmvisor.host.settings import Settings
from hsmvisor.serving.errors import Exhausted, NotFound, WrongState
from hsmvisor.serving.events import Events
from hsmvisor.serving.requests import Request


class Guests:
    """`root`: returns the raw root key that new guests' modules obey, empty where the host has joined no management plane."""

    def __init__(
        self, rows: GuestRows, modules: Modules, attachments: Attachments, events: Events, root: Callable[[], bytes]
    ) -> None:
        self._rows, self._modules, self._attachments, self._events, self._root = rows, modules, attachments, events, root
        self._guests: dict[str, Guest] = {}
        self._changing: dict[str, tuple[asyncio.Lock, int]] = {}  #: with how many hold or want it
        self.refused: dict[str, str] = {}  #: why the manager does not take a guest, as it says
        self.changed: Callable[[str], None] = lambda name: None  #: is told of each change

    async def start(self) -> None:
        self._guests = {guest.name: guest for guest in await self._rows.all()}

    # ---- finding ------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Guest:
        try:
            return self._guests[name]
        except KeyError:
            raise not_found(name) from None

    def find(self, name: str) -> Guest | None:
        return self._guests.get(name)

    def all(self) -> list[Guest]:
        return list(self._guests.values())

    def of_module(self, module: str) -> Guest | None:
        return next((guest for guest in self._guests.values() if module and guest.module == module), None)

    # ---- changing -----------------------------------------------------------------------------------------------

    async def register(self, guest: Guest, request: Request, fields: dict[str, Any]) -> bytes:
        """Makes its module where that is not there yet.  `fields`, for the audit log, is told that.  Raises ServiceError."""
        async with self._alone(guest.name):
            found = self._guests.get(guest.name)
            if found is None and len(self._guests) >= limits.MAX_GUESTS:
                raise Exhausted("GUESTS", f"a host has at most {limits.MAX_GUESTS} guests", "remove one that is gone")
            if found is not None and not found.same(guest):
                raise differs(guest.name)
            other = self.of_module(guest.module)
            if other is not None and other.name != guest.name:
                raise taken(guest.module, other.name)
            if guest.module:
                fields["module_created"] = await self._make_module(guest.module, request)
            stored = await self._rows.register(guest, request)
            if found is None:
                self._note(stored, "guest-registered")
        return b""

    async def _make_module(self, name: str, request: Request) -> bool:
        """Says whether it was made now."""
        async with self._alone(f"module {name}"):
            with contextlib.suppress(NotFound):
                self._modules.get(name)
                return False
            root = self._root()
            if not root:
                hint = "hsmvisor host join; or --no-module; or make the module first (hsmvisor module create)"
                raise WrongState("NOT_JOINED", f"module {name} is to obey a manager, and the host has joined none", hint)
            await self._modules.create(name, root, Settings().beginning(), _part(request, "module"))
            return True

    async def update(self, name: str, owner: str, attributes: Mapping[str, str], request: Request) -> bytes:
        """Raises ServiceError."""
        async with self._alone(name):
            before = self.get(name)
            stored = await self._rows.update(name, owner, attributes, request)
            if stored != before:
                self._note(stored, "guest-changed")
        return b""

    async def remove(self, name: str, keep_module: bool, request: Request, fields: dict[str, Any]) -> tuple[str, str]:
        """Returns the module that was destroyed and why keys of it are left in its HSM, both "" if so.  Raises ServiceError."""
        async with self._alone(name):
            guest, destroyed, left = self.get(name), "", ""
            if guest.module and not keep_module:
                with contextlib.suppress(NotFound):
                    left = await self._attachments.destroy(guest.module, _part(request, "module"))
                    destroyed = guest.module
            fields.update(module=destroyed)
            await self._rows.remove(name, request, destroyed.encode())
            del self._guests[name]
            self.refused.pop(name, None)
            self._events.emit("guest-removed", guest.module, {"guest": name})
            self.changed(name)
        return destroyed, left

    def _note(self, guest: Guest, kind: str) -> None:
        self._guests[guest.name] = guest
        self._events.emit(kind, guest.module, {"guest": guest.name, "owner": guest.owner})
        self.changed(guest.name)

    @contextlib.asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        """Of two who change the same one, the second waits."""
        lock, users = self._changing.get(name, (asyncio.Lock(), 0))
        self._changing[name] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._changing.pop(name)
            if users > 1:
                self._changing[name] = lock, users - 1


def _part(request: Request, what: str) -> Request:
    """A step of a request that is stored by itself: it gets an id of its own, the same one when the request is repeated."""
    digest = hashlib.sha256(f"{what}:{request.request_id}".encode()).hexdigest()
    return Request(f"part:{digest[:32]}", request.method, request.content)
