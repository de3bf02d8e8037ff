"""One running issuer, as the manager speaks with it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field

from hsmvisor.manager.issuer import calls, limits
from hsmvisor.manager.issuer.calls import Answer, Envelopes, Forget, Ready, SealTo, Trouble
from hsmvisor.manager.issuer.keys import BadKey
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.sealed.canonical import MalformedRecord, Record, record_type

_READ = 256 * 1024


class IssuerAway(Exception):
    """Not now: it is to be tried again; the message says why.  Whether a key was made is not known, nor does it matter."""


class TokenLocked(IssuerAway):
    """The escrow's token does not take the PIN: it is not asked again before the manager is started anew."""


@dataclass
class _Pending:
    answer: asyncio.Future[Record]
    targets: int
    envelopes: list[bytes] = field(default_factory=list)


class Link:
    """One running issuer."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.process, self._in, self._out = process, reader, writer
        self._frames = FrameReader()
        self._pending: dict[int, _Pending] = {}
        self._last = 0
        self.closed = False

    @property
    def calls(self) -> int:
        return len(self._pending)

    @property
    def targets(self) -> int:
        return sum(one.targets for one in self._pending.values())

    async def ask(self, call: Record, targets: Sequence[SealTo], within: float) -> tuple[Record, list[bytes]]:
        """Raises IssuerAway, BadKey."""
        if self.closed:
            raise IssuerAway("the issuer ended")
        self._last += 1
        ident = self._last
        pending = self._pending[ident] = _Pending(asyncio.get_running_loop().create_future(), len(targets))
        try:
            async with asyncio.timeout(within):
                self._write(ident, Kind.REQUEST, call)
                for portion in calls.portions(targets):
                    self._write(ident, Kind.REQUEST, portion)
                    await self._out.drain()
                return await pending.answer, pending.envelopes
        except TimeoutError:
            raise IssuerAway(f"the issuer did not answer within {within:.0f} seconds") from None
        except OSError:
            raise IssuerAway("the issuer ended") from None
        finally:
            if pending.answer.done() and not pending.answer.cancelled():
                pending.answer.exception()  # it came while we still wrote
            if self._pending.pop(ident, None) is not None and not self.closed:
                self._write(0, Kind.NOTIFICATION, Forget(ident))

    def _write(self, ident: int, kind: Kind, record: Record) -> None:
        self._out.write(encode_frame(Frame(ident, kind, record.encode())))

    async def hear(self) -> None:
        """Returns when the other end is gone.  Raises MalformedRecord: it said what it may not."""
        with contextlib.suppress(OSError):
            while data := await self._in.read(_READ):
                for frame in self._frames.feed(data):
                    self._take(frame)

    def _take(self, frame: Frame) -> None:
        if not 0 < frame.id <= self._last or frame.kind not in (Kind.REPLY, Kind.ERROR):
            raise MalformedRecord("an answer to nothing")
        pending = self._pending.get(frame.id)
        if pending is None or pending.answer.done():
            return  # forgotten meanwhile
        if frame.kind is Kind.ERROR:
            del self._pending[frame.id]
            pending.answer.set_exception(_raised(Trouble.decode(frame.payload)))
            return
        if record_type(frame.payload) == Envelopes.TYPE:
            pending.envelopes += Envelopes.decode(frame.payload).envelopes
            if len(pending.envelopes) > pending.targets:
                raise MalformedRecord("more envelopes than targets")
            return
        answer = Ready.decode(frame.payload) if record_type(frame.payload) == Ready.TYPE else Answer.decode(frame.payload)
        if len(pending.envelopes) != pending.targets:
            raise MalformedRecord("fewer envelopes than targets")
        del self._pending[frame.id]
        pending.answer.set_result(answer)

    def close(self) -> None:
        self.closed = True
        self._out.close()
        for one in self._pending.values():
            if not one.answer.done():
                one.answer.set_exception(IssuerAway("the issuer ended"))
        self._pending.clear()

    async def reap(self, patience: float) -> None:
        try:
            await asyncio.to_thread(self.process.wait, patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)


def _raised(trouble: Trouble) -> Exception:
    detail = "".join(c for c in trouble.detail if c.isprintable())[: limits.MAX_SAID]
    if trouble.kind == calls.BAD:
        return BadKey(detail)
    return TokenLocked(detail) if trouble.kind == calls.LOCKED else IssuerAway(detail)
