"""The ACME authority as a plug: the session's calls on a thread, one order at a time each, taken up again after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from hsmvisor.manager.ca import chains, requests
from hsmvisor.manager.ca.acme.challenges import Responder
from hsmvisor.manager.ca.acme.session import Lost, Session, account_key
from hsmvisor.manager.ca.interface import Issued, Keep, Later, Order, Reason, Refused, Window

T = TypeVar("T")


class AcmeCa:
    kind = "acme"

    def __init__(
        self,
        directory: str,
        key_file: Path,
        responders: Sequence[Responder],
        contact: Sequence[str] = (),
        ca_file: str = "",
    ) -> None:
        """`directory`: its URL; `key_file`: the account's key; nothing is asked before the first order."""
        self._directory, self._key_file, self._contact, self._ca_file = directory, key_file, tuple(contact), ca_file
        self._responders: Mapping[str, Responder] = {responder.kind: responder for responder in responders}
        self._session: Session | None = None
        self._opening = asyncio.Lock()

    async def _opened(self) -> Session:
        async with self._opening:
            if self._session is None:
                self._session = await asyncio.to_thread(self._open)
            return self._session

    def _open(self) -> Session:
        key = account_key(self._key_file)
        return Session(self._directory, key, self._responders, self._contact, self._ca_file)

    async def issue(self, order: Order, keep: Keep) -> Issued:
        checked = requests.check(order.csr, order.names)
        if set(checked.names) != set(order.names):
            raise Refused("ACME takes the names from the request: it has to have all that were ordered")
        session = await self._opened()
        url = order.kept
        if not url:
            url = await asyncio.to_thread(session.begin, order)
            await keep(url)
        try:
            done = await asyncio.to_thread(session.finish, order, url)
        except Lost as error:
            await keep("")  # the next attempt begins another one
            raise Later(str(error)) from None
        return Issued(chains.checked(chains.of_pem(done.chain), order), done.shown, done.known)

    async def revoke(self, certificate: bytes, reason: Reason) -> None:
        await self._ask(lambda session: session.revoke(certificate, reason))

    async def window(self, certificate: bytes) -> Window | None:
        return await self._ask(lambda session: session.window(certificate))

    async def _ask(self, question: Callable[[Session], T]) -> T:
        session = await self._opened()
        return await asyncio.to_thread(question, session)

    async def close(self) -> None:
        self._session = None
