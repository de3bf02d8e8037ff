"""The manager's side of its issuer: keeps one running, asks it, and never sees a private key."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hsmvisor.manager.ca.names import Name
from hsmvisor.manager.issuer import calls, limits
from hsmvisor.manager.issuer.calls import Answer, Call, Hello, Make, OverLimit, Ready, Reseal, SealTo, Take
from hsmvisor.manager.issuer.keys import BadKey
from hsmvisor.manager.issuer.link import IssuerAway, Link, TokenLocked
from hsmvisor.manager.issuer.settings import Settings
from hsmvisor.serving.measures import Measure
from hsmvisor.spawned import Spawned
from hsmvisor_rpc.sealed.canonical import MalformedRecord
from hsmvisor_rpc.sealed.envelope import PUBLIC_SIZE

__all__ = ["BadKey", "EscrowAs", "Issuer", "IssuerAway", "Made", "OverLimit", "SealTo"]

_MODULE = "hsmvisor.manager.issuer"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EscrowAs:
    """What a kept key is bound to."""

    line: str
    generation: int


@dataclass(frozen=True)
class Made:
    public_key: bytes  #: SubjectPublicKeyInfo, DER
    csr: bytes  #: PKCS #10, DER
    envelopes: tuple[bytes, ...]  #: in the order of the targets
    wrapped: bytes = b""  #: the key as it is kept; empty: it is not
    certificates: tuple[bytes, ...] = ()  #: DER, leaf first and without a root: those that came with an imported key


class Issuer:
    """Its process is started again when it died."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._link: Link | None = None
        self._ready: Ready | None = None
        self._trouble = "the issuer was not started"
        self._keeper: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.restarts = 0

    # ---- its life -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when it is ready.  Raises IssuerAway: it cannot be; the message says why.  It is tried again meanwhile."""
        if self._keeper is None or self._keeper.done():
            self._trouble = "the issuer does not start"
            self._keeper = asyncio.get_running_loop().create_task(self._keep())
        await self._there(first=True)

    async def close(self) -> None:
        """Closes its socket: it ends by itself.  Calls that wait get IssuerAway."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        self._trouble = "the issuer was closed"

    @property
    def recipient(self) -> bytes:
        """The HPKE public key to which owners seal.  Raises IssuerAway."""
        return self._known().recipient

    def _known(self) -> Ready:
        if self._ready is None:
            raise IssuerAway(self._trouble)
        return self._ready

    async def _keep(self) -> None:
        pause, deaths = limits.FIRST_PAUSE, 0
        loop = asyncio.get_running_loop()
        while deaths < limits.MAX_DEATHS:
            began = loop.time()
            try:
                await self._live()
            except (IssuerAway, OSError, MalformedRecord) as error:
                self._trouble = str(error)
            self._tell()
            steady = loop.time() - began > limits.STEADY
            pause = limits.FIRST_PAUSE if steady else min(pause * 2, limits.LONGEST_PAUSE)
            deaths = 1 if steady else deaths + 1
            self.restarts += 1
            if deaths < limits.MAX_DEATHS:
                _log.error("%s; started again in %.1f s", self._trouble, pause)
                await asyncio.sleep(pause)
        _log.error("%s; it ended %d times in a row: it is started again when it is asked for", self._trouble, deaths)

    async def _live(self) -> None:
        """One process, from its start to its end.  Raises IssuerAway, OSError, MalformedRecord."""
        link = await self._spawn()
        hearing = asyncio.get_running_loop().create_task(link.hear())
        hearing.add_done_callback(lambda done: link.close())  # whoever waits learns it at once
        patience = 0.0
        try:
            answer, _ = await link.ask(Hello(), (), limits.START_SECONDS)
            if not isinstance(answer, Ready) or len(answer.recipient) != PUBLIC_SIZE:
                raise MalformedRecord("the issuer answered what it may not")
            self._enter(answer)
            self._link = link
            self._tell()
            await hearing
            self._trouble = "the issuer ended"
        except MalformedRecord as error:
            raise IssuerAway(f"the issuer broke the protocol: {error}") from None
        except asyncio.CancelledError:
            patience = limits.END_SECONDS
            raise
        finally:
            self._link = None
            link.close()
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)
            await asyncio.shield(link.reap(patience))

    async def _spawn(self) -> Link:
        """Raises OSError."""
        arguments = self._settings.arguments()
        if self._ready is not None and self._ready.locked:
            arguments += ["--escrow-refused", self._ready.trouble]
        spawned = Spawned(_MODULE, arguments, environment=self._settings.environment())
        return Link(spawned.process, *await asyncio.open_unix_connection(sock=spawned.sock))

    def _enter(self, ready: Ready) -> None:
        if self._ready is not None and self._ready.recipient != ready.recipient:
            _log.error("the issuer has another key than before: what owners sealed to the old one cannot be opened")
        self._ready = ready
        for measure in _measures(ready):
            if not measure.applied:
                _log.warning("issuer: not applied: %s: %s", measure.name, measure.detail)
        if ready.trouble:
            _log.error("issuer: no keys can be kept: %s", ready.trouble)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _there(self, first: bool = False) -> Link:
        """Returns the running one, waiting a moment for one that is being started.  Raises IssuerAway."""
        if self._keeper is None:
            raise IssuerAway(self._trouble)
        if self._keeper.done():
            self._keeper = asyncio.get_running_loop().create_task(self._keep())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limits.START_SECONDS):
                while self._link is None or self._link.closed:
                    await self._changed.wait()
                    if first and self._link is None:
                        break
        if self._link is None or self._link.closed:
            raise IssuerAway(self._trouble)
        return self._link

    # ---- what it does -------------------------------------------------------------------------------------------

    async def make(self, key_type: str, names: tuple[Name, ...], targets: Sequence[SealTo], escrow: EscrowAs | None) -> Made:
        """A new key, sealed to each target.  Without names: a bare key.  Raises IssuerAway, BadKey."""
        line, generation = _escrow(escrow)
        call = Make(key_type, tuple(map(str, names)), line, generation, calls.count(len(targets)))
        return await self._made(call, targets)

    async def take(
        self,
        request: str,
        envelope: bytes,
        public_key: bytes,
        certificates: Sequence[bytes],
        targets: Sequence[SealTo],
        escrow: EscrowAs | None,
    ) -> Made:
        """An owner's key, which hsmvisor.client.importing sealed to us.  Raises IssuerAway, BadKey."""
        line, generation = _escrow(escrow)
        portions = calls.count(len(targets))
        call = Take(request, envelope, public_key, tuple(certificates), line, generation, portions)
        return await self._made(call, targets)

    async def reseal(self, wrapped: bytes, escrow: EscrowAs, targets: Sequence[SealTo]) -> tuple[bytes, ...]:
        """A kept key for more modules, however many: returns envelopes in their order.  Raises IssuerAway, BadKey."""
        envelopes: tuple[bytes, ...] = ()
        for start in range(0, max(1, len(targets)), limits.MAX_TARGETS):
            some = targets[start : start + limits.MAX_TARGETS]
            call = Reseal(wrapped, *_escrow(escrow), calls.count(len(some)))
            envelopes += (await self._made(call, some)).envelopes
        return envelopes

    async def _made(self, call: Call, targets: Sequence[SealTo]) -> Made:
        if len(targets) > limits.MAX_TARGETS:
            raise OverLimit(f"{len(targets)} modules, a key is sealed to at most {limits.MAX_TARGETS} at once")
        calls.check(call)
        for target in targets:
            calls.check_target(target)
        link = await self._there()
        if link.calls >= limits.MAX_CALLS or link.targets + len(targets) > limits.MAX_TARGETS_AT_ONCE:
            raise IssuerAway(f"the issuer is busy: {link.calls} calls wait, for {link.targets} modules")
        try:
            answer, envelopes = await link.ask(call, targets, limits.CALL_SECONDS)
        except TokenLocked as error:
            self._ready = replace(self._known(), trouble=str(error), locked=True)
            raise
        if not isinstance(answer, Answer):
            raise IssuerAway("the issuer answered what it may not")
        return Made(answer.public_key, answer.csr, tuple(envelopes), answer.wrapped, answer.certificates)


def _escrow(escrow: EscrowAs | None) -> tuple[str, int]:
    if escrow is not None and not escrow.line:
        raise OverLimit("a kept key is of a line")
    return (escrow.line, escrow.generation) if escrow is not None else ("", 0)


def _measures(ready: Ready) -> tuple[Measure, ...]:
    """Raises IssuerAway."""
    try:
        found: Any = json.loads(ready.measures)
        return tuple(Measure(str(one["name"]), bool(one["applied"]), str(one["detail"])) for one in found)
    except (ValueError, TypeError, KeyError):
        raise IssuerAway("the issuer said what it may not") from None
