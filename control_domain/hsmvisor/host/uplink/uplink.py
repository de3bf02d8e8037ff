"""The connection with the management plane: one exchange after the other, and another manager when one is away.

Two exchanges are under way on a connection: one tells nothing and waits at the manager for something to hear; another one tells
what is new as soon as there is something, and is answered at once.  No state of it is kept over a restart: the manager is told all
anew, and gives again what it has no result of.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from hsmvisor.host.commands import Commands
from hsmvisor.host.guests import Guests
from hsmvisor.host.identity import HostIdentity
from hsmvisor.host.modules import Modules
from hsmvisor.host.uplink.carrying import Carrying
from hsmvisor.host.uplink.membership import RENEWING, BadMembership, Membership, Memory, pem
from hsmvisor.host.uplink.telling import Telling
from hsmvisor.host.uplink.told import Heard, Told
from hsmvisor.host.uplink.wire import LinkFault, ManagerChannel
from hsmvisor.serving.audit import Audit
from hsmvisor.serving.events import Events
from hsmvisor.serving.requests import Origin, digest
from hsmvisor_rpc.sealed.commands import fingerprint

_log = logging.getLogger(__name__)

_SHORTEST, _LONGEST = 1.0, 60.0  #: seconds between two attempts to reach a manager
_WAIT, _LONGEST_WAIT = 20, 30  #: seconds of an exchange that tells nothing
_GATHER = 0.005  #: seconds in which what happens at the same time becomes one exchange
_PAUSE, _LONGEST_PAUSE = 0.02, 1.0  #: seconds between exchanges in which nothing new was heard
_RENEW_AGAIN = 10  #: of the time that a certificate still has, the part after which its renewal is tried again


@dataclass(frozen=True)
class LinkState:
    """As it is shown."""

    membership: Membership
    address: str
    connected: bool
    failure: str
    since: float
    heard_at: float
    renewal_failure: str
    commands: int


class Uplink:
    """`clock`: seconds since 1970."""

    def __init__(
        self,
        memory: Memory,
        identity: HostIdentity,
        guests: Guests,
        modules: Modules,
        commands: Commands,
        events: Events,
        audit: Audit,
        version: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._memory, self._identity, self._guests, self._modules = memory, identity, guests, modules
        self._commands, self._events, self._audit, self._version, self._clock = commands, events, audit, version, clock
        self.membership: Membership | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._reset()

    def _reset(self) -> None:
        self._news = asyncio.Event()
        self._telling = Telling(self._guests, self._modules, self._identity, self._news)
        self._carrying = Carrying(self._commands, self._modules, self._origin, self._news)
        self._session, self._number = os.urandom(16).hex(), 0
        self._candidate: Membership | None = None  #: with a renewed certificate, which is not known to work
        self._old_one = False  #: it did not: the one before has its turn
        self._address, self._connected, self._failure, self._since, self._heard_at = "", False, "", self._clock(), 0.0
        self._renewal_failure, self._renew_from = "", 0.0
        self._wait, self._pause, self._one_tells = _WAIT, _PAUSE, asyncio.Lock()

    def root(self) -> bytes:
        """Returns what new guests' modules obey, empty where no management plane was joined."""
        return self.membership.root if self.membership else b""

    def _origin(self) -> Origin:
        return Origin(f"manager:{fingerprint(self.root()).hex()[:16]}")

    @property
    def state(self) -> LinkState | None:
        if self.membership is None:
            return None
        return LinkState(
            self.membership,
            self._address,
            self._connected,
            self._failure,
            self._since,
            self._heard_at,
            self._renewal_failure,
            self._carrying.count,
        )

    # ---- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Goes on where an earlier service was; what is kept of a membership and cannot be used is said, and left."""
        try:
            found = self._memory.membership()
        except (BadMembership, OSError) as error:
            _log.error("the management plane that this host has joined is not known: %s; join it again (hsmvisor host join)", error)
            return
        if found is None:
            return
        if found.host_id != self._identity.host_id.hex():
            _log.error("this is another host than the one that joined as %s: join again (hsmvisor host join)", found.name)
            return
        self.membership = found
        self._begin()
        with contextlib.suppress(BadMembership, OSError):
            candidate = self._memory.candidate()
            if candidate is not None and (candidate.host_id, candidate.root) == (found.host_id, found.root):
                self._candidate = candidate

    def _begin(self) -> None:
        self._reset()
        self._guests.changed = self._telling.mark
        self._guests.refused.clear()
        loop = asyncio.get_running_loop()
        work = (self._telling.follow(self._events), self._telling.sweep(), self._run())
        self._tasks = [loop.create_task(one) for one in work]

    async def stop(self) -> None:
        self._guests.changed = lambda name: None
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._telling.stop()
        await self._carrying.stop()

    async def adopt(self, membership: Membership) -> None:
        """Speaks with this management plane from now on.  Raises OSError; then nothing has changed."""
        self._memory.keep(membership)
        await self.stop()
        self.membership = membership
        with contextlib.suppress(OSError):  # one that is left over is tried, and does not work
            self._memory.end_renewal()
        self._begin()

    async def leave(self) -> bool:
        """Says whether there was one to leave.  Raises OSError."""
        was = self.membership is not None
        self._memory.forget()
        await self.stop()
        self.membership = None
        self._guests.refused.clear()
        return was

    # ---- one manager after the other ------------------------------------------------------------------------------

    async def _run(self) -> None:
        failures = turn = 0
        self._telling.tell_all()
        while True:
            assert self.membership is not None
            identity = self.membership if self._candidate is None or self._old_one else self._candidate
            addresses = identity.addresses
            self._address = addresses[turn % len(addresses)]
            heard_before = self._heard_at
            try:
                if identity.ends_at <= self._clock():
                    raise BadMembership("this host's certificate has expired: join again (hsmvisor host join)")
                channel = ManagerChannel(self._address, identity.authorities, pem(identity.chain), identity.key)
                try:
                    await self._speak(channel, identity)
                    continue  # with a renewed certificate
                finally:
                    await channel.close()
            except (LinkFault, BadMembership) as fault:
                self._lost(str(fault))
                if self._candidate is not None and identity is self._candidate:
                    self._not_renewed(f"the renewed certificate does not work: {fault}")
                    self._old_one = True
                    continue
                self._old_one = False
            except Exception as error:
                _log.exception("the exchange with the manager failed")
                self._lost(f"an error inside the host service: {type(error).__name__}")
            turn += 1
            failures = 1 if self._heard_at != heard_before else failures + 1
            rounds, rest = divmod(failures, len(addresses))
            if not rest:  # all of them were tried
                await asyncio.sleep(min(_SHORTEST * 2.0 ** min(rounds - 1, 6), _LONGEST) * random.uniform(0.75, 1.25))

    def _lost(self, failure: str) -> None:
        if self._connected or self._failure != failure:
            _log.warning("the manager at %s: %s", self._address, failure)
        if self._connected:
            self._events.emit("manager-lost", detail={"address": self._address, "why": failure})
            self._since = self._clock()
        self._connected, self._failure = False, failure

    def _met(self) -> None:
        self._heard_at = self._clock()
        if not self._connected:
            self._connected, self._failure, self._since = True, "", self._heard_at
            self._events.emit("manager-connected", detail={"address": self._address})
            _log.info("connected with the manager at %s", self._address)

    # ---- exchanges --------------------------------------------------------------------------------------------------

    async def _speak(self, channel: ManagerChannel, identity: Membership) -> None:
        """Until there is a renewed certificate to try.  Raises LinkFault."""
        await self._tell(channel)  # the first one shows that there is a manager
        if identity is self._candidate:
            self._renewed(identity)
        teller = asyncio.create_task(self._keep_telling(channel))
        try:
            while True:
                await self._either(asyncio.create_task(self._listen(channel, identity)), teller)
                if self._clock() >= self._due(identity):
                    async with self._one_tells:  # nothing is on its way when the channel is left
                        if await self._renew(channel, identity):
                            return
        finally:
            teller.cancel()
            await asyncio.gather(teller, return_exceptions=True)

    async def _either(self, listening: asyncio.Task[None], teller: asyncio.Task[None]) -> None:
        """Returns when `listening` has; raises what either of them met."""
        try:
            await asyncio.wait({listening, teller}, return_when=asyncio.FIRST_COMPLETED)
            await (teller if teller.done() else listening)
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _keep_telling(self, channel: ManagerChannel) -> None:
        while True:
            await self._news.wait()
            await asyncio.sleep(_GATHER)
            async with self._one_tells:
                await self._tell(channel)

    async def _tell(self, channel: ManagerChannel) -> None:
        """An exchange that is answered at once.  Only one at a time: what is told later is newer."""
        if self._telling.all:
            await self._telling.complete()
        self._news.clear()
        told = replace(self._telling.take(), results=self._carrying.results())
        try:
            heard = await self._exchange(channel, told, 0)
        except BaseException:
            self._telling.failed(told)
            raise
        self._telling.confirm(told, heard.refused)
        self._carrying.confirm(told.results)
        if self._carrying.results():
            self._news.set()
        if heard.tell_all and told.all:
            await self._rest()  # not in a circle
        self._hear(heard)

    async def _listen(self, channel: ManagerChannel, identity: Membership) -> None:
        """An exchange that tells nothing and waits for something to hear.  It is never given up: what comes then would be lost."""
        wait = min(self._wait, max(1, int(self._due(identity) - self._clock()) + 1))
        began = time.monotonic()
        heard = await self._exchange(channel, Told(), wait)
        fresh = self._hear(heard)
        if not fresh and not heard.tell_all and time.monotonic() - began < _LONGEST_PAUSE:
            await self._rest()  # it gives again what is being carried out, or has to wait
        else:
            self._pause = _PAUSE

    async def _exchange(self, channel: ManagerChannel, told: Told, wait: int) -> Heard:
        self._number += 1
        heard = await channel.exchange(self._session, self._number, told, wait, self._version)
        self._met()
        if heard.heartbeat:
            self._wait = min(max(heard.heartbeat, 1), _LONGEST_WAIT)
        return heard

    def _hear(self, heard: Heard) -> int:
        """Returns how many commands were new."""
        if heard.tell_all:
            self._telling.tell_all()
        return self._carrying.take(heard.commands)

    async def _rest(self) -> None:
        await asyncio.sleep(self._pause)
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    # ---- the certificate --------------------------------------------------------------------------------------------

    def _due(self, identity: Membership) -> float:
        return max(identity.renew_at, self._renew_from)

    async def _renew(self, channel: ManagerChannel, identity: Membership) -> bool:
        """Says whether there is a candidate to try.

        The manager knows the present certificate and one more: so the same key is asked for until that one has worked.  It is kept
        before it is tried, for then the present one counts no more.
        """
        try:
            attempt = self._memory.attempt(RENEWING, digest(identity.chain[0]).hex(), identity.host_id)
            chain, authorities = await channel.renew(attempt.request_id, attempt.csr)
            renewed = replace(identity, chain=chain, authorities=authorities or identity.authorities, key=attempt.key)
            candidate = replace(renewed, issued_at=self._clock()).check()
            self._memory.offer(candidate)
            self._candidate, self._old_one = candidate, False
            return True
        except LinkFault as fault:
            self._not_renewed(str(fault))
            if fault.away:
                raise
        except (BadMembership, OSError) as error:
            self._not_renewed(str(error))
        return False

    def _not_renewed(self, failure: str) -> None:
        assert self.membership is not None
        self._renewal_failure = failure
        self._renew_from = self._clock() + max((self.membership.ends_at - self._clock()) / _RENEW_AGAIN, _SHORTEST)
        _log.warning("the host's certificate for the manager is not renewed: %s", failure)

    def _renewed(self, identity: Membership) -> None:
        """It has worked: the one before is forgotten."""
        self.membership, self._candidate, self._renewal_failure = identity, None, ""
        try:
            self._memory.keep(identity)
            self._memory.end_renewal()
        except OSError as error:  # the next start finds it where it is kept
            _log.error("the renewed certificate stays beside the old one: %s", error)
        self._audit.note("manager.renew", who="host", certificate_ends_at=int(identity.ends_at), result="ok")
        self._events.emit("manager-certificate-renewed", detail={"ends_at": int(identity.ends_at)})
