"""The issuer's one thread: hears calls, forks a child for each, hands on what children tell, and ends when its socket closes."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial

from hsmvisor.manager.issuer import calls, child, limits
from hsmvisor.manager.issuer.calls import CALLS, OverLimit, Ready, Trouble, Whole
from hsmvisor.manager.issuer.syscalls import Rules
from hsmvisor.manager.issuer.work import Work
from hsmvisor_rpc.internal.frames import Frame, FrameReader, Kind, encode_frame
from hsmvisor_rpc.sealed.canonical import MAX_RECORD, MalformedRecord, record_type

_READ = 256 * 1024


@dataclass
class _Child:
    ident: int | None  #: of the call; None: it looks for the escrow's key
    pid: int
    reading: int
    deadline: float
    asks_token: bool
    most: int  #: bytes that it may still say
    reader: FrameReader = field(default_factory=FrameReader)
    answered: bool = False
    late: bool = False
    broken: bool = False


class Server:
    """Made before it is confined.  `rules`: a child's; `token`: the escrow's key is in one, for which a child looks first."""

    def __init__(self, control: socket.socket, work: Work, rules: Rules | None, token: bool) -> None:
        control.setblocking(False)
        self._control, self._work, self._rules, self._token = control, work, rules, token
        self._reader = FrameReader()
        self._selector = selectors.EpollSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._coming: dict[int, Whole] = {}  #: calls whose targets have not all come
        self._waiting: deque[tuple[int, Whole]] = deque()
        self._children: dict[int, _Child] = {}  #: by the descriptor that they are heard by
        self._targets: dict[int, int] = {}  #: of each call that is not answered
        self._outgoing: deque[memoryview] = deque()
        self._outgoing_size = 0
        self._heard = True
        self._ready = Ready(b"", "", "", False, "")
        self._locked = ""  #: why the token is not asked
        self._looking = False  #: for the escrow's key
        self._hellos: list[int] = []  #: that wait for what was found

    # ---- the loop -----------------------------------------------------------------------------------------------

    def run(self, ready: Ready) -> None:
        """`ready`: what it tells of itself.  Raises MalformedRecord: the manager said what it may not."""
        self._ready, self._locked = ready, ready.trouble if ready.locked else ""
        if self._token and not self._locked:
            self._looking = True
            self._launch(None, True, 0, limits.PROBE_SECONDS, self._work.probe)
        try:
            while self._turn():
                pass
        finally:
            for one in self._children.values():
                os.kill(one.pid, signal.SIGKILL)

    def _turn(self) -> bool:
        for key, events in self._selector.select(self._patience()):
            if key.fileobj is not self._control:
                if key.fd in self._children:
                    self._hear_child(self._children[key.fd])
                continue
            if events & selectors.EVENT_WRITE:
                self._flush()
            if events & selectors.EVENT_READ and not self._hear():
                return False
        self._end_late()
        self._start()
        self._adjust()
        return True

    def _patience(self) -> float | None:
        deadlines = [one.deadline for one in self._children.values()]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _adjust(self) -> None:
        """Writes where something waits for it; children wait where the manager does not read."""
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
        if self._selector.get_key(self._control).events != wanted:
            self._selector.modify(self._control, wanted)
        heard = self._outgoing_size < limits.MAX_OUTGOING
        if heard != self._heard:
            self._heard = heard
            for descriptor in self._children:
                if heard:
                    self._selector.register(descriptor, selectors.EVENT_READ)
                else:
                    self._selector.unregister(descriptor)

    # ---- the manager --------------------------------------------------------------------------------------------

    def _hear(self) -> bool:
        """Returns False when the manager is gone."""
        try:
            data = self._control.recv(_READ)
        except BlockingIOError:
            return True
        except OSError:
            return False
        for frame in self._reader.feed(data):
            self._take(frame)
        return bool(data)

    def _take(self, frame: Frame) -> None:
        """Raises MalformedRecord."""
        kind = record_type(frame.payload)
        if frame.kind is Kind.NOTIFICATION:
            self._forget(calls.Forget.decode(frame.payload).call)
        elif frame.kind is not Kind.REQUEST:
            raise MalformedRecord("the issuer asks nothing")
        elif kind == calls.Targets.TYPE:
            self._add(frame)
        elif kind == calls.Hello.TYPE and not self._hellos:
            self._hellos.append(frame.id)
            self._greet()
        elif kind in CALLS and frame.id not in self._targets:
            self._begin(frame.id, Whole(CALLS[kind].decode(frame.payload)))
        else:
            raise MalformedRecord(f"a {kind} where none can be")

    def _greet(self) -> None:
        if self._hellos and not self._looking:
            self._send(Frame(self._hellos.pop(), Kind.REPLY, self._ready.encode()))

    def _begin(self, ident: int, whole: Whole) -> None:
        try:
            calls.check(whole.call)
        except OverLimit as error:
            raise MalformedRecord(str(error)) from None
        if len(self._targets) >= limits.MAX_CALLS:
            raise MalformedRecord(f"more than {limits.MAX_CALLS} calls at once")
        self._targets[ident] = 0
        self._coming[ident] = whole
        self._complete(ident)

    def _add(self, frame: Frame) -> None:
        whole = self._coming.get(frame.id)
        if whole is None:
            raise MalformedRecord("targets of no call")
        whole.add(calls.Targets.decode(frame.payload))
        self._targets[frame.id] = len(whole.targets)
        if len(whole.targets) > limits.MAX_TARGETS or sum(self._targets.values()) > limits.MAX_TARGETS_AT_ONCE:
            raise MalformedRecord("more targets than the issuer takes")
        self._complete(frame.id)

    def _complete(self, ident: int) -> None:
        if self._coming[ident].complete:
            self._waiting.append((ident, self._coming.pop(ident)))

    def _forget(self, ident: int) -> None:
        self._targets.pop(ident, None)
        self._coming.pop(ident, None)
        self._waiting = deque(one for one in self._waiting if one[0] != ident)
        for one in self._children.values():
            if one.ident == ident:
                one.answered = True  # whatever it still says
                os.kill(one.pid, signal.SIGKILL)

    def _send(self, frame: Frame) -> None:
        data = encode_frame(frame)
        self._outgoing.append(memoryview(data))
        self._outgoing_size += len(data)
        self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):  # the end is read
            while self._outgoing:
                sent = self._control.send(self._outgoing[0])
                self._outgoing_size -= sent
                self._outgoing[0] = self._outgoing[0][sent:]
                if not self._outgoing[0]:
                    self._outgoing.popleft()

    def _fail(self, ident: int | None, trouble: Trouble) -> None:
        if ident is None:
            self._found(trouble)
        else:
            self._targets.pop(ident, None)
            self._send(Frame(ident, Kind.ERROR, trouble.encode()))

    def _found(self, trouble: Trouble | None) -> None:
        """The escrow's key was looked for, and is there; or not."""
        self._looking = False
        if trouble is not None:
            self._ready = replace(self._ready, trouble=trouble.detail)
        self._greet()

    # ---- children -----------------------------------------------------------------------------------------------

    def _next(self) -> tuple[int, Whole] | None:
        """The call that has waited longest and may begin.  A token is asked one thing at a time: SoftHSM2, for one, fails
        otherwise."""
        busy = any(one.asks_token for one in self._children.values())
        for number, (ident, whole) in enumerate(self._waiting):
            if not (busy and self._asks_token(whole)):
                del self._waiting[number]
                return ident, whole
        return None

    def _asks_token(self, whole: Whole) -> bool:
        return self._token and whole.asks_provider

    def _start(self) -> None:
        while len(self._children) < limits.children() and (found := self._next()) is not None:
            ident, whole = found
            asks = self._asks_token(whole)
            if asks and self._locked:
                self._fail(ident, Trouble(calls.LOCKED, self._locked))
            else:
                self._launch(ident, asks, len(whole.targets), limits.CHILD_SECONDS, partial(self._work.carry_out, whole))

    def _launch(self, ident: int | None, asks_token: bool, targets: int, seconds: float, work: child.Work) -> None:
        try:
            one = self._fork(ident, asks_token, targets, seconds, work)
        except OSError as error:
            self._fail(ident, Trouble(calls.AWAY, f"the issuer cannot fork: {error.strerror}"))
            return
        self._children[one.reading] = one
        if self._heard:
            self._selector.register(one.reading, selectors.EVENT_READ)

    def _fork(self, ident: int | None, asks_token: bool, targets: int, seconds: float, work: child.Work) -> _Child:
        """Raises OSError."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            os.close(reading)
            os.close(writing)
            raise
        if pid == 0:
            child.run(ident or 0, parent, writing, asks_token, self._rules, work)
        os.close(writing)
        most = MAX_RECORD + targets * (limits.MAX_ENVELOPE + 4)
        return _Child(ident, pid, reading, time.monotonic() + seconds, asks_token, most)

    def _hear_child(self, one: _Child) -> None:
        """What it says is not believed: it has read an owner's bytes."""
        data = os.read(one.reading, _READ)
        one.most -= len(data)
        try:
            if one.most < 0:
                raise MalformedRecord("more than it may say")
            for frame in one.reader.feed(data):
                self._hand_on(one, frame)
        except MalformedRecord:
            one.broken = True
        if not data or one.broken:
            self._bury(one)

    def _hand_on(self, one: _Child, frame: Frame) -> None:
        """Raises MalformedRecord."""
        if one.answered:
            return
        kind, trouble = record_type(frame.payload), None
        expected = (calls.Answer.TYPE,) if one.ident is None else (calls.Envelopes.TYPE, calls.Answer.TYPE)
        if frame.kind is Kind.ERROR:
            trouble = Trouble.decode(frame.payload)
            if trouble.kind == calls.LOCKED and one.asks_token:
                self._lock(trouble)
        elif frame.kind is not Kind.REPLY or kind not in expected:
            raise MalformedRecord(f"a {kind}")
        one.answered = kind != calls.Envelopes.TYPE
        if one.ident is None:
            self._found(trouble)
            return
        if one.answered:
            self._targets.pop(one.ident, None)
        self._send(Frame(one.ident, frame.kind, frame.payload))

    def _lock(self, trouble: Trouble) -> None:
        """A token that does not take the PIN is not asked again."""
        self._locked = trouble.detail
        self._ready = replace(self._ready, trouble=trouble.detail, locked=True)

    def _bury(self, one: _Child) -> None:
        del self._children[one.reading]
        if self._heard:
            self._selector.unregister(one.reading)
        status = self._end(one)
        if one.answered:
            return
        if one.late and one.ident is None:
            why = f"the escrow's token did not answer in {limits.PROBE_SECONDS:.0f} seconds"
        else:
            how = f"took longer than {limits.CHILD_SECONDS} seconds" if one.late else f"ended ({status})"
            how = "said what it may not" if one.broken else how
            what = "looked for the escrow's token" if one.ident is None else "had the key"
            why = f"the process that {what} {how}"
        self._fail(one.ident, Trouble(calls.AWAY, why))

    def _end(self, one: _Child) -> str:
        """Returns how it ended, where that was not by us."""
        os.close(one.reading)
        os.kill(one.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(one.pid, 0)[1])
        return f"signal {-code}" if code < 0 else f"status {code}"

    def _end_late(self) -> None:
        now = time.monotonic()
        for one in [one for one in self._children.values() if one.deadline <= now]:
            one.late = True
            self._bury(one)
