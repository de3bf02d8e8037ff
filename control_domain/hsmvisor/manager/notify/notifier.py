"""Takes notices from the queue and sends them, again and again where it must be."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from hsmvisor.manager.history.bell import Bell
from hsmvisor.manager.history.cleaning import text
from hsmvisor.manager.history.events import Event, Happened, History, Kind
from hsmvisor.manager.history.following import AWAY
from hsmvisor.manager.notify import limits, notices
from hsmvisor.manager.notify.channels import Channel, Mail, Webhook
from hsmvisor.manager.notify.errors import Gone, Undelivered
from hsmvisor.manager.notify.notices import Batch
from hsmvisor.manager.notify.smtp import MailSender
from hsmvisor.manager.notify.webhook import WebhookSender
from hsmvisor.manager.store.database import Database
from sqlalchemy.ext.asyncio import AsyncConnection

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Sender(Protocol):
    at_once: int
    digests: bool

    async def send(self, events: Sequence[Event]) -> None: ...


class Notifier:
    def __init__(
        self,
        database: Database,
        history: History,
        channels: Sequence[Channel],
        clock: Callable[[], float] = time.time,
        lease: float = limits.LEASE,
        seconds: float = limits.WHOLE,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """`lease`: seconds after which another manager takes what this one has taken; longer than `seconds`, for one attempt."""
        self._database, self._history, self._clock = database, history, clock
        self._lease, self._chance = lease, chance
        self._senders = {channel.name: _sender(channel, clock, seconds) for channel in channels}
        self._off: set[str] = set()  # until the manager is started again

    async def run(self) -> None:
        """Sends until it is cancelled; what was taken and not sent is given back then."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweeping())
            for name, sender in self._senders.items():
                for _ in range(sender.at_once):
                    group.create_task(self._work(name, sender))

    # ---- one channel ------------------------------------------------------------------------------------------------

    async def _work(self, name: str, sender: Sender) -> None:
        """One of a channel's workers: channels do not wait for one another."""
        is_away = False
        while name not in self._off:
            news = self._history.news.next()
            try:
                batch = await self._taken(name, sender)
                if batch is not None:
                    await self._deliver(sender, batch)
                is_away = False
            except AWAY as error:
                if not is_away:
                    _log.warning("channel %s: notices wait for the database (%s)", name, type(error).__name__)
                is_away, batch = True, None
            except Exception:
                _log.exception("channel %s", name)
                batch = None
            if batch is None:
                await Bell.wait(news, limits.POLL)

    async def _taken(self, name: str, sender: Sender) -> Batch | None:
        """Takes what is due; gives it back where the manager stops, or the channel went off, meanwhile."""
        batch: Batch | None = None

        async def take(connection: AsyncConnection) -> None:
            nonlocal batch
            now = self._clock()
            batch = await notices.take(connection, name, now, now + self._lease, digests=sender.digests)

        try:
            await self._whole(take)
            if batch is None or name not in self._off:
                return batch
        except asyncio.CancelledError:
            await self._give_back(batch)
            raise
        await self._give_back(batch)
        return None

    async def _give_back(self, batch: Batch | None) -> None:
        if batch is not None:
            given = batch
            await self._whole(lambda c: notices.give_back(c, given))

    async def _deliver(self, sender: Sender, batch: Batch) -> None:
        outcome: Undelivered | None = None
        try:
            await sender.send(batch.events)
        except asyncio.CancelledError:
            await self._give_back(batch)
            raise
        except Undelivered as error:
            outcome = error
        except Exception as error:
            _log.exception("channel %s", batch.channel)
            outcome = Undelivered(f"a fault of the manager's ({type(error).__name__})")
        match outcome:
            case None:
                await self._surely(batch, lambda c: notices.delivered(c, batch))
            case Gone():
                is_first = batch.channel not in self._off
                self._off.add(batch.channel)
                await self._surely(batch, lambda c: self._switched_off(c, batch, str(outcome), is_first))
            case _:
                await self._surely(batch, lambda c: self._failed(c, batch, outcome))

    async def _failed(self, connection: AsyncConnection, batch: Batch, error: Undelivered) -> None:
        now, why = self._clock(), text(str(error), limits.MAX_FAILURE)
        end = min(event.at for event in batch.events) + limits.GIVE_UP
        if now >= end:
            await self._tell_lost(connection, batch.channel, await notices.lose(connection, batch, now), why)
            return
        pause = max(self.pause(batch.attempts), error.after)
        level = logging.INFO if batch.attempts else logging.WARNING
        _log.log(level, "channel %s: event %s is not delivered, again in %.0f s: %s", batch.channel, _numbers(batch), pause, why)
        await notices.again(connection, batch, min(now + pause, end), why)

    def pause(self, attempts: int) -> float:
        """Seconds after `attempts` + 1 failures: twice as long each time, by chance up to a half shorter."""
        longest: float = min(limits.FIRST_PAUSE * 2.0 ** min(attempts, 30), limits.LONGEST_PAUSE)
        return longest * (1 - self._chance() / 2)

    async def _switched_off(self, connection: AsyncConnection, batch: Batch, why: str, is_first: bool) -> None:
        """What waits stays: another manager, or this one after its next start, may find the channel back."""
        await notices.give_back(connection, batch)
        if is_first:
            _log.warning("channel %s is off until the manager is started again: %s", batch.channel, why)
            told = {"channel": batch.channel, "why": why}
            await self._history.add(connection, Happened(Kind.CHANNEL_OFF, detail=told), but=batch.channel)

    # ---- what is lost -----------------------------------------------------------------------------------------------

    async def _sweeping(self) -> None:
        while True:
            try:
                await self._whole(self._sweep)
            except AWAY:
                _log.debug("old notices are not looked at: the database is away")
            await asyncio.sleep(limits.SWEEP_EVERY)

    async def _sweep(self, connection: AsyncConnection) -> None:
        for channel, kinds in (await notices.sweep(connection, self._clock())).items():
            await self._tell_lost(connection, channel, kinds, "nothing sends by this channel: it is off, or not set up any more")

    async def _tell_lost(self, connection: AsyncConnection, channel: str, kinds: Sequence[str], why: str) -> None:
        """Of a notice that tells of a loss, or of a channel, the loss is told to nobody: two dead channels would do so for ever."""
        if kinds:
            _log.error("channel %s: %d notices are given up: %s", channel, len(kinds), why)
        if lost := [kind for kind in kinds if kind not in (Kind.NOTICE_LOST, Kind.CHANNEL_OFF)]:
            told = {"channel": channel, "count": len(lost), "kinds": sorted(set(lost)), "why": why}
            await self._history.add(connection, Happened(Kind.NOTICE_LOST, detail=told), but=channel)

    # ---- the database -----------------------------------------------------------------------------------------------

    async def _whole(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Does `work` in a transaction that a cancellation does not interrupt: it would leave the connection in between."""

        async def transaction() -> T:
            async with self._database.transaction() as connection:
                return await work(connection)

        running: Coroutine[Any, Any, T] = transaction()
        task = asyncio.ensure_future(running)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            raise

    async def _surely(self, batch: Batch, work: Callable[[AsyncConnection], Awaitable[None]]) -> None:
        """What became of a batch is written as soon as the database is there, as long as nobody else can take the batch."""
        while True:
            try:
                return await self._whole(work)
            except AWAY:
                if self._clock() + limits.POLL >= batch.lease:
                    raise
                await asyncio.sleep(limits.POLL / 2)


def _sender(channel: Channel, clock: Callable[[], float], seconds: float) -> Sender:
    match channel:
        case Webhook():
            return WebhookSender(channel, clock, seconds)
        case Mail():
            return MailSender(channel, clock, seconds)
    raise TypeError(f"a channel is a Webhook or a Mail, not {type(channel).__name__}")


def _numbers(batch: Batch) -> str:
    return str(batch.ids[0]) if len(batch.ids) == 1 else f"{batch.ids[0]} and {len(batch.ids) - 1} more"
