"""One PKCS#11 session: at most one open operation of each kind (PKCS#11 3.1, 5.1.1)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TypeVar

from hsmvisord import ck
from hsmvisord.ck import CkError
from hsmvisord.lanes.lanes import Gate
from hsmvisord.token.messages import MessageOperation
from hsmvisord.token.operations import Operation
from hsmvisord.token.statistics import Counters

_O = TypeVar("_O", bound=Operation)
_M = TypeVar("_M", bound=MessageOperation)

#: C_SessionCancel's flags (PKCS#11 3.1, 5.6.9) and the kinds of operation they end.
CANCEL_FLAGS = {
    ck.CKF_SIGN: "sign",
    ck.CKF_SIGN_RECOVER: "sign recover",
    ck.CKF_VERIFY: "verify",
    ck.CKF_VERIFY_RECOVER: "verify recover",
    ck.CKF_DECRYPT: "decrypt",
    ck.CKF_ENCRYPT: "encrypt",
    ck.CKF_DIGEST: "digest",
    ck.CKF_FIND_OBJECTS: "find",
    ck.CKF_MESSAGE_ENCRYPT: "message encrypt",
    ck.CKF_MESSAGE_DECRYPT: "message decrypt",
    ck.CKF_MESSAGE_SIGN: "message sign",
    ck.CKF_MESSAGE_VERIFY: "message verify",
}


class Session:
    """`lock` keeps the order of calls within the session when an application shares it between threads."""

    __slots__ = ("_gate", "flags", "handle", "lock", "objects", "operations", "slot")

    def __init__(self, handle: int, slot: int, flags: int) -> None:
        self.handle, self.slot, self.flags = handle, slot, flags
        self.lock = threading.Lock()
        self.operations: dict[str, Operation] = {}
        self.objects: set[int] = set()  #: session objects that it created
        self._gate: Gate | None = None

    def gate(self) -> Gate:
        """Returns the gate that is open while the session is, without an open sign operation.  With the lock."""
        if self._gate is None:
            self._gate = Gate()
        return self._gate

    def shut(self) -> None:
        """It is closed, or has an open sign operation, or is logged out."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.shut()

    def begin(self, operation: Operation) -> None:
        self.operations[operation.name] = operation

    def check_free(self, name: str) -> None:
        """Raises CKR_OPERATION_ACTIVE when an operation of that kind is open."""
        if name in self.operations:
            raise CkError(ck.CKR_OPERATION_ACTIVE, f"a {name} operation is open")

    def cancel(self, name: str) -> None:
        self.operations.pop(name, None)

    def open(self, kind: type[_O]) -> _O:
        """Returns the open operation of a kind."""
        operation = self.operations.get(kind.name)
        if not isinstance(operation, kind):
            raise CkError(ck.CKR_OPERATION_NOT_INITIALIZED, f"no {kind.name} operation is open")
        return operation

    @contextmanager
    def running(self, kind: type[_O], counters: Counters, now: float, count: bool = True) -> Iterator[_O]:
        """Gives the open operation of a kind for one call: an error ends it, its own `done` too; both are counted."""
        operation = self.open(kind)
        name = kind.counted or kind.name
        began = perf_counter()
        try:
            yield operation
        except BaseException:
            del self.operations[kind.name]
            counters.cell(name, operation.mechanism, operation.generation).errors += 1
            raise
        if operation.done:
            del self.operations[kind.name]
            if count:
                cell = counters.cell(name, operation.mechanism, operation.generation)
                cell.observe(perf_counter() - began, now)

    @contextmanager
    def message(self, kind: type[_M], counters: Counters, now: float) -> Iterator[_M]:
        """Gives the open message-based process of a kind for one call; each message is counted."""
        operation = self.open(kind)
        operation.finished = False
        began = perf_counter()
        try:
            yield operation
        except BaseException:
            counters.cell(kind.counted, operation.mechanism, operation.generation).errors += 1
            raise
        if operation.finished:
            counters.cell(kind.counted, operation.mechanism, operation.generation).observe(perf_counter() - began, now)
