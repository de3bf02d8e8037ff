"""The card's thread: what the reader is asked is carried out here, one message at a time, for a signature may take long.

The device's thread goes on meanwhile, so descriptors are answered, channels served, and the importer told that the card needs time.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from hsmvisord import limits, memory
from hsmvisord.face.card.card import Card
from hsmvisord.face.card.reader import Reader


@dataclass(frozen=True)
class Answer:
    """`turn`: of the question; `notify`: nobody has asked, it is for the interrupt endpoint."""

    turn: int
    message: bytes = field(repr=False)
    notify: bool = False


class Outdated(Exception):
    """The card's device is to have another serial number."""


class CardThread:
    """`wake` is called when there is something to take, `shown` when the card's memory of what it has shown is another; by its
    thread."""

    def __init__(
        self, card: Card, wake: Callable[[], None], shown: Callable[[bytes], None], fault: Callable[[Exception], None]
    ) -> None:
        self._card, self._wake, self._shown, self._fault = card, wake, shown, fault
        self.serial = card.serial_number()
        self._reader = Reader(card)
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._told: deque[Answer] = deque()
        self._saved = b""
        self._shown_at: float | None = None  #: when the reader hides its card no longer; None: it does not, or nobody has asked it
        self._ended = threading.Event()

    # ---- any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        memory.start_thread("card", self._run)

    def ask(self, turn: int, message: bytes) -> None:
        self._tasks.put(lambda: self._answer(turn, message))

    def power_down(self) -> None:
        """What was asked before is nobody's any more: what of it has not begun is not carried out."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        self._tasks.put(self._reader.power_down)

    def tell_presence(self) -> None:
        """An importer begins: it is told of an empty reader, and of the card a moment after its driver has asked for it."""
        self._tasks.put(self._begin)

    def look(self) -> None:
        """The token has changed, or the card's settings."""
        self._tasks.put(lambda: None)

    def stop(self, within: float = limits.SUSPEND_SECONDS) -> None:
        """Returns when the thread has ended, or after `within` seconds: an operation in a hardware module is not cut short."""
        self._tasks.put(None)
        self._ended.wait(within)

    def take(self) -> list[Answer]:
        """Returns what is new."""
        taken = []
        while self._told:
            taken.append(self._told.popleft())
        return taken

    def busy(self, message: bytes) -> bytes:
        """Returns the answer to a message that came while another one is carried out."""
        return self._reader.busy(message)

    def more_time(self, message: bytes) -> bytes:
        return self._reader.more_time(message)

    def control(self, request: int, value: int, length: int) -> bytes | None:
        return self._reader.control(request, value, length)

    # ---- its thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                pause = self._look()
                try:
                    task = self._tasks.get(timeout=pause)
                except queue.Empty:
                    continue
                if task is None:
                    return
                task()
                del task  # it holds what was asked, a PIN perhaps, and the next one may be long in coming
        except Exception as error:
            self._fault(error)
        finally:
            self._card.close()
            self._ended.set()

    def _look(self) -> float | None:
        """Puts the card in or takes it out, if that is due; returns the seconds until the next look."""
        move = self._card.look()
        if move.step == "out":
            self._notify(self._reader.remove())
        elif move.step == "in":
            self._notify(self._reader.insert())
        self._save()
        if self._card.serial_number() != self.serial:
            raise Outdated("the card has other keys: it comes back under another serial number")
        return self._show(move.again)

    def _begin(self) -> None:
        self._shown_at = None
        self._notify(self._reader.hide())

    def _show(self, again: float | None) -> float | None:
        """Shows a card that the reader hides, if that is due; returns the seconds until the next look, given those without it."""
        if self._shown_at is None or not self._reader.hides:
            return again
        left = self._shown_at - monotonic()
        if left <= 0:
            self._notify(self._reader.show())
            return again
        return left if again is None else min(left, again)

    def _save(self) -> None:
        if (saved := self._card.shown) != self._saved:
            self._saved = saved
            self._shown(saved)

    def _answer(self, turn: int, message: bytes) -> None:
        if self._reader.hides and self._shown_at is None:
            self._shown_at = monotonic() + limits.CARD_HIDDEN_SECONDS
        answer = self._reader.answer(message)
        self._save()  # first: the next card must not take an older certificate for the newest that was read
        self._told.append(Answer(turn, answer))
        self._wake()

    def _notify(self, message: bytes) -> None:
        self._told.append(Answer(0, message, notify=True))
        self._wake()
